"""A batch of prompts and its answers: what consumes the decode loop, and decides when each row has finished.

`generate_batch` collects what `generate_pieces` yields; `stream_batch` has a thread produce it.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.distributed as dist

from llama.beam_search import BeamSearch
from llama.decoding import decode, prefill
from llama.dialog import CompletionPrediction, LikelyToken
from llama.distributed import broadcast_flag, check_ranks_agree, model_parallel_size
from llama.errors import InputError
from llama.kv_cache import KVCache
from llama.model_lock import lock_of, turn_on
from llama.non_finite import explain_non_finite
from llama.out_of_memory import explain_generation, is_out_of_memory
from llama.positions import fixed_end, has_fixed_steps
from llama.protocols import Cache, CachedModel, LanguageModel, TextTokenizer
from llama.sampling import ranked_logprobs, sample, sampling_probs
from llama.sampling_params import SamplingParams, check_prompts, left_padded
from llama.speculative import WAITS, speculate
from llama.streaming import EndReason, Piece, RowOutput, StopCriteria, Stopped, produce_in_thread


@dataclass
class RowResult:
    """One row of a batch: an answer, after its prompt if that is echoed."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # empty unless asked for
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)  # likewise
    text: str = ""  # of the answer, if there are stop strings
    ended: EndReason | None = None
    score: float | None = None
    proposals: tuple[int, int] | None = None


def generate_batch(
    model: LanguageModel, tokenizer: TextTokenizer, prompt_tokens: Sequence[Sequence[int]], params: SamplingParams
) -> list[RowResult]:
    """All answers to prompts of ids, when they are done."""
    check = functools.partial(check_on_all_ranks, "generate") if dist.is_initialized() else check_prompts
    prompts = check(prompt_tokens, model, tokenizer, params)
    results = [RowResult() for _ in range(len(prompts) * params.num_return_sequences)]
    draft = params.draft_model
    with lock_of(model).turn() if draft is None else turn_on([lock_of(model), lock_of(draft.model)]):
        for piece in generate_pieces(model, tokenizer, prompts, params, text=bool(params.stop_strings)):
            result = results[piece.row]
            if piece.token is not None:
                result.tokens.append(piece.token)
                result.top_logprobs.append(piece.top_logprobs)
            if piece.logprob is not None:
                result.logprobs.append(piece.logprob)
            result.text += piece.text
            result.ended, result.score, result.proposals = piece.ended, piece.score, piece.proposals
    return results


def predict(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    prompt_tokens: list[list[int]],
    params: SamplingParams,
    *,
    details: bool,
) -> list[CompletionPrediction]:
    """All answers as text, with what was asked for beside it."""
    decode_text = tokenizer.decode
    predictions = []
    for row, result in enumerate(generate_batch(model, tokenizer, prompt_tokens, params)):
        prompt = prompt_tokens[row // params.num_return_sequences]
        n_echoed = len(prompt) if params.echo else 0
        # A stop string may begin within the last token: these characters of it are not part of the answer.
        cut = len(decode_text(result.tokens[n_echoed:])) - len(result.text) if params.stop_strings else 0
        text = decode_text(result.tokens)
        prediction = CompletionPrediction(generation=text[: len(text) - cut])
        if params.logprobs:
            token_texts = [decode_text([token]) for token in result.tokens]
            if cut:
                token_texts[-1] = token_texts[-1][: max(0, len(token_texts[-1]) - cut)]
            prediction["tokens"], prediction["logprobs"] = token_texts, result.logprobs
        if params.top_logprobs:
            prediction["top_logprobs"] = [
                [LikelyToken(token=decode_text([token]), id=token, logprob=logprob) for token, logprob in likeliest]
                for likeliest in result.top_logprobs
            ]
        if result.score is not None:
            prediction["score"] = result.score
        if details:
            prediction["finish_reason"] = result.ended or "length"
            prediction["prompt_tokens"] = len(prompt)
            prediction["completion_tokens"] = len(result.tokens) - n_echoed
            if result.proposals is not None:
                prediction["proposed_tokens"], prediction["accepted_tokens"] = result.proposals
        predictions.append(prediction)
    return predictions


def stream_batch(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    prompt_tokens: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    text: bool,
) -> Generator[Piece, None, None]:
    """The answers, piece by piece. An error in the arguments is raised now, not at the first piece."""
    if params.num_beams > 1:
        raise InputError(
            f"num_beams={params.num_beams}: beam search has no answer before it is done, so there is no stream"
        )
    check = functools.partial(check_on_all_ranks, "generate_stream") if dist.is_initialized() else check_prompts
    prompts = check(prompt_tokens, model, tokenizer, params)
    produce = functools.partial(generate_pieces, model, tokenizer, prompts, params, text=text)
    models = [model] if params.draft_model is None else [model, params.draft_model.model]
    return produce_in_thread(list(map(lock_of, models)), produce)


def check_on_all_ranks(
    method: str,
    prompt_tokens: Sequence[Sequence[int]],
    model: LanguageModel,
    tokenizer: TextTokenizer,
    params: SamplingParams,
) -> list[list[int]]:
    """`check_prompts`; and InputError, on all ranks that share a model, unless they make the same call."""
    error: InputError | None = None
    prompts: list[list[int]] = []
    try:
        prompts = check_prompts(prompt_tokens, model, tokenizer, params)
    except InputError as raised:
        error = raised
    if model_parallel_size() > 1:
        digest = hashlib.sha256(repr(prompts).encode()).hexdigest()[:8]
        objects = ("stop", "logits_processor", "logits_processors", "draft_model")  # others on each rank
        arguments = {name: repr(value) for name, value in vars(params).items() if name not in objects}
        arguments["logits_processor"] = f"{len(params.logits_processors)} function(s)"
        draft = params.draft_model
        arguments["draft_model"] = "None" if draft is None else repr(getattr(draft.model.params, "__dict__", "a model"))
        arguments["method"] = method
        arguments["prompts"] = f"{len(prompts)} of {sum(map(len, prompts))} tokens with the checksum {digest}"
        check_ranks_agree(arguments, error)
    elif error is not None:
        raise error
    return prompts


def generate_pieces(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    prompts: list[list[int]],
    params: SamplingParams,
    *,
    text: bool,
    should_stop: Callable[[], bool] | None = None,
) -> Iterator[Piece]:
    """Yield the answers to prompts piece by piece. It must be the caller's turn to use the model.

    Args:
        prompts: ids; they have passed `check_prompts`.
        text: whether the pieces are to have text, which is also searched for stop strings.
        should_stop: asked after each step, and before each layer of the prefill, whether to end early. The first rank's
            answer counts, so that all ranks make the same steps.

    Raises:
        ArithmeticError: the network computed NaN or infinity.
        CheckpointError: a file that the weights are mapped from has been cut.
        MemoryError: not enough memory; the message says for what, and what to lower.
    """
    max_new_tokens = [min(params.max_gen_len, model.params.max_seq_len - len(prompt)) for prompt in prompts]
    is_left = None if should_stop is None else lambda: broadcast_flag(should_stop())
    score_prompts = params.echo and params.logprobs
    rows = [list(prompt) for prompt in prompts for _ in range(params.rows_per_prompt)]
    stage, logits = "prefill", torch.empty(0)
    prompt_logprobs: list[list[float]] = []
    try:
        setup_cache = getattr(model, "setup_cache", None)
        cache: Cache | None = setup_cache() if callable(setup_cache) else None
        if max(max_new_tokens) > 0 or score_prompts:
            end = max(map(len, prompts)) + max(max_new_tokens)
            logits, prompt_logprobs = prefill_rows(model, cache, prompts, params, end, score_prompts, is_left)
        for row in range(len(prompts) * params.num_return_sequences):
            i = row // params.num_return_sequences
            for position, token in enumerate(prompts[i] if params.echo else ()):
                yield Piece(row, token, prompt_logprobs[i][position] if score_prompts else None, "")
            if max_new_tokens[i] < 1:
                yield Piece(row, None, None, "", "length", proposals=(0, 0) if params.is_speculative else None)
        if max(max_new_tokens) < 1:
            return
        stage = "decode"
        stop_tokens = getattr(tokenizer, "stop_tokens", None)
        stop_tokens = {getattr(tokenizer, "eos_id", None)} if stop_tokens is None else set(stop_tokens)
        decode_text = tokenizer.decode if text else None
        criteria = [StopCriteria(limit, stop_tokens, decode_text, params.stop_strings) for limit in max_new_tokens]
        if params.num_beams > 1:
            beams = BeamSearch(model, cache, prompts, params, criteria)
            for _ in decode(model, logits, list(map(len, rows)), beams.select):
                if beams.done:
                    break
            yield from beams.pieces()
        else:
            outputs = [RowOutput(row, criteria[row // params.rows_per_prompt]) for row in range(len(rows))]
            if params.draft_model is not None:
                draft, stage = cast(CachedModel, params.draft_model.model), "prefill"
                prefill_rows(draft, draft.setup_cache(), prompts, params, end, False, is_left)
                stage = "decode"
            yield from sample_rows(model, cache, logits, rows, params, outputs, is_left)
    except Stopped:
        return
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise MemoryError(explain_generation(stage, prompts, params.rows_per_prompt)) from error
        raise


def prefill_rows(
    model: LanguageModel,
    cache: Cache | None,
    prompts: list[list[int]],
    params: SamplingParams,
    end: int,
    score_prompts: bool,
    is_left: Callable[[], bool] | None,
) -> tuple[torch.Tensor, list[list[float]]]:
    """Prefill each prompt once and copy its row of the cache, or as often as it has rows, if that can't be.

    Args:
        end: positions that the longest row may have in the end.
        score_prompts: whether to compute the logprobs of the prompts' tokens.
        is_left: see `should_stop` of `prefill`.

    Returns:
        The logits of each row's next token, (rows, vocab_size); and the logprobs of each prompt's tokens.
    """
    if (mapped_files := getattr(model, "mapped_files", None)) is not None:
        mapped_files.check()
    longest = max(map(len, prompts))
    start_pos = common_prefix(prompts, cache.tokens) if params.reuse_cache and cache is not None else 0
    if isinstance(cache, KVCache) and has_fixed_steps(cache.keys.device):
        # A step attends to them, masked, in every row: but 0 x NaN is NaN.
        cache.clear(longest, fixed_end(end, model.params.max_seq_len))
    elif cache is not None and (min(map(len, prompts)) < longest or params.is_speculative):
        cache.clear(longest, end)  # likewise, in the shorter rows
    prefilled = prompts
    if cache is None:
        prefilled = [prompt for prompt in prompts for _ in range(params.rows_per_prompt)]
    logits, prompt_logprobs = prefill(model, prefilled, start_pos, score_prompts, is_left)
    for prompt, logprobs in zip(prefilled, prompt_logprobs, strict=False):
        if any(map(math.isnan, logprobs)):
            raise ArithmeticError(explain_non_finite(model, prompt))
    if cache is None:
        prompt_logprobs = prompt_logprobs[:: params.rows_per_prompt]
    elif params.rows_per_prompt > 1:
        source_rows = torch.arange(len(prompts), device="cpu").repeat_interleave(params.rows_per_prompt)
        cache.reorder(source_rows, longest)
        logits = logits.repeat_interleave(params.rows_per_prompt, dim=0)  # (rows, vocab_size)
    return logits, prompt_logprobs


def sample_rows(
    model: LanguageModel,
    cache: Cache | None,
    logits: torch.Tensor,
    tokens: list[list[int]],
    params: SamplingParams,
    outputs: list[RowOutput],
    is_left: Callable[[], bool] | None,
) -> Iterator[Piece]:
    """Sample the answers to prompts that have been prefilled.

    Args:
        logits: of each row's first new token, (rows, vocab_size).
        tokens: of each row, its prompt; the answers are appended.
        outputs: the rows' answers.
        is_left: see `should_stop` of `generate_pieces`.
    """
    lengths = list(map(len, tokens))
    generator = None if params.seed is None else torch.Generator(logits.device).manual_seed(int(params.seed))
    temperature, top_p, top_k = float(params.temperature), float(params.top_p), params.top_k
    sample_plain = functools.partial(sample, temperature=temperature, top_p=top_p, top_k=top_k, generator=generator)
    # What the logits processors see of the tokens, (rows, length).
    input_ids = left_padded(tokens, logits.device, max(lengths)) if params.logits_processors else torch.empty(0)

    def process(logits: torch.Tensor) -> torch.Tensor:
        return params.process(model, input_ids, logits)

    def sample_processed(logits: torch.Tensor) -> torch.Tensor:
        return sample_plain(process(logits))

    select = sample_processed if params.logits_processors else sample_plain
    score_tokens = functools.partial(ranked_logprobs, n=params.top_logprobs) if params.logprobs else None
    if params.is_speculative:
        probs = functools.partial(sampling_probs, temperature=temperature, top_p=top_p, top_k=top_k)
        steps = speculate(
            model, logits, tokens, outputs, params, select, process, probs, generator, score_tokens=score_tokens
        )
    else:
        steps = decode(model, logits, lengths, select, score_tokens=score_tokens)
    try:
        for next_tokens, scores in steps:
            ranked = [[]] * len(tokens) if scores is None else scores.tolist()
            # Here the host waits for the device, to see which rows have finished. Those stay in the batch, so that what
            # is sampled for the others doesn't depend on them.
            for row, token in enumerate(next_tokens.tolist()):
                if outputs[row].ended or token == WAITS:
                    continue
                if token == -1:
                    raise ArithmeticError(explain_non_finite(model, tokens[row], bool(params.logits_processors)))
                tokens[row].append(token)
                logprob, *top_logprobs = [(int(i), logprob) for i, logprob in ranked[row]] or [(token, None)]
                for piece in outputs[row].append(token, logprob[1], tuple(top_logprobs)):
                    if piece.ended and params.is_speculative:
                        piece = piece._replace(proposals=(outputs[row].n_proposed, outputs[row].n_accepted))
                    yield piece
            if all(output.ended for output in outputs) or (is_left is not None and is_left()):
                return
            if params.logits_processors:
                input_ids = torch.cat((input_ids, next_tokens.clamp(min=0)[:, None]), dim=1)
    finally:
        if cache is not None:  # whose last token has not been forwarded yet
            cache.tokens = [row[: max(length, len(row) - 1)] for row, length in zip(tokens, lengths, strict=True)]


def common_prefix(prompts: list[list[int]], cached: list[list[int]]) -> int:
    """The length of the prefix that every prompt shares with its row of the cache.

    A prompt's last token is never part of it, since it must be forwarded for the logits of the next.
    """
    if len(prompts) > len(cached):
        return 0
    length = min(map(len, prompts)) - 1
    for prompt, row in zip(prompts, cached, strict=False):
        differ = (i for i, (a, b) in enumerate(zip(prompt[:length], row, strict=False)) if a != b)
        length = min(length, next(differ, len(row)))
    return length
