"""Byte-pair encoding, by tiktoken: the vocabularies of Llama 3, SmolLM2 and others."""

import heapq
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import tiktoken

from llama.vocab.added_tokens import AddedTokenSplitter, Names, names_to_recognise
from llama.vocab.split_steps import GPT2_PATTERN, GPT2_STEPS, LLAMA3_PATTERN, LLAMA3_STEPS, SMOLLM_STEPS
from llama.vocab.text_splitter import TextSplitter
from llama.vocab.vocabulary import Vocabulary

# Steps that one pattern of tiktoken's is equal to.
SMOLLM_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
TIKTOKEN_PATTERNS = {LLAMA3_STEPS: LLAMA3_PATTERN, GPT2_STEPS: GPT2_PATTERN, SMOLLM_STEPS: SMOLLM_PATTERN}

# tiktoken's regular expression engine fails on much longer texts, and on much longer runs of spaces or non-spaces.
MAX_TEXT = 400_000  # characters
MAX_RUN = 25_000


class BytePairTokenizer:
    """Byte-pair encoding with a given vocabulary.

    Args:
        vocabulary: the tokens, and the steps that split a text before they are merged.
        path: the file it was read from, for error messages.

    Attributes:
        model: tiktoken's encoding.
        n_words: one more than the largest token id.

    Raises:
        CheckpointError: a pattern by which it splits a text is not supported, or hostile.
    """

    def __init__(self, vocabulary: Vocabulary, path: Path) -> None:
        self.vocabulary = vocabulary
        self.bos_id, self.eos_id = vocabulary.bos_id, vocabulary.eos_id
        self.stop_tokens, self.special_tokens = vocabulary.stop_tokens, vocabulary.special_tokens
        self.added_tokens, self.template_tokens = vocabulary.added_tokens, vocabulary.template_tokens
        self.add_bos = vocabulary.add_bos
        self.chat_template, self.chat_template_source = vocabulary.chat_template, vocabulary.chat_template_source
        self._splitter = AddedTokenSplitter(vocabulary.added_tokens)
        self._bytes = {i: token for token, i in vocabulary.ranks.items()}
        self._bytes |= {token.id: token.content.encode() for token in vocabulary.added_tokens}
        self.n_words = 1 + max(self._bytes)
        self._text_splitter = TextSplitter(vocabulary.split_steps, path)
        # tiktoken splits by one pattern, and has no time limit; for other steps its splitting isn't used.
        self._tiktoken_splits = vocabulary.split_steps in TIKTOKEN_PATTERNS
        self.model = tiktoken.Encoding(
            name="llama",
            pat_str=TIKTOKEN_PATTERNS.get(vocabulary.split_steps, r"[\s\S]+"),
            mergeable_ranks=vocabulary.ranks,
            special_tokens=vocabulary.special_tokens,
        )
        # Some vocabularies (SmolLM2's) lack tokens for some bytes. They are dropped, as Hugging Face does; tiktoken
        # would panic.
        self._bytes_without_token = bytes(byte for byte in range(256) if bytes([byte]) not in vocabulary.ranks)

    def encode(self, text: str, allowed: Names, disallowed: Names) -> list[int]:
        """Token ids of a text, in which added tokens that aren't special are recognised.

        Args:
            text: the text, without lone surrogates.
            allowed: the special tokens that the text may spell out; others are plain text.
            disallowed: strings that the text must not contain; "all" for every special token that isn't allowed.

        Raises:
            InputError: the text contains what `disallowed` forbids.
        """
        return self.encode_parts(self.split(text, names_to_recognise(self.added_tokens, text, allowed, disallowed)))

    def split(self, text: str, names: Names = "all") -> list[str | int]:
        """The text cut at the added tokens with these contents: see `AddedTokenSplitter.split`."""
        return self._splitter.split(text, names)

    def encode_parts(self, parts: Sequence[str | int], continued: bool = False) -> list[int]:
        """Token ids of texts, in which no added token is recognised, and of token ids, which stay as they are.

        Args:
            parts: texts, without lone surrogates, and token ids.
            continued: makes no difference to a byte-pair vocabulary.
        """
        ids: list[int] = []
        for part in parts:
            ids += [part] if isinstance(part, int) else self._encode_text(part)
        return ids

    def _encode_text(self, text: str) -> list[int]:
        """Token ids of a text in which no added token is recognised.

        A text is split with the bytes without a token in place; within a piece their neighbours merge as if they
        weren't there. What is left may not be UTF-8, and tiktoken takes strings only.
        """
        ids: list[int] = []
        encoded = text.encode()
        lacks_token = len(encoded.translate(None, self._bytes_without_token)) < len(encoded)
        for segment in split_long(text):
            if self._tiktoken_splits and not lacks_token:
                ids += self.model.encode_ordinary(segment)
            else:
                for piece in self._text_splitter.split(segment):
                    ids += merge_byte_pairs(piece.translate(None, self._bytes_without_token), self.vocabulary.ranks)
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of token ids; ids without a token are skipped."""
        return b"".join(self._bytes.get(i, b"") for i in ids).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes | None:
        """The bytes that one token stands for; of an added token, its content; None for an id without a token."""
        return self._bytes.get(token)


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
