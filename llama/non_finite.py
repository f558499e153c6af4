"""What to say when the network computes NaN or infinity: which layer is the first to do so, and what to try."""

from typing import Any

import torch

from llama.device import dtype_name
from llama.model import Transformer


@torch.no_grad()
def explain_non_finite(model: Any, text: list[int], processed: bool = False) -> str:
    """An error message: which layer is the first to compute NaN or infinity on these tokens, and what to try.

    Args:
        processed: whether a logits_processor had a hand in it.
    """
    if processed:
        return "after the logits_processor, the logits of a row hold NaN or infinity, or leave no token to choose"
    message = "the network computed NaN or infinity"
    if not isinstance(model, Transformer):
        return message
    bad: list[int] = []

    def look(layer: Any, _inputs: Any, output: torch.Tensor) -> None:
        if not output.isfinite().all():
            bad.append(layer.layer_id)

    hooks = [layer.register_forward_hook(look) for layer in model.layers]
    try:
        model.hidden_states(torch.tensor([text], device=model.norm.weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    where = f"first in layer {bad[0]} of {model.n_layers}" if bad else "after the last layer"
    dtype = model.norm.weight.dtype
    advice = "a weight is damaged: get the checkpoint again"
    if dtype == torch.float16:
        advice = "if the weights are sound, its range is too small: build with dtype=torch.bfloat16 or torch.float32"
    return f"{message}, {where}, in {dtype_name(dtype)}: {advice}"
