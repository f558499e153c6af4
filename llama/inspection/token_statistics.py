"""The statistics of the tokens of a text, and of the distributions that the next token is sampled from."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from llama.sampling import sampling_probs


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
