"""An answer as it comes: which text of it is certain, whether it has ended, and a thread that produces it.

Text is released as soon as it is certain: never half a character, and never the beginning of a stop string that might
still become one.
"""

import contextlib
import threading
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextvars import copy_context
from queue import SimpleQueue
from typing import Literal, NamedTuple, TypeVar

import torch

from llama.distributed import model_parallel_size
from llama.model_lock import Call, ModelLock, join, turn_on

Part = TypeVar("Part")
EndReason = Literal["stop", "length"]
WINDOW = 32  # ids that are decoded together, so that the time of a step doesn't grow with the answer
SHORTEST_WINDOW = 8  # ids that are kept of them: their text may begin within a character, but not end there
LEAVE_TIMEOUT = 1.0  # seconds that a consumer that leaves a stream waits for the step under way to end


class Piece(NamedTuple):
    """A part of one row's answer: a token, or text that became certain, or the answer's end."""

    row: int
    token: int | None  # None where only text, or the end, came
    logprob: float | None  # None unless asked for
    text: str  # "" unless asked for
    ended: EndReason | None = None  # "stop": at a stop token or string; "length": no tokens left; None: it goes on
    score: float | None = None  # with the end of an answer of beam search
    top_logprobs: tuple[tuple[int, float], ...] = ()  # the likeliest tokens in its place, the likeliest first
    # With the end of an answer of speculative decoding: how many tokens were proposed, and how many of them accepted.
    proposals: tuple[int, int] | None = None


class PendingToken(NamedTuple):
    """A token of an answer that hasn't been released yet."""

    token: int
    logprob: float | None
    top_logprobs: tuple[tuple[int, float], ...]
    begin: int  # where its own text begins in the answer's


class TextStream:
    """The text of ids that come one by one; the parts join to what decoding all of them gives.

    Args:
        decode: ids -> text. An unfinished character must come out as U+FFFD at the end.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []  # the last of them
        self._released = 0  # characters of their text that have been returned
        self.uncertain = 0  # characters at its end that later ids may still change

    def push(self, token: int) -> str:
        """The text that is certain with this token. An unfinished character decodes to up to three U+FFFD."""
        self._ids.append(token)
        text = self._decode(self._ids)
        self.uncertain = min(3, len(text) - len(text.rstrip("\ufffd")))
        return self._release(text, self.uncertain)

    def end(self) -> str:
        """The rest, when no more tokens come."""
        return self._release(self._decode(self._ids), 0)

    def _release(self, text: str, uncertain: int) -> str:
        certain = text[self._released : len(text) - uncertain]
        self._released += len(certain)
        if len(self._ids) > WINDOW:
            # Some text has to stay: sentencepiece drops the space that a text begins with.
            for length in range(SHORTEST_WINDOW, WINDOW):
                released = len(self._decode(self._ids[-length:])) - uncertain
                if released > 0:
                    self._ids, self._released = self._ids[-length:], released
                    break
        return certain


class StopCriteria(NamedTuple):
    """What ends an answer."""

    max_new_tokens: int
    stop_tokens: Collection[int]  # ids that end it, and aren't part of it
    decode: Callable[[list[int]], str] | None = None  # ids -> text; None if no text is wanted
    stop_strings: tuple[str, ...] = ()  # strings that end it, and aren't part of it; they need `decode`


class RowOutput:
    """One row's answer.

    Attributes:
        ended: why it ended, or None while it goes on.
        n_proposed, n_accepted: with speculative decoding, tokens of it that were proposed, and accepted.
    """

    def __init__(self, row: int, criteria: StopCriteria) -> None:
        self.ended: EndReason | None = "length" if criteria.max_new_tokens < 1 else None
        self.n_proposed = self.n_accepted = 0
        self._row, self._criteria = row, criteria
        self._stream = None if criteria.decode is None else TextStream(criteria.decode)
        self._tokens: list[int] = []
        self._text = ""
        self._cut = False  # a stop string was found, and the text ends before it
        self._released = 0  # characters of the text that have been released
        self._pending: list[PendingToken] = []

    @property
    def n_left(self) -> int:
        """How many more tokens it may have."""
        return 0 if self.ended else self._criteria.max_new_tokens - len(self._tokens)

    def append(
        self, token: int, logprob: float | None, top_logprobs: tuple[tuple[int, float], ...] = ()
    ) -> Iterator[Piece]:
        """Add a token; yields what is certain now."""
        is_stop = token in self._criteria.stop_tokens
        if is_stop:
            self.ended = "stop"
        else:
            self._tokens.append(token)
            if len(self._tokens) == self._criteria.max_new_tokens:
                self.ended = "length"
        if self._stream is None:  # without text, every token is certain at once
            if is_stop:
                yield Piece(self._row, None, None, "", self.ended)
            else:
                yield Piece(self._row, token, logprob, "", self.ended, top_logprobs=top_logprobs)
            return
        if not is_stop:
            begin = len(self._text) + self._stream.uncertain
            self._pending.append(PendingToken(token, logprob, top_logprobs, begin))
            self._add_text(self._stream.push(token))
        if self.ended and not self._cut:
            self._add_text(self._stream.end())
        yield from self._release()

    def finish(self) -> Iterator[Piece]:
        """End it, if nothing has yet; yields the rest."""
        if self.ended is None:
            self.ended = "stop"
            if self._stream is not None:
                self._add_text(self._stream.end())
            yield from self._release()

    def _add_text(self, text: str) -> None:
        """Append to the text; cut it where a stop string begins."""
        self._text += text
        positions = [self._text.find(string, self._released) for string in self._criteria.stop_strings]
        begins = [position for position in positions if position >= 0]
        if begins:
            self._text = self._text[: min(begins)]
            self.ended, self._cut = "stop", True
            # Of the pending tokens, keep no more than the text needs.
            released = len(self._tokens) - len(self._pending)
            count = 0
            while count < len(self._pending) and not self._spells_text(self._tokens[: released + count]):
                count += 1
            self._pending = self._pending[:count]

    def _spells_text(self, tokens: list[int]) -> bool:
        """Whether the text of these tokens contains all of the answer's."""
        return self._criteria.decode is not None and self._criteria.decode(tokens).startswith(self._text)

    def _release(self) -> Iterator[Piece]:
        certain = len(self._text) if self.ended else len(self._text) - self._possible_stop()
        held_back = not self.ended and self._criteria.stop_strings
        count = sum(1 for pending in self._pending if not held_back or pending.begin < certain)
        released, self._pending = self._pending[:count], self._pending[count:]
        text, self._released = self._text[self._released : certain], certain
        for i, (token, logprob, top_logprobs, _) in enumerate(released):
            is_last = i == len(released) - 1
            ended = self.ended if is_last else None
            yield Piece(self._row, token, logprob, text if is_last else "", ended, top_logprobs=top_logprobs)
        if not released and (text or self.ended):
            yield Piece(self._row, None, None, text, self.ended)

    def _possible_stop(self) -> int:
        """How many characters at the end might become a stop string."""
        longest = max(map(len, self._criteria.stop_strings), default=1) - 1
        for length in range(min(longest, len(self._text) - self._released), 0, -1):
            if any(string.startswith(self._text[-length:]) for string in self._criteria.stop_strings):
                return length
        return 0


def refused(pieces: Generator[Piece, None, None], refusals: Sequence[str | None]) -> Generator[Piece, None, None]:
    """The pieces of a stream, with a row's refusal, where it has one, in place of the row's text."""
    begun = set()  # the rows whose refusal has been yielded
    with contextlib.closing(pieces):
        for piece in pieces:
            refusal = refusals[piece.row]
            if refusal is not None:
                piece = piece._replace(text="" if piece.row in begun else refusal)
                begun.add(piece.row)
            yield piece


class Stopped(Exception):
    """Nobody waits for the result any more."""


def stoppable(parts: Iterable[Part], should_stop: Callable[[], bool]) -> Iterator[Part]:
    """The parts of some work, one after the other; raises `Stopped` before one of them if `should_stop()`."""
    for part in parts:
        if should_stop():
            raise Stopped
        yield part


class StreamEnd(NamedTuple):
    """The last thing in the queue of a stream."""

    error: BaseException | None


def produce_in_thread(
    locks: Sequence[ModelLock], produce: Callable[..., Iterator[Piece]]
) -> Generator[Piece, None, None]:
    """Yield what `produce` yields, produced in its turn by a thread of its own, as fast as that goes.

    Since production never waits for its consumer, no other call does. It begins when the first piece is asked for, and
    stops after the step under way when the consumer has left.

    Args:
        locks: of the models that `produce` uses.
        produce: its keyword argument `should_stop` is a function that says whether the consumer has left.
    """
    pieces: SimpleQueue[Piece | StreamEnd] = SimpleQueue()
    call, consumer_left = Call(), threading.Event()
    alone = model_parallel_size() == 1  # else the first rank's consumer decides at which step all ranks stop
    # Local variables, since a stream may be closed as Python ends, when a module has lost its own.
    current_thread, leave_timeout = threading.current_thread, LEAVE_TIMEOUT if alone else None
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]  # in this thread alone
    autocasts = [torch.autocast(kind, torch.get_autocast_dtype(kind)) for kind in kinds]

    def should_stop() -> bool:
        return consumer_left.is_set() or not threading.main_thread().is_alive()

    def run() -> None:
        error: BaseException | None = None
        try:
            with contextlib.ExitStack() as contexts:
                for autocast in autocasts:
                    contexts.enter_context(autocast)
                contexts.enter_context(turn_on(locks, call))
                for piece in () if call.withdrawn else produce(should_stop=should_stop):
                    pieces.put(piece)
        except BaseException as raised:  # raised again where the stream is consumed
            error = raised
        pieces.put(StreamEnd(error))

    producer = threading.Thread(target=copy_context().run, args=(run,), name="llama stream")
    try:
        join(call, locks)  # before the thread runs, so that calls have the same order on every rank
        producer.start()
        while not isinstance(piece := pieces.get(), StreamEnd):
            yield piece
        if piece.error is not None:
            raise piece.error
    finally:
        consumer_left.set()
        for lock in locks if alone else ():
            lock.queue.withdraw(call)
        if producer.ident is None:  # it was not started
            for lock in locks:
                lock.queue.leave(call)
        elif current_thread() is not producer:
            # The garbage collector may run this in any thread, which then must not wait for ever.
            producer.join(leave_timeout)
