"""Tensor parallelism: the layers that are split over processes.

With N model-parallel processes each holds 1/N of every matrix. A column-parallel layer (wq, wk, wv, w1, w3, output)
holds some of the output features; a row-parallel one (wo, w2) some of the input features, and the partial results are
summed; the embedding holds some of the vocabulary. So an attention or feed-forward block costs one sum over the
processes (arXiv 1909.08053). Where there are more processes than kv heads, several hold the same head. In one process
every layer is a plain linear layer or embedding.

The collectives, which carry gradients, are fairscale's. The layers are written here, because fairscale's own make the
whole matrix on every process before they keep a part, and can't be made on the meta device.
"""

from typing import Any

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

from llama.cpu_matmul import linear
from llama.distributed import model_parallel_rank, model_parallel_size
from llama.quantized import Int8Weight, QuantizedWeight


def local_kv_heads(n_kv_heads: int) -> int:
    """How many kv heads this process holds."""
    return max(n_kv_heads // model_parallel_size(), 1)


class Linear(nn.Linear):
    """`x @ weight.T`, without a bias. The weight may be quantized."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x, self.weight)

    @staticmethod
    def product(x: torch.Tensor, weight: torch.Tensor | QuantizedWeight) -> torch.Tensor:
        """`x @ weight.T`"""
        return weight(x) if isinstance(weight, QuantizedWeight) else linear(x, weight)


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
        if self.size > self.n_kv_heads and not isinstance(weight, QuantizedWeight):
            head = model_parallel_rank() * self.n_kv_heads // self.size
            weight = _SumGradientOfHead.apply(weight, head, self.n_kv_heads)  # type: ignore[no-untyped-call]
        return self.product(copy_to_model_parallel_region(x), weight)


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
    """One vector for each token of the vocabulary, which is split over the processes."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        size = model_parallel_size()
        super().__init__(num_embeddings // size, embedding_dim)
        self.size = size
        self.first = model_parallel_rank() * self.num_embeddings

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # there, torch would import its whole compiler to initialize nothing
            super().reset_parameters()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.size == 1:
            return self.vectors(tokens)
        local = tokens - self.first
        elsewhere = (local < 0) | (local >= self.num_embeddings)
        vectors = self.vectors(local.masked_fill(elsewhere, 0))
        return reduce_from_model_parallel_region(vectors.masked_fill(elsewhere[..., None], 0.0))

    def vectors(self, tokens: torch.Tensor) -> torch.Tensor:
        """The vectors of tokens of this process's share."""
        if isinstance(self.weight, Int8Weight):
            return self.weight.rows(tokens)
        return F.embedding(tokens, self.weight)
