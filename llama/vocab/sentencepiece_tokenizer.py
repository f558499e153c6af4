"""Llama 2's tokenizer, by sentencepiece."""

from collections.abc import Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from llama.errors import CheckpointError, InputError
from llama.vocab.added_tokens import AddedToken, AddedTokenSplitter, Names


class SentencePieceTokenizer:
    """A sentencepiece model, with the interface of `BytePairTokenizer`.

    Raises:
        CheckpointError: not a sentencepiece model, or a damaged one.
    """

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
        self.added_tokens: tuple[AddedToken, ...] = ()
        self.add_bos = True
        self.chat_template: str | None = None
        self.chat_template_source: str | None = None
        self.template_tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        self.vocabulary = None
        self._splitter = AddedTokenSplitter(self.added_tokens)

    def split(self, text: str, names: Names) -> list[str | int]:
        """The text cut at the added tokens with these contents: see `AddedTokenSplitter.split`."""
        return self._splitter.split(text, names)

    def encode_parts(self, parts: Sequence[str | int], continued: bool = False) -> list[int]:
        """Token ids of texts, in which no added token is recognised, and of token ids, which stay as they are."""
        ids: list[int] = []
        for part in parts:
            ids += [part] if isinstance(part, int) else self.model.encode(part)
        return ids

    def encode(self, text: str, allowed: Names, disallowed: Names) -> list[int]:
        """Token ids of a text; `allowed` and `disallowed` must be empty, since sentencepiece has no such notion."""
        if allowed or disallowed:
            raise InputError("allowed_special and disallowed_special don't apply to a sentencepiece vocabulary")
        ids: list[int] = self.model.encode(text)
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of token ids."""
        text: str = self.model.decode(ids)
        return text

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one token stands for; of a control token, its name."""
        piece: str = self.model.id_to_piece(token)
        if self.model.is_byte(token):  # "<0x0A>"
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode()
