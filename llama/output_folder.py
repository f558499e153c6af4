"""Folders and files that appear when they are complete, each of them written by one process at a time.

One of the name NAME is written as `.NAME.unfinished-XXXXXXXX` beside it, and renamed at the end. Meanwhile `.NAME.lock`
is locked: a second process that would write the same is refused at once, and what a killed one has left unfinished is
removed by the next.
"""

import contextlib
import errno
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from llama.errors import InputError
from llama.file_lock import file_lock
from llama.files import as_path


def output_path(folder: str | Path) -> Path:
    """The absolute path of a folder to write, with `~` expanded and symbolic links resolved.

    The folder is written beside the place that a link leads to: on another disk, perhaps, than the link.

    Raises:
        InputError: not a path, a link that leads in a circle, or the root of a file system.
    """
    path = as_path(folder, "the folder to write")
    try:
        target = path.resolve()
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path} is not a path to a folder: {error}") from error
    if target.is_symlink():
        raise InputError(f"{path} is a symbolic link that leads in a circle; give the name of a new folder")
    if not target.name:
        raise InputError(f"{target} is there already; give the name of a new folder")
    return target


def temporary_path(target: Path) -> Path:
    """A new hidden name beside `target`, on the same file system, so that renaming to `target` is atomic."""
    return target.with_name(f".{target.name}.unfinished-{uuid.uuid4().hex[:8]}")


@contextlib.contextmanager
def exclusive(target: Path) -> Iterator[None]:
    """Keep other processes from writing a folder or file while the block runs; first remove what killed ones left.

    Args:
        target: the result of `output_path`, or a file. The folder that it is in is made if need be.

    Raises:
        InputError: another process is writing it.
        OSError: nothing can be written beside it.
    """
    with contextlib.ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            is_locked = stack.enter_context(file_lock(target.with_name(f".{target.name}.lock")))
        except BlockingIOError as error:
            raise InputError(
                f"{target} is being written by {error.strerror}: wait until that has ended, or give the name of "
                f"another one"
            ) from error
        except OSError as error:
            message = f"{error.strerror}: {target.name} can't be written into {target.parent}"
            raise OSError(error.errno, message) from error
        if is_locked:  # otherwise it may belong to a process that lives
            pattern = re.compile(rf"\.{re.escape(target.name)}\.unfinished-[0-9a-f]{{8}}")
            for leftover in target.parent.iterdir():
                if pattern.fullmatch(leftover.name):
                    remove(leftover)
        yield


def remove(path: Path) -> None:
    """Remove a folder or a file, if it can be."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def write_whole(file: Path, text: str) -> None:
    """Write a text file atomically, replacing any older one: interrupted, it leaves the older one as it was.

    Raises:
        InputError, OSError: see `exclusive`.
    """
    with exclusive(file):
        temporary = temporary_path(file)
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)


def check_free(target: Path) -> None:
    """Raise InputError unless a finished folder can be moved to `target`: there must be nothing, or an empty folder.

    An empty folder is tried out, by moving it away and back. A mount point, for example, can't be moved.
    """
    if not target.exists():
        return
    if not target.is_dir() or any(target.iterdir()):
        raise InputError(f"{target} is there already; give the name of a new folder")
    elsewhere = temporary_path(target)
    try:
        target.rename(elsewhere)
        elsewhere.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:  # a folder of a container's image can't be moved, but it can be removed
            raise InputError(
                f"{target} can't be replaced by the finished folder ({error.strerror}), as a mount point can't be: "
                f"give the name of a new folder in it, such as {target / 'model'}"
            ) from error


def move_into_place(finished: Path, target: Path) -> None:
    """Rename a finished folder to `target`, where there is nothing or an empty folder."""
    if target.exists():
        target.rmdir()
    finished.replace(target)


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Write a folder atomically: yields a temporary folder, which is renamed to `folder` when the block succeeds.

    If the block fails, the temporary folder is removed.

    Raises:
        InputError, OSError: see `output_path`, `exclusive` and `check_free`; before the block runs.
    """
    target = output_path(folder)
    with exclusive(target):
        check_free(target)
        temporary = temporary_path(target)
        temporary.mkdir()
        try:
            yield temporary
            move_into_place(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
