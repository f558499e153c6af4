"""Process groups and ranks: who else works on this model, and what the processes tell each other.

One process makes no process group at all. Under torchrun there is one, NCCL on CUDA and gloo elsewhere, and on it
fairscale's model-parallel groups: the `model_parallel_size()` processes of one group share a copy of the model, and
where there are more processes than that, there are `data_parallel_size()` copies.
"""

import atexit
import contextlib
import io
import logging
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as groups

from llama.device import choose_device
from llama.errors import InputError

Value = TypeVar("Value")

TORCHRUN_VARIABLES = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


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


def setup(device: str | torch.device | None, requested_size: int | None) -> torch.device:
    """Join the other processes, if there are any, and choose this process's device.

    Under torchrun this makes the process group and fairscale's model-parallel groups, and destroys them when the
    program ends. Groups the caller made already are used as they are. A single process makes none.

    Args:
        device: e.g. "cuda" or "cpu"; None takes CUDA if there is one, else the CPU.
        requested_size: processes that share one copy of the model; None for all of them.

    Returns:
        The device, with its index: on CUDA under torchrun, `LOCAL_RANK`'s.

    Raises:
        InputError: the device isn't available, or `requested_size` doesn't divide the number of processes.
    """
    if requested_size is not None and (not isinstance(requested_size, int) or requested_size < 1):
        raise InputError(f"model_parallel_size={requested_size!r} must be a whole number of at least 1")
    launched = os.environ.keys() >= TORCHRUN_VARIABLES
    if not launched and not dist.is_initialized() and os.environ.get("WORLD_SIZE", "1") != "1":
        missing = sorted(TORCHRUN_VARIABLES - os.environ.keys())
        raise InputError(f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but {missing} are not set: start with torchrun")
    chosen = choose_device(device)
    if launched and not dist.is_initialized():
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)  # NCCL uses the current device
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        atexit.register(_destroy_groups)  # otherwise gloo's threads may abort the process as it ends
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


def broadcast_flag(flag: bool, device: torch.device) -> bool:
    """The first model-parallel rank's `flag`, on every rank.

    Args:
        device: where the ranks talk: the model's.
    """
    if model_parallel_size() == 1:
        return flag
    return bool(broadcast(torch.tensor(flag, dtype=torch.uint8, device=device)).item())


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
    """Collect a tensor of the same shape from every model-parallel rank.

    Returns:
        On the first model-parallel rank the tensors in rank order; on the others an empty list.
    """
    group = groups.get_model_parallel_group()
    parts = [torch.empty_like(tensor) for _ in range(model_parallel_size())] if model_parallel_rank() == 0 else []
    dist.gather(tensor.contiguous(), parts or None, dst=groups.get_model_parallel_src_rank(), group=group)
    return parts


def raise_on_all_ranks(error: BaseException | None) -> None:
    """Raise the error of rank 0, if it has one, on every rank. All of them must call this."""
    if dist.is_initialized():
        shared = [error]
        dist.broadcast_object_list(shared)
        error = error or shared[0]
    if error is not None:
        raise error


def object_broadcaster() -> Callable[[Value], Value]:
    """A function that gives every rank the object that rank 0 passes to it; all of them must call it.

    It waits for rank 0 as long as that takes (a person may be typing there), so it has a gloo group of its own: the
    others time out after minutes. All ranks must call `object_broadcaster` too, since it makes that group.
    """
    if not dist.is_initialized():
        return lambda value: value
    group = dist.new_group(backend="gloo", timeout=timedelta(days=365))

    def broadcast_object(value: Value) -> Value:
        shared = [value]
        dist.broadcast_object_list(shared, src=0, group=group, device=torch.device("cpu"))
        return shared[0]

    return broadcast_object


def on_first_rank(action: Callable[[], None]) -> None:
    """Wait for every rank, then run `action` on rank 0. What it raises is raised on all."""
    if dist.is_initialized():
        dist.barrier()
    error: BaseException | None = None
    if is_first_rank():
        try:
            action()
        except BaseException as raised:
            error = raised
    raise_on_all_ranks(error)
