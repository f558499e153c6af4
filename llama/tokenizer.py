"""Text to token ids and back: one interface over Llama 3's, Llama 2's and byte-level vocabularies."""

import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Literal

import regex
import tiktoken
from sentencepiece import SentencePieceProcessor

from llama.chat import ChatFormat, Dialog, Message, Role
from llama.errors import CheckpointError, InputError
from llama.files import first_bytes, require_path
from llama.gguf_file import GGUFFile
from llama.tokenizer_json import read_tokenizer_json
from llama.vocabulary import Vocabulary, is_tiktoken, read_gguf, read_tiktoken

__all__ = ["ChatFormat", "Dialog", "Message", "Role", "Tokenizer"]

# tiktoken's regular expression engine gives up on texts and runs far longer than these.
MAX_TEXT = 400_000
MAX_RUN = 25_000


class Tokenizer:
    """Turns text into token ids and back.

    Args:
        model_path: a `tokenizer.model` of Llama 3 (tiktoken ranks) or Llama 2 (sentencepiece), or a `tokenizer.json` or
            `*.gguf` file that carries a byte-level vocabulary; told apart by looking at the file.

    Attributes:
        n_words: number of tokens; in Hugging Face folders, of rows of the embedding, which may be padded.
        n_padding: how many of them no text is made of.
        bos_id, eos_id: the ids that begin (None if there is none) and end a text.
        pad_id: -1; no model ever sees it.
        stop_tokens: the ids at which generation ends.
        special_tokens: name -> id of the tokens that no plain text encodes to (empty for Llama 2).
        add_bos: whether a text to complete starts with BOS.
        chat_template: the Jinja template the file carries, or None.
        vocabulary: the byte pairs it is made of; None for Llama 2.

    Raises:
        MissingFileError: no such file.
        CheckpointError: not a tokenizer, or a damaged one.
    """

    def __init__(self, model_path: str | Path | GGUFFile) -> None:
        engine = _open(model_path)
        self.model = engine.model
        self.n_words: int = engine.n_words
        self.n_padding = 0
        self.bos_id: int | None = engine.bos_id
        self.eos_id: int = engine.eos_id
        self.pad_id: int = -1
        self.stop_tokens: set[int] = set(engine.stop_tokens)
        self.special_tokens: dict[str, int] = dict(engine.special_tokens)
        self.add_bos: bool = engine.add_bos
        self.chat_template: str | None = engine.chat_template
        self.vocabulary: Vocabulary | None = engine.vocabulary
        self._engine = engine

    def encode(
        self,
        s: str,
        bos: bool,
        eos: bool,
        allowed_special: Literal["all"] | Collection[str] = (),
        disallowed_special: Literal["all"] | Collection[str] = (),
    ) -> list[int]:
        """Token ids of a text. Every string encodes, whatever it holds.

        Args:
            s: the text.
            bos: put the beginning-of-text token before it.
            eos: put the end-of-text token after it.
            allowed_special: special tokens that `s` may spell out; others are plain text. (Not for Llama 2.)
            disallowed_special: texts that `s` must not hold; "all" for every special token not allowed. (Not for
                Llama 2.)

        Raises:
            InputError: `s` is no string, or holds what `disallowed_special` forbids, or there is no BOS to put before.
        """
        if not isinstance(s, str):
            raise InputError(f"encode takes a str, not {type(s).__name__}: {s!r:.80}")
        text = s.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half a surrogate pair becomes U+FFFD
        ids = self._engine.encode(text, allowed_special, disallowed_special)
        if bos:
            if self.bos_id is None:
                raise InputError("bos=True, but this vocabulary has no beginning-of-text token")
            ids.insert(0, self.bos_id)
        if eos:
            ids.append(self.eos_id)
        return ids

    def decode(self, t: Sequence[int]) -> str:
        """The text of token ids; bytes that are not UTF-8 (a character cut in two) become U+FFFD.

        Raises:
            InputError: an id outside the vocabulary.
        """
        ids = [int(i) for i in t]
        for i in ids:
            if not 0 <= i < self.n_words:
                raise InputError(f"token id {i} is outside the vocabulary of {self.n_words} tokens")
        return self._engine.decode([i for i in ids if i < self._engine.n_words])  # not n_padding

    def token_text(self, token: int) -> str:
        """What one token reads as: text, in which bytes that are no whole character stand as `\\xf0\\x9f`; or its name.

        Names are those of special tokens, and `<|unused_7|>` of an id that no text is made of.

        Raises:
            InputError: an id outside the vocabulary.
        """
        if not 0 <= token < self.n_words:
            raise InputError(f"token id {token} is outside the vocabulary of {self.n_words} tokens")
        known = self._engine.token_bytes(token) if token < self._engine.n_words else None
        return f"<|unused_{token}|>" if known is None else known.decode("utf-8", "backslashreplace")


def _open(model_path: str | Path | GGUFFile) -> "_BytePairs | _SentencePieces":
    """The engine for a file, told by its first bytes."""
    if isinstance(model_path, GGUFFile):
        return _BytePairs(read_gguf(model_path), model_path.path)
    path = require_path(model_path, "tokenizer_path")
    head = first_bytes(path)
    if head.startswith(b"GGUF"):
        return _BytePairs(read_gguf(GGUFFile(path)), path)
    if head.lstrip().startswith(b"{"):
        return _BytePairs(read_tokenizer_json(path), path)
    if is_tiktoken(head):
        return _BytePairs(read_tiktoken(path), path)
    return _SentencePieces(path)


class _BytePairs:
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
            for stretch in split_long(part):
                for piece in self._pattern.findall(stretch):
                    known = piece.encode().translate(None, self._no_token)
                    if known:
                        ids += self.model._encode_single_piece(known)
        return ids

    def decode(self, ids: list[int]) -> str:
        return self.model.decode([i for i in ids if i in self._ids])

    def token_bytes(self, token: int) -> bytes | None:
        return self.model.decode_single_token_bytes(token) if token in self._ids else None


class _SentencePieces:
    """Llama 2's sentencepiece model."""

    def __init__(self, path: Path) -> None:
        try:
            self.model = SentencePieceProcessor(model_proto=path.read_bytes())
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{path} is neither a sentencepiece model (Llama 2), nor lines of base64 tokens and ranks (Llama 3), "
                f"nor tokenizer.json, nor GGUF: {error}"
            ) from error
        self.n_words: int = self.model.vocab_size()
        self.bos_id: int | None = self.model.bos_id()
        self.eos_id: int = self.model.eos_id()
        self.stop_tokens = {self.eos_id}
        self.special_tokens: dict[str, int] = {}
        self.add_bos, self.chat_template = True, None
        self.vocabulary = None

    def encode(
        self, text: str, allowed: Literal["all"] | Collection[str], disallowed: Literal["all"] | Collection[str]
    ) -> list[int]:
        if allowed or disallowed:
            raise InputError("allowed_special and disallowed_special don't apply to a sentencepiece vocabulary")
        return self.model.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)

    def token_bytes(self, token: int) -> bytes:
        piece: str = self.model.id_to_piece(token)
        if self.model.is_byte(token):  # "<0x0A>"
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode()


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
