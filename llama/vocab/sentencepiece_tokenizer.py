"""Llama 2's kind of tokenizer, by sentencepiece."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from llama.errors import CheckpointError, InputError
from llama.vocab.added_tokens import AddedToken, AddedTokenSplitter, Names, names_to_recognise
from llama.vocab.sentencepiece_proto import NO_DUMMY_PREFIX, user_defined_as_control
from llama.vocab.tokenizer_config import TokenizerConfig, added_token_values, write_tokenizer_config
from llama.vocab.vocabulary import END_TOKENS, without_surrogates


class SentencePieceTokenizer:
    """A sentencepiece model, with the interface of `BytePairTokenizer`.

    A text without added tokens is encoded exactly as sentencepiece does it. The parts of a text that has some, such as
    a rendered chat template, are encoded as `LlamaTokenizer` of transformers 5 does it: the two differ in where a space
    is put before them.

    Args:
        proto: the model, a serialized ModelProto.
        path: the file it is from, for error messages.
        config: what else is known of it. Added tokens may be pieces of the model, or follow them.

    Attributes:
        model: the sentencepiece processor.
        proto: the model, as given.
        add_prefix_space, legacy, doubles_space: see `TokenizerConfig`.
        added_tokens: the tokens that are added, and the model's own that no ordinary text is made of.
        special_tokens: the special ones that are added; the model's own unknown, BOS and EOS tokens are not.
        listed_tokens: those of `added_tokens` that a file beside the model must list.

    Raises:
        CheckpointError: not a sentencepiece model, a damaged one, or another than `config` is about.
    """

    def __init__(self, proto: bytes, path: Path, config: TokenizerConfig) -> None:
        try:
            SentencePieceProcessor(model_proto=proto)  # what is appended could complete a file that is cut
            text_proto, user_defined = user_defined_as_control(proto)
            prefix = b"" if config.add_prefix_space else NO_DUMMY_PREFIX
            self.model = SentencePieceProcessor(model_proto=text_proto + prefix)
            self._model_without_prefix = SentencePieceProcessor(model_proto=text_proto + NO_DUMMY_PREFIX)
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{path} is neither a sentencepiece model (Llama 2), nor lines of base64 tokens and ranks (Llama 3), "
                f"nor tokenizer.json, nor GGUF: {error}"
            ) from error
        self.proto, self.vocabulary = proto, None
        self.legacy, self.doubles_space = config.legacy, config.doubles_space
        self.add_prefix_space: bool = self.model.encode("a") != self._model_without_prefix.encode("a")
        self._model_after_token = self.model if config.legacy else self._model_without_prefix
        self._read_tokens(user_defined, path, config)
        self._splitter = AddedTokenSplitter(self.added_tokens)
        self.add_bos = config.add_bos is not False and self.bos_id is not None
        self.chat_template, self.chat_template_source = config.chat_template, config.chat_template_source

    def _read_tokens(self, user_defined: set[int], path: Path, config: TokenizerConfig) -> None:
        """Set the attributes that tell of single tokens."""
        try:
            pieces: list[str] = self.model.id_to_piece(list(range(self.model.vocab_size())))
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path}: its pieces are not all texts in UTF-8: {error}") from error
        id_of = {piece: i for i, piece in enumerate(pieces)}
        named = {"bos_token": self.model.bos_id(), "eos_token": self.model.eos_id(), "unk_token": self.model.unk_id()}
        config = config.with_names(**{name: pieces[i] for name, i in named.items() if i >= 0})
        own = {i for i in range(len(pieces)) if self.model.is_control(i)}
        self.added_tokens = config.merge_added_tokens(
            (AddedToken(pieces[i], i, special=i not in user_defined) for i in own), id_of, path
        )
        self.n_words: int = max([len(pieces), *(token.id + 1 for token in self.added_tokens)])

        of_every_model = set(named.values())
        listed = {id_of.get(token.content, token.id) for token in config.added_tokens} | user_defined
        self._recognised = [
            token
            for token in self.added_tokens
            if token.id not in of_every_model and (token.id in listed or token.id not in own)
        ]
        recognised_ids = {token.id for token in self._recognised}
        self.listed_tokens = [token for token in self.added_tokens if token.id in of_every_model | recognised_ids]
        self.special_tokens = {token.content: token.id for token in self._recognised if token.special}
        # Ordinary pieces that are named as special tokens, such as for padding, are still ordinary.
        self._contents = {
            token.id: token.content for token in self._recognised if token.id in own or token.id >= len(pieces)
        }

        self.template_tokens = config.template_tokens()
        ids = {token.content: token.id for token in self.added_tokens}
        self.bos_id = ids.get(self.template_tokens.get("bos_token", ""))
        self.eos_id: int = ids.get(self.template_tokens.get("eos_token", ""), self.model.eos_id())
        if self.eos_id < 0:
            raise CheckpointError(
                f"{path} has no token that ends a text: name one as eos_token in tokenizer_config.json"
            )
        self.stop_tokens = {self.eos_id, *config.eos_ids, *(ids[name] for name in END_TOKENS if name in ids)}
        if not all(0 <= i < self.n_words for i in self.stop_tokens):
            raise CheckpointError(
                f"{path}: not all the ids that end a text, {sorted(self.stop_tokens)}, are among its {self.n_words} "
                f"tokens"
            )

    def encode(self, text: str, allowed: Names, disallowed: Names) -> list[int]:
        """Token ids of a text, in which added tokens that aren't special are recognised.

        Args:
            text: the text, without lone surrogates.
            allowed: the added special tokens that the text may spell out; others are plain text.
            disallowed: strings that the text must not contain; "all" for every special token that isn't allowed.

        Raises:
            InputError: the text contains what `disallowed` forbids, or no special tokens are added to the vocabulary.
        """
        if (allowed or disallowed) and not self.special_tokens:
            raise InputError(
                "allowed_special and disallowed_special don't apply to a sentencepiece vocabulary without added tokens"
            )
        parts = self.split(text, names_to_recognise(self._recognised, text, allowed, disallowed))
        if any(isinstance(part, int) for part in parts):
            return self.encode_parts(parts)
        ids: list[int] = self.model.encode(text)
        return ids

    def normalize(self, text: str) -> str:
        """The text as it is when it is cut into pieces: some models take fullwidth letters for ordinary ones."""
        normalized: str = self._model_without_prefix.normalize(without_surrogates(text))
        return normalized

    def split(self, text: str, names: Names = "all") -> list[str | int]:
        """The text cut at the added tokens with these contents: see `AddedTokenSplitter.split`."""
        return self._splitter.split(text, names)

    def encode_parts(self, parts: Sequence[str | int], continued: bool = False) -> list[int]:
        """Token ids of texts, in which no added token is recognised, and of token ids, which stay as they are.

        Args:
            parts: texts, without lone surrogates, and token ids.
            continued: whether they continue another text, so that no space is put before the first.
        """
        ids: list[int] = []
        model = self._model_without_prefix if continued else self.model
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
                model = self._model_after_token
            elif part:
                has_space = part.startswith((" ", "▁")) and not self.doubles_space
                ids += (self._model_without_prefix if has_space else model).encode(part)
                model = self._model_without_prefix
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of token ids; ids without a token are skipped, as are those of the model's own control tokens."""
        text = ""
        segment: list[int] = []  # ids between two added tokens
        model = self.model
        for i in ids:
            if i in self._contents:
                text += model.decode(segment) + self._contents[i]
                segment, model = [], self._model_after_token
            elif i < self.model.vocab_size():
                segment.append(i)
        text += model.decode(segment)
        return text

    def token_bytes(self, token: int) -> bytes | None:
        """The bytes that one token stands for; of a control token, its name; None for an id without a token."""
        if token in self._contents:
            return self._contents[token].encode()
        if token >= self.model.vocab_size():
            return None
        piece: str = self.model.id_to_piece(token)
        if self.model.is_byte(token):  # "<0x0A>"
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode()


def write_sentencepiece_config(
    folder: Path, tokenizer: SentencePieceTokenizer, stop_tokens: set[int], add_bos: bool
) -> None:
    """Write what is known of a sentencepiece model as files beside it.

    Args:
        folder: where to write `tokenizer_config.json` and `generation_config.json`.
        tokenizer: the tokenizer.
        stop_tokens: the ids that end a text.
        add_bos: whether a text begins with BOS.
    """
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast" if tokenizer.doubles_space else "LlamaTokenizer",
        "add_bos_token": add_bos,
        "legacy": tokenizer.legacy,
        "add_prefix_space": tokenizer.add_prefix_space,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {str(token.id): added_token_values(token) for token in tokenizer.listed_tokens},
        **dict.fromkeys(("bos_token", "eos_token", "unk_token")),  # null, where there is none
        **tokenizer.template_tokens,
    }
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    write_tokenizer_config(folder, config, tokenizer.bos_id, stop_tokens)
