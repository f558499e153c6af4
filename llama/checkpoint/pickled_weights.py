"""PyTorch's files of weights (`.pth`, `.bin`): a zip file with a pickle, which names tensors, and the data of each.

A pickle is a little program: its instructions (`pickletools` describes them) may call any function by its name. Even
what `torch.load(weights_only=True)` still lets a file call is more than weights need. So before torch sees a file,
its instructions are followed here, without running any, and only those by which `torch.save` stores a dictionary of
tensors are let through.
"""

import pickletools
import zipfile
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llama.checkpoint.base import check_dtypes
from llama.errors import CheckpointError
from llama.files import first_bytes, raise_if_unmappable

# A list of 10,000 tensors takes 1 MB and 300,000 instructions.
MAX_DIRECTORY_BYTES = 2**24  # of the zip file: some 100 for each tensor
MAX_PICKLE_BYTES = 2**24
MAX_INSTRUCTIONS = 2**19
MAX_AXES = 8

# The classes of a tensor's data, with the bytes of an element. (Integers have a clearer error message later on.)
ELEMENT_SIZES = {
    "torch.DoubleStorage": 8,
    "torch.FloatStorage": 4,
    "torch.HalfStorage": 2,
    "torch.BFloat16Storage": 2,
    "torch.LongStorage": 8,
    "torch.IntStorage": 4,
    "torch.ShortStorage": 2,
    "torch.CharStorage": 1,
    "torch.ByteStorage": 1,
    "torch.BoolStorage": 1,
}
ORDERED_DICT = "collections.OrderedDict"
REBUILD_TENSOR = "torch._utils._rebuild_tensor_v2"
REBUILD_PARAMETER = "torch._utils._rebuild_parameter"
ALLOWED_GLOBALS = {*ELEMENT_SIZES, ORDERED_DICT, REBUILD_TENSOR, REBUILD_PARAMETER}


class Item(Enum):
    """What a pickle builds, where only its kind matters."""

    DICT = "dict"
    TENSOR = "tensor"


class Global(NamedTuple):
    """A class or function, by its full name."""

    name: str


class Storage(NamedTuple):
    """The data of one or several tensors: the number of elements, and the class that tells their type."""

    length: int
    kind: str


# Instructions that put their argument on the stack, and those that put a constant there.
LITERALS = ("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1")
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "EMPTY_DICT": Item.DICT}


def open_pickled_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.pth` or `.bin` file, memory-mapped. A pickle that would run code is refused.

    Raises:
        CheckpointError: not a PyTorch file, a damaged or hostile one, or one that holds something other than tensors.
        MemoryError: the system refuses to map so large a file.
    """
    head, size = first_bytes(path), path.stat().st_size
    if not head.startswith(b"PK"):
        raise CheckpointError(
            f"{path} ({size} bytes) is not a PyTorch file: it begins with {head[:16]!r}. If it was "
            f"saved by a PyTorch older than 1.6, load it there and save it again with torch.save"
        )
    try:
        check_pickle(path, *_read_archive(path))
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged or hostile zip or pickle can make the readers raise anything
        raise_if_unmappable(path, error)
        raise CheckpointError(
            f"{path} ({size} bytes) is damaged or cut short: download it again ({type(error).__name__}: {error!s:.200})"
        ) from error
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                f"{path} holds something other than named tensors: {name!r:.80} is a {type(tensor).__name__}"
            )
        if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: {name} has shape {tuple(tensor.shape)}, larger than its data in the file")
    check_dtypes(path, tensors)
    return {name: tensor.detach() for name, tensor in tensors.items()}  # a saved Parameter would ask for its gradient


def _read_archive(path: Path) -> tuple[bytes, dict[str, int]]:
    """The pickle in a zip file, and the size of each tensor's data by its key.

    Raises:
        ValueError: the entries of the zip file are not those that `torch.save` writes.
    """
    if _directory_length(path) > MAX_DIRECTORY_BYTES:
        raise ValueError("the zip file's list of contents is too long for a file of weights")
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        # torch's reader ignores case; which of two entries it took would not be certain.
        if len({name.lower() for name in entries}) < len(archive.infolist()):
            raise ValueError("several entries of the zip file have the same name")
        for name, entry in entries.items():
            if entry.file_size != entry.compress_size or entry.header_offset + entry.file_size > path.stat().st_size:
                raise ValueError(f"{name} claims {entry.file_size} bytes")
        root = next(iter(entries)).split("/")[0]
        pickle = entries[f"{root}/data.pkl"]
        if pickle.file_size > MAX_PICKLE_BYTES:
            raise ValueError(f"{pickle.filename} has {pickle.file_size} bytes, too many for a list of tensors")
        prefix = f"{root}/data/"
        data = {name: entry.file_size for name, entry in entries.items() if name.startswith(prefix)}
        return archive.read(pickle), {name.removeprefix(prefix): size for name, size in data.items()}


def _directory_length(path: Path) -> int:
    """The length in bytes of a zip file's list of contents, all of which `zipfile` would make into objects.

    Python's reader of zip files and torch's take the list from different places: the one from right before the records
    at the file's end, the other from where these records say it is. Both must be the same list, or torch would read
    another pickle than the one that was checked.

    Raises:
        ValueError: the file doesn't end as `torch.save` ends it: with the list, and a record of 22 bytes; between them
            may be a record of 56 bytes with larger numbers, and one of 20 bytes that leads to it.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - 98))
        end = file.read()
    has_large_record = end.startswith(b"PK\6\6")
    if end[-22:-18] != b"PK\5\6" or has_large_record != (end[-42:-38] == b"PK\6\7"):
        raise ValueError("it doesn't end as a zip file")
    numbers, end_of_directory = end[-10:-2], size - 22
    if has_large_record:
        numbers, end_of_directory = end[40:56], size - 98
        if int.from_bytes(end[64:72], "little") != end_of_directory:
            raise ValueError("its last records don't follow each other")
    half = len(numbers) // 2
    length, start = (int.from_bytes(number, "little") for number in (numbers[:half], numbers[half:]))
    if start + length != end_of_directory:
        raise ValueError("its list of contents is not where it is said to be")
    return length


def check_pickle(path: Path, pickle: bytes, data_sizes: Mapping[str, int]) -> None:
    """Follow the instructions of a pickle, and raise an exception unless all they do is to name tensors.

    Args:
        path: the file, for error messages.
        pickle: the instructions.
        data_sizes: the key of each tensor's data in the file -> its bytes.

    Raises:
        CheckpointError: it would call a function that weights don't need, or holds something other than named tensors.
        Exception: it is damaged, or a tensor reaches beyond its data.
    """
    stacks: list[list[Any]] = [[]]  # the last one holds what has been built since the last MARK
    memo: dict[Any, Any] = {}
    storages: dict[str, Storage] = {}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(pickle)):
        name, stack = opcode.name, stacks[-1]
        if count == MAX_INSTRUCTIONS:
            raise ValueError(f"over {MAX_INSTRUCTIONS} instructions, too many for a list of tensors")
        if name in LITERALS:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name == "GLOBAL":
            function = str(argument).replace(" ", ".")
            if function not in ALLOWED_GLOBALS:
                raise CheckpointError(
                    f"{path} would call {function:.80} while it is read, which no file of weights needs: refused, "
                    f"not run"
                )
            stack.append(Global(function))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            stacks.append([])
        elif name == "TUPLE":
            items = stacks.pop()
            stacks[-1].append(tuple(items))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            items = [stack.pop() for _ in range(int(name[-1]))]
            stack.append(tuple(reversed(items)))
        elif name in ("BINPERSID", "REDUCE"):
            arguments = stack.pop()
            try:
                if name == "BINPERSID":
                    stack.append(_checked_storage(arguments, storages, data_sizes))
                else:
                    stack.append(_checked_call(stack.pop(), arguments))
            except ValueError as error:
                last_name = next((item for items in stacks[::-1] for item in items[::-1] if isinstance(item, str)), "")
                raise ValueError(f"{last_name!r:.80}: {error}") from error
        elif name in ("SETITEM", "SETITEMS"):
            items = stacks.pop() if name == "SETITEMS" else [stack.pop(), stack.pop()][::-1]
            if not all(isinstance(key, str) for key in items[::2]) or stacks[-1][-1] is not Item.DICT:
                raise CheckpointError(f"{path} holds something other than named tensors")
        elif name == "BUILD":  # a state_dict() has an attribute with version numbers
            if stack.pop() is not Item.DICT or stack[-1] is not Item.DICT:
                raise ValueError("attributes of something other than a dictionary")
        elif name == "PROTO" and argument != 2:
            raise CheckpointError(f"{path} is a pickle of protocol {argument}: save it with torch.save's default, 2")
        elif name == "STOP" and stack[-1] is not Item.DICT:
            raise CheckpointError(f"{path} holds something other than named tensors")
        elif name not in ("PROTO", "STOP"):
            raise CheckpointError(f"{path} holds something other than named tensors: its pickle has {name}")


def _checked_storage(identifier: Any, storages: dict[str, Storage], data_sizes: Mapping[str, int]) -> Storage:
    """The data that a pickle refers to; `storages` remembers what it has referred to.

    Raises:
        ValueError: it isn't in the file, or has fewer bytes there, or was another kind of data before.
    """
    match identifier:
        case ("storage", Global(kind), str(key), str(), int(length)) if kind in ELEMENT_SIZES:
            storage = Storage(length, kind)
        case _:
            raise ValueError("a reference to something other than the data of a tensor")
    if not 0 <= length * ELEMENT_SIZES[kind] <= data_sizes.get(key, -1):
        raise ValueError(f"data/{key:.20} has {data_sizes.get(key, 'no')} bytes, too few for {length} elements")
    if storages.setdefault(key, storage) != storage:
        raise ValueError(f"data/{key:.20} is used as {storages[key]} and as {storage}")
    return storage


def _checked_call(function: Any, arguments: Any) -> Item:
    """What a call returns.

    Raises:
        ValueError: its arguments are not those that `torch.save` writes, or a tensor reaches beyond its data.
    """
    match function, arguments:
        case Global(name), () if name == ORDERED_DICT:
            return Item.DICT
        case Global(name), (Item.TENSOR, bool(), Item.DICT) if name == REBUILD_PARAMETER:
            return Item.TENSOR
        case Global(name), (Storage() as storage, int(offset), tuple(size), tuple(stride), bool(), Item.DICT) if (
            name == REBUILD_TENSOR
        ):
            if not all(isinstance(number, int) and 0 <= number < 2**63 for number in (offset, *size, *stride)):
                raise ValueError("a tensor whose shape, stride or offset are not whole numbers of at least 0")
            if len(size) > MAX_AXES:
                raise ValueError(f"a tensor of {len(size)} axes")
            last = sum((count - 1) * step for count, step in zip(size, stride, strict=True))
            if min(size, default=1) > 0 and offset + last >= storage.length:
                raise ValueError(f"a tensor of shape {size!r:.80} in {storage.length} elements")
            return Item.TENSOR
    raise ValueError("a call that torch.save would not write")
