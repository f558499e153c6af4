"""From logits to the next token: pure functions of tensors and of a random generator (None: torch's default one)."""

import torch
import torch.nn.functional as F

from llama.positions import has_fixed_steps


def sample(
    logits: torch.Tensor,
    temperature: float,
    top_p: float,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Sample the next token of each row.

    Args:
        logits: (batch, vocab_size) float32.
        temperature: 0 takes the likeliest token; else logits are divided by it.
        top_p, generator: see `sample_top_p`.
        top_k: sample from this many of the likeliest tokens; None for all.

    Returns:
        (batch) ids; -1 for a row with NaN, infinity or no token left (to raise, the host would wait for the device).
    """
    highest = logits.amax(dim=-1, keepdim=True)  # (batch, 1); NaN counts as the greatest of all
    finite = highest.isfinite()
    if temperature == 0 or top_k == 1:
        next_token = logits.argmax(dim=-1)
    else:
        fits = (highest / temperature).isfinite()  # else differences are divided (torch.multinomial refuses NaN)
        logits = torch.where(fits, logits, torch.where(finite, logits - highest, 0.0)) / temperature
        if top_k is not None:
            logits = keep_top_k(logits, top_k)
        next_token = sample_top_p(torch.softmax(logits, dim=-1), top_p, generator=generator).squeeze(-1)
    return torch.where(finite.squeeze(-1), next_token, -1)


def sample_top_p(probs: torch.Tensor, p: float, *, generator: torch.Generator | None = None) -> torch.Tensor:
    """Sample from the nucleus: the likeliest tokens that together reach probability p (arXiv 1904.09751).

    A token belongs to it while the probability of all likelier ones is at most p, so the likeliest always does.

    Args:
        probs: (batch, vocab_size), each row summing to 1; not changed.
        p: 0 to 1.
        generator: its device must be that of `probs`.

    Returns:
        Token ids, (batch, 1).
    """
    vocab_size, count = probs.shape[-1], _n_to_sort(probs, p)
    if count == vocab_size:
        sorted_probs, sorted_ids = torch.sort(probs, dim=-1, descending=True)
    else:
        sorted_probs, sorted_ids = probs.topk(count, dim=-1)  # (batch, count)
    nucleus = sorted_probs.masked_fill(torch.cumsum(sorted_probs, dim=-1) - sorted_probs > p, 0.0)
    if count < vocab_size:  # as wide as the vocabulary, so that as many random numbers are used, and sums rounded alike
        nucleus = F.pad(nucleus, (0, vocab_size - count))
    nucleus = nucleus / nucleus.sum(dim=-1, keepdim=True)
    if has_fixed_steps(probs.device):  # what torch.multinomial does, but for its checks: they make the host wait
        choice = (nucleus / torch.empty_like(nucleus).exponential_(generator=generator)).argmax(dim=-1, keepdim=True)
    else:
        choice = torch.multinomial(nucleus, num_samples=1, generator=generator)
    if count < vocab_size and ((probs == sorted_probs.gather(-1, choice)).sum(dim=-1) > 1).any():
        sorted_ids = torch.sort(probs, dim=-1, descending=True).indices  # topk may order equally likely ones otherwise
    return sorted_ids.gather(-1, choice)  # (batch, 1)


def _n_to_sort(probs: torch.Tensor, p: float) -> int:
    """How many of the likeliest tokens are sure to hold the nucleus; the whole vocabulary where a sort is as fast.

    Sorting a vocabulary of 128,256 takes a CPU 10 ms, and a few hundred tokens hold nearly all of the probability.
    Those below (1 - p) / vocab_size have less than 1 - p together, so the others reach p without them. (Half of that
    bound, so that rounding can't matter.) On a GPU the sort is quick, and counting would make the host wait.
    """
    vocab_size = probs.shape[-1]
    if probs.device.type != "cpu" or p >= 0.999:
        return vocab_size
    count = int((probs >= (1 - p) / (2 * vocab_size)).sum(dim=-1).max())
    return count if count < vocab_size // 8 else vocab_size


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest logits of each row, (batch, vocab_size), and minus infinity in place of the others."""
    values, ids = logits.topk(min(k, logits.shape[-1]), dim=-1)
    return torch.full_like(logits, -torch.inf).scatter(-1, ids, values)


def sampling_probs(logits: torch.Tensor, temperature: float, top_p: float, top_k: int | None = None) -> torch.Tensor:
    """The probability with which `sample` samples each token: (batch, vocab_size) -> (batch, vocab_size)."""
    if temperature == 0 or top_k == 1:
        return F.one_hot(logits.argmax(dim=-1), logits.shape[-1]).to(logits.dtype)
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    probs = torch.softmax(scaled if top_k is None else keep_top_k(scaled, top_k), dim=-1)
    if top_p == 1:  # rounding of the sums might cut off the last few
        return probs
    sorted_probs, sorted_ids = probs.topk(_n_to_sort(probs, top_p), dim=-1)
    nucleus = sorted_probs.masked_fill(torch.cumsum(sorted_probs, dim=-1) - sorted_probs > top_p, 0.0)
    return torch.zeros_like(probs).scatter(-1, sorted_ids, nucleus / nucleus.sum(dim=-1, keepdim=True))


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Natural log of each given token's probability: (..., vocab_size) and (...) -> (...), float32, at most 0."""
    return torch.log_softmax(logits, dim=-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def ranked_logprobs(logits: torch.Tensor, tokens: torch.Tensor, n: int) -> torch.Tensor:
    """Each row's token and its n likeliest, as ids and logprobs: (batch, vocab_size), (batch) -> (batch, 1 + n, 2).

    They are one float32 tensor, so that it takes one wait: it holds ids exactly, up to 2^24.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    likeliest = logprobs.topk(min(n, logits.shape[-1]), dim=-1).indices
    ids = torch.cat((tokens[:, None], likeliest), dim=-1)
    return torch.stack((ids.float(), logprobs.gather(-1, ids)), dim=-1)
