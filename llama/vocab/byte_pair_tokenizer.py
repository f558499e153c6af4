"""Byte-pair encoding, by tiktoken: the vocabularies of Llama 3, SmolLM2 and others."""

import heapq
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Literal

import regex
import tiktoken

from llama.errors import CheckpointError, InputError
from llama.vocab.vocabulary import Vocabulary

# tiktoken's regular expression engine fails on much longer texts, and on much longer runs of spaces or non-spaces.
MAX_TEXT = 400_000  # characters
MAX_RUN = 25_000


class BytePairTokenizer:
    """Byte-pair encoding with a given vocabulary.

    Args:
        vocabulary: the tokens, and the pattern that splits a text before they are merged.
        path: the file it was read from, for error messages.

    Attributes:
        model: tiktoken's encoding.
        n_words: one more than the largest token id.

    Raises:
        CheckpointError: the split pattern is not a valid regular expression, or matches the empty text.
    """

    def __init__(self, vocabulary: Vocabulary, path: Path) -> None:
        self.vocabulary = vocabulary
        self.bos_id, self.eos_id = vocabulary.bos_id, vocabulary.eos_id
        self.stop_tokens, self.special_tokens = vocabulary.stop_tokens, vocabulary.special_tokens
        self.add_bos, self.chat_template = vocabulary.add_bos, vocabulary.chat_template
        self._ids = {*vocabulary.ranks.values(), *vocabulary.special_tokens.values()}
        self.n_words = 1 + max(self._ids)
        try:
            self._pattern = regex.compile(vocabulary.pattern)
            self.model = tiktoken.Encoding(
                name="llama",
                pat_str=vocabulary.pattern,
                mergeable_ranks=vocabulary.ranks,
                special_tokens=vocabulary.special_tokens,
            )
        except (ValueError, regex.error) as error:
            raise CheckpointError(f"{path}: its split pattern {vocabulary.pattern!r:.200} fails: {error}") from error
        # tiktoken panics on empty pieces of a text.
        if any(not match[0] for text in ("", "Ab, é中 12\n\t🙂") for match in self._pattern.finditer(text)):
            raise CheckpointError(f"{path}: its split pattern {vocabulary.pattern!r:.200} matches the empty text")
        # Some vocabularies (SmolLM2's) lack tokens for some bytes. They are dropped, as Hugging Face does; tiktoken
        # would panic.
        self._bytes_without_token = bytes(byte for byte in range(256) if bytes([byte]) not in vocabulary.ranks)

    def encode(
        self, text: str, allowed: Literal["all"] | Collection[str], disallowed: Literal["all"] | Collection[str]
    ) -> list[int]:
        """Token ids of a text.

        Args:
            text: the text, without lone surrogates.
            allowed: the special tokens that the text may spell out; others are plain text.
            disallowed: strings that the text must not contain; "all" for every special token that isn't allowed.

        Raises:
            InputError: the text contains what `disallowed` forbids.
        """
        special = set(self.special_tokens)
        allowed_special = special if allowed == "all" else special & set(allowed)
        for name in special - allowed_special if disallowed == "all" else disallowed:
            if name in text:
                raise InputError(f"the text contains {name!r}, which disallowed_special forbids")
        encoded = text.encode()
        if len(encoded.translate(None, self._bytes_without_token)) < len(encoded):
            return self._encode_without_missing_bytes(text, allowed_special)
        ids: list[int] = []
        for piece in split_long(text):
            ids += self.model.encode(piece, allowed_special=allowed_special, disallowed_special=())
        return ids

    def _encode_without_missing_bytes(self, text: str, allowed_special: set[str]) -> list[int]:
        """Encode a text, dropping the bytes without a token.

        The text is split into pieces with these bytes in place; within a piece their neighbours merge as if they
        weren't there. What is left may not be UTF-8, and tiktoken takes strings only, so `merge_byte_pairs` encodes it.
        """
        ids: list[int] = []
        names = "|".join(re.escape(name) for name in sorted(allowed_special, key=len, reverse=True))
        for part in re.split(f"({names})", text) if names else [text]:
            if part in allowed_special:
                ids.append(self.special_tokens[part])
                continue
            for segment in split_long(part):
                for piece in self._pattern.findall(segment):
                    ids += merge_byte_pairs(
                        piece.encode().translate(None, self._bytes_without_token), self.vocabulary.ranks
                    )
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of token ids; ids without a token are skipped."""
        return self.model.decode([i for i in ids if i in self._ids])

    def token_bytes(self, token: int) -> bytes | None:
        """The bytes that one token stands for; of a special token, its name; None for an id without a token."""
        return self.model.decode_single_token_bytes(token) if token in self._ids else None


def merge_byte_pairs(piece: bytes, ranks: Mapping[bytes, int]) -> list[int]:
    """Token ids of a piece of text: neighbouring parts, at first single bytes, merge in the order of their ranks.

    Of pairs with the same rank the leftmost merges first. A heap and linked lists keep it at O(n log n).

    Args:
        piece: the bytes; each must have a token.
        ranks: the bytes of each token -> its id.
    """
    if piece in ranks:
        return [ranks[piece]]
    length = len(piece)
    ends = list(range(1, length + 1))  # of the part that starts here; 0 where no part starts any more
    previous = list(range(-1, length))  # the start of the part before the one that starts here
    pairs: list[tuple[int, int, int]] = []  # (rank, start, end) of two neighbouring parts; outdated ones stay in

    def add_pair(start: int) -> None:
        if start >= 0 and ends[start] < length:
            end = ends[ends[start]]
            rank = ranks.get(piece[start:end])
            if rank is not None:
                heapq.heappush(pairs, (rank, start, end))

    for start in range(length):
        add_pair(start)
    while pairs:
        _, start, end = heapq.heappop(pairs)
        middle = ends[start]
        if middle == 0 or middle >= length or ends[middle] != end:
            continue  # outdated: one of the two parts has merged with another
        ends[start], ends[middle], previous[end] = end, 0, start
        add_pair(start)
        add_pair(previous[start])
    return [ranks[piece[start : ends[start]]] for start in range(length) if ends[start]]


def split_long(text: str) -> Iterator[str]:
    """Cut a text into pieces of at most MAX_TEXT characters, without a run of over MAX_RUN spaces or non-spaces."""
    for begin in range(0, len(text), MAX_TEXT):
        block = text[begin : begin + MAX_TEXT]
        start = 0
        for run in re.finditer(r"\s+|\S+", block) if len(block) > MAX_RUN else ():
            for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
                yield block[start:cut]
                start = cut
        yield block[start:]
