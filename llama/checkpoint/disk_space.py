"""Disks that are full: foreseen before anything is written, and explained when it happens all the same."""

import contextlib
import errno
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

# Errors of a full disk, of a quota, and of a file system that has no larger files. safetensors has them in its message,
# and torch hides them behind errors of its own.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
HIDDEN = re.compile(rf"unexpected pos|PytorchStreamWriter failed|os error ({'|'.join(map(str, FULL))})\)")


def check_disk_space(folder: Path, needed: int, disk: Path) -> None:
    """Raise OSError if there is less free disk space than writing takes.

    Args:
        folder: what is written, for the error message.
        needed: in bytes; 0 for a small file.
        disk: an existing folder on the disk.
    """
    free = shutil.disk_usage(disk).free
    if needed > free:
        message = f"writing takes {needed / 1e9:.1f} GB, and only {free / 1e9:.1f} GB are free"
        raise OSError(errno.ENOSPC, message, str(folder))


@contextlib.contextmanager
def full_disk_explained(folder: Path, needed: int, disk: Path) -> Iterator[None]:
    """Raise one kind of OSError for all the errors by which a full disk shows itself in the block.

    Args: see `check_disk_space`.
    """
    free = shutil.disk_usage(disk).free
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not (error.errno in FULL if isinstance(error, OSError) else HIDDEN.search(str(error))):
            raise
        message = (
            f"the disk takes no more: writing takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB were free before "
            f"(or less, if there is a quota or a limit on the size of files)"
        )
        raise OSError(errno.ENOSPC, message, str(folder)) from error
