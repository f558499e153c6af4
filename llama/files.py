"""Files a user names: are they there, and what their names say? And folders, written whole or not at all."""

import contextlib
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llama.errors import CheckpointError, InputError, MissingFileError

_REQUIRED = object()


def require_path(path: str | Path, what: str) -> Path:
    """`path` as a Path, if something is there.

    Args:
        what: the argument or file that is meant, for the message.

    Raises:
        InputError: not a path at all, such as a flag that took the next flag as its value.
        MissingFileError: nothing is there; the message tells what its folder holds.
    """
    found = as_path(path, what)
    if found.exists():
        return found
    parent = next(folder for folder in found.absolute().parents if folder.is_dir())
    raise MissingFileError(f"{what}={str(path)!r} does not exist; {parent} holds {listing(parent)}")


def as_path(path: str | Path, what: str) -> Path:
    """`path` as a Path, whether something is there or not; InputError if it can't be one."""
    if not isinstance(path, str | Path) or not str(path).strip() or str(path).strip().startswith("--"):
        raise InputError(f"{what}={path!r} is no path; give the path of a folder or file")
    try:
        found = Path(path).expanduser()
        found.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such user, a null byte
        raise InputError(f"{what}={path!r:.80} is no path: {error}") from error
    return found


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


def refuse_if_unmappable(path: Path, error: Exception) -> None:
    """Raise MemoryError if that is why a file couldn't be mapped into memory."""
    if "Cannot allocate memory" in str(error):
        raise MemoryError(
            f"{path} ({path.stat().st_size / 1e9:.1f} GB) is larger than what this system lets a program map into "
            f"memory; allow it with `sysctl vm.overcommit_memory=1`, or add swap"
        ) from error


class Metadata:
    """Named values that a file holds, each asked for with the type it must have."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self.values = values

    def get(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        """One value.

        Args:
            key: its name.
            kind: the type it must have; a whole number serves as a float.
            default: what an absent key means, and a null one; without it, the key must be there.

        Raises:
            CheckpointError: the key is absent, or its value is of another type.
        """
        value: Any = self.values.get(key)
        if value is None:
            if default is _REQUIRED:
                raise CheckpointError(f"{self.path} lacks {key!r}")
            return default
        kinds: Any = (int, float) if kind is float else kind
        if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
            raise CheckpointError(f"{self.path}: {key} is {value!r:.80}, which is no {kind.__name__}")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise CheckpointError(f"{self.path}: {key} is {value!r:.80}, which is no {kind.__name__} there can be")
        return float(value) if kind is float else value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: the file can't be read, or holds something else.
    """
    head = first_bytes(path)
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); it begins with {head[:40]!r}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {found!r:.80}")
    return found


def writable_file(path: str | Path, what: str) -> Path:
    """`path` as a Path, if a file can get this name; raises what `require_path` does for its folder."""
    file = as_path(path, what).resolve()  # not the link to it
    require_path(file.parent, f"the folder of {what}")
    if not file.parent.is_dir() or (file.exists() and not file.is_file()):
        raise InputError(f"{what}={str(path)!r} must be the name of a file in a folder")
    return file


def write_whole(file: Path, text: str) -> None:
    """Write a file that gets its name only when all of it is written; one of that name is replaced."""
    scratch = file.with_name(f".{file.name}.unfinished-{uuid.uuid4().hex[:8]}")
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(file)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def free_path(folder: str | Path) -> Path:
    """The absolute path of a folder to write; InputError if one is there already, with something in it, or a file."""
    target = as_path(folder, "the folder to write").absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} is there already; give the name of a new folder")
    return target


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to write into, which gets its name, `folder`, only when the block has ended well.

    Whatever interrupts the writing, no folder is left that looks finished.

    Raises:
        InputError: there is a folder of that name already, with something in it, or a file.
    """
    target = free_path(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.unfinished-{uuid.uuid4().hex[:8]}")
    scratch.mkdir()
    try:
        yield scratch
        if target.exists():
            target.rmdir()
        scratch.replace(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
