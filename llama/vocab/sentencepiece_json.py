"""Hugging Face's `tokenizer.json` of the Llama 2 family: a sentencepiece model's pieces, and how they merge."""

from typing import Any

from llama.errors import CheckpointError
from llama.files import Metadata
from llama.vocab.sentencepiece_proto import (
    BOS,
    BYTE,
    CONTROL,
    EOS,
    NORMAL,
    SPACE,
    UNK,
    UNKNOWN,
    USER_DEFINED,
    model_proto,
)
from llama.vocab.tokenizer_config import read_added_tokens
from llama.vocab.vocabulary import without_surrogates

ADVICE = "put the model's own tokenizer.model beside it, or pass that as tokenizer_path"

# Of the tokens, since all the ways to cut each in two are looked at. Those of 256,000 tokens have 2 million characters.
MAX_CHARACTERS = 2**22
MAX_LENGTH = 512

BYTES = {f"<0x{byte:02X}>" for byte in range(256)}


def is_sentencepiece_json(file: Metadata) -> bool:
    """Whether a `tokenizer.json` is of sentencepiece's kind: characters without a token are split into bytes."""
    model = Metadata(file.path, file.get("model", dict))
    return model.get("type", str, "BPE") == "BPE" and model.get("byte_fallback", bool, False)


def json_sentencepiece_proto(file: Metadata) -> bytes:
    """The serialized ModelProto of the sentencepiece model in a `tokenizer.json`.

    Hugging Face's byte-pair encoding merges pairs in the order of a list, sentencepiece's by the score of what they
    make. These are the same if the pairs that make a token stand together, and no possible pair is missing.

    Raises:
        CheckpointError: a damaged file, or one that can't be expressed as a sentencepiece model; the message says why.
    """
    path = file.path
    model = Metadata(path, file.get("model", dict))
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout", "ignore_merges"):
        if model.values.get(key):
            raise CheckpointError(f"{path}: {key} is {model.values[key]!r:.80}, which is not supported; {ADVICE}")
    if not _only_replaces_spaces(file.values.get("normalizer"), file.values.get("pre_tokenizer")):
        raise CheckpointError(
            f"{path}: its normalizer or pre_tokenizer does more than replace spaces, which is not supported; {ADVICE}"
        )
    vocabulary = model.get("vocab", dict)
    by_id = {i: token for token, i in vocabulary.items() if type(i) is int}
    valid = all(token and token == without_surrogates(token) for token in vocabulary)
    if not valid or by_id.keys() != set(range(len(vocabulary))):
        raise CheckpointError(f"{path}: its {len(vocabulary)} tokens are not texts with the ids 0, 1, 2 and so on")
    tokens = [by_id[i] for i in range(len(by_id))]
    missing = ({UNK, BOS, EOS} | BYTES) - vocabulary.keys()
    if missing:
        raise CheckpointError(
            f"{path}: it has no tokens {sorted(missing)[:8]}, as a tokenizer of Llama 2's kind has; {ADVICE}"
        )

    types = [BYTE if token in BYTES else NORMAL for token in tokens]
    for token in read_added_tokens(file):
        if token.id < len(tokens) and tokens[token.id] == token.content:
            types[token.id] = CONTROL if token.special else USER_DEFINED
    types[vocabulary[UNK]] = UNKNOWN
    scores = _read_scores(model, {token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL})
    return model_proto(tokens, [scores.get(token, 0.0) for token in tokens], types, vocabulary)


def _read_scores(model: Metadata, tokens: set[str]) -> dict[str, float]:
    """The scores of the tokens that others merge to: those that come first in the list of merges have the highest.

    Args:
        model: what the file says of its model.
        tokens: the ordinary tokens.
    """
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", list)]
    if sum(map(len, tokens)) > MAX_CHARACTERS or max(map(len, tokens), default=0) > MAX_LENGTH:
        raise CheckpointError(f"{model.path}: its tokens are too many or too long; {ADVICE}")
    scores: dict[str, float] = {}
    last = None
    listed = set()
    for merge in merges:
        if not isinstance(merge, list) or len(merge) != 2 or not all(part in tokens for part in map(str, merge)):
            raise CheckpointError(f"{model.path}: the merge {merge!r:.80} is not a pair of tokens")
        left, right = merge
        token = left + right
        if token not in tokens or (token in scores and token != last):
            raise CheckpointError(
                f"{model.path}: the merge {merge!r:.80} is out of order, which is not supported; {ADVICE}"
            )
        scores[token] = -float(len(scores) - (token == last))
        last = token
        listed.add((left, right))
    for token in tokens:
        pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        possible = {pair for pair in pairs if all(part in tokens or len(part) == 1 for part in pair)}
        if not possible <= listed:
            missing = sorted(possible - listed)
            raise CheckpointError(
                f"{model.path}: no merge is listed for {missing[:4]}, which make a token, and that is not supported; "
                f"{ADVICE}"
            )
    return scores


def _only_replaces_spaces(normalizer: Any, pre_tokenizer: Any) -> bool:
    """Whether all that is done to a text before it is encoded is to put "▁" for spaces, and one before it."""
    steps = normalizer.get("normalizers", [normalizer]) if isinstance(normalizer, dict) else []
    replaces_spaces = isinstance(pre_tokenizer, dict)
    if pre_tokenizer is not None and pre_tokenizer != {
        "type": "Metaspace",
        "replacement": SPACE,
        "prepend_scheme": pre_tokenizer.get("prepend_scheme") if isinstance(pre_tokenizer, dict) else None,
        "split": False,
    }:
        return False
    for step in steps:
        if step == {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}:
            replaces_spaces = True
        elif step != {"type": "Prepend", "prepend": SPACE}:
            return False
    return replaces_spaces and (normalizer is None or isinstance(normalizer, dict))
