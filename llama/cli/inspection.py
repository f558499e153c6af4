"""How sure a model was: what it expected in place of each token of a text, and what it would draw next.

ids -> [one pass through the network, without a cache] -> logits of each position -> numbers, token by token
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from llama.decoding import LOGITS_AT_ONCE
from llama.errors import InputError
from llama.generation import Llama
from llama.non_finite import explain_non_finite
from llama.sampling import sampling_probs
from llama.sampling_params import SamplingParams, check_count, check_prompts


class Choice(NamedTuple):
    """A token that could stand somewhere."""

    id: int
    text: str  # see `Tokenizer.token_text`
    probability: float


class Token(NamedTuple):
    """A token of a text, and what the model expected in its place.

    The first one has nothing before it: None, and no alternatives.
    """

    id: int
    text: str  # see `Tokenizer.token_text`
    new: bool  # whether it is the model's own, behind the prompt
    probability: float | None
    logprob: float | None  # natural log of it
    rank: int | None  # 1: the likeliest
    entropy: float | None  # of the distribution it was taken from, in nats: the logprob to be expected, negated
    alternatives: list[Choice]  # the likeliest there, in falling order, the token itself among them if it is one


class Reshaped(NamedTuple):
    """The distribution that the next token is drawn from at some settings."""

    temperature: float
    top_p: float
    top_k: int | None
    probabilities: list[float]  # of `Inspection.next_tokens`, in their order
    others: float  # of all other tokens together
    drawable: int  # how many tokens can be drawn


class Totals(NamedTuple):
    """What the tokens of a text come to; None where none of them has something before it."""

    tokens: int
    logprob: float  # the sum, in nats
    perplexity: float | None  # e to the power of minus the mean logprob
    entropy: float | None  # the mean, in nats


@dataclass(frozen=True)
class Inspection:
    """What `inspect_tokens` found."""

    tokens: list[Token]
    next_tokens: list[Choice]  # the likeliest after the text, at temperature 1
    asked: Reshaped  # at the settings that were asked for
    single: list[Reshaped]  # one at a time: three temperatures, a top_k and a top_p (those asked for, or 5 and 0.9)


def inspect_tokens(
    llama: Llama,
    ids: Sequence[int],
    new: int = 0,
    *,
    alternatives: int = 5,
    bars: int = 10,
    temperature: float = 0.6,
    top_p: float = 0.9,
    top_k: int | None = None,
) -> Inspection:
    """Look at each token of a text, and at what would follow.

    Args:
        llama: its model is a `Transformer`.
        ids: the text's tokens: a prompt, and what was generated behind it.
        new: how many of them were generated.
        alternatives: how many of the likeliest tokens to name at each place.
        bars: how many of them to name after the text.
        temperature, top_p, top_k: how the next token is drawn; see `llama.sampling.sample`.

    Raises:
        InputError: no tokens, more than `max_seq_len`, or one outside the vocabulary; or a number out of range.
        ArithmeticError: the network computed something that is no finite number.
    """
    params = llama.model.params
    (tokens,) = check_prompts([ids], 1, params.max_batch_size, params.max_seq_len, params.vocab_size)
    check_count("alternatives", alternatives, 1)
    check_count("bars", bars, 1)
    check_count("new", new, 0)
    SamplingParams(0, temperature, top_p, top_k=top_k)  # which refuses what is out of range
    if new > len(tokens):
        raise InputError(f"new={new} is more than the {len(tokens)} tokens there are")

    device, text = llama.model.norm.weight.device, llama.tokenizer.token_text
    found = [Token(tokens[0], text(tokens[0]), new == len(tokens), None, None, None, None, [])]
    with torch.inference_mode():
        hidden = llama.model.hidden_states(torch.tensor([tokens], device=device))[0]  # (seq, dim)
        block = max(1, LOGITS_AT_ONCE // 4 // params.vocab_size)  # the numbers take a few tensors of the logits' size
        for start in range(0, len(tokens) - 1, block):
            targets = torch.tensor(tokens[1 + start : 1 + start + block], device=device)  # (block)
            logits = _logits(llama, tokens, hidden[start : start + len(targets)])  # (block, vocab_size)
            for logprob, rank, entropy, top, top_ids in zip(*_numbers(logits, targets, alternatives), strict=True):
                likeliest = [Choice(i, text(i), math.exp(x)) for i, x in zip(top_ids, top, strict=True)]
                place = len(found)
                numbers = (math.exp(logprob), logprob, rank, entropy)
                found.append(Token(tokens[place], text(tokens[place]), place >= len(tokens) - new, *numbers, likeliest))

        logits = _logits(llama, tokens, hidden[-1:])  # (1, vocab_size), of the token after the text
        probs, shown = torch.softmax(logits[0], dim=-1).topk(min(bars, logits.shape[-1]))  # (bars) each
        after = [Choice(i, text(i), p) for i, p in zip(shown.tolist(), probs.tolist(), strict=True)]
        asked = _reshape(logits, shown, temperature, top_p, top_k)
        single = [_reshape(logits, shown, value, 1.0, None) for value in (0.5, 1.0, 1.5)]
        single.append(_reshape(logits, shown, 1.0, 1.0, top_k or 5))
        single.append(_reshape(logits, shown, 1.0, top_p if top_p < 1 else 0.9, None))
    return Inspection(found, after, asked, single)


def _logits(llama: Llama, tokens: list[int], hidden: torch.Tensor) -> torch.Tensor:
    """(seq, dim) of these tokens -> (seq, vocab_size); ArithmeticError if they aren't finite."""
    logits: torch.Tensor = llama.model.logits(hidden)
    if not logits.isfinite().all():
        raise ArithmeticError(explain_non_finite(llama.model, tokens))
    return logits


def _numbers(logits: torch.Tensor, targets: torch.Tensor, k: int) -> tuple[list, list, list, list, list]:
    """Of each position's token: logprob, rank, entropy; and the k likeliest: logprobs, ids.

    Args:
        logits: (seq, vocab_size) float32.
        targets: (seq) int64, the tokens that stand there.
    """
    logprobs = torch.log_softmax(logits, dim=-1)  # (seq, vocab_size)
    mine = logprobs.gather(-1, targets[:, None])  # (seq, 1)
    rank = 1 + (logprobs > mine).sum(dim=-1)  # (seq)
    entropy = -(logprobs.exp() * logprobs).sum(dim=-1)  # (seq)
    top, ids = logprobs.topk(min(k, logits.shape[-1]), dim=-1)  # (seq, k)
    return mine.squeeze(-1).tolist(), rank.tolist(), entropy.tolist(), top.tolist(), ids.tolist()


def _reshape(
    logits: torch.Tensor, shown: torch.Tensor, temperature: float, top_p: float, top_k: int | None
) -> Reshaped:
    """The distribution at these settings, of logits (1, vocab_size); by name, of the ids `shown`, (bars)."""
    probs = sampling_probs(logits, temperature, top_p, top_k)[0]  # (vocab_size)
    others = probs.index_fill(0, shown, 0.0).sum().item()
    return Reshaped(temperature, top_p, top_k, probs[shown].tolist(), others, int((probs > 0).sum()))


def totals(tokens: Sequence[Token]) -> Totals:
    """The sums and means over the tokens that have something before them."""
    logprobs = [token.logprob for token in tokens if token.logprob is not None]
    entropies = [token.entropy for token in tokens if token.entropy is not None]
    if not logprobs:
        return Totals(len(tokens), 0.0, None, None)
    mean = math.fsum(logprobs) / len(logprobs)
    perplexity = math.exp(-mean) if mean > -700 else math.inf
    return Totals(len(tokens), math.fsum(logprobs), perplexity, math.fsum(entropies) / len(entropies))
