"""Logits to the next token: pure functions of tensors, drawing from torch's default generator."""

import torch


def sample_top_p(probs: torch.Tensor, p: float) -> torch.Tensor:
    """Draw from the nucleus: the likeliest tokens that together reach probability p (arXiv 1904.09751).

    A token belongs to it while the probability of all likelier ones is at most p, so the likeliest always does.

    Args:
        probs: (batch, vocab_size), each row summing to 1; left as it is.
        p: 0 to 1.

    Returns:
        Token ids, (batch, 1).
    """
    sorted_probs, sorted_ids = torch.sort(probs, dim=-1, descending=True)
    before = torch.cumsum(sorted_probs, dim=-1) - sorted_probs
    nucleus = sorted_probs.masked_fill(before > p, 0.0)
    nucleus = nucleus / nucleus.sum(dim=-1, keepdim=True)
    return sorted_ids.gather(-1, torch.multinomial(nucleus, num_samples=1))


def next_tokens(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """The next token of each row.

    Args:
        logits: (batch, vocab_size) float32.
        temperature: 0 takes the likeliest token; else logits are divided by it.
        top_p: see `sample_top_p`.

    Returns:
        (batch) ids; -1 for a row that holds NaN or infinity, or nothing above minus infinity. (No exception, since to
        raise one the host would have to wait for the device.)
    """
    finite = logits.amax(dim=-1).isfinite()  # NaN is the greatest of all
    if temperature == 0:
        ids = logits.argmax(dim=-1)
    else:
        drawable = torch.where(finite[:, None], logits, 0.0)  # torch.multinomial aborts on NaN
        ids = sample_top_p(torch.softmax(drawable / temperature, dim=-1), top_p).squeeze(-1)
    return torch.where(finite, ids, -1)


def token_logprobs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Natural log of each given token's probability: (..., vocab_size) and (...) -> (...), float32, at most 0."""
    return torch.log_softmax(logits, dim=-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
