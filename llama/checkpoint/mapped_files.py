"""Weights are used where their files are mapped: what happens to the files happens to the weights."""

import logging
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from llama.errors import CheckpointError

logger = logging.getLogger("llama")


class MappedFiles:
    """The files that a model's weights are mapped from, and how they were when it was loaded.

    A file that another one has replaced, or that was removed, stays as it was for this process. One that is written to
    in place, or cut, does not: the weights change, and where there is no file any more the process is killed (SIGBUS).

    Args:
        paths: of the files.
    """

    def __init__(self, paths: Iterable[Path] = ()) -> None:
        self._states = {path: os.stat(path) for path in paths}

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return MappedFiles, ()  # a copy of the model has its weights in memory

    def check(self) -> None:
        """Warn of a file that has changed since this was last asked.

        Raises:
            CheckpointError: a file has become shorter.
        """
        for path, before in self._states.items():
            try:
                now = os.stat(path)
            except OSError:
                continue
            if (now.st_dev, now.st_ino) != (before.st_dev, before.st_ino):
                continue
            if now.st_size < before.st_size:
                raise CheckpointError(f"{path} has been cut since the model was loaded, which uses its weights there")
            if now.st_mtime_ns != before.st_mtime_ns:
                logger.warning(
                    "%s has been written to since the model was loaded, which uses its weights there: answers may be "
                    "wrong. Build it again; with mmap=False it has a copy of its own",
                    path,
                )
                self._states[path] = now


def mapped_files(model: nn.Module) -> MappedFiles:
    """The files that weights of a model are mapped from; none where the operating system doesn't say."""
    pointers = sorted(weight.data_ptr() for weight in model.parameters() if weight.device == torch.device("cpu"))
    try:
        lines = Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines()
    except OSError:  # not Linux
        return MappedFiles()
    paths = set()
    for line in lines:
        addresses, *_, path = line.split(maxsplit=5)
        start, end = (int(address, 16) for address in addresses.split("-"))
        if path.startswith("/") and any(start <= pointer < end for pointer in pointers) and os.path.isfile(path):
            paths.add(Path(path))
    return MappedFiles(paths)
