"""AdamW on float32 weights, the learning rate schedule, and gradient clipping."""

import math
from typing import Any

import torch
from torch import nn

from llama.distributed import model_parallel_size, sum_over_data_parallel, sum_over_model_parallel
from llama.errors import InputError
from llama.parallel import ColumnParallelLinear, KVHeadParallelLinear, RowParallelLinear, VocabParallelEmbedding
from llama.quantized import QuantizedWeight

BETAS = (0.9, 0.95)  # as Llama 2 was trained (arXiv 2307.09288)


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Return the learning rate of a step: linear warmup to `peak`, then cosine decay towards 0 (arXiv 1608.03983).

    Args:
        step: from 0 to `steps` - 1. The rate is above 0 for all of them.
        steps: number of steps of the run.
        peak: the highest rate.
        warmup: the fraction of the steps in which the rate rises, from 0 to 1.
    """
    warmup_steps = math.ceil(warmup * steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))


def replica_count(module: nn.Module) -> int:
    """Return how many of the processes that share a model hold the same part of a layer's weight."""
    if isinstance(module, KVHeadParallelLinear):
        return max(1, model_parallel_size() // module.n_kv_heads)
    if isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding):
        return 1
    return model_parallel_size()  # norms, and LoRA matrices that aren't split


def check_trainable(model: nn.Module) -> None:
    """Raise InputError if weights of the model are quantized: these have no gradients."""
    if any(isinstance(module, QuantizedWeight) for module in model.modules()):
        raise InputError("a model with quantized weights can't be trained: build it without quantize")


class Optimizer:
    """AdamW (arXiv 1711.05101) on float32 master weights of the trainable parameters of a model.

    An update is often smaller than the distance between neighbouring bfloat16 numbers, and would be rounded away.
    Therefore the master weights and the sum of their gradients are float32, and the model computes with a rounded copy.
    A float32 model needs no copy: its parameters are the master weights.

    Args:
        model: the model; its parameters that require gradients are trained.
        weight_decay: of matrices. The weights of norms have none.

    Attributes:
        parameters: the trained parameters of the model, by name.
        master_weights: their float32 values, by name.

    Raises:
        InputError: the model is quantized.
    """

    def __init__(self, model: nn.Module, weight_decay: float) -> None:
        check_trainable(model)
        self.parameters: dict[str, nn.Parameter] = {}
        self.master_weights: dict[str, torch.Tensor] = {}
        self._replicas: dict[str, int] = {}
        modules = dict(model.named_modules())
        for name, parameter in model.named_parameters():  # a tied embedding appears once
            if parameter.requires_grad:
                # A loaded weight may be mapped from its file, or be a slice of a larger tensor: it must not be changed.
                parameter.data = parameter.detach().clone()
                self.parameters[name] = parameter
                is_float32 = parameter.dtype == torch.float32
                self.master_weights[name] = parameter if is_float32 else parameter.detach().float()
                self._replicas[name] = replica_count(modules[name.rpartition(".")[0]])
        matrices = [weight for weight in self.master_weights.values() if weight.dim() > 1]
        vectors = [weight for weight in self.master_weights.values() if weight.dim() == 1]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        # Fused on CUDA: otherwise AdamW takes memory for another copy of the weights in each step.
        self._fused = True if any(weight.is_cuda for weight in matrices + vectors) else None
        self._adamw = torch.optim.AdamW([group for group in groups if group["params"]], betas=BETAS, fused=self._fused)

    def accumulate_gradients(self) -> None:
        """Move the gradients of one batch from the model into the float32 sum of this step."""
        for name, weight in self.master_weights.items():
            parameter = self.parameters[name]
            if weight is not parameter and parameter.grad is not None:
                gradient = parameter.grad.float()
                weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
                parameter.grad = None

    def sum_gradients(self) -> None:
        """Add up the gradients of all copies of the model, each of which has seen other examples."""
        for weight in self.master_weights.values():
            if weight.grad is None:  # there was no batch for this copy
                weight.grad = torch.zeros_like(weight)
            sum_over_data_parallel(weight.grad)

    def gradient_norm(self) -> float:
        """Return the norm of the gradient of the whole model.

        A part that several model-parallel processes hold counts once.
        """
        squares = [
            weight.grad.norm() ** 2 / self._replicas[name]
            for name, weight in self.master_weights.items()
            if weight.grad is not None
        ]
        return sum_over_model_parallel(torch.stack(squares).sum()).sqrt().item()

    @torch.no_grad()
    def step(self, rate: float, clip: float) -> float:
        """Update the weights, and clear their gradients.

        Args:
            rate: the learning rate.
            clip: the maximum gradient norm; a larger gradient is scaled down to it (arXiv 1211.5063). 0: no clipping.

        Returns:
            The gradient norm before clipping.
        """
        norm = self.gradient_norm()
        if 0 < clip < norm:
            for weight in self.master_weights.values():
                if weight.grad is not None:
                    weight.grad.mul_(clip / norm)
        for group in self._adamw.param_groups:
            group["lr"] = rate
        with torch.device("cpu"):  # older torch makes AdamW's counts of steps on the default device
            self._adamw.step()
        self._adamw.zero_grad()
        self._copy_to_model()
        return norm

    def _copy_to_model(self) -> None:
        """Copy the master weights, rounded, to the model's parameters."""
        for name, weight in self.master_weights.items():
            if weight is not self.parameters[name]:
                self.parameters[name].data.copy_(weight)

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs to continue exactly from here."""
        masters = {name: weight.detach() for name, weight in self.master_weights.items()}
        return {"masters": masters, "adamw": self._adamw.state_dict()}

    def state_bytes(self) -> int:
        """The size of the tensors of `state` after a step: three float32 numbers for each weight."""
        return sum(12 * weight.numel() for weight in self.master_weights.values())

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a result of `state`."""
        for name, weight in self.master_weights.items():
            weight.copy_(state["masters"][name])
        # The state may have been saved on another device.
        groups = [group | {"fused": self._fused} for group in state["adamw"]["param_groups"]]
        self._adamw.load_state_dict(state["adamw"] | {"param_groups": groups})
        self._copy_to_model()
