"""What the files beside a tokenizer in a Hugging Face folder say of it.

`tokenizer_config.json` (or, in older folders, `special_tokens_map.json` and `added_tokens.json`) names special tokens
and lists added ones; `generation_config.json` or `config.json` lists the ids that end a text; the chat template is in
`chat_template.jinja` or `tokenizer_config.json`. They are read as `AutoTokenizer` of transformers 5 reads them.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from llama.errors import CheckpointError
from llama.files import Metadata, read_json, read_whole, write_json
from llama.vocab.added_tokens import AddedToken
from llama.vocab.vocabulary import without_surrogates

logger = logging.getLogger("llama")

TOKENIZER_JSON, TOKENIZER_CONFIG, CHAT_TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
EOS_FILES = ("generation_config.json", "config.json")  # the first that has an eos_token_id counts

# The tokens that transformers knows by name, besides those of a model's own (`image_token`).
TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

NO_ID = -1  # of a token that a file names by its content

MAX_TEMPLATE_BYTES = 2**20  # of a chat template, which may have 200,000 characters

MAX_CONTENT = 256  # characters; a text is compared with every length there is


@dataclass
class TokenizerConfig:
    """What is known of a tokenizer beyond its vocabulary; by default nothing.

    Attributes:
        added_tokens: with the ids that the files give them.
        named_tokens: by names such as `bos_token`; None for a token that the model is said not to have. Their ids are
            `NO_ID`, as are those of the extra tokens.
        extra_tokens: further special tokens.
        eos_ids: the ids that end a text.
        add_bos: whether a text to complete begins with BOS.
        chat_template: the Jinja template of the model's chat format.
        chat_template_source: the name of the file, or of the GGUF field, that the template is from.
        add_prefix_space: whether sentencepiece puts a space before a text.
        legacy: whether it does so also after each added token.
        doubles_space: whether it does so also before a part of a text that itself begins with a space.
        vocab_size: the number of rows of the model's embedding.
    """

    added_tokens: list[AddedToken] = field(default_factory=list)
    named_tokens: dict[str, AddedToken | None] = field(default_factory=dict)
    extra_tokens: list[AddedToken] = field(default_factory=list)
    eos_ids: set[int] = field(default_factory=set)
    add_bos: bool | None = None
    chat_template: str | None = None
    chat_template_source: str | None = None
    add_prefix_space: bool = True
    legacy: bool = False
    doubles_space: bool = False
    vocab_size: int | None = None

    def with_names(self, **defaults: str) -> "TokenizerConfig":
        """The same, where it says nothing of tokens with these names, with their texts."""
        tokens: dict[str, AddedToken | None] = {name: AddedToken(text, NO_ID) for name, text in defaults.items()}
        return replace(self, named_tokens=tokens | self.named_tokens)

    def template_tokens(self) -> dict[str, str]:
        """The tokens that chat templates know by name, as `bos_token` -> its text."""
        return {name: token.content for name, token in self.named_tokens.items() if token is not None}

    def merge_added_tokens(
        self, tokens: Iterable[AddedToken], vocabulary: Mapping[str, int], path: Path
    ) -> tuple[AddedToken, ...]:
        """All added tokens of a tokenizer, in the order of their ids: its own, and those of this configuration.

        What the configuration says of a token counts for more, but for its id. A named token that is in the vocabulary
        is an added token as well. One without an id is left out, and so are those beyond the model's embedding.

        Args:
            tokens: the tokenizer's own added tokens.
            vocabulary: the text of each of its other tokens -> its id.
            path: the tokenizer's file, for error messages.

        Raises:
            CheckpointError: two different tokens have the same id.
        """
        merged = {token.content: token for token in tokens}

        def known_id(token: AddedToken) -> int:
            return merged[token.content].id if token.content in merged else vocabulary.get(token.content, token.id)

        for token in self.added_tokens:
            merged[token.content] = replace(token, id=known_id(token))
        for token in (*self.extra_tokens, *filter(None, self.named_tokens.values())):
            if known_id(token) != NO_ID:
                merged[token.content] = replace(merged.get(token.content, token), id=known_id(token), special=True)
        text_of = {i: text for text, i in vocabulary.items()}
        for token in merged.values():
            other = text_of.setdefault(token.id, token.content)
            if other != token.content:
                raise CheckpointError(f"{path}: {other!r:.80} and {token.content!r:.80} both have the id {token.id}")
        outside = {} if self.vocab_size is None else {t.content: t for t in merged.values() if t.id >= self.vocab_size}
        if outside:
            logger.warning("%s: %s left out: the model has %d tokens", path, list(outside)[:8], self.vocab_size)
        return tuple(sorted((t for t in merged.values() if t.content not in outside), key=lambda token: token.id))


def read_tokenizer_config(folder: Path, reads_json: bool = True) -> TokenizerConfig:
    """What the files in a folder say of the tokenizer there.

    Args:
        folder: the folder.
        reads_json: whether `tokenizer.json`, if there is one, is among these files. It isn't if it is the tokenizer.

    Raises:
        CheckpointError: one of them is damaged.
    """
    config = _read_optional(folder / TOKENIZER_CONFIG)
    json_path = folder / TOKENIZER_JSON
    named_tokens, extra_tokens = _read_named_tokens(config)
    added_tokens = []
    if config.get("added_tokens_decoder", dict, None) is not None:
        for i, entry in config.get("added_tokens_decoder", dict).items():
            added_tokens.append(read_added_token(config.path, entry, int(i) if re.fullmatch("[0-9]{1,10}", i) else i))
    else:  # an older folder, where more files say it
        more_named_tokens, more_extra_tokens = _read_named_tokens(_read_optional(folder / "special_tokens_map.json"))
        named_tokens, extra_tokens = named_tokens | more_named_tokens, extra_tokens + more_extra_tokens
        special = {token.content for token in (*extra_tokens, *filter(None, named_tokens.values()))}
        added = _read_optional(folder / "added_tokens.json")
        for content, i in added.values.items():
            flags = {"content": content, "special": content in special}
            added_tokens.append(read_added_token(added.path, flags, i))
        added_tokens += read_added_tokens(_read_optional(json_path)) if reads_json else []
    chat_template, chat_template_source = _read_chat_template(folder, config)
    return TokenizerConfig(
        added_tokens,
        named_tokens,
        extra_tokens,
        read_eos_ids(folder),
        config.get("add_bos_token", bool, None),
        chat_template,
        chat_template_source,
        *_read_spaces(config, json_path),
        _read_optional(folder / "config.json").get("vocab_size", int, None),
    )


def read_added_tokens(tokenizer_json: Metadata) -> list[AddedToken]:
    """The added tokens in `tokenizer.json`."""
    entries = tokenizer_json.get("added_tokens", list, [])
    if not all(isinstance(entry, dict) for entry in entries):
        raise CheckpointError(f"{tokenizer_json.path}: added_tokens must be a list of objects")
    return [read_added_token(tokenizer_json.path, entry, entry.get("id")) for entry in entries]


def read_added_token(path: Path, entry: Any, token_id: Any) -> AddedToken:
    """An added token as files write it, as an object with its content and flags.

    Args:
        path: the file.
        entry: the object.
        token_id: the id that the file gives it.

    Raises:
        CheckpointError: it isn't a token.
    """
    token = _read_token(path, entry, special=False)
    if type(token_id) is not int or not 0 <= token_id < 2**31:
        raise CheckpointError(f"{path}: the id of the added token {token.content!r} is {token_id!r:.80}")
    return replace(token, id=token_id)


def _read_token(path: Path, entry: Any, special: bool) -> AddedToken:
    """A token without its id: its content, or an object with the content and flags."""
    values = Metadata(path, entry if isinstance(entry, dict) else {"content": entry})
    content, special = values.get("content", str), values.get("special", bool, special)
    if not 0 < len(content) <= MAX_CONTENT or content != without_surrogates(content):
        raise CheckpointError(f"{path}: the token {content!r:.80} must have 1 to {MAX_CONTENT} characters of Unicode")
    flags = {flag: values.get(flag, bool, False) for flag in ("lstrip", "rstrip", "single_word")}
    return AddedToken(content, NO_ID, special, **flags, normalized=values.get("normalized", bool, not special))


def _read_named_tokens(file: Metadata) -> tuple[dict[str, AddedToken | None], list[AddedToken]]:
    """The special tokens that a file names as `bos_token` and so on, and those that it lists without a name."""
    named: dict[str, Any] = {}
    extra: list[Any] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        entries = file.values.get(key)
        if isinstance(entries, dict):
            named |= entries
        elif isinstance(entries, list):
            extra += entries
    named |= {key: value for key, value in file.values.items() if key in TOKEN_NAMES}
    named |= {key: v for key, v in file.values.items() if key.endswith("_token") and isinstance(v, str | dict)}
    return (
        {key: None if v is None else _read_token(file.path, v, special=True) for key, v in named.items()},
        [_read_token(file.path, entry, special=True) for entry in extra],
    )


def _read_spaces(config: Metadata, json_path: Path) -> tuple[bool, bool, bool]:
    """`add_prefix_space`, `legacy` and `doubles_space`, which depend on the class that transformers takes."""
    kind = config.get("tokenizer_class", str, "").removesuffix("Fast")
    add_prefix_space = config.get("add_prefix_space", bool, True)
    if kind == "LlamaTokenizer" or not config.values:
        return add_prefix_space, config.get("legacy", bool, False), False
    if kind == "CodeLlamaTokenizer":
        return add_prefix_space, False, False
    if not json_path.exists():
        legacy = config.get("legacy", bool, True)
        return True, legacy, legacy
    json_file = _read_optional(json_path)
    normalizer = json_file.get("normalizer", dict, {})
    steps = Metadata(json_path, normalizer).get("normalizers", list, [normalizer])
    if any(isinstance(step, dict) and step.get("type") == "Prepend" for step in steps):
        return True, True, True
    scheme = Metadata(json_path, json_file.get("pre_tokenizer", dict, {})).get("prepend_scheme", str, "never")
    return scheme != "never", scheme == "always", False


def _read_chat_template(folder: Path, config: Metadata) -> tuple[str | None, str | None]:
    """The chat template and the name of the file it is from; of several templates, the one named "default"."""
    path = folder / CHAT_TEMPLATE
    if path.exists():
        return read_whole(path, MAX_TEMPLATE_BYTES).decode("utf-8", "replace"), CHAT_TEMPLATE
    template = config.values.get("chat_template")
    if isinstance(template, list):
        by_name = {str(entry.get("name")): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = by_name.get("default")
        if template is None:
            logger.warning("%s: none of its chat templates %s is named 'default'", config.path, list(by_name)[:8])
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{config.path}: chat_template is {template!r:.80}, not a text or a list of named ones")
    return (template, TOKENIZER_CONFIG) if template else (None, None)


def read_eos_ids(folder: Path) -> set[int]:
    """The ids that end a text; empty where no file says."""
    for name in EOS_FILES:
        value = _read_optional(folder / name).values.get("eos_token_id")
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(type(i) is int and i >= 0 for i in ids):
                raise CheckpointError(
                    f"{folder / name}: eos_token_id is {value!r:.80}; it must be a token id or a list of them"
                )
            return set(ids)
    return set()


def _read_optional(path: Path) -> Metadata:
    """The content of a JSON file; empty where there is no such file."""
    return Metadata(path, read_json(path) if path.exists() else {})


def added_token_values(token: AddedToken) -> dict[str, Any]:
    """An added token as files write it: all but its id."""
    return {key: value for key, value in asdict(token).items() if key != "id"}


def write_tokenizer_config(folder: Path, config: dict[str, Any], bos_id: int | None, stop_tokens: set[int]) -> None:
    """Write `tokenizer_config.json`, and `generation_config.json` with the ids that begin and end a text.

    Args:
        folder: where to write them.
        config: the content of `tokenizer_config.json`.
        bos_id: the id that begins a text, or None.
        stop_tokens: the ids that end it.
    """
    write_json(folder / TOKENIZER_CONFIG, config)
    bos = {} if bos_id is None else {"bos_token_id": bos_id}
    write_json(folder / EOS_FILES[0], {**bos, "eos_token_id": sorted(stop_tokens)})
