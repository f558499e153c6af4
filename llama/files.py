"""Path validation, JSON reading, atomic writes, memory of mapped files."""

import ctypes
import json
import mmap
import stat
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

from llama.errors import CheckpointError, InputError, MissingFileError

T = TypeVar("T")
Default = TypeVar("Default")

_REQUIRED = object()

# Of a JSON file. The largest tokenizer.json there is has 34 million bytes and 2 million items; Llama 3's half of them.
MAX_JSON_BYTES = 40_000_000
MAX_JSON_ITEMS = 2_400_000  # of its lists and objects together: each takes up to 200 bytes of memory
MAX_JSON_DEPTH = 100  # lists within lists; Python can't show what is nested much deeper


def require_path(path: str | Path, name: str) -> Path:
    """`path` as a Path to an existing file or folder, with `~` expanded.

    Args:
        path: the path.
        name: the argument or file it stands for, for the error message.

    Raises:
        InputError: not a path at all, such as a flag that took the next flag as its value.
        MissingFileError: nothing exists there; the message lists what its folder holds.
    """
    result = as_path(path, name)
    if result.exists():
        return result
    parent = next(folder for folder in result.absolute().parents if folder.is_dir())
    raise MissingFileError(f"{name}={str(path)!r} does not exist; {parent} holds {listing(parent)}")


def require_file(path: str | Path, name: str) -> Path:
    """`path` as a Path to an existing ordinary file: see `require_path`.

    Raises:
        InputError: see `require_path`; or a folder, a pipe, a device or a socket is there.
        MissingFileError: see `require_path`.
    """
    result = require_path(path, name)
    other = other_than_file(result)
    if other is not None:
        raise InputError(f"{name}={str(path)!r} is {other}, not an ordinary file")
    return result


def other_than_file(path: Path) -> str | None:
    """What stands at a path, links resolved, in place of an ordinary file; None for such a file.

    To be asked before a path is opened: opening a pipe waits for its writer, and some devices have no end.

    Raises:
        OSError: nothing is there, or its folder can't be read.
    """
    kinds = {stat.S_IFREG: None, stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(path.stat().st_mode), "a device")


def as_path(path: str | Path, name: str) -> Path:
    """`path` as a Path, whether or not anything exists there, with `~` expanded.

    Raises:
        InputError: it can't be a path.
    """
    if not isinstance(path, str | Path) or not str(path).strip() or str(path).strip().startswith("--"):
        raise InputError(f"{name}={path!r} is not a path; give the path of a folder or file")
    try:
        result = Path(path).expanduser()
        result.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such user, a null byte
        raise InputError(f"{name}={path!r:.80} is not a path: {error}") from error
    return result


def listing(folder: Path) -> str:
    """The names of the first entries of a folder, for an error message."""
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in folder.iterdir())
    return (", ".join(names[:12]) + (f", … ({len(names)} in all)" if len(names) > 12 else "")) or "nothing"


def first_bytes(path: Path, count: int = 512) -> bytes:
    """The first `count` bytes of a file of weights, vocabulary or metadata.

    Raises:
        CheckpointError: a folder, a pipe, a device or a socket, an empty file, or what a failed download leaves in a
            file's place.
    """
    try:
        other = other_than_file(path)
        if other is not None:
            content = f"; it holds {listing(path)}" if other == "a folder" else ""
            raise CheckpointError(f"{path} is {other}, not a file{content}")
        head = b""
        if path.stat().st_size > 0:  # what the system shows in files of its own may have no end, and their size is 0
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


def raise_if_unmappable(path: Path, error: Exception) -> None:
    """Raise MemoryError if `error`, from memory-mapping the file, says that the system refused so large a mapping."""
    if "Cannot allocate memory" in str(error):
        raise MemoryError(
            f"{path} ({path.stat().st_size / 1e9:.1f} GB) is larger than what this system lets a program map into "
            f"memory; allow it with `sysctl vm.overcommit_memory=1`, or add swap"
        ) from error


def release_pages(address: int, length: int) -> None:
    """Give back the memory into which a part of a mapped file has been read; what is used again is read again.

    On systems other than Linux, and for memory that is not a mapped file's, this does nothing.

    Args:
        address, length: the part, in bytes. Nobody may have written to it.
    """
    if sys.platform != "linux":
        return
    for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
        addresses, permissions, _, _, inode, *_ = line.split()
        first, end = (int(number, 16) for number in addresses.split("-"))
        start, stop = max(address, first), min(address + length, end)
        start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        if start < stop and inode != "0" and permissions.endswith("p"):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)


class Metadata:
    """The key-value pairs of a file, with a type check on every access.

    Args:
        path: the file, for error messages.
        values: its key-value pairs.
    """

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self.values = values

    @overload
    def get(self, key: str, kind: type[T]) -> T: ...

    @overload
    def get(self, key: str, kind: type[T], default: Default) -> T | Default: ...

    def get(self, key: str, kind: type[Any], default: Any = _REQUIRED) -> Any:
        """The value of a key.

        Args:
            key: its name.
            kind: the type the value must have; an int is accepted as a float.
            default: returned where the key is absent or its value null; without a default, the key is required.

        Raises:
            CheckpointError: a required key is absent, or the value has another type or is too large.
        """
        value = self.values.get(key)
        if value is None:
            if default is _REQUIRED:
                raise CheckpointError(f"{self.path} lacks {key!r}")
            return default
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise CheckpointError(f"{self.path}: {key} is {value!r:.80}, not of type {kind.__name__}")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise CheckpointError(f"{self.path}: {key} is {value!r:.80}, outside the range of 64-bit integers")
        return float(value) if kind is float else value


def read_whole(path: Path, max_bytes: int) -> bytes:
    """The content of a file of settings, of tokens or of a template.

    Raises:
        CheckpointError: see `first_bytes`; or it has more than `max_bytes`, which none of its kind needs.
    """
    first_bytes(path)
    size = path.stat().st_size
    if size > max_bytes:
        raise CheckpointError(f"{path} has {size} bytes, too many for a file of settings or of tokens")
    return path.read_bytes()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: the file can't be read, is far too long or nested too deep, or isn't a JSON object.
    """
    content = read_whole(path, MAX_JSON_BYTES)
    if sum(map(content.count, (b",", b"[", b"{"))) > MAX_JSON_ITEMS:
        raise CheckpointError(f"{path} has over {MAX_JSON_ITEMS} items, too many for a file of settings or of tokens")
    try:
        values = json.loads(content)
        check_json_depth(values)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); it begins with {content[:40]!r}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {values!r:.80}")
    return values


def check_json_depth(values: Any) -> None:
    """Raise ValueError if a JSON value has lists or objects within more than `MAX_JSON_DEPTH` others."""
    children: Iterable[Any] = [values]
    for _ in range(MAX_JSON_DEPTH + 1):
        level = [value for value in children if isinstance(value, dict | list)]
        children = (value for item in level for value in (item.values() if isinstance(item, dict) else item))
    if level:
        raise ValueError(f"it is nested more than {MAX_JSON_DEPTH} deep")


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file for people to read: indented, in UTF-8."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def writable_file(path: str | Path, name: str) -> Path:
    """`path` as the Path of a file that can be written, symbolic links resolved; its folder must exist.

    Args:
        path: the path.
        name: the argument it stands for, for the error message.

    Raises:
        InputError: not a path, or something other than a file has this name.
        MissingFileError: its folder does not exist.
    """
    file = as_path(path, name).resolve()
    require_path(file.parent, f"the folder of {name}")
    if not file.parent.is_dir() or (file.exists() and not file.is_file()):
        raise InputError(f"{name}={str(path)!r} must be the name of a file in a folder")
    return file
