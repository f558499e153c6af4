"""Matrix products on a CPU: the quickest of the libraries behind torch's one product, for each shape and dtype.

To generate a token each weight is read once and used for as many numbers as there are rows, so that the time is the
memory's; to prefill there are many rows, and the time is the arithmetic's. Three libraries (MKL, oneDNN and torch's own
kernels) are each quick where the others are slow, and torch doesn't always take the quickest. `benchmarks/README.md`
has the measurements. On other devices `linear` is `F.linear`.
"""

import contextlib
import math
import os
import threading
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from llama.fused import matrix_times_vector

MKL = torch.backends.mkl.is_available()
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
SLICED_ROWS = 4  # in float32: up to this many rows MKL with slices is faster, with more oneDNN
NATIVE_ROWS = 2  # in 16 bits: up to this many rows torch's own kernels are faster than oneDNN
NATIVE_IS_FAST = torch.__version__ >= "2.7"  # (compared as a version) before, they were slower than oneDNN

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


_lock = threading.Lock()
_active = 0  # `fast_products` blocks that have oneDNN switched off, in all threads
_onednn_enabled = True  # what the program had chosen before the first of them


@contextlib.contextmanager
def fast_products(rows: int, weight: torch.Tensor) -> Iterator[None]:
    """Choose the fastest library for products of `rows` rows with weights of this dtype and device, within the block.

    For one or two rows in bfloat16 or float16 that is torch's own kernel, three times as fast as oneDNN. It can only be
    chosen by a switch of the whole process, which is put back when the last block ends.
    """
    global _active, _onednn_enabled
    if (
        not NATIVE_IS_FAST
        or rows > NATIVE_ROWS
        or weight.dtype not in (torch.bfloat16, torch.float16)
        or weight.device.type != "cpu"
        or torch.compiler.is_compiling()
    ):
        yield
        return
    with _lock:
        if _active == 0:
            _onednn_enabled = torch._C._get_mkldnn_enabled()
            torch._C._set_mkldnn_enabled(False)
        _active += 1
    try:
        yield
    finally:
        with _lock:
            _active -= 1
            if _active == 0:
                torch._C._set_mkldnn_enabled(_onednn_enabled)


def _after_fork() -> None:
    """In a forked process no other thread runs, and so no block of one."""
    global _lock, _active
    _lock = threading.Lock()
    if _active > 0:
        _active = 0
        torch._C._set_mkldnn_enabled(_onednn_enabled)


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)
