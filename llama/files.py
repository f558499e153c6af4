"""Looking at files a user names, before anything trusts them: is it there, and is it what its name says?"""

from pathlib import Path

from llama.errors import CheckpointError, InputError, MissingFileError


def require_path(path: str | Path, what: str) -> Path:
    """`path` as a Path, if something is there.

    Args:
        what: the argument or file that is meant, for the message.

    Raises:
        InputError: not a path at all, such as a flag that took the next flag as its value.
        MissingFileError: nothing is there; the message tells what its folder holds.
    """
    if not isinstance(path, str | Path) or not str(path).strip() or str(path).strip().startswith("--"):
        raise InputError(f"{what}={path!r} is no path; give the path of a folder or file")
    try:
        found = Path(path).expanduser()
        if found.exists():
            return found
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such user, a null byte
        raise InputError(f"{what}={path!r:.80} is no path: {error}") from error
    parent = next(folder for folder in found.absolute().parents if folder.is_dir())
    raise MissingFileError(f"{what}={str(path)!r} does not exist; {parent} holds {listing(parent)}")


def listing(folder: Path) -> str:
    """The names in a folder, for a message."""
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in folder.iterdir())
    return (", ".join(names[:12]) + (f", … ({len(names)} in all)" if len(names) > 12 else "")) or "nothing"


def first_bytes(path: Path, count: int = 512) -> bytes:
    """The beginning of a file that should hold weights, a vocabulary or settings.

    Raises:
        CheckpointError: it is a folder, empty, or what a failed download leaves in its place.
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, not a file; it holds {listing(path)}")
    try:
        with path.open("rb") as file:
            head = file.read(count)
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error
    if not head:
        raise CheckpointError(f"{path} is empty: download it again")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the file itself: fetch the file with `git lfs pull`, or download it"
        )
    if head.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        raise CheckpointError(
            f"{path} is a web page, saved in place of the file: the download needs a login, or failed"
        )
    return head
