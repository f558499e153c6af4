"""Speculative decoding: several tokens for one pass of the network (arXiv 2211.17192).

    tokens -> propose the next few -> forward them all at once -> accept the first ones, sample one more -> tokens

To generate one token takes the time in which the weights are read, and so do a few at once. What proposes them has to
be quick: `PromptLookup` finds them in the tokens so far, `DraftModel` asks a smaller model. A proposal is accepted with
a probability such that the tokens have exactly the distribution that they have without proposals; greedily, they are
the same tokens.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F

from llama.device import copy_without_wait, device_of
from llama.distributed import broadcast
from llama.positions import start_positions
from llama.protocols import CachedModel, LanguageModel
from llama.sampling_params import SamplingParams
from llama.streaming import RowOutput

WAITS = -2  # in place of a row's token: it gets none, since its proposals were accepted no further
MAX_PROPOSALS = 15  # with one more token they are 16: with more rows, products with few bits are slower
MAX_NGRAM = 16  # tokens; a longer match says no more
MIN_NGRAM = 2  # a match of one token says too little


class Proposals(NamedTuple):
    """Tokens that may come next."""

    tokens: list[list[int]]  # of each row; rows may have different numbers of them, or none
    probs: torch.Tensor | None  # (rows, proposals, vocab_size): what they were sampled from; None: they are certain


class PromptLookup:
    """Proposes what followed the last time that the latest tokens occurred: for answers that quote their prompt.

    Args:
        num_tokens: how many tokens to propose.
    """

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens

    def propose(self, tokens: list[list[int]], limits: list[int]) -> Proposals:
        """Tokens that may follow.

        Args:
            tokens: of each row, prompt and answer so far.
            limits: how many proposals each row can use.
        """
        rows = zip(tokens, limits, strict=True)
        return Proposals([continuation(row, min(limit, self.num_tokens)) for row, limit in rows], None)


def continuation(tokens: list[int], count: int) -> list[int]:
    """Up to `count` tokens that followed the longest earlier occurrence of the latest ones; of equals, the last."""
    best_length, best_end = MIN_NGRAM - 1, 0
    for i in range(len(tokens) - 2 if count > 0 else -1, -1, -1):
        if tokens[i] != tokens[-1]:
            continue
        length = 1
        while length < MAX_NGRAM and length <= i and tokens[i - length] == tokens[-1 - length]:
            length += 1
        if length > best_length:
            best_length, best_end = length, i + 1
            if length == MAX_NGRAM:
                break
    return tokens[best_end : best_end + count] if best_end else []


class DraftModel:
    """Proposes what a smaller model would say, which has prefilled the same prompts.

    The number of proposals grows while all of them are accepted in some row, and shrinks otherwise.

    Args:
        model: the smaller one's network.
        prompts: of each row, the tokens in its cache.
        probs: logits (rows, vocab_size) -> the probability of each token; None to propose the likeliest.
        generator: for sampling.
    """

    def __init__(
        self,
        model: CachedModel,
        prompts: list[list[int]],
        probs: Callable[[torch.Tensor], torch.Tensor] | None,
        generator: torch.Generator | None,
    ) -> None:
        self.model, self.probs, self.generator = model, probs, generator
        self.n_cached = list(map(len, prompts))  # of each row: how many of its tokens are in the cache
        self.num_tokens = 4
        self._expected: list[int | None] = []  # of each row with proposals: its length, if all of them are accepted

    def propose(self, tokens: list[list[int]], limits: list[int]) -> Proposals:
        """Tokens that may follow: see `PromptLookup.propose`."""
        if self._expected:
            all_accepted = any(len(row) == length for row, length in zip(tokens, self._expected, strict=True))
            self.num_tokens = min(self.num_tokens + 2, MAX_PROPOSALS) if all_accepted else max(1, self.num_tokens - 1)
        positions_left = self.model.params.max_seq_len - max(map(len, tokens))
        counts = [max(0, min(self.num_tokens, limit, positions_left)) for limit in limits]
        if max(counts) < 1:
            return Proposals([[] for _ in tokens], None)
        # The cache lacks the last token of each row, and the one before where the last proposal was accepted. What it
        # has of proposals that were not accepted is overwritten.
        self.n_cached = [min(n, len(row) - 1) for row, n in zip(tokens, self.n_cached, strict=True)]
        width = max(len(row) - n for row, n in zip(tokens, self.n_cached, strict=True))
        logits = forward(self.model, [row[-width:] for row in tokens], [len(row) - width for row in tokens])[:, -1]
        proposed: list[torch.Tensor] = []
        probs: list[torch.Tensor] = []
        for n in range(max(counts)):
            if n > 0:
                start_pos = start_positions([len(row) + n - 1 for row in tokens])
                with torch.inference_mode():
                    logits = self.model.forward(proposed[-1][:, None], start_pos)[:, -1].float()
            if self.probs is None:
                next_token = logits.argmax(dim=-1)
            else:
                probs.append(self.probs(logits.nan_to_num()))  # (rows, vocab_size)
                next_token = torch.multinomial(probs[-1], 1, generator=self.generator).squeeze(-1)
            proposed.append(broadcast(next_token))  # (rows)
        self.n_cached = [len(row) + max(counts) - 1 for row in tokens]
        self.model.setup_cache().tokens = [list(row) for row in tokens]
        lengths = zip(map(len, tokens), counts, strict=True)
        self._expected = [length + count + 1 if count > 0 else None for length, count in lengths]
        rows = torch.stack(proposed, dim=1).tolist()
        probs_of_rows = torch.stack(probs, dim=1) if probs else None  # (rows, proposals, vocab_size)
        return Proposals([row[:count] for row, count in zip(rows, counts, strict=True)], probs_of_rows)


@torch.no_grad()
def speculate(
    model: LanguageModel,
    logits: torch.Tensor,
    tokens: list[list[int]],
    outputs: list[RowOutput],
    params: SamplingParams,
    select: Callable[[torch.Tensor], torch.Tensor],
    process: Callable[[torch.Tensor], torch.Tensor],
    probs: Callable[[torch.Tensor], torch.Tensor],
    generator: torch.Generator | None,
    *,
    score_tokens: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """`llama.decoding.decode`, with several tokens for one pass of the network where proposals are accepted.

    With logits processors, which may keep a state, all rows advance together, by as many tokens as are accepted in all
    that haven't ended: so processors are called with just the tokens that they would see of these without proposals.

    Args:
        logits: of each row's next token, (rows, vocab_size).
        tokens: of each row, prompt and answer so far: the consumer appends what is yielded, until the row has ended.
        outputs: the rows' answers.
        params: what proposes tokens. A draft model has prefilled the prompts.
        select: see `decode`: it chooses where nothing is proposed, and everywhere if it takes the likeliest token.
        process: logits -> those after the logits processors.
        probs: processed logits -> the probability of each token, (rows, vocab_size).
        generator: for sampling; None for torch's default one.
        score_tokens: see `decode`.

    Yields:
        As `decode`; but `WAITS` in place of a row's token while others advance further.
    """
    proposer: PromptLookup | DraftModel
    if params.draft_model is None:
        proposer = PromptLookup(params.prompt_lookup_num_tokens or 0)
    else:
        draft = cast(CachedModel, params.draft_model.model)  # as `check_draft_model` has found
        proposer = DraftModel(draft, tokens, None if params.is_greedy else probs, generator)
    proposals = Proposals([[] for _ in tokens], None)
    padded = torch.empty(len(tokens), 0)  # the proposals, (rows, proposals), and -1 where a row has fewer
    block_logits = logits[:, None]  # (rows, 1, vocab_size); after a pass (rows, proposals + 1, vocab_size)
    while True:
        advances = [True] * len(tokens)  # the rows that get a token
        for i in range(block_logits.shape[1]):
            logits = block_logits[:, i]  # (rows, vocab_size)
            if params.is_greedy or i == padded.shape[1]:
                next_token = broadcast(select(logits))  # (rows)
            else:
                processed = process(logits)
                is_finite = processed.amax(dim=-1).isfinite()
                p = probs(processed.where(is_finite[:, None], 0.0))
                q = None if proposals.probs is None else proposals.probs[:, i]
                next_token = broadcast(accept_or_resample(p, padded[:, i], q, generator).where(is_finite, -1))
            chosen = next_token.tolist()  # here the host waits for the device
            accepted = [
                advance and proposed[i : i + 1] == [token]
                for advance, proposed, token in zip(advances, proposals.tokens, chosen, strict=True)
            ]
            for output, is_accepted in zip(outputs, accepted, strict=True):
                output.n_accepted += is_accepted
            if not all(advances):
                waiting = [token if advance else WAITS for token, advance in zip(chosen, advances, strict=True)]
                next_token = torch.tensor(waiting, device="cpu")
            scores = None if score_tokens is None else score_tokens(logits, next_token.to(logits.device).clamp(min=0))
            yield next_token, scores
            if params.logits_processors:
                if not all(is_accepted or output.ended for is_accepted, output in zip(accepted, outputs, strict=True)):
                    break
            else:
                advances = accepted
                if not any(advances):
                    break
        start = [len(row) - 1 for row in tokens]
        # What is padded takes positions, too: near the end of the longest row's context no row has proposals.
        positions_left = model.params.max_seq_len - 1 - max(start)
        proposals = proposer.propose(tokens, [min(output.n_left - 1, positions_left) for output in outputs])
        for output, proposed in zip(outputs, proposals.tokens, strict=True):
            output.n_proposed += len(proposed)
        count = max(map(len, proposals.tokens))
        rows = [row + [-1] * (count - len(row)) for row in proposals.tokens]
        padded = copy_without_wait(torch.tensor(rows, dtype=torch.long, device="cpu"), logits.device)
        # Each row's last token and its proposals. What the cache gets of padding is overwritten before it is used.
        block = [[row[-1], *(max(token, 0) for token in more)] for row, more in zip(tokens, rows, strict=True)]
        block_logits = forward(model, block, start)


def accept_or_resample(
    probs: torch.Tensor, proposed: torch.Tensor, draft_probs: torch.Tensor | None, generator: torch.Generator | None
) -> torch.Tensor:
    """The proposed tokens or others, such that they are distributed as `probs` says.

    A token is accepted with probability min(1, p(token) / q(token)), where q is what it was sampled from; another one
    is sampled from max(0, p - q), normalized (arXiv 2211.17192, section 2.3).

    Args:
        probs: p, (rows, vocab_size).
        proposed: (rows) ids; -1 where there is none.
        draft_probs: q, (rows, vocab_size); None where the proposed tokens are certain.
        generator: None for torch's default one.

    Returns:
        (rows) ids.
    """
    is_proposed, ids = (proposed >= 0)[:, None], proposed.clamp(min=0)[:, None]  # (rows, 1)
    q = F.one_hot(ids.squeeze(-1), probs.shape[-1]).to(probs) if draft_probs is None else draft_probs
    q = q.masked_fill(~is_proposed, 0.0)
    uniform = torch.rand(ids.shape, device=probs.device, generator=generator)
    is_accepted = is_proposed & (uniform * q.gather(-1, ids) < probs.gather(-1, ids))
    others = (probs - q).clamp(min=0)
    others = torch.where(others.sum(dim=-1, keepdim=True) > 0, others, probs)  # nothing is left where p = q
    other = torch.multinomial(others, 1, generator=generator)
    return torch.where(is_accepted, ids, other).squeeze(-1)


@torch.inference_mode()
def forward(model: LanguageModel, rows: list[list[int]], start: list[int]) -> torch.Tensor:
    """The logits after each token of some rows of equal length: (rows, length, vocab_size) float32.

    Args:
        rows: ids.
        start: the position of each row's first.
    """
    tokens = copy_without_wait(torch.tensor(rows, device="cpu"), device_of(model))  # (rows, length)
    return model.forward(tokens, start_positions(start)).float()
