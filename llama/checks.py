"""What `Llama.generate` is asked for, found right before it begins; and what to say when the network fails it."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from operator import index
from typing import Any

import torch

from llama.errors import InputError
from llama.model import Transformer


def is_number(value: Any) -> bool:
    """Whether a value is a real number, of Python or numpy, and no flag."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_sampling(max_gen_len: int, temperature: float, top_p: float) -> None:
    """Raise InputError if one of these is out of range."""
    if isinstance(max_gen_len, bool) or not isinstance(max_gen_len, Integral) or max_gen_len < 0:
        raise InputError(f"max_gen_len={max_gen_len!r} must be a whole number of at least 0")
    if not is_number(temperature) or not math.isfinite(temperature) or temperature < 0:
        raise InputError(f"temperature={temperature!r} must be a number of at least 0")
    if 0 < temperature < 1e-30:
        raise InputError(f"temperature={temperature!r} is too small to divide by; 0 takes the likeliest token")
    if not is_number(top_p) or not 0 <= top_p <= 1:
        raise InputError(f"top_p={top_p!r} must be between 0 and 1")


def check_prompts(
    prompt_tokens: Sequence[Sequence[int]], max_batch_size: int, max_seq_len: int, vocab_size: int
) -> list[list[int]]:
    """The prompts as lists of ints; InputError if they don't fit the model."""
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


def explain_non_finite(model: Any, text: list[int]) -> str:
    """An error message: which layer is the first to compute NaN or infinity on these tokens, and what to try."""
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
