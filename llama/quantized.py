"""Weights of 8 and 4 bits: how they are rounded, how they are kept, and their products.

Only weights are quantized, never activations. A token's products read each weight once, so that its time is the
memory's: torch's kernels then multiply with the few bits as they are. A prompt's products are arithmetic: there a
layer's weight is expanded, used and dropped.

    8 bits: w = value * scale, with a scale for each output row
    4 bits: w = (value - 8) * scale + zero, with scale and zero for each group of 32 along the input
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from llama.errors import InputError

QUANTIZATIONS = ("int8", "int4")
GROUP_SIZE = 32  # weights that share a scale and a zero in 4 bits, as in the blocks of GGUF files
FEW_ROWS = 4  # up to this many rows torch's kernels are faster than expanding the weight
INT4_ROWS = 16  # torch's 4-bit kernels take output rows by this number
INT8_COLUMNS = 16  # torch's 8-bit kernels compute wrong results unless the input features are a multiple of this


# The two kernels, and what packs weights for the second: parts of torch that have no other names.
int8_product = torch.ops.aten._weight_int8pack_mm  # noqa: SLF001
int4_product = torch.ops.aten._weight_int4pack_mm_for_cpu  # noqa: SLF001
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
        rows = x.numel() // self.in_features
        if x.is_cpu and 0 < rows <= FEW_ROWS and self.in_features % INT8_COLUMNS == 0:
            x2d = x.reshape(rows, self.in_features).contiguous()
            y: torch.Tensor = int8_product(x2d, self.values, self.scales)
            return y.view(*x.shape[:-1], self.out_features)
        if x.dtype == torch.float16:  # sums of products with whole numbers up to 127 could exceed its range
            return F.linear(x, self.dequantize())
        return F.linear(x, self.values.to(x.dtype)) * self.scales

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
        rows = x.numel() // self.in_features
        if x.is_cpu and 0 < rows <= FEW_ROWS:
            x2d = x.reshape(rows, self.in_features).contiguous()
            y: torch.Tensor = int4_product(x2d, self.packed, GROUP_SIZE, self.scales_and_zeros)
            return y.view(*x.shape[:-1], self.out_features)
        return x @ self._expand()

    def dequantize(self) -> torch.Tensor:
        return self._expand().T

    def _expand(self) -> torch.Tensor:
        """(in_features, out_features)"""
        weight = torch.empty(self.in_features, self.out_features, dtype=self.dtype, device=self.packed.device)
        first = 0
        for block, halves, n_blocks in _cpu_layout(self.out_features):
            end = first + block * n_blocks
            packed = (self.packed[first:end] ^ 0x88).view(torch.int8)  # now each nibble is value - 8, with a sign
            packed = packed.view(n_blocks, self.in_features, block // 2).transpose(0, 1)
            target = weight[:, first:end].unflatten(1, (n_blocks, 2, -1) if halves else (n_blocks, -1, 2))
            low, high = target.unbind(2 if halves else 3)
            low.copy_((packed << 4) >> 4)
            high.copy_(packed >> 4)
            first = end
        scales, zeros = self.scales_and_zeros.permute(2, 0, 1).contiguous().unsqueeze(2)  # (n_groups, 1, out_features)
        grouped = weight.view(-1, GROUP_SIZE, self.out_features)
        return torch.addcmul(zeros, grouped, scales, out=grouped).view(weight.shape)


@functools.cache
def _cpu_layout(out_features: int) -> list[tuple[int, bool, int]]:
    """How this processor's kernel wants 4-bit weights packed, found by packing the numbers of rows.

    A block of rows is packed column by column, two rows in a byte.

    Returns:
        For each part of the matrix: the rows of a block; whether the low bits of a block's bytes hold its first half
        and the high bits its second half (or else neighbouring rows share a byte); the number of blocks.
    """
    if out_features == 0:
        return []
    marks = torch.zeros(out_features, 2, dtype=torch.int32, device="cpu")
    marks[1, 0], marks[:, 1] = 0xF, 0x7
    packed = pack_int4(marks, 1).flatten().tolist()
    block = 2 * packed.index(0x77)  # where the second column begins
    if packed[:2] not in ([0x00, 0x0F], [0xF0, 0x00]):
        raise NotImplementedError(f"torch {torch.__version__} packs weights of 4 bits in an unknown order here")
    halves, n_blocks = packed[0] == 0, out_features // block
    return [(block, halves, n_blocks), *_cpu_layout(out_features % block)]


class Int4Groups(NamedTuple):
    """Rows of a matrix in 4 bits: w = (value - 8) * scale + zero.

    Attributes:
        values: (rows, in_features) uint8, from 0 to 15.
        scales, zeros: of each group of 32, (rows, in_features / 32) float32.
    """

    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor


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
