"""The masked loss: the mean negative log-probability of the tokens that the assistant should say.

    loss = - 1/N * sum over the N tokens that count of log p(token | all tokens before it)

The tokens of prompts and padding are masked: they are in neither the sum nor N. N counts the tokens of everything that
one step trains on. If instead each batch, process or row had a mean of its own, and these means were averaged, then a
token of a short answer would weigh more than one of a long answer, and the gradient would depend on how the examples
are split into batches.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from llama.distributed import data_parallel_rank, data_parallel_size, sum_over_data_parallel
from llama.finetune.data import Batch, Example, make_batch
from llama.model import Transformer


def summed_loss(model: Transformer, batch: Batch) -> torch.Tensor:
    """Return the sum, not the mean, of the loss over the tokens of a batch: a float32 scalar, with gradients.

    Only the positions whose targets count pass through `output`: with a vocabulary of 128,256 tokens, the logits are by
    far the largest tensor.
    """
    hidden = model.hidden_states(batch.tokens)  # (batch, seq, dim)
    logits = model.logits(hidden[batch.loss_mask])  # (tokens that count, vocab_size)
    return F.cross_entropy(logits, batch.targets[batch.loss_mask], reduction="sum")


def shard(examples: Sequence[Example], batch_size: int) -> Iterator[Sequence[Example]]:
    """Yield this process's share of the examples in batches: those of similar length together, for little padding."""
    by_length = sorted(examples, key=lambda example: len(example.tokens))
    for start in range(data_parallel_rank() * batch_size, len(examples), data_parallel_size() * batch_size):
        yield by_length[start : start + batch_size]


@torch.no_grad()
def mean_loss(model: Transformer, examples: Sequence[Example], batch_size: int) -> float:
    """Return the loss over examples, those of all processes together, without training on them."""
    device = model.norm.weight.device
    total = torch.zeros((), dtype=torch.float32, device=device)
    for batch in shard(examples, batch_size):
        total += summed_loss(model, make_batch(batch, device))
    return sum_over_data_parallel(total).item() / sum(example.n_loss_tokens for example in examples)
