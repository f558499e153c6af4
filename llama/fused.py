"""Operations with a second form, for the compiler.

Run one by one, an operation is quickest as one of torch's kernels. In a compiled decoding step (`llama.compiled`) that
kernel would stand between the others, and the compiler has no complex numbers. Written as sums of products, all of a
layer becomes one function, loop after loop, which reads weights and cache at the speed of the memory.
"""

import math

import torch
import torch.nn.functional as F

# (compared as a version) Of numbers of 16 bits; version 2.6 does it in 16 bits, and those between were not tried.
NORMALIZES_IN_FLOAT32 = torch.__version__ >= "2.13"


def normalize(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, computed in float32, in the dtype of x."""
    in_16_bits = x.dtype in (torch.bfloat16, torch.float16)
    if in_16_bits and NORMALIZES_IN_FLOAT32 and not torch.compiler.is_compiling():  # one kernel of a GPU, not three
        return F.rms_norm(x, x.shape[-1:], eps=eps)
    return F.rms_norm(x.float(), x.shape[-1:], eps=eps).type_as(x)


def multiply_complex(pairs: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Multiply complex numbers.

    Args:
        pairs: real and imaginary parts, float32 (..., 2).
        factors: complex64, of a shape that broadcasts to that of `pairs` without the last dimension; or, for the
            compiler, float32 real and imaginary parts.

    Returns:
        float32, of the shape of `pairs`.
    """
    if factors.is_complex():
        return torch.view_as_real(torch.view_as_complex(pairs) * factors)
    (a, b), (c, d) = pairs.unbind(-1), factors.unbind(-1)
    return torch.stack((a * c - b * d, a * d + b * c), dim=-1)


def attention(xq: torch.Tensor, xk: torch.Tensor, xv: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """softmax(xq xk^T / sqrt(head_dim)) xv.

    Args:
        xq: (batch, heads, queries, head_dim)
        xk, xv: (batch, heads, end, head_dim)
        mask: added to the scores, 0 or minus infinity, broadcast to (batch, heads, queries, end); None for none.

    Returns:
        (batch, heads, queries, head_dim)
    """
    if not torch.compiler.is_compiling() or not xq.is_cpu or mask is not None:
        return F.scaled_dot_product_attention(xq, xk, xv, attn_mask=mask)
    xq = at_least_float32(xq) / math.sqrt(xq.shape[-1])
    scores = (xq.unsqueeze(3) * xk.unsqueeze(2)).sum(-1)  # (batch, heads, queries, end)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    out = (weights.unsqueeze(-1) * xv.unsqueeze(2)).sum(3) / weights.sum(-1, keepdim=True)  # divides once, at the end
    return out.type_as(xv)


def matrix_times_vector(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The product of a matrix with a vector: (out_features, in_features) and (in_features) -> (out_features) float32.

    The matrix may consist of integers. float64 stays float64.
    """
    # The strides change nothing, but have the compiler compute the vector once, and not again for each row.
    vector = at_least_float32(x).as_strided(x.shape, (1,))
    return (at_least_float32(weight) * vector).sum(-1)


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Numbers of 16 bits, or integers, in float32, in which their products are to be summed."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
