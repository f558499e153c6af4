"""The decode loop: token ids in, token ids out.

    prompts -> prefill -> logits -> decode: [select a token a row -> forward it -> logits] again and again -> tokens

Whoever consumes `decode` decides which rows have finished: see `llama.batch`.
"""

from collections.abc import Callable, Iterator

import torch

from llama.device import device_of
from llama.distributed import broadcast
from llama.model import Transformer
from llama.positions import start_positions
from llama.protocols import LanguageModel
from llama.sampling import token_logprobs
from llama.streaming import stoppable

MAX_LOGITS = 2**25  # prompts are scored in blocks of positions with at most about this many logits (128 MB)


@torch.inference_mode()
def prefill(
    model: LanguageModel,
    prompts: list[list[int]],
    start_pos: int = 0,
    logprobs: bool = False,
    should_stop: Callable[[], bool] | None = None,
) -> tuple[torch.Tensor, list[list[float]]]:
    """Pass all prompts through the network at once, and so into its cache.

    Args:
        prompts: ids; rows may differ in length.
        start_pos: this many tokens of each prompt are in the cache already.
        logprobs: also score the prompts' own tokens; `start_pos` must be 0 then.
        should_stop: asked before each layer whether to raise `Stopped`, since a long prompt may take many seconds.

    Returns:
        The logits of the token after each prompt, (batch, vocab_size) float32; and the logprobs of the prompts' tokens.
    """
    longest = max(map(len, prompts))
    # Shorter rows are padded on the right, to which none of their own tokens attends. The padding's keys and values are
    # overwritten, position by position, before a new token attends to them.
    padded = [prompt[start_pos:] + [0] * (longest - len(prompt)) for prompt in prompts]
    tokens = torch.tensor(padded, dtype=torch.long, device=device_of(model))  # (batch, seq)
    head: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.float
    if isinstance(model, Transformer) and getattr(model.forward, "__func__", None) is Transformer.forward:
        layers = None if should_stop is None else stoppable(model.layers, should_stop)
        hidden, head = model.hidden_states(tokens, start_pos, layers), model.logits  # (batch, seq, dim)
    else:  # a network or `forward` of the caller's own: the logits of every position
        hidden = model.forward(tokens, start_pos)  # (batch, seq, vocab_size)
    seq = longest - start_pos
    last = [row * seq + len(prompt) - 1 - start_pos for row, prompt in enumerate(prompts)]
    last_hidden = hidden.flatten(0, 1).index_select(0, torch.tensor(last, dtype=torch.long, device=hidden.device))
    logits = head(last_hidden)  # (batch, vocab_size)
    if not logprobs:
        return logits, []
    tokens, block = tokens.to(hidden.device), max(1, MAX_LOGITS // logits.shape[-1])
    return logits, [score(tokens[i, : len(p)], hidden[i], head, block) for i, p in enumerate(prompts)]


def score(
    tokens: torch.Tensor, hidden: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor], block: int
) -> list[float]:
    """The logprob of each token of a prompt, given those before it.

    Args:
        tokens: (seq)
        hidden: their hidden states or logits, (seq, ...); padding may follow.
        head: (positions, ...) of `hidden` -> their logits (positions, vocab_size).
        block: positions whose logits are computed together.
    """
    logprobs = [0.0]  # nothing stands before the first
    for start in range(0, len(tokens) - 1, block):
        targets = tokens[1 + start : 1 + start + block]
        logprobs += token_logprobs(head(hidden[start : start + len(targets)]), targets).tolist()
    return logprobs


@torch.no_grad()  # not inference mode, in which a logits_processor could not switch gradients on again
def decode(
    model: LanguageModel,
    logits: torch.Tensor,
    lengths: list[int],
    select: Callable[[torch.Tensor], torch.Tensor],
    score_tokens: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Generate a token a row, step by step, for as long as the consumer asks for more.

    Args:
        logits: of each row's next token, (batch, vocab_size): see `prefill`.
        lengths: how many tokens each row has. A row that has filled the context is forwarded at its last position again
            and again: the consumer ignores what it yields.
        select: logits -> the next token of each row, (batch), such as `llama.sampling.sample`; -1 where there is none.
        score_tokens: logits and tokens -> what is to be yielded with the tokens, such as their logprobs.

    Yields:
        The tokens, (batch), the same on every rank; and their scores, or None.
    """
    start_pos = start_positions(lengths)
    last_pos = model.params.max_seq_len - 1
    while True:
        next_token = broadcast(select(logits))  # (batch)
        yield next_token, None if score_tokens is None else score_tokens(logits, next_token.clamp(min=0))
        if isinstance(start_pos, torch.Tensor):
            start_pos = start_pos.clamp(max=last_pos)
        with torch.inference_mode():
            logits = model.forward(next_token.clamp(min=0)[:, None], start_pos)[:, -1].float()  # (batch, vocab_size)
        start_pos = start_pos + 1
