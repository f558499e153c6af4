"""From gradients to better weights: AdamW, the learning rate's course, and a limit to the length of a step."""

import math
from typing import Any

import torch
from torch import nn

from llama.distributed import model_parallel_size, sum_over_data_parallel, sum_over_model_parallel
from llama.parallel import ColumnParallelLinear, KVHeadParallelLinear, RowParallelLinear, VocabParallelEmbedding

BETAS = (0.9, 0.95)  # as Llama 2 was trained (arXiv 2307.09288)


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """The learning rate of a step: a straight line up to `peak`, then half a cosine down to 0 (arXiv 1608.03983).

    Args:
        step: from 0 to `steps` - 1. None of them has a rate of 0.
        warmup: the part of the steps in which the rate rises, from 0 to 1.
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


def holders(module: nn.Module) -> int:
    """How many of the processes that share a model hold the same numbers of a layer."""
    if isinstance(module, KVHeadParallelLinear):
        return max(1, model_parallel_size() // module.n_kv_heads)
    if isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding):
        return 1
    return model_parallel_size()  # norms, and what LoRA adds without splitting it


class Optimizer:
    """AdamW (arXiv 1711.05101) on float32 copies of the parameters of a model that are to be trained.

    A step of training is often smaller than the distance between two neighbouring bfloat16 numbers, and would be
    rounded away. So the weights that are trained, and the sum of their gradients, are kept in float32; the model
    computes with rounded copies. In float32 there is nothing to round, and no copy.

    Args:
        model: those of its parameters that want gradients are trained.
        weight_decay: of matrices; norms have none.
    """

    def __init__(self, model: nn.Module, weight_decay: float) -> None:
        self.parameters: dict[str, nn.Parameter] = {}
        self.masters: dict[str, torch.Tensor] = {}
        self._holders: dict[str, int] = {}
        modules = dict(model.named_modules())
        for name, parameter in model.named_parameters():  # a tied embedding comes once
            if parameter.requires_grad:
                # Memory of its own: a loaded weight may be a file's, mapped, or a part of a larger tensor.
                parameter.data = parameter.detach().clone()
                self.parameters[name] = parameter
                self.masters[name] = parameter if parameter.dtype == torch.float32 else parameter.detach().float()
                self._holders[name] = holders(modules[name.rpartition(".")[0]])
        matrices = [master for master in self.masters.values() if master.dim() > 1]
        others = [master for master in self.masters.values() if master.dim() == 1]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        self._adamw = torch.optim.AdamW([group for group in groups if group["params"]], betas=BETAS)

    def add_gradients(self) -> None:
        """Add the gradients of one batch to the sum of this step's, in float32."""
        for name, master in self.masters.items():
            parameter = self.parameters[name]
            if master is not parameter and parameter.grad is not None:
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None

    def sum_gradients(self) -> None:
        """Add up the gradients of all copies of the model, each of which has read other examples."""
        for master in self.masters.values():
            if master.grad is None:  # there were no examples left for this copy
                master.grad = torch.zeros_like(master)
            sum_over_data_parallel(master.grad)

    def gradient_norm(self) -> float:
        """The length of the gradient of the whole model, as one vector.

        Each process has the gradients of the parts it holds. What several of them hold must count once.
        """
        squares = [
            master.grad.norm() ** 2 / self._holders[name]
            for name, master in self.masters.items()
            if master.grad is not None
        ]
        return sum_over_model_parallel(torch.stack(squares).sum()).sqrt().item()

    @torch.no_grad()
    def step(self, rate: float, clip: float) -> float:
        """Make one step against the gradient, and forget it.

        Args:
            rate: the learning rate.
            clip: a gradient longer than this is shortened to it (arXiv 1211.5063); 0 for no limit.

        Returns:
            The length that the gradient had.
        """
        norm = self.gradient_norm()
        if 0 < clip < norm:
            for master in self.masters.values():
                if master.grad is not None:
                    master.grad.mul_(clip / norm)
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._adamw.step()
        self._adamw.zero_grad()
        self._round()
        return norm

    def _round(self) -> None:
        """Give the model the weights as they are now."""
        for name, master in self.masters.items():
            if master is not self.parameters[name]:
                self.parameters[name].data.copy_(master)

    def state(self) -> dict[str, Any]:
        """All that a later process needs to go on just so."""
        masters = {name: master.detach() for name, master in self.masters.items()}
        return {"masters": masters, "adamw": self._adamw.state_dict()}

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        for name, master in self.masters.items():
            master.copy_(state["masters"][name])
        self._adamw.load_state_dict(state["adamw"])
        self._round()
