"""The memory that a model takes, and what to say when there isn't enough."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from llama.checkpoint.load import read_settings
from llama.checkpoint.parameters import parameter_count
from llama.device import dtype_name
from llama.distributed import model_parallel_size
from llama.model_args import ModelArgs

logger = logging.getLogger("llama")

LLAMA2_VOCAB_SIZE = 32000  # which its params.json leaves to the tokenizer


class Footprint(NamedTuple):
    """The memory that a model takes.

    Attributes:
        parameters: of the whole model; a tied embedding counts once.
        weight_bytes: on each process.
        cache_bytes: on each process.
    """

    parameters: int
    weight_bytes: int
    cache_bytes: int


def footprint(
    path: str | Path, *, max_seq_len: int, max_batch_size: int, dtype: torch.dtype, model_parallel_size: int = 1
) -> Footprint:
    """The memory that a model would take; no weights are needed.

    Args:
        path: a `params.json` or `config.json`, or a folder with one; or any checkpoint.
        max_seq_len, max_batch_size: the size of the KV cache, in positions and in rows.
        dtype: of weights and cache.
        model_parallel_size: processes that share the model.

    Raises:
        InputError: the model can't be split over so many processes, or `max_seq_len` is over its limit.
    """
    settings = read_settings(path)
    vocab_size = settings.params.get("vocab_size", -1)
    args = settings.model_args(LLAMA2_VOCAB_SIZE if vocab_size == -1 else vocab_size, max_seq_len, max_batch_size)
    args.check(model_parallel_size)
    return Footprint(
        parameter_count(args),
        weight_bytes(args, dtype, model_parallel_size),
        cache_bytes(args, dtype, model_parallel_size),
    )


def weight_bytes(args: ModelArgs, dtype: torch.dtype, size: int) -> int:
    """Bytes of weights on each of `size` model-parallel processes."""
    return parameter_count(args, size) * dtype.itemsize


def cache_bytes(args: ModelArgs, dtype: torch.dtype, size: int) -> int:
    """Bytes of the KV cache on each of `size` model-parallel processes."""
    positions = args.max_batch_size * args.max_seq_len
    return 2 * args.n_layers * positions * max(args.kv_heads // size, 1) * args.head_size * dtype.itemsize


def check_memory(args: ModelArgs, device: torch.device, dtype: torch.dtype) -> None:
    """Log the memory that a model is about to take; on the CPU, compare it with the free memory.

    The operating system kills a process that uses more than there is, without an explanation. If the weights alone
    don't fit, there is only a warning, since they may be mapped from their files, which needs no free memory.

    Raises:
        MemoryError: the KV cache is larger than the free memory.
    """
    logger.info("%s parameters: %s", f"{parameter_count(args):,}", _describe(args, device, dtype))
    free = free_host_memory() if device.type == "cpu" else None
    if free is not None:
        processes, size = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), model_parallel_size()
        cache = processes * cache_bytes(args, dtype, size)
        if cache > free:
            raise MemoryError(f"{_out_of_memory_message(args, device, dtype)} ({free / 1e9:.2f} GB are free)")
        if cache + processes * weight_bytes(args, dtype, size) > free:
            logger.warning("only %.2f GB of memory are free; %s", free / 1e9, _describe(args, device, dtype))


def free_host_memory() -> int | None:
    """Bytes of memory that are available without swapping; None if the operating system doesn't say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


@contextlib.contextmanager
def explain_out_of_memory(args: ModelArgs, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Turn the errors by which torch runs out of memory into a MemoryError that says what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise MemoryError(_out_of_memory_message(args, device, dtype)) from error
        raise


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that there is not enough memory, on the CPU or on a GPU."""
    phrases = ("out of memory", "allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(phrase in str(error) for phrase in phrases)


def _describe(args: ModelArgs, device: torch.device, dtype: torch.dtype) -> str:
    """The memory that a model takes, as text."""
    size = model_parallel_size()
    weights, cache = weight_bytes(args, dtype, size) / 1e9, cache_bytes(args, dtype, size) / 1e9
    return (
        f"{weights:.2f} GB of weights and {cache:.2f} GB of KV cache (max_batch_size={args.max_batch_size} x "
        f"max_seq_len={args.max_seq_len}) in {dtype_name(dtype)} on {device}"
        + (f", on each of {size} processes" if size > 1 else "")
    )


def _out_of_memory_message(args: ModelArgs, device: torch.device, dtype: torch.dtype) -> str:
    """What was asked for, and what to change."""
    smaller_dtype = "a 16-bit dtype, or " if dtype.itemsize > 2 else ""
    return (
        f"not enough memory for {_describe(args, device, dtype)}: build with {smaller_dtype}a lower max_batch_size or "
        f"max_seq_len, or over more processes"
    )
