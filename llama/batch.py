"""A batch of prompts and its answers: what consumes the decode loop, and decides when each row has finished.

`generate_batch` collects what `generate_pieces` yields; `stream_batch` has a thread produce it.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from llama.beam_search import BeamSearch
from llama.decoding import decode, prefill
from llama.distributed import broadcast_flag, check_ranks_agree, model_parallel_size
from llama.errors import InputError
from llama.kv_cache import KVCache
from llama.model_lock import lock_of
from llama.non_finite import explain_non_finite
from llama.out_of_memory import explain_generation, is_out_of_memory
from llama.positions import fixed_end, has_fixed_steps
from llama.protocols import Cache, LanguageModel, TextTokenizer
from llama.sampling import sample
from llama.sampling_params import SamplingParams, check_prompts
from llama.streaming import Piece, RowOutput, StopCriteria, Stopped, produce_in_thread


class BatchOutput(NamedTuple):
    """The answers to a batch, row by row."""

    tokens: list[list[int]]
    logprobs: list[list[float]]  # empty unless asked for
    texts: list[str]  # empty unless there are stop strings
    scores: list[float | None]


def generate_batch(
    model: LanguageModel, tokenizer: TextTokenizer, prompt_tokens: Sequence[Sequence[int]], params: SamplingParams
) -> BatchOutput:
    """All answers to prompts of ids, when they are done."""
    check = functools.partial(check_on_all_ranks, "generate") if dist.is_initialized() else check_prompts
    prompts = check(prompt_tokens, model, tokenizer, params)
    rows = range(len(prompts) * params.num_return_sequences)
    output = BatchOutput([[] for _ in rows], [[] for _ in rows], ["" for _ in rows], [None for _ in rows])
    with lock_of(model).turn():
        for piece in generate_pieces(model, tokenizer, prompts, params, text=bool(params.stop_strings)):
            if piece.token is not None:
                output.tokens[piece.row].append(piece.token)
            if piece.logprob is not None:
                output.logprobs[piece.row].append(piece.logprob)
            output.texts[piece.row] += piece.text
            output.scores[piece.row] = piece.score
    return output


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
    return produce_in_thread(lock_of(model), produce)


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
        arguments = {
            name: repr(value) for name, value in vars(params).items() if name not in ("stop", "logits_processor")
        }
        arguments["logits_processor"] = "None" if params.logits_processor is None else "a function"
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
    if (mapped_files := getattr(model, "mapped_files", None)) is not None:
        mapped_files.check()
    max_new_tokens = [min(params.max_gen_len, model.params.max_seq_len - len(prompt)) for prompt in prompts]
    rows_per_prompt = max(params.num_return_sequences, params.num_beams)
    prompt_of_row = [prompt for prompt in prompts for _ in range(rows_per_prompt)]
    is_left = None if should_stop is None else lambda: broadcast_flag(should_stop())
    score_prompts = params.echo and params.logprobs
    # The prompts: each is prefilled once and its row of the cache copied, or as often as it has rows, if that can't be.
    try:
        setup_cache = getattr(model, "setup_cache", None)
        cache: Cache | None = setup_cache() if callable(setup_cache) else None
        start_pos = common_prefix(prompts, cache.tokens) if params.reuse_cache and cache is not None else 0
        if max(max_new_tokens) > 0 or score_prompts:
            prefilled, longest = prompts if cache is not None else prompt_of_row, max(map(len, prompts))
            end = longest + max(max_new_tokens)
            if isinstance(cache, KVCache) and has_fixed_steps(cache.keys.device):
                # A step attends to them, masked, in every row: but 0 x NaN is NaN.
                cache.clear(longest, fixed_end(end, model.params.max_seq_len))
            elif cache is not None and min(map(len, prompts)) < longest:
                cache.clear(longest, end)  # likewise, in the shorter rows
            logits, prompt_logprobs = prefill(model, prefilled, start_pos, score_prompts, is_left)
            for prompt, scores in zip(prefilled, prompt_logprobs, strict=False):
                if any(map(math.isnan, scores)):
                    raise ArithmeticError(explain_non_finite(model, prompt))
            if cache is not None and rows_per_prompt > 1:
                source_rows = torch.arange(len(prompts), device="cpu").repeat_interleave(rows_per_prompt)
                cache.reorder(source_rows, longest)
                logits = logits.repeat_interleave(rows_per_prompt, dim=0)  # (rows, vocab_size)
                prompt_logprobs = [scores for scores in prompt_logprobs for _ in range(rows_per_prompt)]
    except Stopped:
        return
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise MemoryError(explain_generation("prefill", prompts, rows_per_prompt)) from error
        raise
    for row in range(len(prompts) * params.num_return_sequences):
        i = row // params.num_return_sequences
        for position, token in enumerate(prompts[i] if params.echo else ()):
            yield Piece(row, token, prompt_logprobs[i * rows_per_prompt][position] if score_prompts else None, "")
        if max_new_tokens[i] < 1:
            yield Piece(row, None, None, "", "length")
    if max(max_new_tokens) < 1:
        return

    # The answers.
    stop_tokens = getattr(tokenizer, "stop_tokens", None)
    stop_tokens = {getattr(tokenizer, "eos_id", None)} if stop_tokens is None else set(stop_tokens)
    decode_text = tokenizer.decode if text else None
    criteria = [StopCriteria(limit, stop_tokens, decode_text, params.stop_strings) for limit in max_new_tokens]
    lengths = list(map(len, prompt_of_row))
    beams = BeamSearch(model, cache, prompts, params, criteria) if params.num_beams > 1 else None
    tokens = [list(prompt) for prompt in prompt_of_row]  # of each row, prompt and answer so far
    outputs = [RowOutput(row, criteria[row // rows_per_prompt]) for row in range(len(tokens))]
    generator = None if params.seed is None else torch.Generator(logits.device).manual_seed(int(params.seed))
    sample_plain = functools.partial(
        sample,
        temperature=float(params.temperature),
        top_p=float(params.top_p),
        top_k=params.top_k,
        generator=generator,
    )

    def sample_processed(logits: torch.Tensor) -> torch.Tensor:
        return sample_plain(params.process(model, tokens, logits))

    select = sample_plain if params.logits_processor is None else sample_processed
    n_forwarded = 0  # new tokens of each row in the cache: step i yields its token before it is forwarded
    try:
        if beams is not None:
            for _ in decode(model, logits, lengths, beams.select):
                if beams.done:
                    break
            yield from beams.pieces()
            return
        steps = decode(model, logits, lengths, select, logprobs=params.logprobs)
        for n_forwarded, (next_tokens, next_logprobs) in enumerate(steps):  # noqa: B007 - used when it ends
            logprobs = [None] * len(tokens) if next_logprobs is None else next_logprobs.tolist()
            # Here the host waits for the device, to see which rows have finished. Those stay in the batch, so that what
            # is sampled for the others doesn't depend on them.
            for row, token in enumerate(next_tokens.tolist()):
                if outputs[row].ended:
                    continue
                if token == -1:
                    processed = params.logits_processor is not None
                    raise ArithmeticError(explain_non_finite(model, tokens[row], processed))
                tokens[row].append(token)
                yield from outputs[row].append(token, logprobs[row])
            if all(output.ended for output in outputs):
                return
            if is_left is not None and is_left():
                return
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise MemoryError(explain_generation("decode", prompts, rows_per_prompt)) from error
        raise
    finally:
        if cache is not None and beams is None:
            cache.tokens = [row[: length + n_forwarded] for row, length in zip(tokens, lengths, strict=True)]


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
