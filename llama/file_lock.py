"""A lock between processes, which ends with the process that holds it, however that ends."""

import contextlib
import errno
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

logger = logging.getLogger("llama")

HELD = {errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK, errno.EDEADLK}  # the systems' errors where another holds a lock
POLL_SECONDS = 0.1


@contextlib.contextmanager
def file_lock(path: Path, timeout: float = 0.0) -> Iterator[bool]:
    """Lock a file while the block runs. It is made for that, and removed at the end.

    The system unlocks it when the process dies, so a file that a killed process has left keeps nobody out.

    Args:
        path: the file. It holds the id of the process.
        timeout: how long to wait for another process, or thread, that has locked it, in seconds.

    Yields:
        Whether it is locked. Where the file system has no locks, it isn't, and a warning says so.

    Raises:
        BlockingIOError: it is still locked by another; the message says by which process.
        OSError: the file can't be written.
    """
    descriptor = _acquire(path, timeout)
    try:
        yield descriptor is not None
    finally:
        if descriptor is None:
            path.unlink(missing_ok=True)
        elif sys.platform == "win32":  # it removes no open file
            os.close(descriptor)
            with contextlib.suppress(OSError):  # another process has locked it already
                path.unlink()
        else:
            path.unlink(missing_ok=True)
            os.close(descriptor)


def _acquire(path: Path, timeout: float) -> int | None:
    """Open and lock a file, and return its descriptor, or None where the file system has no locks: see `file_lock`."""
    deadline = time.monotonic() + timeout
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor)
        except OSError as error:
            os.close(descriptor)
            if error.errno not in HELD:
                logger.warning("%s can't be locked (%s): start nothing else that writes there", path, error.strerror)
                return None
            if time.monotonic() >= deadline:
                raise BlockingIOError(errno.EWOULDBLOCK, _holder(path), str(path)) from None
            time.sleep(POLL_SECONDS)
            continue
        if _is_at(descriptor, path):
            os.truncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
            return descriptor
        os.close(descriptor)  # whoever had locked the file has removed it since it was opened here


def _lock(descriptor: int) -> None:
    """Lock an open file, or raise OSError at once."""
    if sys.platform == "win32":
        os.lseek(descriptor, 2**30, os.SEEK_SET)  # far beyond the content: nobody could read what is locked
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        os.lseek(descriptor, 0, os.SEEK_SET)
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    """Which process has locked a file, for an error message."""
    with contextlib.suppress(OSError, ValueError):
        return f"process {int(path.read_text(encoding='ascii'))}"
    return "another process"
