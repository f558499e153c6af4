"""What a call can ask for: how tokens are chosen, when an answer ends, and what is returned."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from numbers import Integral, Real
from operator import index
from typing import Any, Literal, TypedDict

import torch
import torch.distributed as dist

from llama.distributed import PROCESSOR_TAG, check_ranks_agree, model_parallel_size
from llama.errors import InputError
from llama.model_lock import lock_of
from llama.protocols import LanguageModel, TextTokenizer

LogitsProcessor = Callable[[list[list[int]], torch.Tensor], torch.Tensor]


class SamplingOptions(TypedDict, total=False):
    """The keyword arguments that `Llama.generate`, `text_completion`, `chat_completion` and their streams share."""

    top_k: int | None  # sample from this many of the likeliest tokens; then from the nucleus of these
    num_return_sequences: int  # answers to each prompt: first all of the first prompt's, then all of the second's, …
    num_beams: int  # above 1: beam search with this many beams, instead of sampling
    length_penalty: float  # a beam's score is its log-probability / length ** length_penalty
    # When beam search ends. True: when num_beams answers are finished. False: when the best beam's score at its present
    # length is no better than theirs. "never": when its score at the greatest length isn't.
    early_stopping: bool | Literal["never"]
    stop: str | Iterable[str] | None  # strings that end an answer, and aren't part of it
    logits_processor: LogitsProcessor | None  # (each row's ids so far, logits (rows, vocab_size)) -> logits
    seed: int | None  # sample with a generator of this call's own
    # Prefill only what the cache doesn't hold of the last call's prompts and answers; not after changing the weights.
    reuse_cache: bool


@dataclass(frozen=True)
class SamplingParams:
    """The arguments of one call, checked. Applied in this order: logits_processor, temperature, top_k, top_p.

    Raises:
        InputError: a value out of range, or a combination that makes no sense.
        TypeError: an unknown argument.
    """

    max_gen_len: int
    temperature: float = 0.6
    top_p: float = 0.9
    logprobs: bool = False
    echo: bool = False
    _: KW_ONLY
    top_k: int | None = None
    num_return_sequences: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    stop: str | Iterable[str] | None = None
    stop_strings: tuple[str, ...] = field(init=False)  # `stop` as a tuple
    logits_processor: LogitsProcessor | None = None
    seed: int | None = None
    reuse_cache: bool = False

    def __post_init__(self) -> None:
        check_number("max_gen_len", self.max_gen_len, 0, integer=True)
        check_number("temperature", self.temperature, 0)
        if 0 < self.temperature < 1e-30:
            raise InputError(f"temperature={self.temperature!r} is too small to divide by; 0 takes the likeliest token")
        check_number("top_p", self.top_p, 0, 1)
        check_number("num_return_sequences", self.num_return_sequences, 1, integer=True)
        check_number("num_beams", self.num_beams, 1, integer=True)
        check_number("length_penalty", self.length_penalty, -20, 20)
        if self.top_k is not None:
            check_number("top_k", self.top_k, 1, integer=True)
        if self.seed is not None:
            check_number("seed", self.seed, 0, 2**64 - 1, integer=True)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise InputError(f"early_stopping={self.early_stopping!r} must be True, False or 'never'")
        if self.logits_processor is not None and not callable(self.logits_processor):
            raise InputError(
                f"logits_processor={self.logits_processor!r:.80} must be a function (tokens, logits) -> logits"
            )
        stop = () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, Iterable):
            raise InputError(f"stop={stop!r:.80} must be a string or list of strings")
        object.__setattr__(self, "stop_strings", tuple(stop))  # the dataclass is frozen
        if not all(isinstance(string, str) and string for string in self.stop_strings):
            raise InputError(
                f"stop={self.stop_strings!r:.80} must be a string or a list of strings, none of them empty"
            )
        if self.num_beams > 1:
            self._check_beam_search()
        elif self.length_penalty != 1 or self.early_stopping is not False:
            raise InputError("length_penalty and early_stopping are for beams: give num_beams, too, or leave them out")
        elif self.num_return_sequences > 1 and (self.temperature == 0 or self.top_p == 0 or self.top_k == 1):
            raise InputError(
                f"num_return_sequences={self.num_return_sequences} answers would all be the same, since the likeliest "
                f"token is taken each time: give a temperature above 0, or num_beams"
            )
        if self.reuse_cache and self.echo and self.logprobs:
            raise InputError(
                "reuse_cache=True leaves out what echo and logprobs together need: every token of the prompt"
            )

    def _check_beam_search(self) -> None:
        values = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "seed": self.seed}
        # The defaults of temperature and top_p can't be told from arguments that were left out.
        unused = {"temperature": (0, 0.6), "top_p": (1, 0.9), "top_k": (None,), "seed": (None,)}
        for name, value in values.items():
            if value not in unused[name]:
                raise InputError(
                    f"num_beams={self.num_beams} searches for the likeliest answer and samples nothing, so that "
                    f"{name}={value} means nothing: leave it out"
                )
        if self.num_return_sequences > self.num_beams:
            raise InputError(
                f"num_return_sequences={self.num_return_sequences} is more than the num_beams={self.num_beams} answers "
                f"that are found"
            )

    def process(self, model: LanguageModel, tokens: list[list[int]], logits: torch.Tensor) -> torch.Tensor:
        """The logits, (rows, vocab_size) float32, after the call's logits_processor, if it has one.

        Args:
            model: where they come from; the logits_processor can't make a call on it.
            tokens: of each row, prompt and answer so far.

        Raises:
            InputError: it returned something else than logits of this shape.
        """
        if self.logits_processor is None:
            return logits
        if not dist.is_initialized() or model_parallel_size() == 1:
            return self._processed(self.logits_processor, model, tokens, logits)
        processed, rows = logits, ""
        error: BaseException | None = None
        try:
            processed = self._processed(self.logits_processor, model, tokens, logits)
            rows = str(processed.amax(dim=-1).isfinite().nonzero().flatten().tolist())
        except BaseException as raised:  # raised on all ranks, which would otherwise wait for this one
            error = raised
        check_ranks_agree({"rows for which the logits_processor leaves a token to choose": rows}, error, PROCESSOR_TAG)
        return processed

    def _processed(
        self, processor: LogitsProcessor, model: LanguageModel, tokens: list[list[int]], logits: torch.Tensor
    ) -> torch.Tensor:
        """`process`, on this rank alone."""
        with lock_of(model).calling_processor():
            processed = processor(tokens, logits.clone())
        if not isinstance(processed, torch.Tensor) or processed.shape != logits.shape:
            raise InputError(
                f"logits_processor must return logits of shape {tuple(logits.shape)}, not "
                f"{tuple(processed.shape) if isinstance(processed, torch.Tensor) else processed!r}"
            )
        return processed.to(logits)


def check_number(name: str, value: Any, minimum: float, maximum: float = math.inf, *, integer: bool = False) -> None:
    """Raise InputError if an argument is no number (of Python or numpy) between `minimum` and `maximum`."""
    is_number = isinstance(value, Integral if integer else Real) and not isinstance(value, bool)
    if not is_number or not minimum <= value <= maximum or value == math.inf:
        bounds = f"of at least {minimum}" if maximum == math.inf else f"between {minimum} and {maximum}"
        raise InputError(f"{name}={value!r} must be a {'whole ' if integer else ''}number {bounds}")


def check_prompts(
    prompt_tokens: Sequence[Sequence[int]], model: LanguageModel, tokenizer: TextTokenizer, params: SamplingParams
) -> list[list[int]]:
    """The prompts as lists of ints; InputError if they, with the rows that `params` ask for, don't fit the model."""
    max_batch_size, max_seq_len = model.params.max_batch_size, model.params.max_seq_len
    vocab_size = getattr(model.params, "vocab_size", -1)
    if vocab_size == -1:
        vocab_size = getattr(tokenizer, "n_words", math.inf)
    rows_per_prompt = max(params.num_return_sequences, params.num_beams)
    if params.num_beams > 1 and not callable(getattr(model, "setup_cache", None)):
        raise InputError(
            f"num_beams={params.num_beams} needs a model whose KV cache can be reordered, with `setup_cache`: see "
            f"llama.protocols.CachedModel"
        )
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
    if len(prompts) * rows_per_prompt > max_batch_size:
        raise InputError(
            f"{len(prompts)} prompt(s) with {rows_per_prompt} rows each (num_return_sequences or num_beams) are more "
            f"than max_batch_size={max_batch_size}"
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
