"""Prompts, found right before anything is read; and what to say when the network fails."""

from collections.abc import Sequence
from operator import index
from typing import Any

import torch

from llama.errors import InputError
from llama.model import Transformer


def check_prompts(
    prompt_tokens: Sequence[Sequence[int]], rows_each: int, max_batch_size: int, max_seq_len: int, vocab_size: int
) -> list[list[int]]:
    """The prompts as lists of ints; InputError if they, with so many rows each, don't fit the model."""
    try:
        prompts = [[index(token) for token in prompt] for prompt in prompt_tokens]
    except TypeError as error:
        raise InputError(f"prompt_tokens must be a list of lists of token ids: {error}") from error
    if not prompts:
        raise InputError("an empty batch: at least one prompt is needed")
    if len(prompts) > max_batch_size:
        raise InputError(
            f"{len(prompts)} prompts given, but max_batch_size={max_batch_size}: give fewer at a time, or build with a "
            f"larger max_batch_size"
        )
    if len(prompts) * rows_each > max_batch_size:
        raise InputError(
            f"{len(prompts)} prompt(s) with {rows_each} rows each (num_return_sequences or num_beams) are more than "
            f"max_batch_size={max_batch_size}"
        )
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise InputError(f"prompt {row} is empty: it needs at least one token")
        if len(prompt) > max_seq_len:
            raise InputError(
                f"prompt {row} has {len(prompt)} tokens, but max_seq_len={max_seq_len}: shorten it, or build with a "
                f"larger max_seq_len"
            )
        outside = [token for token in prompt if not 0 <= token < vocab_size]
        if outside:
            raise InputError(f"prompt {row} holds {outside[0]}, which is outside the vocabulary of {vocab_size} tokens")
    return prompts


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
    return f"{message}, {where}, in {str(dtype).removeprefix('torch.')}: {advice}"
