"""What a call can ask for: how tokens are chosen, and when an answer ends."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from numbers import Integral, Real
from operator import index
from typing import Any, Literal, TypedDict

import torch

from llama.errors import InputError

LogitsProcessor = Callable[[list[list[int]], torch.Tensor], torch.Tensor]


class SamplingOptions(TypedDict, total=False):
    """The keyword arguments that `Llama.generate`, `text_completion`, `chat_completion` and their streams share."""

    top_k: int | None  # draw from this many of the likeliest tokens; then from the nucleus of these
    num_return_sequences: int  # answers to each prompt: first all of the first prompt's, then all of the second's, …
    num_beams: int  # with more than 1, search for the likeliest answer, this many at a time, instead of drawing
    length_penalty: float  # a beam's score is its log-probability / length ** length_penalty
    # True: the search ends with num_beams answers found. False: when the best beam's score, for its length so far, is
    # no better than theirs. "never": when its score for the greatest length isn't.
    early_stopping: bool | Literal["never"]
    stop: str | Iterable[str] | None  # texts that end an answer, and aren't part of it
    logits_processor: LogitsProcessor | None  # (each row's ids so far, logits (rows, vocab_size)) -> logits
    seed: int | None  # draw from a generator of this call's own
    reuse_cache: bool  # read only what the cache doesn't hold yet of the last call's prompts and answers. (Whoever
    # changes the weights in between must not ask for it.)


@dataclass(frozen=True)
class SamplingParams:
    """The arguments of one call, checked. Applied in this order: logits_processor, temperature, top_k, top_p.

    Raises:
        InputError: a value out of range, or a combination that makes no sense.
        TypeError: an argument there isn't.
    """

    max_gen_len: int
    temperature: float = 0.6
    top_p: float = 0.9
    _: KW_ONLY
    top_k: int | None = None
    num_return_sequences: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    stop: str | Iterable[str] | None = None
    logits_processor: LogitsProcessor | None = None
    seed: int | None = None
    reuse_cache: bool = False

    def __post_init__(self) -> None:
        if self.stop is not None:
            texts = (self.stop,) if isinstance(self.stop, str) else self.stop
            if not isinstance(texts, Iterable):
                raise InputError(f"stop={self.stop!r:.80} must be a text or a list of texts")
            object.__setattr__(self, "stop", tuple(texts))
        check_count("max_gen_len", self.max_gen_len, 0)
        if not is_number(self.temperature) or not math.isfinite(self.temperature) or self.temperature < 0:
            raise InputError(f"temperature={self.temperature!r} must be a number of at least 0")
        if 0 < self.temperature < 1e-30:
            raise InputError(f"temperature={self.temperature!r} is too small to divide by; 0 takes the likeliest token")
        if not is_number(self.top_p) or not 0 <= self.top_p <= 1:
            raise InputError(f"top_p={self.top_p!r} must be between 0 and 1")
        if self.top_k is not None:
            check_count("top_k", self.top_k, 1)
        check_count("num_return_sequences", self.num_return_sequences, 1)
        check_count("num_beams", self.num_beams, 1)
        if not is_number(self.length_penalty) or not -20 <= self.length_penalty <= 20:
            raise InputError(f"length_penalty={self.length_penalty!r} must be a number between -20 and 20")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise InputError(f"early_stopping={self.early_stopping!r} must be True, False or 'never'")
        if not all(isinstance(text, str) and text for text in self.stop_texts):
            raise InputError(f"stop={self.stop!r:.80} must be a text or a list of texts, none of them empty")
        if self.logits_processor is not None and not callable(self.logits_processor):
            raise InputError(
                f"logits_processor={self.logits_processor!r:.80} must be a function (tokens, logits) -> logits"
            )
        if self.seed is not None:
            check_count("seed", self.seed, 0)
            if self.seed >= 2**64:
                raise InputError(f"seed={self.seed} must be below 2**64")
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.num_beams > 1:
            # The defaults of temperature and top_p can't be told from what wasn't said.
            if self.temperature not in (0, 0.6) or self.top_p not in (1, 0.9):
                raise InputError(
                    f"num_beams={self.num_beams} searches for the likeliest answer and draws nothing, so that "
                    f"temperature={self.temperature} and top_p={self.top_p} mean nothing: leave them out"
                )
            for name in ("top_k", "seed"):
                if getattr(self, name) is not None:
                    raise InputError(
                        f"num_beams={self.num_beams} searches for the likeliest answer and draws nothing, so that "
                        f"{name}={getattr(self, name)} means nothing: leave it out"
                    )
            if self.num_return_sequences > self.num_beams:
                raise InputError(
                    f"num_return_sequences={self.num_return_sequences} is more than the num_beams={self.num_beams} "
                    f"answers that are found"
                )
        else:
            if self.length_penalty != 1 or self.early_stopping is not False:
                raise InputError(
                    "length_penalty and early_stopping are for beams: give num_beams, too, or leave them out"
                )
            if self.num_return_sequences > 1 and (self.temperature == 0 or self.top_p == 0 or self.top_k == 1):
                raise InputError(
                    f"num_return_sequences={self.num_return_sequences} answers would all be the same, since the "
                    f"likeliest token is taken each time: give a temperature above 0, or num_beams"
                )

    @property
    def stop_texts(self) -> tuple[Any, ...]:
        return tuple(self.stop or ())

    def generator(self, device: torch.device) -> torch.Generator | None:
        """This call's own source of randomness, or None for torch's default one."""
        return None if self.seed is None else torch.Generator(device).manual_seed(int(self.seed))

    def process(self, texts: list[list[int]], logits: torch.Tensor) -> torch.Tensor:
        """The logits, (rows, vocab_size) float32, as the call's logits_processor has them."""
        if self.logits_processor is None:
            return logits
        found = self.logits_processor(texts, logits.clone())
        if not isinstance(found, torch.Tensor) or found.shape != logits.shape:
            raise InputError(
                f"logits_processor must return logits of shape {tuple(logits.shape)}, not "
                f"{tuple(found.shape) if isinstance(found, torch.Tensor) else found!r}"
            )
        return found.to(logits)


def is_number(value: Any) -> bool:
    """Whether a value is a real number, of Python or numpy, and no flag."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_count(name: str, value: Any, least: int) -> None:
    """Raise InputError if an argument is no whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise InputError(f"{name}={value!r} must be a whole number of at least {least}")


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
