"""LoRA (arXiv 2106.09685): train two low-rank matrices beside each weight matrix W, which stays frozen.

    y = W x + SCALE * up(down(x))        down: in_features -> rank,  up: rank -> out_features

`up` starts as zeros, so that at first nothing changes. At the end, W + SCALE * up down replaces W, and the checkpoint
is like any other. This saves memory: only the LoRA matrices, a few percent of the model's parameters, need gradients,
AdamW's state and float32 copies.

The LoRA matrices are split over model-parallel processes by the same layers as W. Where W is split by output features,
so is `up`; where W is split by input features, so is `down`, whose partial results are summed. The other one is whole.
"""

import torch
from torch import nn

from llama.distributed import model_parallel_rank, model_parallel_size
from llama.finetune.optimizer import check_trainable
from llama.model import Transformer
from llama.parallel import ColumnParallelLinear, KVHeadParallelLinear, Linear, RowParallelLinear, local_kv_heads

SCALE = 2.0  # alpha / rank, in the paper's terms


class LoRALinear(nn.Module):
    """A frozen linear layer with LoRA matrices beside it.

    Args:
        base: the layer.
        rank: the rank of the product of the LoRA matrices.
        generator: initializes `down`, with the same values for any number of processes.
    """

    def __init__(self, base: Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        size, weight = model_parallel_size(), base.weight
        out_features, in_features = weight.shape  # of this process's share of W
        split_by_input = isinstance(base, RowParallelLinear)
        in_features *= size if split_by_input else 1
        down: Linear
        up: Linear
        with torch.device("meta"):
            down = RowParallelLinear(in_features, rank) if split_by_input else Linear(in_features, rank)
            if split_by_input:
                up = Linear(rank, out_features)
            elif isinstance(base, KVHeadParallelLinear):
                up = KVHeadParallelLinear(rank, base.n_kv_heads, out_features // local_kv_heads(base.n_kv_heads))
            else:
                up = ColumnParallelLinear(rank, out_features * size)
        initial = torch.empty(rank, in_features, device="cpu").uniform_(-1, 1, generator=generator) / in_features**0.5
        if split_by_input:
            initial = initial.chunk(size, dim=1)[model_parallel_rank()]
        down.weight = nn.Parameter(initial.to(weight))  # (rank, in_features), or this process's share of it
        up.weight = nn.Parameter(weight.new_zeros(up.weight.shape))  # (out_features, rank), or this process's share
        self.down, self.up = down, up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + SCALE * self.up(self.down(x))

    def merge(self) -> Linear:
        """Add the product of the LoRA matrices to the weight of the layer, and return the layer."""
        change = SCALE * self.up.weight.float() @ self.down.weight.float()
        self.base.weight = nn.Parameter((self.base.weight.float() + change).to(self.base.weight.dtype))
        return self.base


def add_lora(model: Transformer, rank: int, seed: int) -> None:
    """Put LoRA matrices beside every weight matrix of every layer, and make them the only trainable parameters.

    Raises:
        InputError: the model is quantized.
    """
    check_trainable(model)
    generator = torch.Generator("cpu").manual_seed(seed)
    model.requires_grad_(False)
    for block in model.layers:
        for part in block.children():
            for name, layer in list(part.named_children()):
                if isinstance(layer, Linear):
                    setattr(part, name, LoRALinear(layer, rank, generator))


@torch.no_grad()
def merge_lora(model: Transformer) -> None:
    """Replace each LoRALinear of the model, if there are any, by its merged layer."""
    for block in model.layers:
        for part in block.children():
            for name, layer in list(part.named_children()):
                if isinstance(layer, LoRALinear):
                    setattr(part, name, layer.merge())
