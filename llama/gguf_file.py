"""GGUF files (llama.cpp's format) through the `gguf` package."""

from pathlib import Path
from typing import Any

from gguf import GGUFReader

from llama.errors import CheckpointError
from llama.files import Metadata, first_bytes


class _CheckedReader(GGUFReader):
    """The package's reader, which by itself returns fewer items than asked for at the end of a truncated file."""

    def _get(self, offset: int, dtype: Any, count: int = 1, *args: Any, **options: Any) -> Any:
        items = super()._get(offset, dtype, count, *args, **options)
        if len(items) < count:
            raise ValueError(f"the file ends before the {count} items at byte {offset}")
        return items


class GGUFFile(Metadata):
    """A GGUF file's metadata and tensors, memory-mapped.

    Attributes:
        tensors: the `gguf` package's descriptions of the tensors, by the names they have in the file.

    Raises:
        CheckpointError: not a GGUF file, or a damaged one.
    """

    def __init__(self, path: Path) -> None:
        if not first_bytes(path).startswith(b"GGUF"):
            raise CheckpointError(f"{path} is not a GGUF file: it doesn't begin with 'GGUF'")
        try:
            try:
                reader = _CheckedReader(path, "c")  # copy-on-write, so that torch can take the arrays without a copy
            except OSError:  # the file is larger than the memory the system would promise for such copies
                reader = _CheckedReader(path)
            super().__init__(path, {key: field.contents() for key, field in reader.fields.items()})
            self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        except Exception as error:  # the reader trusts the file's content, so a damaged one can raise anything
            raise CheckpointError(f"{path} is damaged or cut short: {type(error).__name__}: {error}") from error
