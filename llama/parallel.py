"""Tensor parallelism: the process groups, and the layers that are split over them.

One process needs none of this: no process group is made, and every layer is a plain linear layer or embedding. With
N model-parallel processes each holds 1/N of every matrix. A column-parallel layer (wq, wk, wv, w1, w3, output) holds
some of the output features; a row-parallel one (wo, w2) some of the input features, and the partial results are
summed; the embedding holds some of the words. So an attention or feed-forward block costs one sum over processes.

The groups and the collectives, which carry gradients, are fairscale's. The layers are written here, because
fairscale's own make the whole matrix on every process before they keep a part, and can't be made on the meta device.
"""

import atexit
import contextlib
import io
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairscale.nn.model_parallel import initialize as groups
from fairscale.nn.model_parallel.mappings import (
    copy_to_model_parallel_region,
    gather_from_model_parallel_region,
    reduce_from_model_parallel_region,
)
from torch import nn

from llama.errors import InputError


def model_parallel_size() -> int:
    """How many processes share one copy of the model."""
    return groups.get_model_parallel_world_size() if groups.model_parallel_is_initialized() else 1


def model_parallel_rank() -> int:
    """Which part of the model is this process's, from 0."""
    return groups.get_model_parallel_rank() if groups.model_parallel_is_initialized() else 0


def setup(device: str | torch.device | None, requested_size: int | None) -> torch.device:
    """Join the other processes, if there are any, and choose this process's device.

    Under torchrun (`RANK` and `WORLD_SIZE` are set) this makes the process group, NCCL on CUDA and gloo elsewhere, and
    fairscale's model-parallel group. Groups the caller made already are used as they are. Alone, nothing is made.

    Args:
        device: e.g. "cuda" or "cpu"; None takes CUDA if there is one, else the CPU.
        requested_size: processes that share one copy of the model; None for all of them.

    Returns:
        The device, with its index: on CUDA under torchrun, `LOCAL_RANK`'s.

    Raises:
        InputError: the device isn't there, or `requested_size` doesn't fit the processes there are.
    """
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if chosen.type == "cuda" and chosen.index is None:
            chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # AssertionError: this torch is built without CUDA
        raise InputError(f"device={device!r} can't be used here: {error}") from error

    if launched and not dist.is_initialized():
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)  # NCCL talks through the current device
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    world_size = dist.get_world_size() if dist.is_initialized() else 1

    if groups.model_parallel_is_initialized():
        if requested_size not in (None, model_parallel_size()):
            raise InputError(
                f"model_parallel_size={requested_size}, but this program's model-parallel group has "
                f"{model_parallel_size()} processes; leave model_parallel_size out to use that group"
            )
    elif requested_size is not None and (requested_size < 1 or world_size % requested_size):
        raise InputError(
            f"model_parallel_size={requested_size} doesn't divide the {world_size} process(es) there are; "
            f"start the program with: torchrun --nproc_per_node {max(requested_size, 1)}"
        )
    elif dist.is_initialized():
        with contextlib.redirect_stdout(io.StringIO()):  # fairscale prints the sizes
            groups.initialize_model_parallel(requested_size or world_size)
    return chosen


_silence = contextlib.ExitStack()  # what `restore_stdout` has to undo


def silence_stdout() -> None:
    """Send what this process prints to nowhere, if its rank is above 0, until `restore_stdout` or the end.

    So a program's own `print` appears once under torchrun. It is the one thing `Llama.build` changes for the whole
    process. Standard error stays as it is.
    """
    if dist.is_initialized() and dist.get_rank() > 0:
        restore_stdout()  # so that building twice silences once
        nowhere = _silence.enter_context(open(os.devnull, "w"))  # noqa: SIM115 - closed by the stack
        _silence.enter_context(contextlib.redirect_stdout(nowhere))


@atexit.register
def restore_stdout() -> None:
    """Undo `silence_stdout`."""
    _silence.close()


def same_on_all_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The first model-parallel rank's values of `tensor`, on every rank, whatever each one's random state is."""
    if model_parallel_size() > 1:
        dist.broadcast(tensor, groups.get_model_parallel_src_rank(), group=groups.get_model_parallel_group())
    return tensor


class ColumnParallelLinear(nn.Linear):
    """`x @ weight.T`, with the output features split over the processes.

    Args:
        in_features, out_features: the whole layer's sizes; this process holds `out_features / size` of the features.
        gather_output: give every process all the features, not only its own.
    """

    def __init__(self, in_features: int, out_features: int, *, gather_output: bool = False) -> None:
        size = model_parallel_size()
        super().__init__(in_features, out_features // size, bias=False)
        self.size = size
        self.gather_output = gather_output

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.size == 1:
            return super().forward(x)
        y = super().forward(copy_to_model_parallel_region(x))  # (..., out_features / size)
        return gather_from_model_parallel_region(y) if self.gather_output else y


class RowParallelLinear(nn.Linear):
    """`x @ weight.T`, with the input features split over the processes: each takes the features it has in `x`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        size = model_parallel_size()
        super().__init__(in_features // size, out_features, bias=False)
        self.size = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y if self.size == 1 else reduce_from_model_parallel_region(y)


class VocabParallelEmbedding(nn.Embedding):
    """One vector a word, with the words split over the processes."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        size = model_parallel_size()
        super().__init__(num_embeddings // size, embedding_dim)
        self.size = size
        self.first = model_parallel_rank() * self.num_embeddings

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # there, torch would import its whole compiler to draw nothing
            super().reset_parameters()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.size == 1:
            return super().forward(tokens)
        local = tokens - self.first
        elsewhere = (local < 0) | (local >= self.num_embeddings)
        vectors = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return reduce_from_model_parallel_region(vectors.masked_fill(elsewhere[..., None], 0.0))
