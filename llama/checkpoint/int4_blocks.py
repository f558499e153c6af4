"""The blocks of GGUF files that consist of groups of 32 weights of 4 bits: w = (value - 8) * scale + zero.

The formats: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

import torch
from gguf import GGMLQuantizationType

from llama.quantized import Int4Groups


def read_q4_0(blocks: torch.Tensor) -> Int4Groups:
    """Blocks of 32 weights: a float16 scale, and 16 bytes of values, w = (value - 8) * scale.

    Args:
        blocks: (rows, n_blocks, 18) uint8.
    """
    scales = as_float(blocks[..., 0:2])
    return Int4Groups(unpack(blocks[..., 2:]), scales, torch.zeros_like(scales))


def read_q4_1(blocks: torch.Tensor) -> Int4Groups:
    """Blocks of 32 weights: a float16 scale, a float16 minimum, and 16 bytes of values, w = value * scale + minimum.

    Args:
        blocks: (rows, n_blocks, 20) uint8.
    """
    scales, minima = as_float(blocks[..., 0:2]), as_float(blocks[..., 2:4])
    return Int4Groups(unpack(blocks[..., 4:]), scales, minima + 8 * scales)


def read_q4_k(blocks: torch.Tensor) -> Int4Groups:
    """Blocks of 256 weights, in 8 groups: w = value * scale - minimum, where scale and minimum of a group have 6 bits.

    They are multiples of the block's two float16 numbers, and lie in 12 bytes: those of groups 0 to 3 in the lower bits
    of bytes 0 to 3 (scales) and 4 to 7 (minima); of groups 4 to 7 the lower four bits in bytes 8 to 11 (scales below,
    minima above), the upper two in the upper bits of bytes 0 to 3 and 4 to 7.

    Args:
        blocks: (rows, n_blocks, 144) uint8.
    """
    scale_unit, minimum_unit = as_float(blocks[..., 0:2]), as_float(blocks[..., 2:4])
    first, second, third = blocks[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat([first & 63, (third & 15) | (first >> 6 << 4)], dim=-1)  # (rows, n_blocks, 8)
    minima = torch.cat([second & 63, (third >> 4) | (second >> 6 << 4)], dim=-1)
    scales, minima = (scale_unit[..., None] * scales).flatten(1), (minimum_unit[..., None] * minima).flatten(1)
    return Int4Groups(unpack(blocks[..., 16:].unflatten(-1, (4, 32))), scales, 8 * scales - minima)


def as_float(pairs: torch.Tensor) -> torch.Tensor:
    """The float16 number in each pair of bytes, as float32: (rows, n_blocks, 2) uint8 -> (rows, n_blocks)."""
    return pairs.contiguous().view(torch.float16).squeeze(-1).float()


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The 4-bit values of runs of bytes, first the lower bits of all bytes of a run, then the upper bits.

    Args:
        packed: (rows, ..., bytes of a run) uint8.

    Returns:
        (rows, values of a row) uint8.
    """
    return torch.stack([packed & 15, packed >> 4], dim=-2).flatten(1)


INT4_BLOCKS = {
    GGMLQuantizationType.Q4_0: read_q4_0,
    GGMLQuantizationType.Q4_1: read_q4_1,
    GGMLQuantizationType.Q4_K: read_q4_k,
}
