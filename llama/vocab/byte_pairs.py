"""Byte-pair encoding, by tiktoken: the vocabularies of Llama 3, SmolLM2 and others."""

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Literal

import regex
import tiktoken

from llama.errors import CheckpointError, InputError
from llama.vocab.vocabulary import Vocabulary

# tiktoken's regular expression engine gives up on texts and runs far longer than these.
MAX_TEXT = 400_000
MAX_RUN = 25_000


class BytePairs:
    """Byte-pair encoding by tiktoken."""

    def __init__(self, vocabulary: Vocabulary, path: Path) -> None:
        self.vocabulary = vocabulary
        self.bos_id, self.eos_id = vocabulary.bos_id, vocabulary.eos_id
        self.stop_tokens, self.special_tokens = vocabulary.stop_tokens, vocabulary.special_tokens
        self.add_bos, self.chat_template = vocabulary.add_bos, vocabulary.chat_template
        self.n_words = 1 + max([*vocabulary.ranks.values(), *vocabulary.special_tokens.values()])
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
        if any(not match[0] for text in ("", "Ab, é中 12\n\t🙂") for match in self._pattern.finditer(text)):
            raise CheckpointError(f"{path}: its split pattern {vocabulary.pattern!r:.200} matches nothing at all")
        # Bytes that some vocabularies (SmolLM2's) have no token for: dropped, as Hugging Face does. tiktoken panics.
        self._no_token = bytes(byte for byte in range(256) if bytes([byte]) not in vocabulary.ranks)
        self._ids = {*vocabulary.ranks.values(), *vocabulary.special_tokens.values()}

    def encode(
        self, text: str, allowed: Literal["all"] | Collection[str], disallowed: Literal["all"] | Collection[str]
    ) -> list[int]:
        special = set(self.special_tokens)
        allowed_special = special if allowed == "all" else special & set(allowed)
        for name in special - allowed_special if disallowed == "all" else disallowed:
            if name in text:
                raise InputError(f"the text holds {name!r}, which disallowed_special forbids")
        raw = text.encode()
        if len(raw.translate(None, self._no_token)) < len(raw):
            return self._encode_dropping(text, allowed_special)
        ids: list[int] = []
        for piece in split_long(text):
            ids += self.model.encode(piece, allowed_special=allowed_special, disallowed_special=())
        return ids

    def _encode_dropping(self, text: str, allowed_special: set[str]) -> list[int]:
        """Encode a text with bytes that have no token: its neighbours merge as if such a byte weren't there."""
        ids: list[int] = []
        names = "|".join(re.escape(name) for name in sorted(allowed_special, key=len, reverse=True))
        for part in re.split(f"({names})", text) if names else [text]:
            if part in allowed_special:
                ids.append(self.special_tokens[part])
                continue
            for segment in split_long(part):
                for piece in self._pattern.findall(segment):
                    known = piece.encode().translate(None, self._no_token)
                    if known:
                        ids += self.model._encode_single_piece(known)
        return ids

    def decode(self, ids: list[int]) -> str:
        return self.model.decode([i for i in ids if i in self._ids])

    def token_bytes(self, token: int) -> bytes | None:
        return self.model.decode_single_token_bytes(token) if token in self._ids else None


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
