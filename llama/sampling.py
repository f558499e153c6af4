"""Logits to the next token: pure functions of tensors, and of a generator; by default, torch's own."""

import torch
import torch.nn.functional as F


def sample_top_p(probs: torch.Tensor, p: float, *, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw from the nucleus: the likeliest tokens that together reach probability p (arXiv 1904.09751).

    A token belongs to it while the probability of all likelier ones is at most p, so the likeliest always does.

    Args:
        probs: (batch, vocab_size), each row summing to 1; left as it is.
        p: 0 to 1.
        generator: to draw from, on the device of `probs`; None for torch's default one.

    Returns:
        Token ids, (batch, 1).
    """
    sorted_probs, sorted_ids = _likeliest(probs, p)  # (batch, count)
    nucleus = keep_nucleus(sorted_probs, p)
    # As wide as the vocabulary: so many random numbers does the reference draw, and so they are added up there.
    nucleus = F.pad(nucleus, (0, probs.shape[-1] - nucleus.shape[-1]))
    nucleus = nucleus / nucleus.sum(dim=-1, keepdim=True)
    drawn = torch.multinomial(nucleus, num_samples=1, generator=generator)  # (batch, 1) places in the sorted order
    if sorted_ids.shape[-1] < probs.shape[-1]:
        # Equally likely tokens have an order of their own in the sort of all.
        twins = (probs == sorted_probs.gather(-1, drawn)).sum(dim=-1) > 1
        if twins.any():
            sorted_ids = torch.sort(probs, dim=-1, descending=True).indices
    return sorted_ids.gather(-1, drawn)


def keep_nucleus(sorted_probs: torch.Tensor, p: float) -> torch.Tensor:
    """Probabilities in falling order, (batch, count), with 0 in place of those outside of the nucleus of p."""
    before = torch.cumsum(sorted_probs, dim=-1) - sorted_probs
    return sorted_probs.masked_fill(before > p, 0.0)


def _likeliest(probs: torch.Tensor, p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest tokens in falling order, at least those of the nucleus: their probabilities and ids.

    Sorting 128,256 words takes a CPU 10 ms, and a few hundred of them hold nearly all of the probability. Those below
    (1 - p) / vocab_size have less than 1 - p together, so the others reach p without them. (Half of that bound, so that
    rounding can't matter.) On a GPU the sort is quick, and counting would make the host wait.
    """
    vocab_size = probs.shape[-1]
    if probs.device.type == "cpu" and p < 0.999:
        count = int((probs >= (1 - p) / (2 * vocab_size)).sum(dim=-1).max())
        if count < vocab_size // 8:
            return probs.topk(count, dim=-1)
    return torch.sort(probs, dim=-1, descending=True)


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest logits of each row, (batch, vocab_size), and minus infinity in place of the others."""
    values, ids = logits.topk(min(k, logits.shape[-1]), dim=-1)
    return torch.full_like(logits, -torch.inf).scatter(-1, ids, values)


def sample(
    logits: torch.Tensor,
    temperature: float,
    top_p: float,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """The next token of each row.

    Args:
        logits: (batch, vocab_size) float32.
        temperature: 0 takes the likeliest token; else logits are divided by it.
        top_p, generator: see `sample_top_p`.
        top_k: draw from this many of the likeliest tokens; None for all.

    Returns:
        (batch) ids; -1 for a row that holds NaN or infinity, or nothing above minus infinity. (No exception, since to
        raise one the host would have to wait for the device.)
    """
    finite = logits.amax(dim=-1).isfinite()  # NaN is the greatest of all
    if temperature == 0 or top_k == 1:
        ids = logits.argmax(dim=-1)
    else:
        drawable = torch.where(finite[:, None], logits, 0.0)  # torch.multinomial aborts on NaN
        probs = scaled_probs(drawable, temperature, top_k)
        ids = sample_top_p(probs, top_p, generator=generator).squeeze(-1)
    return torch.where(finite, ids, -1)


def scaled_probs(logits: torch.Tensor, temperature: float, top_k: int | None = None) -> torch.Tensor:
    """Probabilities, (batch, vocab_size), of logits divided by a temperature above 0; the `top_k` likeliest tokens'."""
    scaled = logits / temperature
    if top_k is not None:
        scaled = keep_top_k(scaled, top_k)
    return torch.softmax(scaled, dim=-1)


def sampling_probs(logits: torch.Tensor, temperature: float, top_p: float, top_k: int | None = None) -> torch.Tensor:
    """The probability that `sample` draws each token with: (batch, vocab_size) -> (batch, vocab_size).

    With `top_p=1` that is every token's. (A draw then leaves out the last few, where the sum of all before, about 1,
    happens to be rounded up.)
    """
    if temperature == 0 or top_k == 1:
        return F.one_hot(logits.argmax(dim=-1), logits.shape[-1]).to(logits.dtype)
    probs = scaled_probs(logits, temperature, top_k)
    if top_p == 1:
        return probs
    sorted_probs, ids = torch.sort(probs, dim=-1, descending=True)
    nucleus = keep_nucleus(sorted_probs, top_p)
    nucleus = nucleus / nucleus.sum(dim=-1, keepdim=True)
    return torch.zeros_like(nucleus).scatter(-1, ids, nucleus)


def token_logprobs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Natural log of each given token's probability: (..., vocab_size) and (...) -> (...), float32, at most 0."""
    return torch.log_softmax(logits, dim=-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
