"""A staging area on disk for tensors that are saved together, so that they need not fit into memory."""

import shutil
from pathlib import Path
from types import TracebackType

import torch


class Staging:
    """A context manager that stages tensors in memory-mapped files.

    A file of weights is written in one go from all of its tensors, while the tensors come one at a time. Each is
    copied into a file of its own, and `add` returns that file mapped into memory, so that the operating system can drop
    it from memory until it is saved. At the end of the block the staged files are removed; their tensors must not be
    used any more.

    Args:
        folder: an existing folder on a disk with enough space; the files are put into a subfolder of it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / ".staging"
        self.count = 0

    def __enter__(self) -> "Staging":
        self.folder.mkdir()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A copy of a tensor, in this dtype and mapped from a file."""
        self.count += 1
        file = self.folder / str(self.count)
        converted = tensor.to(device="cpu", dtype=dtype).contiguous()
        # Written and then mapped, not written through the mapping: a full disk would kill the process there.
        file.write_bytes(converted.view(-1).view(torch.uint8).numpy().data)
        return torch.from_file(str(file), shared=True, size=converted.numel(), dtype=dtype).view(converted.shape)
