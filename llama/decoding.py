"""The decode loop: ids in, ids out.

    prompts -> [read them in one pass] -> [draw a token a row, pass it through the network, again and again] -> pieces

Everything that generates collects or dresses what `Decoder.run` yields.
"""

import itertools
import math
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from llama import distributed
from llama.beam_search import beam_search
from llama.errors import InputError
from llama.model import Transformer
from llama.non_finite import explain_non_finite
from llama.sampling import sample, token_logprobs
from llama.sampling_params import SamplingParams
from llama.streaming import Piece, RowOutput, StopCriteria

# Prompts are scored in blocks of positions whose logits take about this many numbers (128 MB in float32).
LOGITS_AT_ONCE = 2**25

Head = Callable[[torch.Tensor], torch.Tensor]


@dataclass(eq=False)
class _Call:
    """A call that uses a model."""

    thread: int  # that last worked for it
    at_work: bool = True  # or a stream, waiting to be asked for more


class Decoder:
    """Reads prompts into a model's cache, and goes on from there.

    One call at a time: another one waits, but for one on the same thread as a stream that waits to be asked for more.
    That stream can't go on then.

    Args:
        model: a `Transformer`, or anything with `params` and `forward(tokens, start_pos)`.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._held_elsewhere: list[list[int]] = []  # of a model that isn't a `Transformer`
        self._turns = threading.Condition()
        self._caller: _Call | None = None  # whose turn it is

    def run(
        self,
        prompts: list[list[int]],
        how: SamplingParams,
        stop_tokens: Collection[int],
        decode: Callable[[list[int]], str] | None,
        *,
        logprobs: bool = False,
        echo: bool = False,
    ) -> Iterator[Piece]:
        """Yield the answers to prompts, token by token, row by row.

        Args:
            prompts: ids; checked.
            how: the call's other arguments.
            stop_tokens: ids that end an answer.
            decode: ids -> text, if the pieces are to have text, or there are texts to stop at.
            echo: yield the prompts' tokens first (without text).
        """
        if how.reuse_cache and echo and logprobs:
            raise InputError(
                "reuse_cache=True leaves out what echo and logprobs together need: every token of the prompt"
            )
        call = self._begin()
        try:
            for piece in self._pieces(prompts, how, stop_tokens, decode, logprobs, echo):
                self._pause(call)
                yield piece
                self._resume(call)
        finally:
            self._end(call)

    def _pieces(
        self,
        prompts: list[list[int]],
        how: SamplingParams,
        stop_tokens: Collection[int],
        decode: Callable[[list[int]], str] | None,
        logprobs: bool,
        echo: bool,
    ) -> Iterator[Piece]:
        copies = how.num_return_sequences
        rooms = [min(how.max_gen_len, self.model.params.max_seq_len - len(prompt)) for prompt in prompts]
        scores: list[list[float]] = []
        if max(rooms) > 0 or (echo and logprobs):
            logits, scores = self._read(prompts, max(rooms), how.reuse_cache, score=echo and logprobs)
        for row in range(len(prompts) * copies):
            prompt = row // copies
            for i, token in enumerate(prompts[prompt] if echo else ()):
                yield Piece(row, token, scores[prompt][i] if scores else None, "")
            if rooms[prompt] < 1:
                yield Piece(row, None, None, "", "length")
        if max(rooms) > 0:
            rules = [StopCriteria(room, stop_tokens, decode, how.stop_texts) for room in rooms]
            if how.num_beams > 1:
                yield from beam_search(self, prompts, logits, how, rules)
            else:
                yield from self._draw(prompts, logits, how, rules, logprobs)

    def _draw(
        self,
        prompts: list[list[int]],
        logits: torch.Tensor,
        how: SamplingParams,
        rules: list[StopCriteria],
        logprobs: bool,
    ) -> Iterator[Piece]:
        """The decode loop: yields new tokens of the rows, step by step, until every row has ended.

        `logits`, (batch, vocab_size), are those after the prompts. Ended rows stay in the batch, so that the others'
        draws don't depend on when they ended.
        """
        copies = [row for row in range(len(prompts)) for _ in range(how.num_return_sequences)]
        if how.num_return_sequences > 1:
            logits = logits.index_select(0, torch.tensor(copies, dtype=torch.long, device=logits.device))
            self.reorder(copies, max(map(len, prompts)))
        texts = [list(prompts[row]) for row in copies]
        answers = [RowOutput(i, rules[row]) for i, row in enumerate(copies)]
        start_pos = self.first_positions(texts)
        generator = how.generator(logits.device)
        while True:
            ids, scores = self._choose(texts, logits, how, generator, logprobs)
            # Here the host waits for the device, once a step, to see which rows have ended.
            for row, token in enumerate(ids.tolist()):
                if answers[row].ended:
                    continue
                if token == -1:
                    raise ArithmeticError(explain_non_finite(self.model, texts[row], how.logits_processor is not None))
                texts[row].append(token)
                yield from answers[row].take(token, scores[row])
            if all(answer.ended for answer in answers):
                return
            held = self.held
            logits = self.step(ids.clamp(min=0), start_pos)
            for text, token in zip(held, ids.tolist(), strict=True):
                text.append(token)
            self.held = held
            start_pos = self.next_positions(start_pos)

    @torch.no_grad()  # a logits_processor may switch gradients on again, which it couldn't in inference mode
    def _choose(
        self,
        texts: list[list[int]],
        logits: torch.Tensor,
        how: SamplingParams,
        generator: torch.Generator | None,
        logprobs: bool,
    ) -> tuple[torch.Tensor, list[float] | list[None]]:
        """The next token of each row, (batch), the same on every process; and its logprob, if wanted."""
        wanted = how.process(texts, logits)
        ids = distributed.broadcast(sample(wanted, how.temperature, how.top_p, how.top_k, generator))
        scores = token_logprobs(logits, ids.clamp(min=0)).tolist() if logprobs else [None] * len(texts)
        return ids, scores

    @torch.inference_mode()
    def _read(
        self, prompts: list[list[int]], room: int, reuse: bool, score: bool
    ) -> tuple[torch.Tensor, list[list[float]]]:
        """Pass all prompts through the network at once; at most `room` tokens will follow.

        Returns:
            The logits of the token after each prompt, (batch, vocab_size); and, with `score`, the logprobs of its
            own tokens. Of our network, only the positions that are used pass through `output`.
        """
        start = self._in_cache(prompts) if reuse else 0
        longest = max(len(prompt) for prompt in prompts)
        # Shorter rows are filled up on the right, where no token of their own looks; what they store there in the
        # cache is overwritten, slot by slot, before it is looked at.
        padded = [prompt[start:] + [0] * (longest - len(prompt)) for prompt in prompts]
        tokens = torch.tensor(padded, dtype=torch.long, device=self._device)
        width = longest - start
        ends = [row * width + len(prompt) - 1 - start for row, prompt in enumerate(prompts)]
        head: Head = torch.Tensor.float
        if self._ours:
            if min(map(len, prompts)) < longest:  # then the shorter rows' slots there are masked, not written
                self.model.setup_cache().clear(longest, longest + room)
            hidden, head = self.model.hidden_states(tokens, start), self.model.logits  # (batch, seq, dim)
        else:
            hidden = self.model.forward(tokens, start)  # the logits themselves
        self.held = [list(prompt) for prompt in prompts]
        # Of each row, in all of `tokens`; where the network has put what it computed.
        last = torch.tensor(ends, dtype=torch.long, device=hidden.device)
        logits = head(hidden.flatten(0, 1).index_select(0, last))  # (batch, vocab_size)
        scores = []
        if score:
            block = max(1, LOGITS_AT_ONCE // logits.shape[-1])
            ids = tokens.to(hidden.device)
            scores = [self._score(prompt, ids[row], hidden[row], head, block) for row, prompt in enumerate(prompts)]
        return logits, scores

    def _score(self, prompt: list[int], ids: torch.Tensor, hidden: torch.Tensor, head: Head, block: int) -> list[float]:
        """The logprob of each token of a prompt, given those before it, from the logits of `block` positions a time.

        `ids` and `hidden`, (seq) and (seq, ...), may go on behind the prompt.
        """
        scores = [0.0]  # nothing stands before the first
        for start in range(0, len(prompt) - 1, block):
            targets = ids[1 + start : min(1 + start + block, len(prompt))]
            scores += token_logprobs(head(hidden[start : start + len(targets)]), targets).tolist()
        if any(map(math.isnan, scores)):
            raise ArithmeticError(explain_non_finite(self.model, prompt))
        return scores

    def _in_cache(self, prompts: list[list[int]]) -> int:
        """How many of the first tokens of every prompt its row of the cache holds. Each prompt's last must be read."""
        if len(prompts) > len(self.held):
            return 0
        common = min(map(len, prompts)) - 1
        for prompt, held in zip(prompts, self.held, strict=False):
            same = (a == b for a, b in zip(prompt[:common], held, strict=False))
            common = sum(1 for _ in itertools.takewhile(bool, same))
        return common

    @torch.inference_mode()
    def step(self, ids: torch.Tensor, start_pos: int | torch.Tensor) -> torch.Tensor:
        """Pass one token a row, (batch), through the network: the logits of the next, (batch, vocab_size) float32."""
        return self.model.forward(ids[:, None], start_pos)[:, -1].float()

    def first_positions(self, texts: list[list[int]]) -> int | torch.Tensor:
        """Where each row's next token stands: rows of one length share an int; others have one each, on the CPU."""
        lengths = {len(text) for text in texts}
        if len(lengths) == 1:
            return lengths.pop()
        return self._within([len(text) for text in texts])

    def next_positions(self, start_pos: int | torch.Tensor) -> int | torch.Tensor:
        return start_pos + 1 if isinstance(start_pos, int) else self._within((start_pos + 1).tolist())

    def _within(self, positions: list[int]) -> torch.Tensor:
        """A row at the end of the context has ended, and waits there. (No later prompt takes its last position from
        the cache: its own last token is always read.)"""
        return torch.tensor(positions, device="cpu").clamp(max=self.model.params.max_seq_len - 1)

    @torch.inference_mode()
    def reorder(self, rows: list[int], end: int) -> None:
        """Let row i of the cache hold what row `rows[i]` holds, up to position `end`."""
        held = self.held
        if isinstance(self.model, Transformer):
            self.model.setup_cache().reorder(torch.tensor(rows, dtype=torch.long, device=self._device), end)
        self.held = [list(held[row]) for row in rows] if held else []

    def check_reorder(self) -> None:
        """Raise InputError if the model may have a cache that can't be reordered."""
        if not isinstance(self.model, Transformer) and hasattr(self.model, "parameters"):
            raise InputError("several answers to a prompt need the cache of this library's Transformer")

    @property
    def held(self) -> list[list[int]]:
        """The ids of each row whose keys and values the cache holds. Whoever uses the model otherwise empties it."""
        return self.model.setup_cache().held if isinstance(self.model, Transformer) else self._held_elsewhere

    @held.setter
    def held(self, rows: list[list[int]]) -> None:
        if isinstance(self.model, Transformer):
            self.model.setup_cache().held = rows
        else:
            self._held_elsewhere = rows

    @property
    def _ours(self) -> bool:
        """Whether the model is our network, with its own `forward`: then its two halves can be asked for."""
        return getattr(self.model.forward, "__func__", None) is Transformer.forward

    @property
    def _device(self) -> torch.device:
        """Where the model's weights are; a scripted model may have none."""
        parameters = self.model.parameters() if hasattr(self.model, "parameters") else iter(())
        return next((parameter.device for parameter in parameters), torch.device("cpu"))

    def _begin(self) -> "_Call":
        """Wait for this call's turn."""
        call = _Call(threading.get_ident())
        with self._turns:
            while self._caller is not None:
                if self._caller.thread == call.thread and self._caller.at_work:
                    raise RuntimeError("a logits_processor can't use the Llama that it is called by")
                if self._caller.thread == call.thread:
                    break  # a stream that this thread has left
                self._turns.wait()
            self._caller = call
        return call

    def _pause(self, call: "_Call") -> None:
        """Before a piece goes out."""
        with self._turns:
            call.at_work = False

    def _resume(self, call: "_Call") -> None:
        """When more is asked for, on whatever thread; RuntimeError if the turn has gone to another call."""
        with self._turns:
            if self._caller is not call:
                raise RuntimeError("this stream can't go on: its program has used the same Llama for another call")
            call.thread, call.at_work = threading.get_ident(), True

    def _end(self, call: "_Call") -> None:
        with self._turns:
            if self._caller is call:
                self._caller = None
                self._turns.notify_all()
