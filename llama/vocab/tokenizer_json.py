"""Hugging Face's `tokenizer.json` of the byte-level kind; the module `sentencepiece_json` reads the other kind."""

from pathlib import Path
from typing import Any

from llama.errors import CheckpointError
from llama.files import Metadata, write_json
from llama.vocab.pre_tokenizer import read_pre_tokenizer, write_pre_tokenizer
from llama.vocab.tokenizer_config import (
    EOS_FILES,
    added_token_values,
    read_added_tokens,
    read_tokenizer_config,
    write_tokenizer_config,
)
from llama.vocab.vocabulary import END_TOKENS, Vocabulary, byte_level_ranks, gpt2_characters


def read_tokenizer_json(file: Metadata) -> Vocabulary:
    """The vocabulary in a `tokenizer.json`, completed by `tokenizer_config.json` and the other files beside it.

    Raises:
        CheckpointError: a damaged file, or a kind of tokenizer that isn't byte-level; the message says which.
    """
    path = file.path
    model = Metadata(path, file.get("model", dict))
    _check_supported(file, model)
    tokens = _read_vocabulary(model)
    own_tokens = read_added_tokens(file)
    config = read_tokenizer_config(path.parent, reads_json=False)
    added_tokens = config.merge_added_tokens(own_tokens, tokens, path)
    ranks = _read_ranks(model, tokens, {token.content for token in (*own_tokens, *added_tokens)})

    id_of = {token.content: token.id for token in added_tokens}
    template_bos, template_adds_bos = leading_special_token(file.values.get("post_processor"))
    names = config.template_tokens()
    bos_id = id_of.get(names.get("bos_token") or template_bos or "")
    stop_tokens = config.eos_ids | {id_of[name] for name in END_TOKENS if name in id_of}
    eos_id = id_of.get(names.get("eos_token", ""), min(stop_tokens, default=None))
    if eos_id is None:
        raise CheckpointError(f"{path}: no token that ends a text is named: {EOS_FILES[0]} should have an eos_token_id")
    ids = {*ranks.values(), *id_of.values()}
    if not stop_tokens <= ids:
        raise CheckpointError(
            f"{path}: not all the ids that end a text, {sorted(stop_tokens)}, are among its {len(ids)} tokens"
        )
    return Vocabulary(
        ranks,
        added_tokens,
        read_pre_tokenizer(file.values.get("pre_tokenizer"), path),
        bos_id=bos_id,
        eos_id=eos_id,
        stop_tokens=stop_tokens | {eos_id},
        add_bos=(template_adds_bos if config.add_bos is None else config.add_bos) and bos_id is not None,
        chat_template=config.chat_template,
        chat_template_source=config.chat_template_source,
        template_tokens=names,
    )


def _check_supported(file: Metadata, model: Metadata) -> None:
    """Raise CheckpointError if the tokenizer isn't byte-level byte-pair encoding, or does more than that."""
    path = file.path
    kind = model.get("type", str, "BPE")
    if kind != "BPE":
        raise CheckpointError(
            f"{path} holds a tokenizer of kind {kind!r}, and only 'BPE' is read from JSON; put the model's own "
            f"tokenizer.model beside it, or pass that as tokenizer_path"
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.values.get(key):
            raise CheckpointError(f"{path}: {key} is {model.values[key]!r:.80}, which is not supported")
    if file.values.get("normalizer") is not None:
        raise CheckpointError(f"{path}: the normalizer {file.values['normalizer']!r:.80} is not supported")


def _read_vocabulary(model: Metadata) -> dict[str, int]:
    """Each token of the vocabulary, in GPT-2's characters, and its id; added tokens may be among them."""
    tokens = model.get("vocab", dict)
    valid = all(type(i) is int and 0 <= i < 2**31 for i in tokens.values())
    if not valid or not tokens or len(set(tokens.values())) != len(tokens):
        raise CheckpointError(
            f"{model.path}: the ids of its {len(tokens)} tokens are not different integers of at least 0"
        )
    return tokens


def _read_ranks(model: Metadata, tokens: dict[str, int], added: set[str]) -> dict[bytes, int]:
    """The bytes of each ordinary token -> its id: of the added tokens only those that merges make."""
    path = model.path
    merges = [" ".join(map(str, merge)) if isinstance(merge, list) else merge for merge in model.get("merges", list)]
    if not all(isinstance(merge, str) for merge in merges):
        raise CheckpointError(f"{path}: its merges are not all pairs of tokens")
    added = {token for token in added if len(token) > 1}
    if added:
        added -= {merge.replace(" ", "", 1) for merge in merges}
    ordinary = {token: i for token, i in tokens.items() if token not in added}
    ranks = byte_level_ranks(ordinary, merges, path, model.get("ignore_merges", bool, False))
    if model.values.get("unk_token") is not None and any(bytes([byte]) not in ranks for byte in range(256)):
        raise CheckpointError(
            f"{path}: unk_token {model.values['unk_token']!r:.80} stands for some bytes, which is not supported"
        )
    return ranks


def leading_special_token(post_processor: Any) -> tuple[str | None, bool]:
    """The special token that a post-processor puts before a text, and whether it does so."""
    steps = post_processor.get("processors") if isinstance(post_processor, dict) else None
    for step in steps if isinstance(steps, list) else [post_processor]:
        if isinstance(step, dict) and step.get("type") == "TemplateProcessing":
            single = step.get("single")
            first = single[0] if isinstance(single, list) and single else None
            token = first.get("SpecialToken") if isinstance(first, dict) else None
            if isinstance(token, dict):
                name = token.get("id")
                return (name if isinstance(name, str) else None), True
    return None, False


def write_tokenizer_json(folder: Path, vocabulary: Vocabulary) -> None:
    """Write `tokenizer.json`, and beside it `tokenizer_config.json` and `generation_config.json`."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    bos = next((token.content for token in vocabulary.added_tokens if token.id == vocabulary.bos_id), None)
    post_processor: dict[str, Any] = byte_level
    if vocabulary.add_bos and bos is not None:
        start, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
        second_text = {"Sequence": {"id": "B", "type_id": 1}}
        post_processor = {
            "type": "TemplateProcessing",
            "single": [start, text],
            "pair": [start, text, second_text],
            "special_tokens": {bos: {"id": bos, "ids": [vocabulary.bos_id], "tokens": [bos]}},
        }
    characters = gpt2_characters()
    tokens = {"".join(characters[byte] for byte in token): i for token, i in vocabulary.ranks.items()}
    write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": token.id, **added_token_values(token)} for token in vocabulary.added_tokens],
            "normalizer": None,
            "pre_tokenizer": write_pre_tokenizer(vocabulary.split_steps),
            "post_processor": post_processor,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": True,
                # With the added tokens, which Hugging Face would otherwise give new ids.
                "vocab": tokens | {token.content: token.id for token in vocabulary.added_tokens},
                "merges": [" ".join(merge) for merge in _all_merges(tokens)],
            },
        },
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": vocabulary.add_bos,
        "clean_up_tokenization_spaces": False,
        **vocabulary.template_tokens,
    }
    if vocabulary.chat_template is not None:
        config["chat_template"] = vocabulary.chat_template
    write_tokenizer_config(folder, config, vocabulary.bos_id, vocabulary.stop_tokens)


def _all_merges(tokens: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make a token from two others, in the order of the tokens made, then of their left and right part."""
    merges: list[tuple[str, str]] = []
    for token in sorted(tokens, key=tokens.__getitem__):
        pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        possible = [(left, right) for left, right in pairs if left in tokens and right in tokens]
        merges += sorted(possible, key=lambda pair: (tokens[pair[0]], tokens[pair[1]]))
    return merges
