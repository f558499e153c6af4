"""Tensor parallelism: the process groups, and the layers that are split over them.

One process needs none of this: no process group is made, and every layer is a plain linear layer or embedding. With
N model-parallel processes each holds 1/N of every matrix. A column-parallel layer (wq, wk, wv, w1, w3, output) holds
some of the output features; a row-parallel one (wo, w2) some of the input features, and the partial results are
summed; the embedding holds some of the words. So an attention or feed-forward block costs one sum over processes.
Where there are more processes than kv heads, several hold the same head.

The groups and the collectives, which carry gradients, are fairscale's. The layers are written here, because
fairscale's own make the whole matrix on every process before they keep a part, and can't be made on the meta device.
"""

import atexit
import contextlib
import io
import logging
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

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
from torch.nn.modules import module

from llama.errors import InputError
from llama.linear import Linear, linear

Value = TypeVar("Value")

LAUNCHED = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}  # what torchrun sets


def model_parallel_size() -> int:
    """How many processes share one copy of the model."""
    return groups.get_model_parallel_world_size() if groups.model_parallel_is_initialized() else 1


def model_parallel_rank() -> int:
    """Which part of the model is this process's, from 0."""
    return groups.get_model_parallel_rank() if groups.model_parallel_is_initialized() else 0


def data_parallel_size() -> int:
    """How many copies of the model there are, where there are more processes than share one."""
    return groups.get_data_parallel_world_size() if groups.model_parallel_is_initialized() else 1


def data_parallel_rank() -> int:
    """Which copy of the model has this process's part, from 0."""
    return groups.get_data_parallel_rank() if groups.model_parallel_is_initialized() else 0


def local_kv_heads(n_kv_heads: int) -> int:
    """How many kv heads this process holds."""
    return max(n_kv_heads // model_parallel_size(), 1)


def first_rank() -> bool:
    """Whether this is the process that speaks for all."""
    return (dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))) == 0


logging.getLogger("llama").addFilter(lambda record: first_rank())


def setup(device: str | torch.device | None, requested_size: int | None) -> torch.device:
    """Join the other processes, if there are any, and choose this process's device.

    Under torchrun this makes the process group, NCCL on CUDA and gloo elsewhere, and fairscale's model-parallel group,
    and leaves them when the program ends. Groups the caller made already are used as they are. Alone, nothing is made.

    Args:
        device: e.g. "cuda" or "cpu"; None takes CUDA if there is one, else the CPU.
        requested_size: processes that share one copy of the model; None for all of them.

    Returns:
        The device, with its index: on CUDA under torchrun, `LOCAL_RANK`'s.

    Raises:
        InputError: the device isn't there, or `requested_size` doesn't fit the processes there are.
    """
    if requested_size is not None and (not isinstance(requested_size, int) or requested_size < 1):
        raise InputError(f"model_parallel_size={requested_size!r} must be a whole number of at least 1")
    launched = os.environ.keys() >= LAUNCHED
    if not launched and not dist.is_initialized() and os.environ.get("WORLD_SIZE", "1") != "1":
        missing = sorted(LAUNCHED - os.environ.keys())
        raise InputError(f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but {missing} are not set: start with torchrun")
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if chosen.type == "cuda" and chosen.index is None:
            chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
        if chosen.type not in ("cuda", "cpu", "mps"):
            raise RuntimeError("only cuda, cpu and mps can")
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # AssertionError: this torch is built without CUDA
        raise InputError(f"device={device!r} can't be used here: {error}") from error

    if launched and not dist.is_initialized():
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)  # NCCL talks through the current device
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        atexit.register(_leave)  # else gloo's threads may abort the process as it ends
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


def _leave() -> None:
    """Give up the groups that `setup` made."""
    if dist.is_initialized():
        groups.destroy_model_parallel()
        dist.destroy_process_group()


_silence = contextlib.ExitStack()  # what `restore_stdout` has to undo


def silence_stdout() -> None:
    """Send what this process prints to nowhere, if its rank is above 0, until `restore_stdout` or the end.

    So a program's own `print` appears once under torchrun. Standard error stays as it is.
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


def sum_over_parts(tensor: torch.Tensor) -> torch.Tensor:
    """The sum, in place, over the processes that share a copy of the model."""
    if model_parallel_size() > 1:
        dist.all_reduce(tensor, group=groups.get_model_parallel_group())
    return tensor


def sum_over_copies(tensor: torch.Tensor) -> torch.Tensor:
    """The sum, in place, over the processes that hold the same part of each copy of the model."""
    if data_parallel_size() > 1:
        dist.all_reduce(tensor, group=groups.get_data_parallel_group())
    return tensor


def gather(tensor: torch.Tensor) -> list[torch.Tensor]:
    """On the first model-parallel process, what each gives, in order; on the others, nothing. Shapes are alike."""
    group = groups.get_model_parallel_group()
    parts = [torch.empty_like(tensor) for _ in range(model_parallel_size())] if model_parallel_rank() == 0 else []
    dist.gather(tensor.contiguous(), parts or None, dst=groups.get_model_parallel_src_rank(), group=group)
    return parts


def raise_together(failure: BaseException | None) -> None:
    """Raise what went wrong on the first process of all on every one; each must call this."""
    if dist.is_initialized():
        shared = [failure]
        dist.broadcast_object_list(shared)
        failure = failure or shared[0]
    if failure is not None:
        raise failure


def told_by_the_first() -> Callable[[Value], Value]:
    """A function that every process calls, and that gives each what the first of all has passed to it.

    It waits as long as that takes: a person may be thinking. Every process must call this, too. (Its group is of its
    own, since others give up after minutes.)
    """
    if not dist.is_initialized():
        return lambda value: value
    group = dist.new_group(backend="gloo", timeout=timedelta(days=365))

    def tell(value: Value) -> Value:
        told = [value]
        dist.broadcast_object_list(told, src=0, group=group, device=torch.device("cpu"))
        return told[0]

    return tell


def on_first_rank(action: Callable[[], None]) -> None:
    """Do something on the first process of all, when every process has come here; what it raises is raised on all."""
    if dist.is_initialized():
        dist.barrier()
    failure: BaseException | None = None
    if first_rank():
        try:
            action()
        except BaseException as error:
            failure = error
    raise_together(failure)


class ColumnParallelLinear(Linear):
    """`x @ weight.T`, with the output features split over the processes.

    Args:
        in_features, out_features: the whole layer's sizes; this process holds `out_features / size` of the features.
        gather_output: give every process all the features, not only its own.
    """

    def __init__(self, in_features: int, out_features: int, *, gather_output: bool = False) -> None:
        size = model_parallel_size()
        super().__init__(in_features, out_features // size)
        self.size = size
        self.gather_output = gather_output

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.size == 1:
            return super().forward(x)
        y = super().forward(copy_to_model_parallel_region(x))  # (..., out_features / size)
        return gather_from_model_parallel_region(y) if self.gather_output else y


class KVHeadParallelLinear(Linear):
    """`x @ weight.T`, with the kv heads split over the processes; with more processes than heads, some hold the same.

    Args:
        in_features: the input's size.
        n_kv_heads, head_dim: how many heads there are in all, and how many features each has.
    """

    def __init__(self, in_features: int, n_kv_heads: int, head_dim: int) -> None:
        super().__init__(in_features, local_kv_heads(n_kv_heads) * head_dim)
        self.size = model_parallel_size()
        self.n_kv_heads = n_kv_heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.size == 1:
            return super().forward(x)
        weight = self.weight
        if self.size > self.n_kv_heads:
            weight = _SumGradientOfHead.apply(
                weight, model_parallel_rank() * self.n_kv_heads // self.size, self.n_kv_heads
            )
        return linear(copy_to_model_parallel_region(x), weight)


def together(x: torch.Tensor, *layers: nn.Module) -> Sequence[torch.Tensor]:
    """Each layer's output for x: all in one product, where their weights lie side by side in memory.

    They do where `lay_side_by_side` put them. Fewer, larger products make decoding about a tenth faster on a CPU. With
    gradients, and with layers that someone has changed or watches, each layer makes its own.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not all(map(_is_plain, layers)):
        return [layer(x) for layer in layers]
    weights: list[torch.Tensor] = [layer.weight for layer in layers]  # type: ignore[misc]
    first = weights[0]
    sizes, width = [weight.shape[0] for weight in weights], first.shape[1]
    memory, end = first.untyped_storage()._cdata, first.storage_offset() + first.numel()
    for weight in weights[1:]:
        follows = weight.storage_offset() == end and weight.untyped_storage()._cdata == memory
        if not follows or weight.dtype != first.dtype:
            return [layer(x) for layer in layers]
        end += weight.numel()
    return linear(x, first.as_strided((sum(sizes), width), (width, 1))).split_with_sizes(sizes, dim=-1)


def lay_side_by_side(weights: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Copies of matrices that go on, one after another, in one piece of memory."""
    return torch.cat(list(weights)).split([len(weight) for weight in weights])


def _is_plain(layer: nn.Module) -> bool:
    """Whether what the layer does is the product with its weight, and nobody looks on."""
    ours = type(layer) is ColumnParallelLinear or type(layer) is KVHeadParallelLinear
    hooks = layer._forward_hooks or layer._forward_pre_hooks or module._global_forward_hooks
    return ours and not (hooks or module._global_forward_pre_hooks or "forward" in layer.__dict__)


class _SumGradientOfHead(torch.autograd.Function):
    """The weights of a head that several processes hold: their gradient is the sum over those processes."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, head: int, n_kv_heads: int) -> torch.Tensor:
        ctx.head, ctx.n_kv_heads = head, n_kv_heads
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        heads = gradient.new_zeros(ctx.n_kv_heads, *gradient.shape)
        heads[ctx.head] = gradient
        dist.all_reduce(heads, group=groups.get_model_parallel_group())
        return heads[ctx.head], None, None


class RowParallelLinear(Linear):
    """`x @ weight.T`, with the input features split over the processes: each takes the features it has in `x`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        size = model_parallel_size()
        super().__init__(in_features // size, out_features)
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
