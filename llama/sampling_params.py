"""What a call can ask for: how tokens are chosen, when an answer ends, and what is returned."""

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from numbers import Integral, Real
from operator import index
from typing import Any, Literal

import torch
import torch.distributed as dist

from llama.device import device_of
from llama.distributed import PROCESSOR_TAG, check_ranks_agree, model_parallel_size
from llama.errors import InputError
from llama.model_lock import lock_of
from llama.protocols import LanguageModel, TextGenerator, TextTokenizer

# (input_ids (rows, length), scores (rows, vocab_size)) -> scores: the convention of Hugging Face's transformers
LogitsProcessor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class SamplingParams:
    """The arguments of one call, checked: see `llama.sampling_options` for what they mean.

    Attributes:
        stop_strings, logits_processors: `stop` and `logits_processor` as tuples.
        rows_per_prompt: how many rows of the batch each prompt has.
        is_greedy: whether the likeliest token is taken each time.
        is_speculative: whether tokens are proposed: see `llama.speculative`.

    Raises:
        InputError: a value out of range, or a combination that makes no sense.
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
    stop_strings: tuple[str, ...] = field(init=False)
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None = None
    logits_processors: tuple[LogitsProcessor, ...] = field(init=False)
    top_logprobs: int = 0
    prompt_lookup_num_tokens: int | None = None
    draft_model: TextGenerator | None = None
    rows_per_prompt: int = field(init=False)
    is_greedy: bool = field(init=False)
    is_speculative: bool = field(init=False)
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
        proposers = (self.prompt_lookup_num_tokens, self.draft_model)
        object.__setattr__(self, "is_speculative", proposers != (None, None))
        if self.prompt_lookup_num_tokens is not None:
            check_number("prompt_lookup_num_tokens", self.prompt_lookup_num_tokens, 1, 100, integer=True)
            if self.draft_model is not None:
                raise InputError("tokens are proposed by prompt_lookup_num_tokens or by draft_model: give one of them")
        check_number("top_logprobs", self.top_logprobs, 0, integer=True)
        if self.top_logprobs > 0 and not self.logprobs:
            raise InputError(f"top_logprobs={self.top_logprobs} needs logprobs=True, too")
        processors: Any = () if self.logits_processor is None else self.logits_processor
        if not isinstance(processors, list | tuple):  # transformers' LogitsProcessorList is a list, and callable too
            processors = (processors,)
        object.__setattr__(self, "logits_processors", tuple(processors))  # the dataclass is frozen
        for processor in processors:
            if not callable(processor):
                raise InputError(
                    f"logits_processor={processor!r:.80} must be a function (input_ids, scores) -> scores, or a list "
                    f"of them"
                )
        object.__setattr__(self, "rows_per_prompt", max(self.num_return_sequences, self.num_beams))
        object.__setattr__(self, "is_greedy", self.temperature == 0 or self.top_p == 0 or self.top_k == 1)
        stop = () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, Iterable):
            raise InputError(f"stop={stop!r:.80} must be a string or list of strings")
        object.__setattr__(self, "stop_strings", tuple(stop))
        if not all(isinstance(string, str) and string for string in self.stop_strings):
            raise InputError(
                f"stop={self.stop_strings!r:.80} must be a string or a list of strings, none of them empty"
            )
        if self.num_beams > 1:
            self._check_beam_search()
        elif self.length_penalty != 1 or self.early_stopping is not False:
            raise InputError("length_penalty and early_stopping are for beams: give num_beams, too, or leave them out")
        elif self.num_return_sequences > 1 and self.is_greedy:
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
        if self.is_speculative:
            raise InputError(f"num_beams={self.num_beams} leaves nothing to propose: give no draft_model, nor a lookup")
        if self.top_logprobs > 0:
            raise InputError(f"num_beams={self.num_beams} compares whole answers: leave top_logprobs out")
        if self.num_return_sequences > self.num_beams:
            raise InputError(
                f"num_return_sequences={self.num_return_sequences} is more than the num_beams={self.num_beams} answers "
                f"that are found"
            )

    def process(self, model: LanguageModel, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores after the call's logits processors; without any, the scores themselves.

        Args:
            model: where they come from; a logits processor can't make a call on it.
            input_ids: of each row, prompt and answer so far, (rows, length) int64: see `left_padded`.
            scores: logits, or in beam search log-probabilities, (rows, vocab_size) float32.

        Raises:
            InputError: a processor returned something else than scores of this shape.
        """
        if not self.logits_processors:
            return scores
        if not dist.is_initialized() or model_parallel_size() == 1:
            return self._processed(model, input_ids, scores)
        processed, rows = scores, ""
        error: BaseException | None = None
        try:
            processed = self._processed(model, input_ids, scores)
            rows = str(processed.amax(dim=-1).isfinite().nonzero().flatten().tolist())
        except BaseException as raised:  # raised on all ranks, which would otherwise wait for this one
            error = raised
        check_ranks_agree({"rows for which the logits_processor leaves a token to choose": rows}, error, PROCESSOR_TAG)
        return processed

    def _processed(self, model: LanguageModel, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`process`, on this rank alone."""
        processed = scores.clone()  # a processor may change it in place
        models = [model] if self.draft_model is None else [model, self.draft_model.model]
        for processor in self.logits_processors:
            with contextlib.ExitStack() as marks:
                for used_model in models:
                    marks.enter_context(lock_of(used_model).calling_processor())
                processed = processor(input_ids, processed)
            if not isinstance(processed, torch.Tensor) or processed.shape != scores.shape:
                raise InputError(
                    f"logits_processor must return scores of shape {tuple(scores.shape)}, not "
                    f"{tuple(processed.shape) if isinstance(processed, torch.Tensor) else processed!r}"
                )
        return processed.to(scores)


def left_padded(rows: list[list[int]], device: torch.device, length: int) -> torch.Tensor:
    """Rows of ids as one tensor, (rows, length) int64, for logits processors.

    Shorter rows are padded on the left with their own first token: so no row holds a token that isn't in it anyway, and
    a penalty for tokens that have occurred, for example, does not depend on the other rows.

    Args:
        length: of the longest row, or more.
    """
    return torch.tensor([row[:1] * (length - len(row)) + row for row in rows], device=device)


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
    if params.num_beams > 1 and not callable(getattr(model, "setup_cache", None)):
        raise InputError(
            f"num_beams={params.num_beams} needs a model whose KV cache can be reordered, with `setup_cache`: see "
            f"llama.protocols.CachedModel"
        )
    if params.is_speculative and not callable(getattr(model, "setup_cache", None)):
        raise InputError(
            "draft_model and prompt_lookup_num_tokens need a model that takes several tokens at any position, with "
            "`setup_cache`: see llama.protocols.CachedModel"
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
    if len(prompts) * params.rows_per_prompt > max_batch_size:
        raise InputError(
            f"{len(prompts)} prompt(s) with {params.rows_per_prompt} rows each (num_return_sequences or num_beams) are "
            f"more than max_batch_size={max_batch_size}"
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
    if params.draft_model is not None:
        n_tokens = max(min(len(prompt) + params.max_gen_len, max_seq_len) for prompt in prompts)
        check_draft_model(params.draft_model, model, tokenizer, len(prompts) * params.rows_per_prompt, n_tokens)
    return prompts


def check_draft_model(
    draft: TextGenerator, model: LanguageModel, tokenizer: TextTokenizer, n_rows: int, n_tokens: int
) -> None:
    """Raise InputError unless another model can propose tokens to this one.

    Args:
        n_rows, n_tokens: the size of the batch, and the number of tokens that its longest row may have in the end.
    """
    has_tokenizer = callable(getattr(getattr(draft, "tokenizer", None), "decode", None))
    if not has_tokenizer or not callable(getattr(getattr(draft, "model", None), "setup_cache", None)):
        raise InputError(f"draft_model={draft!r:.80} must be a Llama, whose model has `setup_cache`")
    if draft.model is model:
        raise InputError("draft_model has the same network, and so the same cache: build it as a Llama of its own")
    limits = draft.model.params
    if limits.max_batch_size < n_rows or limits.max_seq_len < n_tokens:
        raise InputError(
            f"draft_model has max_batch_size={limits.max_batch_size} and max_seq_len={limits.max_seq_len}, but this "
            f"call has {n_rows} row(s) of up to {n_tokens} tokens: build it with as much"
        )
    devices = device_of(draft.model), device_of(model)
    if devices[0] != devices[1]:
        raise InputError(f"draft_model is on {devices[0]}, and the model on {devices[1]}: build both on one device")
    sizes = getattr(limits, "vocab_size", None), getattr(model.params, "vocab_size", None)
    if None not in sizes and sizes[0] != sizes[1]:
        raise InputError(f"draft_model has vocab_size={sizes[0]}, but the model has {sizes[1]}: take one of its family")
    if not have_same_tokens(draft.tokenizer, tokenizer, sizes[0]):
        raise InputError("draft_model has another tokenizer: take a model of the same family, whose ids mean the same")


def have_same_tokens(one: TextTokenizer, other: TextTokenizer, vocab_size: int | None = None) -> bool:
    """Whether two tokenizers have equally many tokens, and some 1,000 ids, special tokens apart, mean the same to both.

    If other ids don't, their proposals are not accepted, which costs time alone.

    Args:
        vocab_size: how many ids there are, where the tokenizers don't say it.
    """
    sizes = [getattr(tokenizer, "n_words", vocab_size) or 0 for tokenizer in (one, other)]
    special = {i for tokenizer in (one, other) for i in getattr(tokenizer, "special_tokens", {}).values()}
    ids = [i for i in range(0, sizes[0], max(1, sizes[0] // 1000)) if i not in special]
    return sizes[0] == sizes[1] and all(one.decode([i]) == other.decode([i]) for i in ids)
