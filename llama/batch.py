"""A batch of prompts and its answers: what consumes the decode loop, and decides when each row has finished."""

import math
from collections.abc import Callable, Iterator

import torch

from llama.beam_search import BeamSearch
from llama.decoding import common_prefix, decode, device_of, prefill
from llama.non_finite import explain_non_finite
from llama.protocols import CachedModel, LanguageModel, TextTokenizer
from llama.sampling import sample
from llama.sampling_params import SamplingParams
from llama.streaming import Piece, RowOutput, StopCriteria


def generate_pieces(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    prompts: list[list[int]],
    params: SamplingParams,
    *,
    text: bool,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Piece]:
    """Yield the answers to prompts piece by piece. It must be the caller's turn to use the model.

    Args:
        prompts: ids; they have passed `check_prompts`.
        text: whether the pieces are to have text, which is also searched for stop strings.
        should_stop: asked before the first step and after each, on every rank: whether to end early.

    Raises:
        ArithmeticError: the network computed NaN or infinity.
    """
    if should_stop():
        return
    copies, score_prompts = params.num_return_sequences, params.echo and params.logprobs
    max_new_tokens = [min(params.max_gen_len, model.params.max_seq_len - len(prompt)) for prompt in prompts]
    cache = model.setup_cache() if isinstance(model, CachedModel) else None
    start_pos = common_prefix(prompts, cache.tokens) if params.reuse_cache and cache is not None else 0
    if max(max_new_tokens) > 0 or score_prompts:
        logits, prompt_logprobs = prefill(model, prompts, start_pos, max(max_new_tokens), score_prompts)
        for prompt, logprobs in zip(prompts, prompt_logprobs, strict=False):
            if any(map(math.isnan, logprobs)):
                raise ArithmeticError(explain_non_finite(model, prompt))
    for row in range(len(prompts) * copies):
        i = row // copies
        for position, token in enumerate(prompts[i] if params.echo else ()):
            yield Piece(row, token, prompt_logprobs[i][position] if score_prompts else None, "")
        if max_new_tokens[i] < 1:
            yield Piece(row, None, None, "", "length")
    if max(max_new_tokens) < 1:
        return

    stop_tokens = getattr(tokenizer, "stop_tokens", None)
    stop_tokens = {tokenizer.eos_id} if stop_tokens is None else set(stop_tokens)
    decode_text = tokenizer.decode if text else None
    criteria = [StopCriteria(limit, stop_tokens, decode_text, params.stop_strings) for limit in max_new_tokens]
    rows_per_prompt = max(copies, params.num_beams)
    if rows_per_prompt > 1:  # each prompt was prefilled once: copy its row
        logits = logits.repeat_interleave(rows_per_prompt, dim=0)  # (rows, vocab_size)
        if cache is not None:
            rows = torch.arange(len(prompts), device=device_of(model)).repeat_interleave(rows_per_prompt)
            cache.reorder(rows, max(map(len, prompts)))
    if params.num_beams > 1:
        beams = BeamSearch(model, prompts, params, criteria)
        lengths = [len(prompt) for prompt in prompts for _ in range(rows_per_prompt)]
        for _ in decode(model, logits, lengths, beams.select):
            if beams.done:
                break
        yield from beams.pieces()
    else:
        outputs = [RowOutput(row, criteria[row // copies]) for row in range(len(logits))]
        tokens = [list(prompts[row // copies]) for row in range(len(logits))]
        yield from _sample_pieces(model, logits, tokens, outputs, params, should_stop)


def _sample_pieces(
    model: LanguageModel,
    logits: torch.Tensor,
    tokens: list[list[int]],
    outputs: list[RowOutput],
    params: SamplingParams,
    should_stop: Callable[[], bool],
) -> Iterator[Piece]:
    """Yield sampled tokens until every row has finished.

    Args:
        logits: of the next tokens, (rows, vocab_size).
        tokens: of each row, the prompt; the answer is appended.
    """
    generator = params.generator(logits.device)

    def select(logits: torch.Tensor) -> torch.Tensor:
        logits = params.process(model, tokens, logits)
        return sample(logits, params.temperature, params.top_p, params.top_k, generator)

    lengths = list(map(len, tokens))
    steps = decode(model, logits, lengths, select, logprobs=params.logprobs)
    n_forwarded = 0  # new tokens of each row whose keys and values are in the cache
    try:
        for n_forwarded, (next_tokens, next_logprobs) in enumerate(steps):  # noqa: B007 - used below
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
            if all(output.ended for output in outputs) or should_stop():
                return
    finally:
        if isinstance(model, CachedModel):
            ends = [length + n_forwarded for length in lengths]
            model.setup_cache().tokens = [row[:end] for row, end in zip(tokens, ends, strict=True)]
