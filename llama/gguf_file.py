"""GGUF files (llama.cpp's format): their metadata, and their tensors as they are stored.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import struct
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from llama.errors import CheckpointError
from llama.files import Metadata, first_bytes, raise_if_unmappable

VERSIONS = (2, 3)
# Of the metadata and the descriptions of tensors. Those of Llama 3's models, with 128,256 tokens, take 8 million bytes
# and 0.7 million values. A value takes up to 150 bytes of memory.
MAX_METADATA = 2**26
MAX_VALUES = 2**21

NUMBERS: dict[GGUFValueType, np.dtype[Any]] = {
    GGUFValueType.UINT8: np.dtype("<u1"),
    GGUFValueType.INT8: np.dtype("<i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
    GGUFValueType.BOOL: np.dtype("?"),
}
# Tensors of all other types consist of blocks of bytes.
PLAIN_TENSORS: dict[GGMLQuantizationType, np.dtype[Any]] = {
    GGMLQuantizationType.F16: np.dtype("<f2"),
    GGMLQuantizationType.F32: np.dtype("<f4"),
    GGMLQuantizationType.F64: np.dtype("<f8"),
    GGMLQuantizationType.I8: np.dtype("<i1"),
    GGMLQuantizationType.I16: np.dtype("<i2"),
    GGMLQuantizationType.I32: np.dtype("<i4"),
    GGMLQuantizationType.I64: np.dtype("<i8"),
}


class GGUFTensor(NamedTuple):
    """A tensor as it is stored.

    Attributes:
        shape: the number of its features along each axis, the contiguous axis first.
        kind: how it is quantized, if it is.
        data: its numbers, or the bytes of its blocks, mapped from the file; the contiguous axis is the last.
    """

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    data: npt.NDArray[Any]


class GGUFFile(Metadata):
    """A GGUF file's metadata and tensors; the tensors stay memory-mapped.

    Attributes:
        tensors: by the names they have in the file.

    Raises:
        CheckpointError: not a GGUF file, an unsupported one, or a damaged one.
        MemoryError: the system refuses to map so large a file.
    """

    def __init__(self, path: Path) -> None:
        head = first_bytes(path)
        if not head.startswith(b"GGUF"):
            raise CheckpointError(f"{path} is not a GGUF file: it doesn't begin with 'GGUF'")
        version = int.from_bytes(head[4:8], "little")
        if len(head) >= 8 and version not in VERSIONS:
            order = " (big-endian)" if version >= 2**16 else ""
            raise CheckpointError(
                f"{path}: GGUF version {int.from_bytes(head[4:8], 'big' if order else 'little')}{order} is not "
                f"supported, only little-endian files of version 2 or 3"
            )
        content = _map_file(path)
        try:
            cursor = _Cursor(content, 8)
            n_tensors, n_values = cursor.number("Q"), cursor.number("Q")
            super().__init__(path, _read_values(cursor, n_values))
            self.tensors = _read_tensors(cursor, n_tensors, self.values.get("general.alignment", 32))
        except ValueError as error:  # UnicodeDecodeError is one too
            raise CheckpointError(f"{path} is damaged or cut short: {error}") from error


def _map_file(path: Path) -> mmap.mmap:
    """The content of a file, mapped copy-on-write if possible, so that torch can take arrays of it without a copy."""
    if sys.byteorder != "little":
        raise CheckpointError(f"{path}: GGUF files can only be read on little-endian machines")
    try:
        with path.open("rb") as file:
            try:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except OSError:  # the file is larger than the memory the system would promise for such copies
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise_if_unmappable(path, error)
        raise CheckpointError(f"{path} can't be read: {error}") from error


class _Cursor:
    """Reads values one after another, none beyond the end of the file.

    Args:
        content: the file.
        position: where to begin, in bytes.
    """

    def __init__(self, content: mmap.mmap, position: int) -> None:
        self.content = content
        self.position = position
        self.end = min(len(content), MAX_METADATA)
        self.values_left = MAX_VALUES

    def require(self, count: int, size: int) -> None:
        """Raise ValueError if fewer than `count` values of `size` bytes can follow, or it would be too many in all."""
        if count * size > self.end - self.position:
            raise ValueError(f"{count} values are said to follow byte {self.position}, where {self._bytes_left()}")
        self.values_left -= count
        if self.values_left < 0:
            raise ValueError(f"its metadata have over {MAX_VALUES} values")

    def _bytes_left(self) -> str:
        limit = "" if self.end < MAX_METADATA else f" (metadata may take {MAX_METADATA})"
        return f"{self.end - self.position} bytes are left{limit}"

    def number(self, code: str) -> int:
        """One integer; `code` is its type in `struct`'s notation."""
        size = struct.calcsize(code)
        self.require(1, size)
        number: int = struct.unpack_from(f"<{code}", self.content, self.position)[0]
        self.position += size
        return number

    def numbers(self, kind: GGUFValueType, count: int) -> list[Any]:
        """Numbers or truth values."""
        dtype = NUMBERS[kind]
        self.require(count, dtype.itemsize)
        numbers: list[Any] = np.frombuffer(self.content, dtype, count, self.position).tolist()
        self.position += count * dtype.itemsize
        return numbers

    def strings(self, count: int) -> list[str]:
        """Strings in UTF-8, each after its length. A vocabulary has hundreds of thousands, so the loop calls little."""
        self.require(count, 8)
        content, end, length_at = self.content, self.end, struct.Struct("<Q").unpack_from
        strings: list[str] = []
        for _ in range(count):
            start = self.position + 8
            if start > end or (stop := start + length_at(content, start - 8)[0]) > end:
                raise ValueError(f"the string at byte {self.position} is longer than the file: {self._bytes_left()}")
            strings.append(content[start:stop].decode())
            self.position = stop
        return strings


def _read_values(cursor: _Cursor, count: int) -> dict[str, Any]:
    """The key-value pairs of the metadata: numbers, truth values, strings, and lists of one of them."""
    cursor.require(count, 8 + 4 + 1)  # the length of a key, a type, a value
    values: dict[str, Any] = {}
    for _ in range(count):
        (key,) = cursor.strings(1)
        if key in values:
            raise ValueError(f"the key {key!r:.80} is there twice")
        kind = GGUFValueType(cursor.number("I"))  # raises ValueError for a number that is none
        n_items = 1
        is_array = kind is GGUFValueType.ARRAY
        if is_array:
            kind, n_items = GGUFValueType(cursor.number("I")), cursor.number("Q")
            if kind is GGUFValueType.ARRAY:
                raise ValueError(f"{key!r:.80} is an array of arrays, which is not supported")
        items = cursor.strings(n_items) if kind is GGUFValueType.STRING else cursor.numbers(kind, n_items)
        values[key] = items if is_array else items[0]
    return values


def _read_tensors(cursor: _Cursor, count: int, alignment: Any) -> dict[str, GGUFTensor]:
    """The tensors by name: first their descriptions, then, at a multiple of `alignment` bytes, their data."""
    if type(alignment) is not int or not 8 <= alignment <= 2**20 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r:.80}, not a power of two from 8 to {2**20}")
    cursor.require(count, 8 + 4 + 8 + 4 + 8)  # the length of a name, a number of axes, a size, a kind, an offset
    descriptions: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(count):
        (name,) = cursor.strings(1)
        if name in descriptions:
            raise ValueError(f"the tensor {name!r:.80} is there twice")
        n_axes = cursor.number("I")
        if not 1 <= n_axes <= 4:
            raise ValueError(f"the tensor {name!r:.80} has {n_axes} axes, not 1 to 4")
        shape = tuple(cursor.number("Q") for _ in range(n_axes))
        descriptions[name] = shape, cursor.number("I"), cursor.number("Q")
    data_start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, (shape, kind, offset) in descriptions.items():
        if offset % alignment:
            raise ValueError(f"the tensor {name!r:.80} begins at byte {offset}, not a multiple of {alignment}")
        try:
            tensors[name] = _map_tensor(cursor.content, shape, GGMLQuantizationType(kind), data_start + offset)
        except ValueError as error:
            raise ValueError(f"the tensor {name!r:.80} of shape {shape}: {error}") from error
    return tensors


def _map_tensor(content: mmap.mmap, shape: tuple[int, ...], kind: GGMLQuantizationType, start: int) -> GGUFTensor:
    """A tensor whose data begin at the byte `start` of the file."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    n_features = math.prod(shape)
    if n_features == 0 or shape[0] % block:
        raise ValueError(f"{kind.name} takes rows of whole blocks of {block}, and none may be empty")
    size = n_features // block * block_bytes
    if start + size > len(content):
        raise ValueError(f"its {size} bytes from byte {start} exceed the {len(content)} of the file")
    dtype = PLAIN_TENSORS.get(kind, np.dtype(np.uint8))
    items = np.frombuffer(content, dtype, size // dtype.itemsize, start)
    return GGUFTensor(shape, kind, items.reshape(*reversed(shape[1:]), -1))
