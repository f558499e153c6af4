"""Beam search: the likeliest answers, found by following several beginnings (beams) at a time.

Each step continues every beam of a prompt with every token, and keeps the best `num_beams` of all. A beam that ends
becomes an answer with the score log-probability / length ** length_penalty. Every option means what it means in Hugging
Face's `generate`, so that the same model finds the same answers there.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from llama.device import copy_without_wait
from llama.distributed import broadcast
from llama.non_finite import explain_non_finite
from llama.protocols import Cache, LanguageModel
from llama.sampling_params import SamplingParams, left_padded
from llama.streaming import Piece, RowOutput, StopCriteria

IMPOSSIBLE = -1e9  # the log-probability of beams that only fill up the batch, at the first step


class Beam(NamedTuple):
    """The beginning of an answer; or, with its stop token, a whole one."""

    tokens: list[int]
    logprobs: list[float]
    total: float  # the sum of the logprobs, as a logits_processor has changed them


class Candidate(NamedTuple):
    """A beam continued by a token."""

    beam: int  # index
    token: int
    logprob: float  # of the token, as the network has it
    total: float  # of the longer beam


class PromptSearch:
    """The search for the answers to one prompt.

    Attributes:
        beams: num_beams beginnings, the likeliest first.
        answers: the best answers so far, with their scores, the best first; at most num_beams.
        done: whether the search is over.
    """

    def __init__(self, params: SamplingParams, criteria: StopCriteria) -> None:
        self.params, self.criteria = params, criteria
        self.beams = [Beam([], [], 0.0)] + [Beam([], [], IMPOSSIBLE)] * (params.num_beams - 1)
        self.answers: list[tuple[float, Beam]] = []
        self.done = criteria.max_new_tokens < 1

    def advance(self, candidates: list[Candidate]) -> list[int]:
        """Replace the beams by their best continuations.

        Args:
            candidates: the likeliest first.

        Returns:
            Of each new beam, the index of the old one that it continues.
        """
        if self.done:
            return list(range(len(self.beams)))
        size, old = self.params.num_beams, self.beams
        continued: list[tuple[int, Beam]] = []
        for rank, (index, token, logprob, total) in enumerate(candidates):
            beam = Beam([*old[index].tokens, token], [*old[index].logprobs, logprob], total)
            if self._ends(beam):
                if rank < size:  # the other candidates are only there in case all of these end
                    self.answers.append((total / len(beam.tokens) ** self.params.length_penalty, beam))
            elif len(continued) < size:
                continued.append((index, beam))
        self.answers = sorted(self.answers, key=lambda answer: -answer[0])[:size]
        if not continued or not self._may_improve(continued[0][1]):
            self.done = True
        unused = (0, Beam([*old[0].tokens, 0], [*old[0].logprobs, 0.0], IMPOSSIBLE))
        continued += [unused] * (size - len(continued))
        self.beams = [beam for _, beam in continued]
        return [index for index, _ in continued]

    def _ends(self, beam: Beam) -> bool:
        criteria = self.criteria
        if beam.tokens[-1] in criteria.stop_tokens or len(beam.tokens) == criteria.max_new_tokens:
            return True
        if criteria.decode is None or not criteria.stop_strings:
            return False
        reach = 4 * max(map(len, criteria.stop_strings)) + 4  # it ends in the last token; 4 bytes a character
        text = criteria.decode(beam.tokens[-reach:])
        return any(string in text for string in criteria.stop_strings)

    def _may_improve(self, best: Beam) -> bool:
        """Whether the beams, of which this one is the best, might still become a better answer than those found."""
        if len(self.answers) < self.params.num_beams:
            return True
        if self.params.early_stopping is True:
            return False
        penalty = self.params.length_penalty
        at_full_length = self.params.early_stopping == "never" and penalty > 0
        length = self.criteria.max_new_tokens if at_full_length else len(best.tokens)
        return best.total / length**penalty > self.answers[-1][0]


class BeamSearch:
    """The searches for the answers to a batch of prompts: one row of the batch is one beam of one prompt.

    Args:
        cache: the model's, whose rows are reordered as the beams are.
        prompts: ids, which `model` has been prefilled with.
        criteria: what ends the answers to each prompt.
    """

    def __init__(
        self,
        model: LanguageModel,
        cache: Cache | None,
        prompts: list[list[int]],
        params: SamplingParams,
        criteria: list[StopCriteria],
    ) -> None:
        self.model, self.cache, self.prompts, self.params = model, cache, prompts, params
        self.searches = [PromptSearch(params, prompt_criteria) for prompt_criteria in criteria]
        self.end = max(map(len, prompts))  # of the cache
        self.totals: torch.Tensor | None = None  # of each beam, (rows), where the logits are
        # So many that, if each beam's likeliest tokens are those that end it, enough others are left.
        self.n_candidates = max(2, 1 + len(criteria[0].stop_tokens)) * params.num_beams

    @property
    def done(self) -> bool:
        return all(search.done for search in self.searches)

    def select(self, logits: torch.Tensor) -> torch.Tensor:
        """Advance every search: logits (prompts * num_beams, vocab_size) -> the last token of each beam, (rows)."""
        candidates = self._candidates(logits)
        sources = []
        for i, search in enumerate(self.searches):
            sources += [i * self.params.num_beams + beam for beam in search.advance(candidates[i])]
        last_tokens = [beam.tokens[-1] if beam.tokens else 0 for beam in self._beams()]
        # In one tensor, and so in one copy to the device. float32 holds ids exactly, up to 2^24.
        rows = [sources, last_tokens, [beam.total for beam in self._beams()]]
        rows_of, tokens, self.totals = copy_without_wait(
            torch.tensor(rows, dtype=torch.float32, device="cpu"), logits.device
        )
        if not self.done and self.cache is not None:
            self.cache.reorder(rows_of.long(), self.end)
            self.end += 1
        return tokens.long()

    def pieces(self) -> Iterator[Piece]:
        """The best answers, one row each."""
        for i, search in enumerate(self.searches):
            for j, (score, beam) in enumerate(search.answers[: self.params.num_return_sequences]):
                output = RowOutput(i * self.params.num_return_sequences + j, search.criteria)
                tokens = zip(beam.tokens, beam.logprobs, strict=True)
                pieces = [piece for token, logprob in tokens for piece in output.append(token, logprob)]
                for piece in (*pieces, *output.finish()):
                    yield piece._replace(score=score if piece.ended else None)

    def _beams(self) -> list[Beam]:
        """All beams: one for each row of the batch."""
        return [beam for search in self.searches for beam in search.beams]

    def _candidates(self, logits: torch.Tensor) -> list[list[Candidate]]:
        """For each prompt, the likeliest continuations of its beams, the likeliest first."""
        tokens = [self.prompts[i] + beam.tokens for i, search in enumerate(self.searches) for beam in search.beams]
        logprobs = torch.log_softmax(logits, dim=-1)  # (prompts * num_beams, vocab_size)
        processed_logprobs = logprobs
        if self.params.logits_processors:  # whose probabilities don't sum to 1 any more, as in Hugging Face's
            processed_logprobs = self.params.process(self.model, left_padded(tokens, logits.device, self.end), logprobs)
        if self.totals is None:
            self.totals = logits.new_tensor([beam.total for beam in self._beams()])
        vocab_size = logprobs.shape[-1]
        sums = (processed_logprobs + self.totals[:, None]).view(len(self.searches), -1)  # (prompts, beams * vocab_size)
        values, flat_ids = sums.topk(min(self.n_candidates, sums.shape[-1]), dim=-1)  # (prompts, n_candidates)
        token_logprobs = logprobs.view(len(self.searches), -1).gather(-1, flat_ids)
        # In one tensor, and so with one wait for the device. float32 holds ids exactly, up to 2^24.
        best = torch.stack((flat_ids // vocab_size, flat_ids % vocab_size, token_logprobs, values), dim=-1)
        candidates = []
        for i, prompt_best in enumerate(broadcast(best).tolist()):
            possible = [
                Candidate(int(beam), int(token), logprob, total)
                for beam, token, logprob, total in prompt_best
                if total != -math.inf
            ]
            if not self.searches[i].done and (not possible or any(math.isnan(c.total) for c in possible)):
                beam_rows = range(i * self.params.num_beams, (i + 1) * self.params.num_beams)
                bad = next((r for r in beam_rows if not processed_logprobs[r].amax().isfinite()), beam_rows[0])
                has_processor = bool(self.params.logits_processors)
                raise ArithmeticError(explain_non_finite(self.model, tokens[bad], has_processor))
            candidates.append(possible)
        return candidates
