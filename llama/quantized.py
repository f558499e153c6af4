"""Weights of 8 and 4 bits: how they are rounded, how they are kept, and their products.

    8 bits: w = value * scale, with a scale for each output row
    4 bits: w = (value - 8) * scale + zero, with a scale and a zero for each group of 32 along the input

Only weights are quantized, never activations. To generate a token each weight is read once, and the time is the
memory's: torch has kernels that multiply with the few bits as they are. To prefill, the time is the arithmetic's, and
so a weight is expanded, used and dropped, a few rows at a time, so that they stay in the processor's cache.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from llama.cpu_matmul import ONEDNN, linear
from llama.errors import InputError

QUANTIZATIONS = ("int8", "int4")
GROUP_SIZE = 32  # weights that share a scale and a zero in 4 bits, as in the blocks of GGUF files
INT4_ROWS = 16  # torch's 4-bit kernel takes this many output rows at a time
INT8_COLUMNS = 16  # torch's 8-bit kernel takes this many input features at a time, and reads beyond the last
FEW_ROWS = 16  # up to this many rows of x torch's kernels are faster than expanding: 40 in 4 bits, 12 in 8
CACHED_WEIGHTS = 2**19  # weights that are expanded at a time on a CPU: 1 MB in bfloat16
BLOCK_ROWS = 64  # output rows; packed weights can be divided at multiples of this


# The two kernels, and what packs weights for the second: parts of torch that have no other names.
int8_kernel = torch.ops.aten._weight_int8pack_mm  # noqa: SLF001
int4_kernel = torch.ops.aten._weight_int4pack_mm_for_cpu  # noqa: SLF001
pack_int4 = torch.ops.aten._convert_weight_to_int4pack_for_cpu  # noqa: SLF001


def check_quantize(quantize: str | None, dtype: torch.dtype | None) -> None:
    """Raise InputError unless `quantize` is a kind of quantization, and possible with activations of this dtype."""
    if quantize is None:
        return
    if quantize not in QUANTIZATIONS:
        raise InputError(f"quantize={quantize!r} must be one of {list(QUANTIZATIONS)}, or None")
    if dtype == torch.float64:
        raise InputError(f"quantize={quantize!r} takes activations of bfloat16, float16 or float32, not float64")


class QuantizedWeight(nn.Module):
    """A weight matrix in few bits, in place of a layer's `weight`. It has no gradients.

    Attributes:
        out_features, in_features: the matrix's sizes.
    """

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.out_features, self.in_features = out_features, in_features

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the scales, and of the activations."""
        return next(buffer.dtype for buffer in self.buffers() if buffer.is_floating_point())

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features): `x @ weight.T`."""
        raise NotImplementedError

    def dequantize(self) -> torch.Tensor:
        """The weights that the bits stand for: (out_features, in_features), in the activations' dtype."""
        raise NotImplementedError


class Int8Weight(QuantizedWeight):
    """A weight matrix in 8 bits, with a scale for each output row.

    Args:
        out_features, in_features: the matrix's sizes.
        dtype: of the scales and of the activations.
        device: where it is kept.
    """

    values: torch.Tensor
    scales: torch.Tensor

    def __init__(self, out_features: int, in_features: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(out_features, in_features)
        self.register_buffer("values", torch.empty(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("scales", torch.empty(out_features, dtype=dtype, device=device))

    def set_rows(self, first: int, values: torch.Tensor, scales: torch.Tensor) -> None:
        """Fill the rows from `first` on: see `round_to_int8`."""
        self.values[first : first + len(values)] = values.to(self.values.device)
        self.scales[first : first + len(scales)] = scales.to(self.scales.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if has_kernel(x) and self.in_features % INT8_COLUMNS == 0:
            y = int8_kernel(x.reshape(-1, self.in_features).contiguous(), self.values, self.scales)
            return y.view(*x.shape[:-1], self.out_features)
        if x.is_cpu:
            return expanded_product(x, self.values, self.scales)
        return F.linear(x, self.dequantize())

    def rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """Rows of the matrix, as the vectors of an embedding: (...) int64 -> (..., in_features)."""
        return self.values[tokens].to(self.dtype) * self.scales[tokens].unsqueeze(-1)

    def dequantize(self) -> torch.Tensor:
        return self.values.to(self.dtype) * self.scales[:, None]


class Int4Weight(QuantizedWeight):
    """A weight matrix in 4 bits, with a scale and a zero for each group of 32 weights along the input.

    Args:
        out_features, in_features: the matrix's sizes, multiples of 16 and 32.
        dtype: of scales and zeros, and of the activations.
        device: where it is kept. The bits are in the order that this device's kernel takes: they can't be moved to a
            device of another type.
    """

    packed: torch.Tensor
    scales_and_zeros: torch.Tensor

    def __init__(self, out_features: int, in_features: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(out_features, in_features)
        n_groups = in_features // GROUP_SIZE
        self.register_buffer("packed", torch.empty(out_features, in_features // 2, dtype=torch.uint8, device=device))
        self.register_buffer("scales_and_zeros", torch.empty(n_groups, out_features, 2, dtype=dtype, device=device))

    def set_rows(self, first: int, groups: "Int4Groups") -> None:
        """Fill the rows from `first` on, a multiple of 64: see `round_to_int4`."""
        last = first + len(groups.values)
        self.packed[first:last] = pack_int4(groups.values.int(), 1)
        self.scales_and_zeros[:, first:last, 0] = groups.scales.T
        self.scales_and_zeros[:, first:last, 1] = groups.zeros.T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if has_kernel(x):
            x2d = x.reshape(-1, self.in_features).contiguous()
            y = int4_kernel(x2d, self.packed, GROUP_SIZE, self.scales_and_zeros)
            return y.view(*x.shape[:-1], self.out_features)
        if x.is_cpu:
            return expanded_product(x, self.packed, self.scales_and_zeros)
        return F.linear(x, self.dequantize())

    def dequantize(self) -> torch.Tensor:
        return expand_int4(self.packed, self.scales_and_zeros, self.dtype)


def has_kernel(x: torch.Tensor) -> bool:
    """Whether torch has a kernel that multiplies x with a quantized weight faster than with the expanded one."""
    return x.is_cpu and x.dtype == torch.bfloat16 and 0 < x.numel() // x.shape[-1] <= FEW_ROWS


def expanded_product(x: torch.Tensor, bits: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T`, with a weight that is expanded some rows at a time.

    Args:
        x: (..., in_features)
        bits, scales: the two buffers of an `Int8Weight` or of an `Int4Weight`.

    Returns:
        (..., out_features)
    """
    x2d = x.reshape(-1, x.shape[-1])
    product = torch.ops.llama.expanded_product if torch.compiler.is_compiling() else _expanded_product
    y: torch.Tensor = product(x2d, bits, scales)
    return y.view(*x.shape[:-1], len(bits))


def _expanded_product(x: torch.Tensor, bits: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    y = x.new_empty(len(x), len(bits))
    x = x.to(fast_dtype(x))
    for rows in row_chunks(len(bits), x.shape[1]):
        if bits.dtype == torch.int8:
            y[:, rows] = linear(x, bits[rows].to(x.dtype)) * scales[rows]
        else:
            y[:, rows] = linear(x, expand_int4(bits[rows], scales[:, rows], x.dtype))
    return y


# For the compiler it is one operation, since it would unroll the loop.
torch.library.custom_op("llama::expanded_product", _expanded_product, mutates_args=()).register_fake(
    lambda x, bits, scales: x.new_empty(len(x), len(bits))
)


def row_chunks(out_features: int, in_features: int) -> list[slice]:
    """The rows of a weight that are expanded at a time."""
    n_rows = max(CACHED_WEIGHTS // in_features // BLOCK_ROWS, 1) * BLOCK_ROWS
    return [slice(first, min(first + n_rows, out_features)) for first in range(0, out_features, n_rows)]


def fast_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which this CPU multiplies x with a matrix fastest: bfloat16 if it has it, else float32."""
    has_bfloat16 = ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # noqa: SLF001
    return torch.bfloat16 if x.dtype == torch.bfloat16 and has_bfloat16 else torch.float32


def expand_int4(packed: torch.Tensor, scales_and_zeros: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Some rows of a weight, from the buffers of an `Int4Weight`: (rows, in_features) in `dtype`, not contiguous."""
    weight = unpack_int4(packed).to(dtype).unflatten(0, (-1, GROUP_SIZE))  # (n_groups, 32, rows)
    scales, zeros = scales_and_zeros.to(dtype).permute(2, 0, 1).contiguous().unsqueeze(2)  # (n_groups, 1, rows)
    return torch.addcmul(zeros, weight, scales, out=weight).flatten(0, 1).T


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """What `pack_int4` has packed, less 8: (rows, in_features / 2) uint8 -> (in_features, rows) int8."""
    n_rows, in_features = len(packed), 2 * packed.shape[1]
    values = packed.new_empty(in_features, n_rows)
    for first, last, block, halves in packed_blocks(n_rows):
        blocks = packed[first:last].view(-1, in_features, block // 2).transpose(0, 1)
        values[:, first:last] = torch.stack([blocks & 0xF, blocks >> 4], dim=2 if halves else 3).flatten(1)
    return values.view(torch.int8).sub_(8)


@functools.cache
def packed_blocks(n_rows: int) -> list[tuple[int, int, int, bool]]:
    """The order in which `pack_int4` packs a matrix, which is this processor's, found by packing a few marks.

    A block of rows is packed column by column, two rows in a byte. The last rows, too few for a block, make up another.

    Returns:
        For each size of a block: the first row, and the one after the last; the rows of a block; whether the low bits
        of its bytes hold its first half and the high bits its second half, or else each byte two neighbouring rows.

    Raises:
        NotImplementedError: a later torch packs in another way.
    """
    marks = torch.zeros(n_rows, 2, dtype=torch.int32, device="cpu")
    marks[1, 0], marks[:, 1] = 0xF, 0x7
    packed = pack_int4(marks, 1).flatten().tolist()
    block = 2 * packed.index(0x77)  # where the second column begins
    if packed[:2] not in ([0x00, 0x0F], [0xF0, 0x00]):
        raise NotImplementedError(f"torch {torch.__version__} packs weights of 4 bits in an unknown order here")
    last = n_rows // block * block
    parts = [(0, last, block, packed[0] == 0)]
    if last < n_rows:
        parts += [(first + last, end + last, *part) for first, end, *part in packed_blocks(n_rows - last)]
    return parts


class Int4Groups(NamedTuple):
    """Rows of a matrix in 4 bits: w = (value - 8) * scale + zero.

    Attributes:
        values: (rows, in_features) uint8, from 0 to 15.
        scales, zeros: of each group of 32, (rows, in_features / 32) float32.
    """

    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    def columns(self, start: int, stop: int) -> "Int4Groups":
        """Some of the input features, from and to a multiple of 32."""
        groups = slice(start // GROUP_SIZE, stop // GROUP_SIZE)
        return Int4Groups(self.values[:, start:stop], self.scales[:, groups], self.zeros[:, groups])


def round_to_int8(weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Round rows of weights to 8 bits. A row with a weight that is NaN or infinite gets a scale that is.

    Args:
        weight: (rows, in_features), whole rows.
        dtype: of the scales.

    Returns:
        values: (rows, in_features) int8, from -127 to 127.
        scales: (rows) in `dtype`.
    """
    weight = weight.float()
    scales = (weight.abs().amax(dim=1) / 127).to(dtype)
    divisors = scales.float().masked_fill(scales == 0, 1)
    return (weight / divisors[:, None]).round_().clamp_(-127, 127).to(torch.int8), scales


def round_to_int4(weight: torch.Tensor, dtype: torch.dtype) -> Int4Groups:
    """Round rows of weights to 4 bits. A group with a weight that is NaN or infinite gets a scale that is.

    Args:
        weight: (rows, in_features), in_features a multiple of 32.
        dtype: that scales and zeros will be kept in.
    """
    groups = weight.float().unflatten(1, (-1, GROUP_SIZE))  # (rows, n_groups, 32)
    low, high = groups.aminmax(dim=2)
    scales = ((high - low) / 15).to(dtype).float()
    zeros = (low + 8 * scales).to(dtype).float()
    divisors = scales.masked_fill(scales == 0, 1)
    values = ((groups - zeros[..., None]) / divisors[..., None]).round_().add_(8).clamp_(0, 15)
    return Int4Groups(values.to(torch.uint8).flatten(1), scales, zeros)
