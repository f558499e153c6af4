"""Opening GGUF files (the format of llama.cpp) through the `gguf` package."""

from pathlib import Path
from typing import Any

from gguf import GGUFReader

from llama.errors import CheckpointError
from llama.files import Metadata, first_bytes


class _Reader(GGUFReader):
    """The package's reader takes what it finds where the file ends too early, whatever sizes the file claims."""

    def _get(self, offset: int, dtype: Any, count: int = 1, *more: Any, **options: Any) -> Any:
        found = super()._get(offset, dtype, count, *more, **options)
        if len(found) < count:
            raise ValueError(f"{count} items at byte {offset} are more than the file holds")
        return found


class GGUFFile(Metadata):
    """A GGUF file's metadata and tensors, memory-mapped.

    Args:
        path: the file.

    Raises:
        CheckpointError: it is no GGUF file, or a damaged one.
    """

    def __init__(self, path: Path) -> None:
        if not first_bytes(path).startswith(b"GGUF"):
            raise CheckpointError(f"{path} is not a GGUF file: it doesn't begin with 'GGUF'")
        try:
            try:
                reader = _Reader(path, "c")  # copied where it is written to
            except OSError:  # larger than the memory that the system would promise for such copies
                reader = _Reader(path)
            super().__init__(path, {key: field.contents() for key, field in reader.fields.items()})
            self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        except Exception as error:  # the reader trusts the file, so that a damaged one can raise anything
            raise CheckpointError(f"{path} is damaged or cut short: {type(error).__name__}: {error}") from error
