"""Matrix products on a CPU: the quickest of the libraries behind torch's one product, for each shape and dtype.

To generate a token each weight is read once and used for as many numbers as there are rows, so that the time is the
memory's; to prefill there are many rows, and the time is the arithmetic's. Three libraries (MKL, oneDNN and torch's own
kernels) are each quick where the others are slow, and torch doesn't always take the quickest. `benchmarks/README.md`
has the measurements. On other devices `linear` is `F.linear`.
"""

import math

import torch
import torch.nn.functional as F

from llama.fused import matrix_times_vector

MKL = torch.backends.mkl.is_available()
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
SLICED_ROWS = 4  # in float32: up to this many rows MKL with slices is faster, with more oneDNN

# glibc returns freed memory to the system at once, so that each new tensor costs page faults (a tenth of a prefill of
# 512 tokens), until a large block has been freed: that raises its limits. This one is never touched, so it takes none.
torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T`.

    Args:
        x: (..., in_features)
        weight: (out_features, in_features)

    Returns:
        (..., out_features)
    """
    rows = x.numel() // x.shape[-1]
    if torch.compiler.is_compiling() and x.is_cpu and rows == 1:
        return matrix_times_vector(weight, x.flatten()).type_as(x).view(*x.shape[:-1], -1)
    if x.dtype != torch.float32 or not x.is_cpu or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight)
    if MKL and 0 < rows <= SLICED_ROWS:
        return _sliced(x, weight, rows)
    if ONEDNN and torch._C._get_mkldnn_enabled() and not torch.is_grad_enabled():  # it has no backward pass
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        return y
    return F.linear(x, weight)


def _sliced(x: torch.Tensor, weight: torch.Tensor, rows: int) -> torch.Tensor:
    """`linear` of a few rows, as a batch of products with slices of the weight.

    MKL's plain product with a few rows keeps one core busy at most. Its batched product gives each core a part of the
    batch, so the output features are cut into slices that make up a batch.
    """
    out_features, in_features = weight.shape
    slices = math.gcd(out_features, 4 * torch.get_num_threads())
    columns = x.contiguous().as_strided((slices, in_features, rows), (0, 1, in_features))
    y = torch.bmm(weight.view(slices, -1, in_features), columns)  # (slices, out_features / slices, rows)
    y = y if rows == 1 else y.view(out_features, rows).t().contiguous()
    return y.view(*x.shape[:-1], out_features)
