"""The memory that a model takes, and what to say when there isn't enough."""

import contextlib
import logging
import os
from collections import Counter
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch

from llama.checkpoint.load import read_settings
from llama.checkpoint.parameters import parameter_count, parameter_shapes, quantization_of, share
from llama.device import dtype_name
from llama.distributed import model_parallel_size, raising_on_all_ranks
from llama.model import Transformer
from llama.model_args import ModelArgs
from llama.out_of_memory import out_of_memory_explained
from llama.protocols import LanguageModel
from llama.quantized import GROUP_SIZE, QuantizedWeight, check_quantize

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
    path: str | Path,
    *,
    max_seq_len: int,
    max_batch_size: int,
    dtype: torch.dtype,
    quantize: str | None = None,
    model_parallel_size: int = 1,
) -> Footprint:
    """The memory that a model would take; no weights are needed.

    Args:
        path: a `params.json` or `config.json`, or a folder with one; or any checkpoint.
        max_seq_len, max_batch_size: the size of the KV cache, in positions and in rows.
        dtype: of weights and cache.
        quantize: "int8" or "int4": the matrices in so many bits; see `llama.quantized`.
        model_parallel_size: processes that share the model.

    Raises:
        InputError: the model can't be split over so many processes, `max_seq_len` is over its limit, or an unknown
            `quantize`.
    """
    check_quantize(quantize, dtype)
    settings = read_settings(path)
    vocab_size = settings.params.get("vocab_size", -1)
    args = settings.model_args(LLAMA2_VOCAB_SIZE if vocab_size == -1 else vocab_size, max_seq_len, max_batch_size)
    args.check(model_parallel_size)
    return Footprint(
        parameter_count(args),
        weight_bytes(args, dtype, model_parallel_size, quantize),
        cache_bytes(args, dtype, model_parallel_size),
    )


def describe_model(model: LanguageModel) -> str:
    """A network in a line: its size, dtype and device, and the size of its KV cache."""
    cache = f"{model.params.max_batch_size} rows of {model.params.max_seq_len} tokens"
    if not isinstance(model, Transformer):
        return cache
    weight = model.norm.weight
    bits = next((part.bits for part in model.modules() if isinstance(part, QuantizedWeight)), None)
    dtype = dtype_name(weight.dtype) + ("" if bits is None else f" with weights of {bits} bits")
    return f"{parameter_count(model.params):,} parameters, {dtype} on {weight.device}, {cache}"


def weight_bytes(args: ModelArgs, dtype: torch.dtype, size: int, quantize: str | None = None) -> int:
    """Bytes of weights on each of `size` model-parallel processes."""
    return sum(_weight_bytes_by_quantization(args, dtype, size, quantize).values())


def _weight_bytes_by_quantization(
    args: ModelArgs, dtype: torch.dtype, size: int, quantize: str | None
) -> Counter[str | None]:
    """`weight_bytes` of the parameters that are kept in 8 bits, in 4 bits, and (under None) in the dtype."""
    total: Counter[str | None] = Counter()
    one_layer = replace(args, n_layers=1)  # the layers are alike, and an absurd number of them would take for ever
    for name, shape in parameter_shapes(one_layer).items():
        axis, start, stop = share(name, shape, one_layer, 0, size)
        count = prod(shape) if axis is None else prod(shape) // shape[axis] * (stop - start)
        quantization = quantization_of(name, one_layer, quantize, size)
        if quantization == "int8":
            rows = stop - start if axis == 0 else shape[0]
            n_bytes = count + rows * dtype.itemsize  # a scale for each row
        elif quantization == "int4":
            n_bytes = count // 2 + count // GROUP_SIZE * 2 * dtype.itemsize  # scale and zero for each group
        else:
            n_bytes = count * dtype.itemsize
        total[quantization] += n_bytes * (args.n_layers if name.startswith("layers.") else 1)
    return total


def cache_bytes(args: ModelArgs, dtype: torch.dtype, size: int) -> int:
    """Bytes of the KV cache on each of `size` model-parallel processes."""
    positions = args.max_batch_size * args.max_seq_len
    return 2 * args.n_layers * positions * max(args.kv_heads // size, 1) * args.head_size * dtype.itemsize


def check_memory(
    args: ModelArgs, device: torch.device, dtype: torch.dtype, quantize: str | None = None, mmap: bool = True
) -> None:
    """Log the memory that a model is about to take, and compare it with the free memory, on the CPU and on CUDA.

    On the CPU the operating system kills a process that uses more than there is, without an explanation. Weights in the
    dtype may be mapped from their files there (unless `mmap` is False), which needs no free memory: where only they
    don't fit, there is a warning. On CUDA everything must fit into the GPU, and it is better to know before minutes of
    loading.

    Raises:
        InputError: see `check_quantize`.
        MemoryError: on any process what is allocated is larger than the free memory.
    """
    check_quantize(quantize, dtype)
    logger.info("%s parameters: %s", f"{parameter_count(args):,}", _describe(args, device, dtype, quantize))
    free, size = free_memory(device), model_parallel_size()
    weights = _weight_bytes_by_quantization(args, dtype, size, quantize)
    mapped = weights.pop(None, 0) if device.type == "cpu" and mmap else 0
    allocated = cache_bytes(args, dtype, size) + weights.total()
    if device.type == "cpu":  # the machine's processes share its memory
        n_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        mapped, allocated = n_processes * mapped, n_processes * allocated
    with raising_on_all_ranks():
        if free is not None and allocated > free:
            raise MemoryError(f"{_out_of_memory_message(args, device, dtype, quantize)} ({free / 1e9:.2f} GB are free)")
    if free is not None and allocated + mapped > free:
        logger.warning("only %.2f GB of memory are free; %s", free / 1e9, _describe(args, device, dtype, quantize))


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on a device; None if that isn't known."""
    if device.type == "cuda" and not torch.cuda.get_device_properties(device).is_integrated:
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch would use it again
        return torch.cuda.mem_get_info(device)[0] + cached
    # A GPU without memory of its own uses the host's. Its driver counts the operating system's file cache, which holds
    # the checkpoint that was just read, as not free.
    return None if device.type == "mps" else free_host_memory()


def free_host_memory() -> int | None:
    """Bytes of memory that are available without swapping; None if the operating system doesn't say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def explain_out_of_memory(
    args: ModelArgs, device: torch.device, dtype: torch.dtype, quantize: str | None = None
) -> contextlib.AbstractContextManager[None]:
    """A context manager: where torch runs out of memory in its block, a MemoryError says what to lower."""
    return out_of_memory_explained(_out_of_memory_message(args, device, dtype, quantize))


def _describe(args: ModelArgs, device: torch.device, dtype: torch.dtype, quantize: str | None) -> str:
    """The memory that a model takes, as text."""
    size = model_parallel_size()
    weights, cache = weight_bytes(args, dtype, size, quantize) / 1e9, cache_bytes(args, dtype, size) / 1e9
    return (
        f"{weights:.2f} GB of weights{f' (quantize={quantize!r})' if quantize else ''} and {cache:.2f} GB of KV cache "
        f"(max_batch_size={args.max_batch_size} x max_seq_len={args.max_seq_len}) in {dtype_name(dtype)} on {device}"
        + (f", on each of {size} processes" if size > 1 else "")
    )


def _out_of_memory_message(args: ModelArgs, device: torch.device, dtype: torch.dtype, quantize: str | None) -> str:
    """What was asked for, and what to change."""
    changes = {None: ["quantize='int8' or 'int4'"], "int8": ["quantize='int4'"]}.get(quantize, [])
    changes += ["a 16-bit dtype"] if dtype.itemsize > 2 else []
    changes += ["a lower max_batch_size or max_seq_len"]
    return (
        f"not enough memory for {_describe(args, device, dtype, quantize)}: build with {', '.join(changes)}, or over "
        f"more processes"
    )
