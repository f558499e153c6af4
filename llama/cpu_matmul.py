"""The linear layer: every product of the network with a matrix of weights.

To draw a token each weight is read once, and used for as many numbers as there are rows: the time is the memory's. To
read a prompt there are many rows, and the time is the arithmetic's. A CPU has three libraries behind torch's one
product, each quick where the others are slow, and torch doesn't always take the quickest: here it is chosen.
`benchmarks/README.md` has the numbers.
"""

import contextlib
import math
import threading
from collections.abc import Iterator

import torch
import torch.nn.functional as F

MKL = torch.backends.mkl.is_available()
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
FEW_ROWS = 4  # up to so many, MKL's slices are faster in float32; with more, oneDNN
NATIVE_ROWS = 2  # up to so many, torch's own products are faster than oneDNN's in 16 bits
NATIVE = torch.__version__ >= "2.7"  # before that, they were slower than oneDNN's


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T`.

    Args:
        x: (..., in_features)
        weight: (out_features, in_features)

    Returns:
        (..., out_features)
    """
    if x.dtype != torch.float32 or not x.is_cpu or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight)
    rows = x.numel() // x.shape[-1]
    if MKL and 0 < rows <= FEW_ROWS:
        return _sliced(x, weight, rows)
    if ONEDNN and torch._C._get_mkldnn_enabled() and not torch.is_grad_enabled():  # for which it has no gradient
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        return y
    return F.linear(x, weight)


def _sliced(x: torch.Tensor, weight: torch.Tensor, rows: int) -> torch.Tensor:
    """`linear` of a few rows, as a batch of products.

    MKL's plain product with a few rows keeps one core busy, or less. Its batched product gives each core a part of the
    batch: so the matrix is made a batch of slices of itself, and the rows are columns to each.
    """
    out_features, in_features = weight.shape
    slices = math.gcd(out_features, 4 * torch.get_num_threads())
    columns = x.contiguous().as_strided((slices, in_features, rows), (0, 1, in_features))
    y = torch.bmm(weight.view(slices, -1, in_features), columns)  # (slices, out_features / slices, rows)
    y = y if rows == 1 else y.view(out_features, rows).t().contiguous()
    return y.view(*x.shape[:-1], out_features)


_lock = threading.Lock()
_users = 0  # of native products, in all threads
_onednn = True  # what the program had chosen before the first of them


@contextlib.contextmanager
def native_products(rows: int, weight: torch.Tensor) -> Iterator[None]:
    """Within, products of this many rows with weights like this one are made by whatever is fastest.

    For one row in bfloat16 or float16 on a CPU that is torch's own product, at three times oneDNN's speed; and oneDNN
    can only be told to stand aside by a switch of the whole process.
    """
    global _users, _onednn
    if (
        not NATIVE
        or rows > NATIVE_ROWS
        or weight.dtype not in (torch.bfloat16, torch.float16)
        or weight.device.type != "cpu"
        or torch.compiler.is_compiling()
    ):
        yield
        return
    with _lock:
        if _users == 0:
            _onednn = torch._C._get_mkldnn_enabled()
            torch._C._set_mkldnn_enabled(False)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                torch._C._set_mkldnn_enabled(_onednn)
