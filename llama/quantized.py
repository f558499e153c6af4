"""Weights of 8 and 4 bits: how they are rounded, how they are kept, and their products.

    8 bits: w = value * scale, with a scale for each output row
    4 bits: w = (value - 8) * scale + zero, with a scale and a zero for each group of 32 along the input

Only weights are quantized, never activations. To generate a token each weight is read once, and the time is the
memory's: torch has kernels that multiply with the few bits as they are. To prefill, the time is the arithmetic's, and
so a weight is expanded, used and dropped, a few rows at a time, so that they stay in the processor's cache.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from llama.cpu_matmul import ONEDNN, linear
from llama.errors import InputError
from llama.fused import matrix_times_vector
from llama.int4_packing import CHUNK_ROWS, INT4_ROWS, best_packing, pack, unpack

QUANTIZATIONS = ("int8", "int4")
GROUP_SIZE = 32  # weights that share a scale and a zero in 4 bits, as in the blocks of GGUF files
PARTS_OF_RANGE = (1, 0.95, 0.9, 0.85)  # of a group's weights, over which its 16 values may be spread

# Up to so many rows of x, torch's products with few bits are faster than those with an expanded weight. Measured in
# bfloat16 with AVX-512 (40 rows in 4 bits, 12 in 8) and with AVX2 (100 and 30); in float32 and float16 they are slower
# even for one row. On CUDA it is an estimate.
FEW_ROWS = {"cpu": 16, "cuda": 128}
INT8_COLUMNS = 16  # torch's 8-bit product takes this many input features at a time, and reads beyond the last
EXPANDED_AT_ONCE = 2**20  # weights, by each core: 2 MB in bfloat16, which the processor's cache holds

# With AVX-512 the compiler's loop over 8-bit weights reads memory twice as fast as torch's kernel; with AVX2, where it
# converts them one by one, it takes nearly twenty times as long.
COMPILED_INT8_IS_FAST = torch.backends.cpu.get_cpu_capability() == "AVX512"

# Parts of torch that have no other names.
int8_product = torch.ops.aten._weight_int8pack_mm  # noqa: SLF001
int4_product_on_cpu = torch.ops.aten._weight_int4pack_mm_for_cpu  # noqa: SLF001
int4_product_on_cuda = torch.ops.aten._weight_int4pack_mm  # noqa: SLF001


def check_quantize(quantize: str | None, dtype: torch.dtype | None) -> None:
    """Raise InputError unless `quantize` is a kind of quantization, and possible with activations of this dtype."""
    if quantize is None:
        return
    if quantize not in QUANTIZATIONS:
        raise InputError(f"quantize={quantize!r} must be one of {list(QUANTIZATIONS)}, or None")
    if dtype == torch.float64:
        raise InputError(f"quantize={quantize!r} takes activations of bfloat16, float16 or float32, not float64")


class QuantizedWeight(nn.Module):
    """A weight matrix in few bits, in place of a layer's `weight`. It is frozen, but gradients flow through it.

    Attributes:
        out_features, in_features: the matrix's sizes.
        bits: of a weight.
    """

    bits: int

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

    bits = 8
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
        if COMPILED_INT8_IS_FAST and torch.compiler.is_compiling() and x.is_cpu and x.numel() == self.in_features:
            sums = matrix_times_vector(self.values, x.flatten())
            return (sums * self.scales).type_as(x).view(*x.shape[:-1], self.out_features)
        if x.is_cpu and has_few_rows(x) and self.in_features % INT8_COLUMNS == 0:
            y: torch.Tensor = int8_product(x.reshape(-1, self.in_features).contiguous(), self.values, self.scales)
            return y.view(*x.shape[:-1], self.out_features)
        if x.is_cpu:
            return expanded_product(x, self.values, self.scales)
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
        device: where it is kept, and stays: its order is the one that this device's product takes.

    Raises:
        InputError: at a product, if it has been moved to a device of another type.
    """

    bits = 4
    packed: torch.Tensor
    scales_and_zeros: torch.Tensor

    def __init__(self, out_features: int, in_features: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(out_features, in_features)
        self.device_type = device.type
        self.packing = best_packing(device, dtype)
        n_groups = in_features // GROUP_SIZE
        block = pack(torch.zeros(INT4_ROWS, in_features, dtype=torch.uint8, device=device), self.packing)
        shape = (out_features * len(block) // INT4_ROWS, *block.shape[1:])
        self.register_buffer("packed", torch.empty(shape, dtype=block.dtype, device=device))
        self.register_buffer("scales_and_zeros", torch.empty(n_groups, out_features, 2, dtype=dtype, device=device))

    def set_rows(self, first: int, groups: "Int4Groups") -> None:
        """Fill the rows from `first` on, a multiple of `CHUNK_ROWS`: see `round_to_int4`."""
        last = first + len(groups.values)
        packed = pack(groups.values.to(self.packed.device), self.packing)
        start = first * len(packed) // len(groups.values)
        self.packed[start : start + len(packed)] = packed
        self.scales_and_zeros[:, first:last, 0] = groups.scales.T
        self.scales_and_zeros[:, first:last, 1] = groups.zeros.T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._check_device()
        if has_few_rows(x) and self.packing != "pairs":
            product = int4_product_on_cpu if x.is_cpu else int4_product_on_cuda
            x2d = x.reshape(-1, self.in_features).contiguous()
            y: torch.Tensor = product(x2d, self.packed, GROUP_SIZE, self.scales_and_zeros)
            return y.view(*x.shape[:-1], self.out_features)
        if x.is_cpu:
            return expanded_product(x, self.packed, self.scales_and_zeros)
        return F.linear(x, self.dequantize())

    def dequantize(self) -> torch.Tensor:
        self._check_device()
        return expand_int4(unpack(self.packed, self.packing), self.scales_and_zeros)

    def _check_device(self) -> None:
        if self.packed.device.type != self.device_type:
            raise InputError(
                f"weights of 4 bits that were packed for {self.device_type} can't be used on {self.packed.device}: "
                f"build the model with device={self.packed.device.type!r}"
            )


def has_few_rows(x: torch.Tensor) -> bool:
    """Whether torch's products with few bits are the best way to multiply x. They have no gradients."""
    n_rows = x.numel() // x.shape[-1]
    needs_gradient = x.requires_grad and torch.is_grad_enabled()
    return x.dtype == torch.bfloat16 and 0 < n_rows <= FEW_ROWS.get(x.device.type, 0) and not needs_gradient


def expanded_product(x: torch.Tensor, bits: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T` on the CPU, with a weight that is expanded some rows at a time.

    Args:
        x: (..., in_features)
        bits, scales: the two buffers of an `Int8Weight` or of an `Int4Weight`.

    Returns:
        (..., out_features)
    """
    x2d = x.reshape(-1, x.shape[-1])
    product = torch.ops.llama.expanded_product if torch.compiler.is_compiling() else _expanded_product
    y: torch.Tensor = product(x2d, bits, scales)
    return y.view(*x.shape[:-1], bits.shape[0])


def _expanded_product(x: torch.Tensor, bits: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    out_features = bits.shape[0]
    y = x.new_empty(x.shape[0], out_features)
    x = x.to(fast_dtype(x))
    is_int8 = bits.dtype == torch.int8
    into_y = x.dtype == torch.bfloat16 and not torch.is_grad_enabled()  # saves copies
    n_rows = max(torch.get_num_threads() * EXPANDED_AT_ONCE // x.shape[1] // CHUNK_ROWS, 1) * CHUNK_ROWS
    for first in range(0, out_features, n_rows):
        rows = slice(first, first + n_rows)
        if is_int8:
            weight = bits[rows].to(x.dtype)
        else:
            weight = expand_int4(unpack(bits[rows], "cpu"), scales[:, rows].to(x.dtype))
        product = torch.mm(x, weight.T, out=y[:, rows]) if into_y else linear(x, weight)
        if is_int8:
            product.mul_(scales[rows])
        if not into_y:
            y[:, rows] = product
    return y


# For the compiler it is one operation, since it would unroll the loop.
torch.library.custom_op("llama::expanded_product", _expanded_product, mutates_args=()).register_fake(
    lambda x, bits, scales: x.new_empty(len(x), len(bits))
)


def fast_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which this CPU multiplies x with a matrix fastest: bfloat16 if it has it, else float32."""
    has_bfloat16 = ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # noqa: SLF001
    return torch.bfloat16 if x.dtype == torch.bfloat16 and has_bfloat16 else torch.float32


def expand_int4(values: torch.Tensor, scales_and_zeros: torch.Tensor) -> torch.Tensor:
    """The weights that 4 bits stand for.

    Args:
        values: (in_features, rows) int8, from -8 to 7.
        scales_and_zeros: (n_groups, rows, 2)

    Returns:
        (rows, in_features) in the dtype of the scales, not contiguous.
    """
    scales, zeros = scales_and_zeros.permute(2, 0, 1).contiguous().unsqueeze(2)  # (n_groups, 1, rows)
    weight = values.to(scales.dtype).unflatten(0, (-1, GROUP_SIZE))  # (n_groups, 32, rows)
    return torch.addcmul(zeros, weight, scales, out=weight).flatten(0, 1).T


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


@torch.no_grad()
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


@torch.no_grad()
def round_to_int4(weight: torch.Tensor, dtype: torch.dtype) -> Int4Groups:
    """Round rows of weights to 4 bits. A group with a weight that is NaN or infinite gets a scale that is.

    The 16 values of a group are spread evenly over the range of its weights, or over a little less of it where that
    lowers the sum of the squared errors: a few weights are then far off, and the others nearer.

    Args:
        weight: (rows, in_features), in_features a multiple of 32.
        dtype: that scales and zeros will be kept in.
    """
    groups = weight.float().unflatten(1, (-1, GROUP_SIZE))  # (rows, n_groups, 32)
    low, high = groups.amin(dim=2, keepdim=True), groups.amax(dim=2, keepdim=True)

    def steps(scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        """How many scales a weight is above the zero of its group."""
        return (groups - zeros).mul_(1 / scales.masked_fill(scales == 0, 1))

    best: list[torch.Tensor] = []
    for part in PARTS_OF_RANGE:
        scales = ((high - low) * (part / 15)).to(dtype).float()  # (rows, n_groups, 1)
        zeros = ((low + high + scales) / 2).to(dtype).float()  # the middle of the range lies between the values 7 and 8
        exact = steps(scales, zeros)
        rounded = exact.round().clamp_(-8, 7)
        errors = torch.linalg.vector_norm(rounded.sub_(exact), dim=2, keepdim=True) * scales
        result = [errors, scales, zeros]
        if best:
            is_better = errors < best[0]
            result = [torch.where(is_better, ours, others) for ours, others in zip(result, best, strict=True)]
        best = result
    _, scales, zeros = best
    values = steps(scales, zeros).round_().nan_to_num_(0).clamp_(-8, 7).add_(8).to(torch.uint8)
    return Int4Groups(values.flatten(1), scales.squeeze(2), zeros.squeeze(2))
