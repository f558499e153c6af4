"""How likely a model found each token of a text, and how the next token would be sampled.

ids -> one forward pass without the cache -> logits of each position -> statistics of each token
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from llama.errors import InputError
from llama.model import Transformer
from llama.non_finite import explain_non_finite
from llama.sampling import sampling_probs
from llama.sampling_params import SamplingParams, check_number, check_prompts
from llama.tokenizer import Tokenizer

MAX_LOGITS = 2**23  # logits that are computed at once; their statistics take a few tensors of this size


class Candidate(NamedTuple):
    """A token that the model could choose at some position."""

    id: int
    text: str  # as `Tokenizer.token_text` writes it
    probability: float


class TokenStatistics(NamedTuple):
    """A token of a text, and the model's prediction at its position.

    Nothing precedes the first token, so there is no prediction for it: its numbers are None, and it has no
    alternatives.
    """

    id: int
    text: str  # as `Tokenizer.token_text` writes it
    generated: bool  # False for a token of the prompt
    probability: float | None
    logprob: float | None  # natural log of the probability
    rank: int | None  # 1 for the most likely token
    entropy: float | None  # of the predicted distribution, in nats
    alternatives: list[Candidate]  # the most likely tokens at this position, in falling order


class SamplingDistribution(NamedTuple):
    """The distribution that the next token is sampled from with some settings."""

    temperature: float
    top_p: float
    top_k: int | None
    probabilities: list[float]  # of `Inspection.next_tokens`, in the same order
    others: float  # the probability of all other tokens together
    n_tokens: int  # number of tokens with a probability above 0


class TextStatistics(NamedTuple):
    """Sums and means over the tokens of a text. The means are None if the model predicted none of them."""

    n_tokens: int
    logprob: float  # the sum, in nats
    perplexity: float | None  # exp(-mean logprob)
    entropy: float | None  # the mean, in nats


@dataclass(frozen=True)
class Inspection:
    """The result of `inspect_tokens`.

    Attributes:
        tokens: the tokens of the text.
        next_tokens: the most likely tokens after the text, with their probabilities at temperature 1.
        requested: the distribution of the next token with the requested sampling settings.
        variations: its distributions with one setting at a time: temperatures 0.5, 1 and 1.5; top-k; top-p (the
            requested ones, or 5 and 0.9).
    """

    tokens: list[TokenStatistics]
    next_tokens: list[Candidate]
    requested: SamplingDistribution
    variations: list[SamplingDistribution]


@torch.inference_mode()
def inspect_tokens(
    model: Transformer,
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    n_generated: int = 0,
    *,
    alternatives: int = 5,
    n_next_tokens: int = 10,
    temperature: float = 0.6,
    top_p: float = 0.9,
    top_k: int | None = None,
) -> Inspection:
    """Compute the statistics of each token of a text, and the distributions of the token after it.

    Args:
        model: the model. Its cache is neither used nor changed.
        tokenizer: the tokenizer, which names the tokens.
        tokens: the ids of the text: a prompt, and what was generated after it.
        n_generated: how many of them, at the end, were generated.
        alternatives: how many of the most likely tokens to list at each position.
        n_next_tokens: how many of the most likely tokens to list after the text.
        temperature, top_p, top_k: the requested sampling settings; see `llama.sampling.sample`.

    Raises:
        InputError: no tokens, more than `max_seq_len`, an id outside the vocabulary, or a number out of range.
        ArithmeticError: the network computed NaN or infinity.
    """
    params = SamplingParams(0, temperature, top_p, top_k=top_k)  # which checks the sampling settings
    (ids,) = check_prompts([tokens], model, tokenizer, params)
    check_number("alternatives", alternatives, 1, integer=True)
    check_number("n_next_tokens", n_next_tokens, 1, integer=True)
    check_number("n_generated", n_generated, 0, integer=True)
    if n_generated > len(ids):
        raise InputError(f"n_generated={n_generated} is more than the {len(ids)} tokens of the text")

    hidden = model.hidden_states(torch.tensor([ids], device=model.norm.weight.device))[0]  # (seq, dim)
    first_generated = len(ids) - n_generated
    first = TokenStatistics(ids[0], tokenizer.token_text(ids[0]), first_generated == 0, None, None, None, None, [])
    statistics = [first]
    positions = max(1, MAX_LOGITS // model.vocab_size)  # of one block
    for start in range(0, len(ids) - 1, positions):
        targets = torch.tensor(ids[1 + start : 1 + start + positions], device=hidden.device)
        logits = finite_logits(model, ids, hidden[start : start + len(targets)])  # (positions, vocab_size)
        for prediction in predictions(logits, targets, alternatives, tokenizer.token_text):
            i = len(statistics)
            statistics.append(TokenStatistics(ids[i], tokenizer.token_text(ids[i]), i >= first_generated, *prediction))

    logits = finite_logits(model, ids, hidden[-1:])  # (1, vocab_size)
    probs, next_ids = torch.softmax(logits[0], dim=-1).topk(min(n_next_tokens, logits.shape[-1]))
    next_tokens = [
        Candidate(token, tokenizer.token_text(token), prob)
        for token, prob in zip(next_ids.tolist(), probs.tolist(), strict=True)
    ]
    settings = [
        (temperature, top_p, top_k),
        *((value, 1.0, None) for value in (0.5, 1.0, 1.5)),
        (1.0, 1.0, top_k or 5),
        (1.0, top_p if top_p < 1 else 0.9, None),
    ]
    requested, *variations = [sampling_distribution(logits, next_ids, *setting) for setting in settings]
    return Inspection(statistics, next_tokens, requested, variations)


def finite_logits(model: Transformer, tokens: list[int], hidden: torch.Tensor) -> torch.Tensor:
    """Return the logits of hidden states that the model computed on these tokens: (seq, dim) -> (seq, vocab_size).

    Raises:
        ArithmeticError: some are NaN or infinity.
    """
    logits = model.logits(hidden)
    if not logits.isfinite().all():
        raise ArithmeticError(explain_non_finite(model, tokens))
    return logits


def predictions(
    logits: torch.Tensor, targets: torch.Tensor, alternatives: int, token_text: Callable[[int], str]
) -> Iterator[tuple[float, float, int, float, list[Candidate]]]:
    """Yield, for each position, probability, logprob and rank of its target, the entropy, and the most likely tokens.

    Args:
        logits: (seq, vocab_size) float32.
        targets: (seq) int64, the token that stands at each position.
        alternatives: how many of the most likely tokens to list.
        token_text: id -> name of a token.
    """
    logprobs = torch.log_softmax(logits, dim=-1)  # (seq, vocab_size)
    target_logprobs = logprobs.gather(-1, targets[:, None])  # (seq, 1)
    ranks = 1 + (logprobs > target_logprobs).sum(dim=-1)  # (seq)
    entropies = -(logprobs.exp() * logprobs).sum(dim=-1)  # (seq)
    top_logprobs, top_ids = logprobs.topk(min(alternatives, logits.shape[-1]), dim=-1)  # (seq, alternatives)
    columns = (target_logprobs.squeeze(-1), ranks, entropies, top_ids, top_logprobs)
    for logprob, rank, entropy, ids, values in zip(*(column.tolist() for column in columns), strict=True):
        likeliest = [Candidate(i, token_text(i), math.exp(value)) for i, value in zip(ids, values, strict=True)]
        yield math.exp(logprob), logprob, rank, entropy, likeliest


def sampling_distribution(
    logits: torch.Tensor, listed_ids: torch.Tensor, temperature: float, top_p: float, top_k: int | None
) -> SamplingDistribution:
    """Return the distribution that a token is sampled from.

    Args:
        logits: (1, vocab_size).
        listed_ids: (listed) int64, the tokens whose probabilities are listed one by one.
        temperature, top_p, top_k: the sampling settings.
    """
    probs = sampling_probs(logits, temperature, top_p, top_k)[0]  # (vocab_size)
    others = probs.index_fill(0, listed_ids, 0.0).sum().item()
    return SamplingDistribution(temperature, top_p, top_k, probs[listed_ids].tolist(), others, int((probs > 0).sum()))


def text_statistics(tokens: Sequence[TokenStatistics]) -> TextStatistics:
    """Return sums and means over the tokens that have a prediction."""
    logprobs = [token.logprob for token in tokens if token.logprob is not None]
    entropies = [token.entropy for token in tokens if token.entropy is not None]
    if not logprobs:
        return TextStatistics(len(tokens), 0.0, None, None)
    mean = math.fsum(logprobs) / len(logprobs)
    perplexity = math.exp(-mean) if mean > -700 else math.inf
    return TextStatistics(len(tokens), math.fsum(logprobs), perplexity, math.fsum(entropies) / len(entropies))
