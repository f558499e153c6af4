"""In which order torch's products want 4-bit weights: two in a byte, in an order of the device's own.

- "cpu": for `_weight_int4pack_mm_for_cpu`. A block of rows is packed column by column. How many rows a block has, and
  which of them share a byte, depends on the processor's vector instructions.
- "cuda": for `_weight_int4pack_mm`, the order in which the tensor cores of NVIDIA's GPUs take a matrix:
  https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/cuda/int4mm.cu
- "pairs": the plain order, where there is no such product; the first of two neighbours in the upper bits.
"""

import functools

import torch

INT4_ROWS = 16  # a packed matrix has a multiple of this many rows
CHUNK_ROWS = 64  # a matrix can be packed and unpacked in parts that begin at multiples of this many rows
TILE_ROWS, TILE_COLUMNS = 8, 16  # of a matrix on tensor cores

pack_for_cpu = torch.ops.aten._convert_weight_to_int4pack_for_cpu  # noqa: SLF001
pack_for_cuda = torch.ops.aten._convert_weight_to_int4pack  # noqa: SLF001


def best_packing(device: torch.device, dtype: torch.dtype) -> str:
    """The packing for this device and these activations."""
    if device.type == "cpu":
        return "cpu"
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    if is_nvidia and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (8, 0):
        return "cuda"
    return "pairs"


def pack(values: torch.Tensor, packing: str) -> torch.Tensor:
    """Pack a weight.

    Args:
        values: (rows, in_features) uint8, from 0 to 15; multiples of 16 and 32.
        packing: "cpu", "cuda" or "pairs".

    Returns:
        (rows, in_features / 2) uint8; for "cuda" (rows / 8, in_features / (16 n), 32, n / 2) int32, with n tiles of 16
        columns that are packed together.
    """
    if packing == "cpu":
        packed: torch.Tensor = pack_for_cpu(values.int(), 1)
        return packed
    pairs = values[:, ::2] << 4 | values[:, 1::2]
    if packing == "pairs":
        return pairs
    n_tiles = next(n for n in (8, 4, 2) if values.shape[1] % (n * TILE_COLUMNS) == 0)
    packed = pack_for_cuda(pairs.contiguous(), n_tiles)
    return packed


def unpack(packed: torch.Tensor, packing: str) -> torch.Tensor:
    """The values that have been packed, less 8: (in_features, rows) int8, from -8 to 7."""
    if packing == "cpu":
        values = _unpack_for_cpu(packed)
    elif packing == "cuda":
        values = _unpack_for_cuda(packed)
    else:
        values = torch.stack([packed >> 4, packed & 0xF], dim=-1).flatten(1).T
    return values.view(torch.int8).sub_(8)


def _unpack_for_cpu(packed: torch.Tensor) -> torch.Tensor:
    n_rows, half_in_features = packed.shape
    parts = []
    for first, last, block, halves in cpu_blocks(n_rows):
        blocks = packed[first:last].view(-1, 2 * half_in_features, block // 2).transpose(0, 1)
        parts.append(torch.stack([blocks & 0xF, blocks >> 4], dim=2 if halves else 3).flatten(1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


@functools.cache
def cpu_blocks(n_rows: int) -> list[tuple[int, int, int, bool]]:
    """How this processor's packing divides a matrix into blocks, found by packing a few marks.

    Returns:
        For each size of a block: the first row, and the one after the last; the rows of a block; whether the lower bits
        of its bytes hold its first half and the upper bits its second half, or else each byte two neighbouring rows.
        The last rows, too few for a block, are a smaller block.

    Raises:
        NotImplementedError: this version of torch packs in another way.
    """
    marks = torch.zeros(n_rows, 2, dtype=torch.int32, device="cpu")
    marks[1, 0], marks[:, 1] = 0xF, 0x7
    packed = pack_for_cpu(marks, 1).flatten().tolist()
    block = 2 * packed.index(0x77)  # where the second column begins
    if packed[:2] not in ([0x00, 0x0F], [0xF0, 0x00]):
        raise NotImplementedError(f"torch {torch.__version__} packs weights of 4 bits in an unknown order here")
    last = n_rows // block * block
    blocks = [(0, last, block, packed[0] == 0)]
    if last < n_rows:
        blocks += [(first + last, end + last, *rest) for first, end, *rest in cpu_blocks(n_rows - last)]
    return blocks


def _unpack_for_cuda(packed: torch.Tensor) -> torch.Tensor:
    row_tiles, column_steps, _, n_pairs = packed.shape
    four_bits = packed.view(torch.uint8)
    four_bits = torch.stack([four_bits & 0xF, four_bits >> 4], dim=-1)
    # An int32 has eight values of a row: of two tiles of 16 columns, of the halves of each, the even or odd ones.
    four_bits = four_bits.view(row_tiles, column_steps, TILE_ROWS, 4, n_pairs, 2, 2, 2)  # (…, parity, tile, half)
    return four_bits.permute(1, 4, 6, 7, 3, 5, 0, 2).reshape(-1, row_tiles * TILE_ROWS)
