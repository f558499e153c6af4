"""Splitting a text by steps, as Hugging Face's pre-tokenizers do it.

Patterns are regular expressions of Oniguruma; those that may mean something else to the package `regex` are refused. A
pattern comes from a file that may be hostile, so its size and the time it runs are limited.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import regex

from llama.errors import CheckpointError
from llama.vocab.split_steps import SplitStep
from llama.vocab.vocabulary import gpt2_characters

MAX_PATTERN = 10_000  # characters
MAX_PARTS = 500  # of it: characters, classes, repetitions; `regex` searches long literals without a time limit
MAX_DEPTH = 5  # groups within groups; for each, compiling may take twice as long
MAX_SIZE = 20_000  # characters of a pattern with its repetitions written out, as `regex` does with some
TIME_LIMIT = 5.0  # seconds for a text; the longest that is split at once has 400,000 characters

# The parts of a pattern that mean the same to Oniguruma and to `regex`.
PATTERN_PART = regex.compile(
    r"""
    (?P<open> \( (?: \?: | \?= | \?! | \?<= | \?<! | \?> | \?i: | (?!\?) ) )
    | (?P<close> \) )
    | (?P<repeat> [*+?][+?]? | \{(?P<most>\d{1,5})\}(?![+?])
                | (?: \{\d{0,5},(?P<most>\d{1,5})\} | \{(?P<most>\d{1,5}),\} ) \??(?![+?]) )
    | (?P<escape> \\ (?: [pP]\{\^?(?:[A-Z][a-z]?|Han|Hiragana|Katakana|Hangul|Latin|Greek|Cyrillic|Arabic|Hebrew|Thai)\}
                       | u[0-9A-Fa-f]{4} | [sSdDrntfv] | [^\w\n] ) )
    | \[\^?\]? (?: (?&escape) | \[:(?:alpha|alnum|digit|upper|space):\] | &(?!&) | [^][\\&] )* \]
    | [^\\\[\](){}*+?^]
    """,
    regex.VERBOSE,
)


class TextSplitter:
    """Splits texts by steps.

    Args:
        steps: the steps; those on bytes come last.
        path: the file they are from, for error messages.

    Raises:
        CheckpointError: a pattern is not supported, or hostile.
    """

    def __init__(self, steps: Sequence[SplitStep], path: Path) -> None:
        self.path = path
        self._steps = [(step, self._compile(step.pattern)) for step in steps]
        list(self.split("Ab, é中 12\n\t🙂"))  # raises for a pattern that matches the empty text

    def _compile(self, pattern: str) -> regex.Pattern[str]:
        try:
            check_pattern(pattern)
            return regex.compile(pattern, regex.MULTILINE)  # $ is the end of a line, as for Oniguruma
        except (ValueError, OverflowError, RecursionError, regex.error) as error:
            message = f"{self.path}: its split pattern {pattern!r:.200} is not supported: {error}"
            raise CheckpointError(message) from error

    def split(self, text: str) -> Iterator[bytes]:
        """The pieces of a text, in UTF-8; they may end within a character.

        Raises:
            CheckpointError: it takes more than `TIME_LIMIT`.
        """
        deadline = time.monotonic() + TIME_LIMIT
        pieces, on_bytes = [text], False
        for step, pattern in self._steps:
            if step.on_bytes and not on_bytes:
                pieces, on_bytes = [to_gpt2_characters(piece) for piece in pieces], True
            # Most words of a text are there many times.
            parts = {piece: cut(piece, self._matches(pattern, piece, deadline), step) for piece in set(pieces)}
            pieces = [part for piece in pieces for part in parts[piece]]
        return map(from_gpt2_characters if on_bytes else str.encode, pieces)

    def _matches(self, pattern: regex.Pattern[str], text: str, deadline: float) -> Iterator[regex.Match[str]]:
        """The matches of a pattern in a text, until a time of `time.monotonic()`."""
        try:
            for match in pattern.finditer(text, timeout=max(deadline - time.monotonic(), 1e-3)):
                if not match[0]:
                    raise CheckpointError(
                        f"{self.path}: its split pattern {pattern.pattern!r:.200} matches an empty text"
                    )
                yield match
        except (TimeoutError, MemoryError) as error:
            raise CheckpointError(
                f"{self.path}: its split pattern {pattern.pattern!r:.200} takes too long for a text of {len(text)} "
                f"characters"
            ) from error


def cut(text: str, matches: Iterator[regex.Match[str]], step: SplitStep) -> list[str]:
    """The pieces that a step makes of a text with these matches."""
    pieces: list[tuple[str, bool]] = []  # and whether each is a match
    end = 0
    for match in matches:
        if match.start() > end:
            pieces.append((text[end : match.start()], step.invert))
        pieces.append((match[0], not step.invert))
        end = match.end()
    if end < len(text):
        pieces.append((text[end:], step.invert))
    if step.behavior == "Isolated":
        return [piece for piece, _ in pieces]
    if step.behavior == "Removed":
        return [piece for piece, is_match in pieces if not is_match]
    merged: list[str] = []
    was_match = False
    backwards = step.behavior == "MergedWithNext"
    for piece, is_match in reversed(pieces) if backwards else pieces:
        joins = is_match == was_match if step.behavior == "Contiguous" else is_match and not was_match
        if joins and merged:
            merged[-1] = piece + merged[-1] if backwards else merged[-1] + piece
        else:
            merged.append(piece)
        was_match = is_match
    return merged[::-1] if backwards else merged


def check_pattern(pattern: str) -> None:
    """Raise ValueError if a pattern is too large, or may mean one thing to Oniguruma and another to `regex`."""
    if len(pattern) > MAX_PATTERN:
        raise ValueError(f"it has {len(pattern)} characters, more than {MAX_PATTERN}")
    openings, sizes = [""], [0]  # of the groups that are open, the outermost being the pattern
    last_size, position, n_parts = 0, 0, 0  # the first is of what a repetition repeats
    while position < len(pattern):
        n_parts += 1
        if n_parts > MAX_PARTS:
            raise ValueError(f"it has more than {MAX_PARTS} parts")
        part = PATTERN_PART.match(pattern, position)
        if part is None or is_ambiguous(part, openings, "(?i:" in pattern):
            raise ValueError(f"the part {pattern[position : position + 20]!r} at {position}")
        position = part.end()
        if part["open"]:
            openings.append(part[0])
            sizes.append(0)
        elif part["close"] and len(sizes) > 1:
            openings.pop()
            last_size = sizes.pop()
            sizes[-1] += last_size
        elif part["repeat"]:
            count = int(part["most"] or 1)
            sizes[-1] += last_size * (count - 1)
            last_size *= count
        else:
            last_size = 1
            sizes[-1] += 1
        if len(sizes) > MAX_DEPTH + 1 or sizes[-1] > MAX_SIZE:
            raise ValueError(
                f"it has groups within more than {MAX_DEPTH} groups, or is longer than {MAX_SIZE} characters with its "
                f"repetitions"
            )


def is_ambiguous(part: regex.Match[str], openings: list[str], ignores_case: bool) -> bool:
    """Whether a part of a pattern may mean two things where it stands, within these groups."""
    in_lookbehind = "(?<=" in openings or "(?<!" in openings
    properties = r"\\[pP]|\[:" if "(?i:" in openings else r"\\[pP]\{\^?L[ult]|\[:upper" if ignores_case else "(?!)"
    return bool(in_lookbehind and part["repeat"]) or regex.search(properties, part[0]) is not None


def to_gpt2_characters(text: str) -> str:
    """A text with one of GPT-2's characters for each byte of its UTF-8."""
    return "".join(map(GPT2_CHARACTERS.__getitem__, text.encode()))


def from_gpt2_characters(text: str) -> bytes:
    """The bytes that GPT-2's characters stand for."""
    return bytes(map(BYTES.__getitem__, text))


GPT2_CHARACTERS = gpt2_characters()
BYTES = {character: byte for byte, character in enumerate(GPT2_CHARACTERS)}
