"""A network's parameters: their names, their shapes, and the slice of each that a process or a file holds.

Loading and writing use these tables for every layout and every number of processes.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import NamedTuple

from llama.int4_packing import INT4_ROWS
from llama.model_args import ModelArgs
from llama.quantized import GROUP_SIZE

# The axis along which a parameter is split over files and processes; norms are replicated.
SPLIT_AXIS = {"tok_embeddings": 0, "output": 0, "wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0}


class Share(NamedTuple):
    """The slice of a parameter from `start` to `stop` along `axis`; the whole parameter if `axis` is None."""

    axis: int | None
    start: int
    stop: int


def split_axis(name: str) -> int | None:
    """The axis along which the parameter of this name is split, or None."""
    return SPLIT_AXIS.get(name.removesuffix(".weight").split(".")[-1])


def parameter_shapes(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """The name and whole shape of every parameter of a network of these sizes."""
    heads, kv_heads = args.n_heads * args.head_size, args.kv_heads * args.head_size
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (args.vocab_size, args.dim)}
    for i in range(args.n_layers):
        shapes |= {
            f"layers.{i}.attention.wq.weight": (heads, args.dim),
            f"layers.{i}.attention.wk.weight": (kv_heads, args.dim),
            f"layers.{i}.attention.wv.weight": (kv_heads, args.dim),
            f"layers.{i}.attention.wo.weight": (args.dim, heads),
            f"layers.{i}.feed_forward.w1.weight": (args.ffn_size, args.dim),
            f"layers.{i}.feed_forward.w2.weight": (args.dim, args.ffn_size),
            f"layers.{i}.feed_forward.w3.weight": (args.ffn_size, args.dim),
            f"layers.{i}.attention_norm.weight": (args.dim,),
            f"layers.{i}.ffn_norm.weight": (args.dim,),
        }
    shapes["norm.weight"] = (args.dim,)
    if not args.tie_embeddings:
        shapes["output.weight"] = (args.vocab_size, args.dim)
    return shapes


def share(name: str, shape: tuple[int, ...], args: ModelArgs, rank: int, size: int) -> Share:
    """The slice of a parameter that one of several model-parallel processes, or files, holds.

    Args:
        name: the parameter's name.
        shape: its whole shape.
        args: the model's sizes.
        rank: which process or file.
        size: how many there are.
    """
    axis = split_axis(name)
    if axis is None:
        return Share(None, 0, 0)
    if name.endswith(("wk.weight", "wv.weight")) and size > args.kv_heads:
        first = rank * args.kv_heads // size * args.head_size  # several ranks hold the same kv head
        return Share(axis, first, first + args.head_size)
    return Share(axis, rank * shape[axis] // size, (rank + 1) * shape[axis] // size)


def quantization_of(name: str, args: ModelArgs, quantize: str | None, size: int) -> str | None:
    """How a parameter is kept on each of `size` model-parallel processes.

    An embedding keeps its dtype, unless the output shares it: then it is kept in 8 bits, for any `quantize`, since few
    tokens are likely enough to tell whether their vectors are exact, and the output is what chooses among all.

    Args:
        name: the parameter's name.
        args: the model's sizes.
        quantize: "int8" or "int4", or None.
        size: how many processes there are.

    Returns:
        "int8", "int4", or None for the dtype of the activations. In place of "int4" it is "int8" where groups of 32
        don't fit this process's share of the input.
    """
    if quantize is None or split_axis(name) is None:
        return None
    if name == "tok_embeddings.weight":
        return "int8" if args.tie_embeddings else None
    shape = list(parameter_shapes(args)[name])
    axis, start, stop = share(name, tuple(shape), args, 0, size)
    shape[axis or 0] = stop - start
    return "int8" if shape[0] % INT4_ROWS or shape[1] % GROUP_SIZE else quantize


def parameter_count(args: ModelArgs, size: int = 1) -> int:
    """The number of parameters on each of `size` model-parallel processes; a tied embedding counts once."""

    def count(n_layers: int) -> int:
        total = 0
        for name, shape in parameter_shapes(replace(args, n_layers=n_layers)).items():
            axis, start, stop = share(name, shape, args, 0, size)
            total += prod(shape) if axis is None else prod(shape) // shape[axis] * (stop - start)
        return total

    return count(0) + args.n_layers * (count(1) - count(0))  # all layers have the same sizes


def network_name(name: str, layer_prefix: str, names: Mapping[str, str]) -> str:
    """A tensor's name in our network, from its name in a file.

    Args:
        name: its name in the file, such as "blk.0.attn_q.weight".
        layer_prefix: what comes before the layer's number there, such as "blk.".
        names: names in the file, without layer and ".weight" -> names in our network.

    Returns:
        The name; for a tensor that isn't in the table its own, in brackets, which is no name in our network.
    """
    match = re.fullmatch(rf"(?:{re.escape(layer_prefix)}(\d+)\.)?(.+)\.weight", name)
    if match is None or match[2] not in names:
        return f"[{name}]"
    return f"layers.{match[1]}.{names[match[2]]}.weight" if match[1] else f"{names[match[2]]}.weight"
