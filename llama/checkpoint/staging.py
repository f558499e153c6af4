"""Tensors that wait in files until they are written together, so that a model larger than memory can be."""

import shutil
from pathlib import Path
from types import TracebackType

import torch


class Staging:
    """Keeps copies of tensors in files, mapped into memory, until the block it is opened for ends.

    Args:
        folder: where there is room for them, in a subfolder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / ".scratch"
        self.count = 0

    def __enter__(self) -> "Staging":
        self.folder.mkdir()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def keep(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A copy of a tensor, in this number format."""
        self.count += 1
        file = self.folder / str(self.count)
        whole = tensor.to(device="cpu", dtype=dtype).contiguous()
        # Written before it is mapped: a disk that fills up under a mapping kills the process.
        file.write_bytes(whole.view(-1).view(torch.uint8).numpy().data)
        return torch.from_file(str(file), shared=True, size=whole.numel(), dtype=dtype).view(whole.shape)
