"""Beam search: the likeliest answers, found by following several at a time.

Each step continues every beam of a prompt with every word, and keeps the best `num_beams` of all. One that ends becomes
an answer, with the score log-probability / length ** length_penalty. The meaning of every option is that of Hugging
Face's `generate`, so that the same model finds the same answers there.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from llama import distributed
from llama.non_finite import explain_non_finite
from llama.sampling_params import SamplingParams
from llama.streaming import Piece, RowOutput, StopCriteria

IMPOSSIBLE = -1e9  # the log-probability of what fills a prompt's places before it has enough beams


class Beam(NamedTuple):
    """A beginning of an answer; or, with its stop token, a whole one."""

    tokens: list[int]
    logprobs: list[float]
    total: float  # their sum


class Search:
    """The search for the answers to one prompt.

    Attributes:
        beams: num_beams beginnings, the likeliest first.
        found: the best answers so far, with their scores, the best first; at most num_beams.
        done: whether it is over.
    """

    def __init__(self, how: SamplingParams, rules: StopCriteria) -> None:
        self.how, self.rules = how, rules
        self.beams = [Beam([], [], 0.0)] + [Beam([], [], IMPOSSIBLE)] * (how.num_beams - 1)
        self.found: list[tuple[float, Beam]] = []
        self.done = rules.room < 1

    def advance(self, candidates: list[tuple[int, int, float, float]]) -> list[int]:
        """Go on with the best continuations: (beam, token, its logprob, total), the likeliest first.

        Returns:
            Of each new beam, which of the old ones it continues.
        """
        if self.done:
            return list(range(len(self.beams)))
        size, old = self.how.num_beams, self.beams
        going: list[tuple[int, Beam]] = []
        for rank, (beam, token, logprob, total) in enumerate(candidates):
            longer = Beam([*old[beam].tokens, token], [*old[beam].logprobs, logprob], total)
            if self._ends(longer):
                if rank < size:  # the others are only there in case all of these end
                    self.found.append((total / len(longer.tokens) ** self.how.length_penalty, longer))
            elif len(going) < size:
                going.append((beam, longer))
        self.found = sorted(self.found, key=lambda one: -one[0])[:size]
        if not going or not self._may_improve(going[0][1]):
            self.done = True
        going += [(0, Beam([*old[0].tokens, 0], [*old[0].logprobs, 0.0], IMPOSSIBLE))] * (size - len(going))
        self.beams = [beam for _, beam in going]
        return [source for source, _ in going]

    def _ends(self, beam: Beam) -> bool:
        rules = self.rules
        if beam.tokens[-1] in rules.stop_tokens or len(beam.tokens) == rules.room:
            return True
        if rules.decode is None or not rules.stops:
            return False
        reach = 4 * max(map(len, rules.stops)) + 4  # the last token ends it: a character may take four
        text = rules.decode(beam.tokens[-reach:])
        return any(stop in text for stop in rules.stops)

    def _may_improve(self, best: Beam) -> bool:
        """Whether beams that go on might still give a better answer than those found."""
        if len(self.found) < self.how.num_beams:
            return True
        if self.how.early_stopping is True:
            return False
        penalty = self.how.length_penalty
        to_the_end = self.how.early_stopping == "never" and penalty > 0
        length = self.rules.room if to_the_end else len(best.tokens)
        return best.total / length**penalty > self.found[-1][0]

    def pieces(self, first_row: int) -> Iterator[Piece]:
        """The best answers, one row each."""
        for i, (score, beam) in enumerate(self.found[: self.how.num_return_sequences]):
            answer = RowOutput(first_row + i, self.rules)
            pieces = [piece for one in zip(beam.tokens, beam.logprobs, strict=True) for piece in answer.take(*one)]
            for piece in (*pieces, *answer.end()):
                yield piece._replace(score=score if piece.ended else None)


def beam_search(
    decoder: Any, prompts: list[list[int]], logits: torch.Tensor, how: SamplingParams, rules: list[StopCriteria]
) -> Iterator[Piece]:
    """Yield the best answers to prompts that have been read, when all are found.

    Args:
        decoder: the `llama.decoding.Decoder` that has read them.
        logits: those after the prompts, (prompts, vocab_size).
        rules: room and what ends an answer, of each prompt.
    """
    size = how.num_beams
    searches = [Search(how, rule) for rule in rules]
    rows = [row for row in range(len(prompts)) for _ in range(size)]
    decoder.reorder(rows, max(map(len, prompts)))
    logits = logits.index_select(
        0, torch.tensor(rows, dtype=torch.long, device=logits.device)
    )  # (prompts * num_beams, vocab_size)
    start_pos = decoder.first_positions([prompts[row] for row in rows])
    end = max(map(len, prompts))
    # So many that, if each beam's likeliest words are those that end it, enough others are left.
    count = max(2, 1 + len(rules[0].stop_tokens)) * size
    while True:
        texts = [prompts[i] + beam.tokens for i, search in enumerate(searches) for beam in search.beams]
        best = _best(decoder.model, texts, logits, searches, how, count)
        sources = []
        for i, search in enumerate(searches):
            sources += [i * size + beam for beam in search.advance(best[i])]
        if all(search.done for search in searches):
            break
        end += 1
        decoder.reorder(sources, min(end, decoder.model.params.max_seq_len))
        ids = [beam.tokens[-1] if beam.tokens else 0 for search in searches for beam in search.beams]
        logits = decoder.step(torch.tensor(ids, device=logits.device), start_pos)
        start_pos = decoder.next_positions(start_pos)
    for i, search in enumerate(searches):
        yield from search.pieces(i * how.num_return_sequences)


@torch.no_grad()
def _best(
    model: Any, texts: list[list[int]], logits: torch.Tensor, searches: list[Search], how: SamplingParams, count: int
) -> list[list[tuple[int, int, float, float]]]:
    """For each prompt, the `count` likeliest continuations of its beams: (beam, token, its logprob, total)."""
    logprobs = torch.log_softmax(logits, dim=-1)  # (prompts * num_beams, vocab_size)
    # What a logits_processor adds to a logit, it adds to the log-probability: as in Hugging Face's, those left don't
    # add up to 1 any more.
    changed = how.process(texts, logits) - logits.logsumexp(dim=-1, keepdim=True)
    beams = [beam.total for search in searches for beam in search.beams]
    totals = torch.tensor(beams, dtype=logits.dtype, device=logits.device)
    vocab_size = logprobs.shape[-1]
    sums = (changed + totals[:, None]).view(len(searches), -1)  # (prompts, num_beams * vocab_size)
    values, places = sums.topk(min(count, sums.shape[-1]), dim=-1)
    values, places = distributed.broadcast(values), distributed.broadcast(places)
    own = logprobs.view(len(searches), -1).gather(-1, places)
    best = []
    for i, row in enumerate(zip(places.tolist(), own.tolist(), values.tolist(), strict=True)):
        possible = [one for one in zip(*row, strict=True) if one[2] != -math.inf]
        if not searches[i].done and (not possible or any(math.isnan(total) for _, _, total in possible)):
            raise ArithmeticError(explain_non_finite(model, texts[i * how.num_beams], how.logits_processor is not None))
        best.append([(place // vocab_size, place % vocab_size, logprob, total) for place, logprob, total in possible])
    return best
