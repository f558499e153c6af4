"""Text to token ids and back: one interface over Llama 3's, Llama 2's and byte-level vocabularies."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

from llama.chat_format import ChatFormat
from llama.chat_template import end_of_turn
from llama.dialog import Dialog, Message, Role
from llama.errors import InputError
from llama.gguf_file import GGUFFile
from llama.vocab import Vocabulary, open_vocabulary
from llama.vocab.vocabulary import without_surrogates

__all__ = ["ChatFormat", "Dialog", "Message", "Role", "Tokenizer"]


class Tokenizer:
    """Turns text into token ids and back.

    Args:
        model_path: a `tokenizer.model` of Llama 3 (tiktoken ranks) or Llama 2 (sentencepiece), a `tokenizer.json`, or a
            `*.gguf` file; told apart by looking at the file. Those beside it may say more of it.

    Attributes:
        n_words: vocabulary size; with Hugging Face's layout, the embedding's, which may be padded by `n_padding`.
        bos_id, eos_id: the ids that begin (None if there is none) and end a text.
        pad_id: -1, which no model ever sees. stop_tokens: the ids at which generation ends, or a turn of a chat.
        special_tokens: name -> id of the added tokens that no plain text encodes to (none in Llama 2's own vocabulary).
        add_bos: whether a text to complete begins with BOS.
        chat_template: the Jinja template that the file or its neighbours carry, or None.
        vocabulary: the tokens' bytes and ranks; None for sentencepiece.
        engine: what encodes and decodes: a `BytePairTokenizer` or a `SentencePieceTokenizer` of `llama.vocab`.

    Raises:
        MissingFileError: no such file.
        CheckpointError: not a tokenizer, or a damaged one.
    """

    def __init__(self, model_path: str | Path | GGUFFile) -> None:
        engine = open_vocabulary(model_path)
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
        self.engine = engine
        self.stop_tokens |= end_of_turn(self)

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
            allowed_special: special tokens that `s` may spell out; others are plain text. (There must be some.)
            disallowed_special: texts that `s` must not hold; "all" for every special token not allowed.

        Raises:
            InputError: `s` is no string, or holds what `disallowed_special` forbids, or there is no BOS to put before.
        """
        if not isinstance(s, str):
            raise InputError(f"encode takes a str, not {type(s).__name__}: {s!r:.80}")
        ids = self.engine.encode(without_surrogates(s), allowed_special, disallowed_special)
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
        return self.engine.decode([i for i in ids if i < self.engine.n_words])  # not n_padding

    def token_text(self, token: int) -> str:
        """What one token reads as: text, in which bytes that are no whole character stand as `\\xf0\\x9f`; or its name.

        Names are those of special tokens, and `<|unused_7|>` of an id that no text is made of.

        Raises:
            InputError: an id outside the vocabulary.
        """
        if not 0 <= token < self.n_words:
            raise InputError(f"token id {token} is outside the vocabulary of {self.n_words} tokens")
        known = self.engine.token_bytes(token) if token < self.engine.n_words else None
        return f"<|unused_{token}|>" if known is None else known.decode("utf-8", "backslashreplace")
