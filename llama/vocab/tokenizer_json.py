"""Hugging Face's `tokenizer.json`, of the byte-level kind, and what the files beside it say of a tokenizer."""

from pathlib import Path
from typing import Any

from llama.errors import CheckpointError
from llama.files import Metadata, first_bytes, read_json, write_json
from llama.vocab.vocabulary import (
    ENDS,
    GPT2_PATTERN,
    LLAMA3_PATTERN,
    SMOLLM_PATTERN,
    Vocabulary,
    byte_level_ranks,
    gpt2_characters,
)

CONFIG = "tokenizer_config.json"
END_FILES = ("generation_config.json", "config.json")  # which name the tokens that end a text; the first goes first


def read_tokenizer_json(path: Path) -> Vocabulary:
    """The vocabulary in a `tokenizer.json`, with what `tokenizer_config.json` and its other neighbours add.

    Raises:
        CheckpointError: a damaged file, or a kind of tokenizer that isn't byte-level; the message names what.
    """
    top = Metadata(path, read_json(path))
    model = Metadata(path, top.get("model", dict))
    kind = model.get("type", str, "BPE")
    if kind != "BPE" or model.get("byte_fallback", bool, False):
        raise CheckpointError(
            f"{path} holds a sentencepiece tokenizer ({kind}), and only byte-level ones are read from JSON; put the "
            f"model's own tokenizer.model beside it, or pass that as tokenizer_path"
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.values.get(key):
            raise CheckpointError(f"{path}: {key} is {model.values[key]!r:.80}, which isn't known here")
    if top.values.get("normalizer") is not None:
        raise CheckpointError(f"{path}: the normalizer {top.values['normalizer']!r:.80} isn't known here")

    added = [Metadata(path, entry) for entry in top.get("added_tokens", list, []) if isinstance(entry, dict)]
    special = {entry.get("content", str): entry.get("id", int) for entry in added}
    ordinary = {token: i for token, i in model.get("vocab", dict).items() if token not in special}
    ids = [*ordinary.values(), *special.values()]
    numbered = all(type(i) is int and 0 <= i < 2**31 for i in ids) and len(set(ids)) == len(ids)
    if not numbered or not ordinary or "" in special:
        raise CheckpointError(f"{path}: the ids of its {len(ids)} tokens are not different numbers from 0")
    merges = [" ".join(map(str, merge)) if isinstance(merge, list) else merge for merge in model.get("merges", list)]
    if not all(isinstance(merge, str) for merge in merges):
        raise CheckpointError(f"{path}: its merges are not all pairs of tokens")
    ranks = byte_level_ranks(ordinary, merges, path, unmerged=model.get("ignore_merges", bool, False))
    if model.values.get("unk_token") is not None and any(bytes([byte]) not in ranks for byte in range(256)):
        raise CheckpointError(
            f"{path}: unk_token {model.values['unk_token']!r:.80} stands for some bytes, which isn't known here"
        )

    config_file = path.with_name(CONFIG)
    config = Metadata(config_file, read_json(config_file) if config_file.exists() else {})
    bos, add_bos = _begins_with(top.values.get("post_processor"))
    bos_id = special.get(_name(config.values.get("bos_token")) or bos or "")
    ends = end_ids(path.parent)
    ends |= {special[name] for name in ENDS if name in special}
    eos_id = special.get(_name(config.values.get("eos_token")) or "", min(ends, default=None))
    if eos_id is None:
        raise CheckpointError(f"{path}: no token that ends a text is named: {END_FILES[0]} should have an eos_token_id")
    if not ends <= set(ids):
        raise CheckpointError(f"{path}: the tokens that end a text are {sorted(ends)}, of {len(ids)} there are")
    return Vocabulary(
        ranks,
        special,
        _pattern(top.values.get("pre_tokenizer"), path),
        bos_id=bos_id,
        eos_id=eos_id,
        stop_tokens=ends | {eos_id},
        add_bos=adds_bos(path.parent, add_bos) and bos_id is not None,
        chat_template=_chat_template(config),
    )


def end_ids(folder: Path) -> set[int]:
    """The ids that end a text, as the first of `END_FILES` that names some says."""
    for name in END_FILES:
        value = read_json(folder / name).get("eos_token_id") if (folder / name).exists() else None
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(type(i) is int and i >= 0 for i in ids):
                raise CheckpointError(f"{folder / name}: eos_token_id is {value!r:.80}, which is no id or list of ids")
            return set(ids)
    return set()


def adds_bos(folder: Path, otherwise: bool) -> bool:
    """Whether the settings in a Hugging Face folder say that a text begins with BOS."""
    path = folder / CONFIG
    return Metadata(path, read_json(path) if path.exists() else {}).get("add_bos_token", bool, otherwise)


def _name(token: Any) -> str | None:
    """The text of a special token, which files write as it is or as an object."""
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None


def _chat_template(config: Metadata) -> str | None:
    """The chat template: a text, one of several with names, or a file."""
    template, file = config.values.get("chat_template"), config.path.with_name("chat_template.jinja")
    if isinstance(template, list):
        named = {str(one.get("name")): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    if template is None and file.exists():
        first_bytes(file)
        template = file.read_text(encoding="utf-8", errors="replace")
    return template if isinstance(template, str) else None


def _begins_with(post_processor: Any) -> tuple[str | None, bool]:
    """The token that a post-processor puts before a text, and whether it does."""
    steps = post_processor.get("processors") if isinstance(post_processor, dict) else None
    for step in steps if isinstance(steps, list) else [post_processor]:
        if isinstance(step, dict) and step.get("type") == "TemplateProcessing":
            single = step.get("single")
            first = single[0] if isinstance(single, list) and single else None
            token = first.get("SpecialToken") if isinstance(first, dict) else None
            if isinstance(token, dict):
                return _name(token.get("id")), True
    return None, False


def _pattern(pre_tokenizer: Any, path: Path) -> str:
    """The pattern that splits a text into the pieces that byte pairs are merged within."""
    steps = pre_tokenizer.get("pretokenizers") if isinstance(pre_tokenizer, dict) else None
    steps = [pre_tokenizer] if steps is None else steps
    if isinstance(steps, list) and all(isinstance(step, dict) for step in steps):
        kinds = [step.get("type") for step in steps]
        plain = not any(step.get("add_prefix_space") for step in steps)
        if kinds[-1:] == ["ByteLevel"] and plain:
            own_regex = steps[-1].get("use_regex", True)
            if len(steps) == 1 and own_regex:
                return GPT2_PATTERN
            if kinds[:-1] == ["Digits"] and steps[0].get("individual_digits") and own_regex:
                return SMOLLM_PATTERN
            if kinds[:-1] == ["Split"] and steps[0].get("behavior") == "Isolated" and not own_regex:
                pattern = steps[0].get("pattern")
                regex = pattern.get("Regex") if isinstance(pattern, dict) else None
                if isinstance(regex, str) and not steps[0].get("invert"):
                    # What a pattern doesn't match is a piece too; the known ones match everything.
                    known = regex in (LLAMA3_PATTERN, GPT2_PATTERN, SMOLLM_PATTERN)
                    return regex if known else rf"{regex}|(?:(?!{regex})[\s\S])+"
    raise CheckpointError(f"{path}: the pre_tokenizer {pre_tokenizer!r:.300} isn't known here")


def write_tokenizer_json(folder: Path, vocabulary: Vocabulary) -> None:
    """Write `tokenizer.json`, and beside it `tokenizer_config.json` and `generation_config.json`.

    All tokens stand in its vocabulary, special ones too: others would get ids anew where it is read by Hugging Face.
    """
    characters = gpt2_characters()
    tokens = {"".join(characters[byte] for byte in token): i for token, i in vocabulary.ranks.items()}
    merges = []  # each way to make a token from two others, token by token
    for token in sorted(tokens, key=tokens.__getitem__):
        ways = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        made = [(left, right) for left, right in ways if left in tokens and right in tokens]
        merges += sorted(made, key=lambda way: (tokens[way[0]], tokens[way[1]]))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    own_pattern = byte_level | {"use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": vocabulary.pattern}, "behavior": "Isolated", "invert": False}
    steps: list[dict[str, Any]] = [split, own_pattern]
    if vocabulary.pattern == SMOLLM_PATTERN:
        steps = [{"type": "Digits", "individual_digits": True}, byte_level]
    names = {i: name for name, i in vocabulary.special_tokens.items()}
    bos, eos = names.get(-1 if vocabulary.bos_id is None else vocabulary.bos_id), names.get(vocabulary.eos_id)
    post_processor: dict[str, Any] = own_pattern
    if vocabulary.add_bos and bos is not None:
        start, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
        more = {"Sequence": {"id": "B", "type_id": 1}}
        post_processor = {
            "type": "TemplateProcessing",
            "single": [start, text],
            "pair": [start, text, more],
            "special_tokens": {bos: {"id": bos, "ids": [vocabulary.bos_id], "tokens": [bos]}},
        }
    added = [
        {
            "id": i,
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, name in sorted(names.items())
    ]
    write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
            "post_processor": post_processor,
            "decoder": own_pattern,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": True,
                "vocab": tokens | vocabulary.special_tokens,
                "merges": [" ".join(merge) for merge in merges],
            },
        },
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": vocabulary.add_bos,
        "bos_token": bos,
        "eos_token": eos,
        "chat_template": vocabulary.chat_template,
        "clean_up_tokenization_spaces": False,
    }
    write_neighbours(folder, config, vocabulary.bos_id, vocabulary.stop_tokens)


def write_neighbours(folder: Path, config: dict[str, Any], bos_id: int | None, stop_tokens: set[int]) -> None:
    """Write what lies beside a tokenizer in Hugging Face's layout."""
    write_json(folder / CONFIG, {key: value for key, value in config.items() if value is not None})
    ids = {"bos_token_id": bos_id, "eos_token_id": sorted(stop_tokens)}
    write_json(folder / END_FILES[0], {key: value for key, value in ids.items() if value is not None})
