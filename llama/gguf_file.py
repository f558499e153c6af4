"""Opening GGUF files (the format of llama.cpp) through the `gguf` package."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFReader

from llama.errors import CheckpointError
from llama.files import first_bytes

_REQUIRED = object()


class GGUFFile:
    """A GGUF file's metadata and tensors, memory-mapped.

    Args:
        path: the file.

    Raises:
        CheckpointError: it is no GGUF file, or a damaged one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not first_bytes(path).startswith(b"GGUF"):
            raise CheckpointError(f"{path} is not a GGUF file: it doesn't begin with 'GGUF'")
        try:
            reader = GGUFReader(path)
            self._metadata: Mapping[str, Any] = {key: field.contents() for key, field in reader.fields.items()}
            self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        except Exception as error:  # the reader trusts the file, so that a damaged one can raise anything
            raise CheckpointError(f"{path} is damaged or cut short: {type(error).__name__}: {error}") from error

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = _REQUIRED) -> Any:
        """One metadata value.

        Args:
            key: its name.
            kind: the type it must have.
            default: what an absent key means; without it, the key must be there.
        """
        value = self._metadata.get(key, default)
        if value is _REQUIRED:
            raise CheckpointError(f"{self.path} lacks the metadata key {key!r}")
        if value is not default and not isinstance(value, kind):
            raise CheckpointError(f"{self.path}: metadata {key} has the unusable value {value!r:.80}")
        return value
