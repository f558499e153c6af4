"""LoRA (arXiv 2106.09685): train two thin matrices beside each large one, which stays as it is.

    y = W x + SCALE * up(down(x))        down: in_features -> rank,  up: rank -> out_features

`up` begins as zeros, so that at first nothing changes. At the end, W + SCALE * up down takes the place of W: the
checkpoint is one like any other. What is saved is memory: AdamW's state, gradients and float32 copies are only needed
for the thin matrices, a few hundredths of the model's numbers, or less.

The thin matrices are split over processes as W is, by the same layers. Where W has some of the output features, `up`
has those; where W has some of the input features, `down` has those, and sums what comes out. The other is whole.
"""

import torch
from torch import nn

from llama.distributed import model_parallel_rank, model_parallel_size
from llama.model import Transformer
from llama.parallel import ColumnParallelLinear, KVHeadParallelLinear, Linear, RowParallelLinear, local_kv_heads

SCALE = 2.0  # alpha / rank, in the paper's terms


class LoRALinear(nn.Module):
    """A layer, and the two thin matrices beside it.

    Args:
        base: the layer; its weight stays as it is.
        rank: features between the two.
        generator: draws `down`: the same numbers for any number of processes.
    """

    def __init__(self, base: Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        size, weight = model_parallel_size(), base.weight
        out_features, in_features = weight.shape  # this process's
        by_rows = isinstance(base, RowParallelLinear)
        in_features *= size if by_rows else 1
        down: Linear
        up: Linear
        with torch.device("meta"):
            down = RowParallelLinear(in_features, rank) if by_rows else Linear(in_features, rank)
            if by_rows:
                up = Linear(rank, out_features)
            elif isinstance(base, KVHeadParallelLinear):
                up = KVHeadParallelLinear(rank, base.n_kv_heads, out_features // local_kv_heads(base.n_kv_heads))
            else:
                up = ColumnParallelLinear(rank, out_features * size)
        drawn = torch.empty(rank, in_features).uniform_(-1, 1, generator=generator) / in_features**0.5
        if by_rows:
            drawn = drawn.chunk(size, dim=1)[model_parallel_rank()]
        down.weight = nn.Parameter(drawn.to(weight))  # (rank, in_features), or this process's part of them
        up.weight = nn.Parameter(weight.new_zeros(up.weight.shape))  # (out_features, rank), likewise
        self.down, self.up = down, up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + SCALE * self.up(self.down(x))

    def merged(self) -> Linear:
        """The layer alone, with what was learned added to its weight."""
        change = SCALE * self.up.weight.float() @ self.down.weight.float()
        self.base.weight = nn.Parameter((self.base.weight.float() + change).to(self.base.weight.dtype))
        return self.base


def add_adapters(model: Transformer, rank: int, seed: int) -> None:
    """Put adapters beside every matrix of every layer, and train only those."""
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for block in model.layers:
        for part in block.children():
            for name, layer in list(part.named_children()):
                if isinstance(layer, Linear):
                    setattr(part, name, LoRALinear(layer, rank, generator))


@torch.no_grad()
def merge_adapters(model: Transformer) -> None:
    """Put merged layers in the place of adapted ones, if there are any."""
    for block in model.layers:
        for part in block.children():
            for name, layer in list(part.named_children()):
                if isinstance(layer, LoRALinear):
                    setattr(part, name, layer.merged())
