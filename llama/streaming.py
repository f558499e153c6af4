"""An answer as it comes: what may be shown of it so far, and whether it has ended.

Text comes out as soon as it is certain: never half a character, and never the beginning of a stop text that might
still become one.
"""

from collections.abc import Callable, Collection, Iterator
from typing import Literal, NamedTuple

Ended = Literal["stop", "length"]
WINDOW = 32  # ids that are decoded together, so that the time of a step doesn't grow with the answer


class Piece(NamedTuple):
    """What came of one row's answer: a token, or text that became certain, or its end."""

    row: int
    token: int | None  # None where only text, or the end, came
    logprob: float | None  # None unless asked for
    text: str  # "" unless asked for
    ended: Ended | None = None  # "stop": at a stop token or text; "length": no more room; None: it goes on
    score: float | None = None  # of an answer that beam search found, with its end


class TextStream:
    """The text of ids that come one by one; the pieces join to what decoding them together gives.

    Args:
        decode: ids -> text. What is no whole character yet must come out as U+FFFD at the end.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []  # the last of them, from some whole character on
        self._shown = 0  # characters of their text that are out
        self.uncertain = 0  # characters at its end that may still become others

    def push(self, token: int) -> str:
        """The text that is certain with this token. An unfinished character shows as up to three U+FFFD."""
        self._ids.append(token)
        text = self._decode(self._ids)
        self.uncertain = min(3, len(text) - len(text.rstrip("\ufffd")))
        return self._show(text, self.uncertain)

    def end(self) -> str:
        """The rest, when no more comes."""
        return self._show(self._decode(self._ids), 0)

    def _show(self, text: str, uncertain: int) -> str:
        piece = text[self._shown : len(text) - uncertain]
        self._shown += len(piece)
        if len(self._ids) > WINDOW:
            # Some text has to stay: sentencepiece drops the space that a text begins with.
            for length in range(8, WINDOW):
                shown = len(self._decode(self._ids[-length:])) - uncertain
                if shown > 0:
                    self._ids, self._shown = self._ids[-length:], shown
                    break
        return piece


class StopCriteria(NamedTuple):
    """How long an answer may get, and what ends it."""

    room: int  # tokens it may have
    stop_tokens: Collection[int]  # ids that end it, and aren't part of it
    decode: Callable[[list[int]], str] | None = None  # ids -> text; None if no text is wanted
    stops: tuple[str, ...] = ()  # texts that end it, and aren't part of it; they need `decode`


class RowOutput:
    """One row's answer.

    Attributes:
        ended: why it ended, or None.
    """

    def __init__(self, row: int, rules: StopCriteria) -> None:
        self.ended: Ended | None = "length" if rules.room < 1 else None
        self._row, self._rules = row, rules
        self._stream = None if rules.decode is None else TextStream(rules.decode)
        self._text, self._cut = "", False
        self._shown = 0  # characters of it that are out
        self._tokens: list[int] = []
        self._waiting: list[tuple[int, float | None, int]] = []  # tokens, logprobs, and where the tokens' text begins

    def take(self, token: int, logprob: float | None) -> Iterator[Piece]:
        """Go on with a token; yields what is certain now."""
        if token in self._rules.stop_tokens:
            self.ended = "stop"
        else:
            self._tokens.append(token)
            begin = len(self._text) + (self._stream.uncertain if self._stream else 0)
            self._waiting.append((token, logprob, begin))
            self._add(self._stream.push(token) if self._stream else "")
            if len(self._tokens) == self._rules.room and self.ended is None:
                self.ended = "length"
        if self.ended and self._stream and not self._cut:
            self._add(self._stream.end())
        yield from self._release()

    def end(self) -> Iterator[Piece]:
        """End it, if nothing has yet; yields the rest."""
        if self.ended is None:
            self.ended = "stop"
            self._add(self._stream.end() if self._stream else "")
            yield from self._release()

    def _add(self, text: str) -> None:
        """More text; cut where a stop text begins in it."""
        self._text += text
        begins = [at for at in (self._text.find(stop, self._shown) for stop in self._rules.stops) if at >= 0]
        if begins:
            self._text = self._text[: min(begins)]
            self.ended, self._cut = "stop", True
            # Of the tokens that wait, no more than the text needs.
            out = len(self._tokens) - len(self._waiting)
            count = 0
            while count < len(self._waiting) and not self._says(self._tokens[: out + count]):
                count += 1
            self._waiting = self._waiting[:count]

    def _says(self, tokens: list[int]) -> bool:
        """Whether these tokens have all of the text."""
        return self._rules.decode is not None and self._rules.decode(tokens).startswith(self._text)

    def _release(self) -> Iterator[Piece]:
        certain = len(self._text) if self.ended else len(self._text) - self._possible_stop()
        count = sum(1 for one in self._waiting if self.ended or not self._rules.stops or one[2] < certain)
        released, self._waiting = self._waiting[:count], self._waiting[count:]
        text, self._shown = self._text[self._shown : certain], certain
        for i, (token, logprob, _) in enumerate(released):
            last = i == len(released) - 1
            yield Piece(self._row, token, logprob, text if last else "", self.ended if last else None)
        if not released and (text or self.ended):
            yield Piece(self._row, None, None, text, self.ended)

    def _possible_stop(self) -> int:
        """How many characters at the end might become a stop text."""
        longest = max(map(len, self._rules.stops), default=1) - 1
        for length in range(min(longest, len(self._text) - self._shown), 0, -1):
            if any(stop.startswith(self._text[-length:]) for stop in self._rules.stops):
                return length
        return 0
