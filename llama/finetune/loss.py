"""The masked loss: how surprised the model is by what the assistant says.

At each position the network gives every word a probability of being next. The loss is minus the log of the one that the
word that does come next was given, averaged over the words that are learned:

    loss = - 1/N * sum over the N learned tokens of log p(token | all tokens before it)

The others, the prompt's and the filling's, are masked: read, but not in the sum, and not in N. N counts the learned
tokens of everything that one step learns from. If each batch, process or row had a mean of its own, and the means were
averaged, a token in a short answer would weigh more than one in a long answer, and what is learned would depend on how
the examples happened to be dealt out.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from llama.distributed import data_parallel_rank, data_parallel_size, sum_over_data_parallel
from llama.finetune.data import Batch, Example, make_batch
from llama.model import Transformer


def summed_loss(model: Transformer, batch: Batch) -> torch.Tensor:
    """Minus the log-probability of the learned tokens, added up: a float32 scalar, with gradients.

    Only the positions that come before a learned token pass through `output`: with 128,256 words, the logits are by far
    the largest tensor there is.
    """
    hidden = model.hidden_states(batch.tokens)  # (batch, seq, dim)
    logits = model.logits(hidden[batch.learned])  # (learned tokens, vocab_size)
    return F.cross_entropy(logits, batch.targets[batch.learned], reduction="sum")


def shard(examples: Sequence[Example], batch_size: int) -> Iterator[Sequence[Example]]:
    """This process's part of the examples, in batches. Those of like length go together, so that little is filled."""
    by_length = sorted(examples, key=lambda example: len(example.tokens))
    for start in range(data_parallel_rank() * batch_size, len(examples), data_parallel_size() * batch_size):
        yield by_length[start : start + batch_size]


@torch.no_grad()
def mean_loss(model: Transformer, examples: Sequence[Example], batch_size: int) -> float:
    """The loss over examples, all processes' together, without learning from it."""
    device = model.norm.weight.device
    total = torch.zeros((), device=device)
    for part in shard(examples, batch_size):
        total += summed_loss(model, make_batch(part, device))
    return sum_over_data_parallel(total).item() / sum(example.n_learned for example in examples)
