"""Process groups and ranks: who else works on this model, and what the processes tell each other.

One process makes no process group at all. Under torchrun there is one, NCCL on CUDA and gloo elsewhere, and on it
fairscale's model-parallel groups: the `model_parallel_size()` processes of one group share a copy of the model, and
where there are more processes than that, there are `data_parallel_size()` copies.

The network's sums go over these groups, and take milliseconds. What has to wait for a disk or for a person goes over
another one, the `waiting_group`: it is always gloo, waits as long as that takes, and ends at once if a process dies.
"""

import atexit
import contextlib
import io
import itertools
import json
import logging
import os
import pickle
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as groups
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from llama.device import choose_device, gpu_identity
from llama.errors import InputError

Value = TypeVar("Value")

TORCHRUN_VARIABLES = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}

TIMEOUT = timedelta(minutes=30)  # of the process group; the model-parallel groups, which fairscale makes, have torch's
WAITING_TIMEOUT = timedelta(days=365)

# What is sent from one rank to another has a tag, since a stream's thread may send flags while other threads send other
# things.
FLAG_TAG, PART_TAG, CALL_TAG, PROCESSOR_TAG = 1, 2, 3, 4


def model_parallel_size() -> int:
    """How many processes share one copy of the model."""
    return groups.get_model_parallel_world_size() if groups.model_parallel_is_initialized() else 1


def model_parallel_rank() -> int:
    """Which part of the model this process holds, from 0."""
    return groups.get_model_parallel_rank() if groups.model_parallel_is_initialized() else 0


def data_parallel_size() -> int:
    """How many copies of the model there are."""
    return groups.get_data_parallel_world_size() if groups.model_parallel_is_initialized() else 1


def data_parallel_rank() -> int:
    """Which copy of the model this process holds a part of, from 0."""
    return groups.get_data_parallel_rank() if groups.model_parallel_is_initialized() else 0


def is_first_rank() -> bool:
    """Whether this process is rank 0, which alone prints, logs and writes files."""
    return (dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))) == 0


logging.getLogger("llama").addFilter(lambda record: is_first_rank())


class RankDevice(NamedTuple):
    """The device that a process has chosen: what the others must know of it."""

    name: str  # e.g. "cuda:0"; "" if there is none
    gpu: str  # which GPU that is: another process may have it under another number; "" if it is none
    problem: str  # why there is none


def setup(device: str | torch.device | None, requested_size: int | None) -> torch.device:
    """Join the other processes, if there are any, and choose this process's device.

    Under torchrun this makes the process group and fairscale's model-parallel groups, and destroys them when the
    program ends. Groups the caller made already are used as they are. A single process makes none. Where there are
    several processes, all must call this; on CUDA the chosen GPU becomes the process's current one.

    Args:
        device: e.g. "cuda" or "cpu"; None takes CUDA if there is one, else the CPU.
        requested_size: processes that share one copy of the model; None for all of them.

    Returns:
        The device, with its index: on CUDA under torchrun, `LOCAL_RANK`'s.

    Raises:
        InputError: the device of some process isn't available, or it is a GPU that another process has too (which only
            gloo groups allow); or `requested_size` doesn't divide the number of processes.
    """
    if requested_size is not None and (not isinstance(requested_size, int) or requested_size < 1):
        raise InputError(f"model_parallel_size={requested_size!r} must be a whole number of at least 1")
    launched = os.environ.keys() >= TORCHRUN_VARIABLES
    if not launched and not dist.is_initialized() and os.environ.get("WORLD_SIZE", "1") != "1":
        missing = sorted(TORCHRUN_VARIABLES - os.environ.keys())
        raise InputError(f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but {missing} are not set: start with torchrun")
    chosen = _join(device) if launched or dist.is_initialized() else choose_device(device)
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if chosen.type == "mps" and world_size > 1:
        raise InputError(f"device='mps' works in one process, not in {world_size}")

    if groups.model_parallel_is_initialized():
        if requested_size not in (None, model_parallel_size()):
            raise InputError(
                f"model_parallel_size={requested_size}, but this program's model-parallel group has "
                f"{model_parallel_size()} processes; leave model_parallel_size out to use that group"
            )
    elif requested_size is not None and world_size % requested_size:
        raise InputError(
            f"model_parallel_size={requested_size} doesn't divide the {world_size} process(es) there are; "
            f"start the program with: torchrun --nproc_per_node {requested_size}"
        )
    elif dist.is_initialized():
        with contextlib.redirect_stdout(io.StringIO()):  # fairscale prints the sizes
            groups.initialize_model_parallel(requested_size or world_size)
    return chosen


def _join(device: str | torch.device | None) -> torch.device:
    """Choose this process's device, and make the process group unless the caller has.

    The devices are compared before NCCL does anything, since it may hang where two processes have the same GPU.
    """
    try:
        chosen = choose_device(device)
        mine = RankDevice(str(chosen), gpu_identity(chosen), "")
    except InputError as error:  # raised by `_check_devices`, on all ranks
        mine = RankDevice("", "", str(error))
    is_cuda = mine.name.startswith("cuda")
    if dist.is_initialized():
        group = groups.get_model_parallel_group() if groups.model_parallel_is_initialized() else None
        uses_nccl = "cuda:nccl" in dist.get_backend_config(group)
        devices = [mine] * dist.get_world_size()
        dist.all_gather_object(devices, mine, group=waiting_group())
    else:
        uses_nccl = is_cuda
        store, rank, world_size = next(rendezvous("env://", timeout=TIMEOUT))
        # The store may be torchrun's, and still have what an earlier process group left there.
        store = PrefixStore(f"llama {next(_n_joined)}", store)
        devices = _exchange(mine, store, rank, world_size)
    _check_devices(device, devices, uses_nccl)
    if is_cuda:
        torch.cuda.set_device(chosen)  # which NCCL uses, and whatever of the caller's names no GPU
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if is_cuda else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=TIMEOUT,
            device_id=chosen if is_cuda else None,
        )
        atexit.register(_destroy_groups)  # otherwise gloo's threads may abort the process as it ends
        if "TORCHELASTIC_RUN_ID" in os.environ:
            threading.Thread(target=_end_with_torchrun, args=(os.getppid(),), daemon=True, name="torchrun").start()
        waiting_group()  # made here, since later several threads may need it at once
    return chosen


def _end_with_torchrun(torchrun: int) -> None:
    """End this process if torchrun, the parent that would end it, is killed."""
    while os.getppid() == torchrun:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


_n_joined = itertools.count()


def _exchange(mine: RankDevice, store: Store, rank: int, world_size: int) -> list[RankDevice]:
    """Every rank's device, in rank order, before there is a process group."""
    store.set(f"device {rank}", json.dumps(mine))
    devices = [RankDevice(*json.loads(store.get(f"device {i}"))) for i in range(world_size)]
    store.set(f"read {rank}", "")
    if rank == 0:  # the store may be part of this process: it must not end before all have read from it
        store.wait([f"read {i}" for i in range(world_size)])
    return devices


def _check_devices(device: str | torch.device | None, devices: list[RankDevice], uses_nccl: bool) -> None:
    """Raise InputError, the same on all ranks, unless the ranks can work together on their devices.

    Args:
        device: as it was asked for.
        devices: every rank's, in rank order.
        uses_nccl: whether the processes talk over NCCL on CUDA.
    """
    for rank, other in enumerate(devices):
        if other.problem:
            raise InputError(f"rank {rank}: {other.problem}")
    if len({other.name.split(":")[0] for other in devices}) > 1:
        raise InputError(
            f"device={device!r}: the processes have different kinds of devices, {[other.name for other in devices]}"
        )
    first_ranks: dict[str, int] = {}  # of each GPU
    for rank, other in enumerate(devices):
        first = first_ranks.setdefault(other.gpu, rank)
        if first != rank and other.gpu and uses_nccl:
            raise InputError(
                f"device={device!r}: ranks {first} and {rank} have the same GPU, {other.name} of {other.gpu}, and NCCL "
                f"needs one for each: leave device out, for the GPU of each process's LOCAL_RANK, or give each its own"
            )


def _destroy_groups() -> None:
    """Destroy the groups that `setup` made."""
    if dist.is_initialized():
        groups.destroy_model_parallel()
        dist.destroy_process_group()


_silence = contextlib.ExitStack()  # what `restore_stdout` has to undo


def silence_stdout() -> None:
    """On ranks above 0, discard what is printed to standard output, until `restore_stdout` or the end.

    A program's own `print` thus appears once under torchrun. Standard error is left alone.
    """
    if dist.is_initialized() and dist.get_rank() > 0:
        restore_stdout()  # so that a second build doesn't silence twice
        devnull = _silence.enter_context(open(os.devnull, "w"))  # noqa: SIM115 - closed by the stack
        _silence.enter_context(contextlib.redirect_stdout(devnull))


@atexit.register
def restore_stdout() -> None:
    """Undo `silence_stdout`."""
    _silence.close()


def broadcast(tensor: torch.Tensor) -> torch.Tensor:
    """Give every model-parallel rank the first one's values of `tensor`, in place."""
    if dist.is_initialized() and model_parallel_size() > 1:
        dist.broadcast(tensor, groups.get_model_parallel_src_rank(), group=groups.get_model_parallel_group())
    return tensor


def broadcast_flag(flag: bool) -> bool:
    """The first model-parallel rank's `flag`, on every rank.

    It is sent over gloo, so that no rank waits for its device.
    """
    if model_parallel_size() == 1:
        return flag
    first, *others = dist.get_process_group_ranks(groups.get_model_parallel_group())
    message = torch.tensor([flag], dtype=torch.uint8, device="cpu")
    if dist.get_rank() == first:
        sent = [dist.isend(message, rank, group=waiting_group(), tag=FLAG_TAG) for rank in others]
        for work in sent:
            if work is not None:
                work.wait()
    else:
        dist.recv(message, first, group=waiting_group(), tag=FLAG_TAG)
    return bool(message.item())


def sum_over_model_parallel(tensor: torch.Tensor) -> torch.Tensor:
    """The sum, in place, over the processes that share a copy of the model."""
    if model_parallel_size() > 1:
        dist.all_reduce(tensor, group=groups.get_model_parallel_group())
    return tensor


def sum_over_data_parallel(tensor: torch.Tensor) -> torch.Tensor:
    """The sum, in place, over the processes that hold the same part of each copy of the model."""
    if data_parallel_size() > 1:
        dist.all_reduce(tensor, group=groups.get_data_parallel_group())
    return tensor


def gather(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Collect a tensor of the same shape from every model-parallel rank, on the CPU and over gloo.

    The first rank may be busy writing to a disk, and its GPU may have no memory left for the others' tensors.

    Returns:
        On the first model-parallel rank the tensors in rank order; on the others an empty list.
    """
    first, *others = dist.get_process_group_ranks(groups.get_model_parallel_group())
    parts = [tensor.cpu().contiguous()]
    if dist.get_rank() != first:
        dist.send(parts[0], first, group=waiting_group(), tag=PART_TAG)
        return []
    for rank in others:
        part = torch.empty_like(parts[0])
        dist.recv(part, rank, group=waiting_group(), tag=PART_TAG)
        parts.append(part)
    return parts


def _destroy_waiting_groups() -> None:
    """Destroy the groups that `waiting_group` made; their threads may abort a process that ends with them."""
    group = _waiting_groups.pop(cast(dist.ProcessGroup, dist.group.WORLD), None) if dist.is_initialized() else None
    if group is not None:
        dist.destroy_process_group(group)
    _waiting_groups.clear()


def check_ranks_agree(facts: dict[str, str], error: BaseException | None = None, tag: int = CALL_TAG) -> None:
    """Compare something with the other model-parallel ranks, which must all call this at the same time.

    Args:
        facts: what must be the same on every rank, by name.
        error: what this rank would raise.
        tag: another one for each thread that may be here at the same time.

    Raises:
        The error of the lowest rank that has one, or else InputError naming what differs: the same on all ranks.
    """
    first, *others = ranks = dist.get_process_group_ranks(groups.get_model_parallel_group())
    mine = (facts, _picklable(error))
    try:
        if dist.get_rank() == first:
            answers = [mine, *(_receive(rank, tag) for rank in others)]
            for rank in others:
                _send(answers, rank, tag)
        else:
            _send(mine, first, tag)
            answers = _receive(first, tag)
    except RuntimeError as closed:
        raise RuntimeError("another process has ended, or has failed with an error of its own") from closed
    if error is not None:
        raise error
    for _, other_error in answers:
        if other_error is not None:
            raise other_error
    for rank, (theirs, _) in zip(ranks, answers, strict=True):
        ours = answers[0][0]
        differ = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        if differ:
            described = [f"{name} is {ours.get(name)} and {theirs.get(name)}" for name in differ]
            raise InputError(
                f"every process must make the same call, but on ranks {first} and {rank} {', '.join(described)}"
            )


def _send(value: Any, rank: int, tag: int) -> None:
    """Send an object to a rank, which must call `_receive`."""
    data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    dist.send(torch.tensor([len(data)], device="cpu"), rank, group=waiting_group(), tag=tag)
    dist.send(data, rank, group=waiting_group(), tag=tag)


def _receive(rank: int, tag: int) -> Any:
    """The object that a rank sends."""
    size = torch.zeros(1, dtype=torch.long, device="cpu")
    dist.recv(size, rank, group=waiting_group(), tag=tag)
    data = torch.empty(int(size), dtype=torch.uint8, device="cpu")
    dist.recv(data, rank, group=waiting_group(), tag=tag)
    return pickle.loads(bytes(data.tolist()))


_waiting_groups: "weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup]" = weakref.WeakKeyDictionary()


def waiting_group() -> dist.ProcessGroup:
    """The gloo group of all ranks, for whatever waits for a disk or for a person.

    NCCL ends a program that waits for minutes, and lets it wait where a process has died. This group is made at the
    first call, in which all ranks must take part, and anew when the program has made another process group.
    """
    world = cast(dist.ProcessGroup, dist.group.WORLD)  # another object for each process group
    if world not in _waiting_groups:
        if not _waiting_groups:
            atexit.register(_destroy_waiting_groups)
        _waiting_groups[world] = dist.new_group(backend="gloo", timeout=WAITING_TIMEOUT)
    return _waiting_groups[world]


def raise_on_all_ranks(error: BaseException | None) -> None:
    """Wait for every rank, which must all call this; if some have an error, raise it on all.

    A rank that has none itself raises that of the lowest rank that has one.
    """
    if dist.is_initialized():
        errors = [error] * dist.get_world_size()
        dist.all_gather_object(errors, _picklable(error), group=waiting_group())
        error = error or next(filter(None, errors), None)
    if error is not None:
        raise error


def _picklable(error: BaseException | None) -> BaseException | None:
    """The error itself, or one with its message if it can't be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@contextlib.contextmanager
def raising_on_all_ranks() -> Iterator[None]:
    """At the end of the block wait for every rank; what is raised in it on one of them is raised on all."""
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:
        error = raised
    raise_on_all_ranks(error)


def on_first_rank(action: Callable[[], None]) -> None:
    """Wait for every rank, then run `action` on rank 0. What it raises is raised on all."""
    raise_on_all_ranks(None)
    with raising_on_all_ranks():
        if is_first_rank():
            action()


def broadcast_object(value: Value) -> Value:
    """Give every rank the object that rank 0 passes; all of them must call this.

    It waits for rank 0 as long as that takes: a person may be typing there.
    """
    if not dist.is_initialized():
        return value
    shared = [value]
    dist.broadcast_object_list(shared, src=0, group=waiting_group(), device=torch.device("cpu"))
    return shared[0]
