"""What a network's parameters are: names, whole shapes, and what each of several processes or files holds of them.

Every layout and every number of processes goes through these tables.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import NamedTuple

from llama.model_args import ModelArgs

# The axis along which a parameter is split over files and processes; norms are whole in each.
SPLIT_AXIS = {"tok_embeddings": 0, "output": 0, "wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0}


class Share(NamedTuple):
    """A part of a parameter: from `start` to `stop` along `axis`. Without an axis, the whole."""

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
    """What one of `size` model-parallel processes, or files, holds of a parameter of this whole shape."""
    axis = split_axis(name)
    if axis is None:
        return Share(None, 0, 0)
    if name.endswith(("wk.weight", "wv.weight")) and size > args.kv_heads:
        first = rank * args.kv_heads // size * args.head_size  # several hold the same kv head
        return Share(axis, first, first + args.head_size)
    return Share(axis, rank * shape[axis] // size, (rank + 1) * shape[axis] // size)


def parameter_count(args: ModelArgs, size: int = 1) -> int:
    """How many numbers each of `size` model-parallel processes holds; a tied embedding counts once."""

    def count(n_layers: int) -> int:
        numbers = 0
        for name, shape in parameter_shapes(replace(args, n_layers=n_layers)).items():
            axis, start, stop = share(name, shape, args, 0, size)
            numbers += prod(shape) if axis is None else prod(shape) // shape[axis] * (stop - start)
        return numbers

    return count(0) + args.n_layers * (count(1) - count(0))  # every layer is alike


def our_name(name: str, layer: str, table: Mapping[str, str]) -> str:
    """A tensor's name in our network. One that isn't in the table is put in brackets, and so is unexpected.

    Args:
        name: its name in a file, such as "blk.0.attn_q.weight".
        layer: what stands before the layer's number there, such as "blk.".
        table: the names there, without layer and ".weight" -> ours.
    """
    match = re.fullmatch(rf"(?:{re.escape(layer)}(\d+)\.)?(.+)\.weight", name)
    if match is None or match[2] not in table:
        return f"[{name}]"
    return f"layers.{match[1]}.{table[match[2]]}.weight" if match[1] else f"{table[match[2]]}.weight"
