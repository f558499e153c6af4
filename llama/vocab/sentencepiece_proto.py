"""Sentencepiece models as the serialized messages that sentencepiece loads: made from their pieces, or changed.

A GGUF file of the kind "llama" holds a sentencepiece model's pieces, but not the model; so may a `tokenizer.json`. The
numbers of fields and types are those of sentencepiece_model.proto, in https://github.com/google/sentencepiece.
"""

from collections.abc import Mapping, Sequence

from llama.errors import CheckpointError
from llama.gguf_file import GGUFFile
from llama.vocab.protobuf import bytes_field, float_field, int_field, read_fields

# Numbers of fields: of ModelProto, of a SentencePiece, and of NormalizerSpec.
PIECES, TRAINER_SPEC, NORMALIZER_SPEC = 1, 2, 3
TEXT, SCORE, TYPE = 1, 2, 3
NORMALIZER_NAME, ADD_DUMMY_PREFIX, REMOVE_EXTRA_WHITESPACES, ESCAPE_WHITESPACES = 1, 3, 4, 5

# Values of `tokenizer.ggml.token_type`, the same as sentencepiece's types of pieces.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# The ids where the metadata name none, as in llama.cpp, or those of added tokens, such as the end of a turn.
UNKNOWN_ID, BOS_ID, EOS_ID = 0, 1, 2
OWN_IDS = range(3)  # sentencepiece's own special pieces come first

# Appended to a serialized ModelProto it replaces what that says.
NO_DUMMY_PREFIX = bytes_field(NORMALIZER_SPEC, int_field(ADD_DUMMY_PREFIX, False))

UNK, BOS, EOS = "<unk>", "<s>", "</s>"

BPE = 2  # a value of TrainerSpec.model_type
MAX_SCORE = 3.4e38
SPACE = "▁"  # by which sentencepiece replaces a space


def gguf_sentencepiece_proto(file: GGUFFile) -> bytes:
    """The serialized ModelProto of a GGUF file's vocabulary of the kind "llama".

    It encodes as the model's original `tokenizer.model` does, if that changes nothing in a text but its spaces.

    Raises:
        CheckpointError: damaged metadata, or a model that changes more, or has no scores; the message says which.
    """
    if file.get("tokenizer.ggml.precompiled_charsmap", list, []):
        raise CheckpointError(f"{file.path}: its tokenizer normalizes texts, which is not supported")
    tokens, scores, types = _read_pieces(file)
    unknown_id = types.index(UNKNOWN)
    bos_id = file.get("tokenizer.ggml.bos_token_id", int, BOS_ID)
    eos_id = file.get("tokenizer.ggml.eos_token_id", int, EOS_ID)
    if not all(0 <= i < len(tokens) for i in (bos_id, eos_id, *OWN_IDS)):
        raise CheckpointError(f"{file.path}: bos {bos_id} or eos {eos_id} is not one of the {len(tokens)} tokens")
    bos_id, eos_id = bos_id if bos_id in OWN_IDS else BOS_ID, eos_id if eos_id in OWN_IDS else EOS_ID

    return model_proto(
        tokens,
        scores,
        types,
        {UNK: unknown_id, BOS: bos_id, EOS: eos_id},
        add_dummy_prefix=file.get("tokenizer.ggml.add_space_prefix", bool, True),
        remove_extra_whitespaces=file.get("tokenizer.ggml.remove_extra_whitespaces", bool, False),
    )


def model_proto(
    tokens: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    ids: Mapping[str, int],
    *,
    add_dummy_prefix: bool = True,
    remove_extra_whitespaces: bool = False,
) -> bytes:
    """A serialized ModelProto of byte-pair encoding.

    Args:
        tokens, scores, types: of each piece. Of two pairs of pieces the one with the higher score merges first.
        ids: of the pieces `<unk>`, `<s>` and `</s>`, whatever they are called.
        add_dummy_prefix: whether a space is put before a text.
        remove_extra_whitespaces: whether only one of several spaces is kept.
    """
    pieces = [
        bytes_field(PIECES, bytes_field(TEXT, token.encode()) + float_field(SCORE, score) + int_field(TYPE, kind))
        for token, score, kind in zip(tokens, scores, types, strict=True)
    ]
    trainer_spec = int_field(3, BPE) + int_field(4, len(tokens)) + int_field(35, BYTE in types)
    for name, (id_field, piece_field) in {UNK: (40, 45), BOS: (41, 46), EOS: (42, 47)}.items():
        trainer_spec += int_field(id_field, ids[name]) + bytes_field(piece_field, tokens[ids[name]].encode())
    normalizer_spec = (
        bytes_field(NORMALIZER_NAME, b"identity")
        + int_field(ADD_DUMMY_PREFIX, add_dummy_prefix)
        + int_field(REMOVE_EXTRA_WHITESPACES, remove_extra_whitespaces)
        + int_field(ESCAPE_WHITESPACES, True)
    )
    return b"".join([*pieces, bytes_field(TRAINER_SPEC, trainer_spec), bytes_field(NORMALIZER_SPEC, normalizer_spec)])


def _read_pieces(file: GGUFFile) -> tuple[list[str], list[float], list[int]]:
    """The texts, scores and types of the pieces, one of which is unknown."""
    path = file.path
    tokens, scores, types = (
        list(file.get(f"tokenizer.ggml.{key}", list)) for key in ("tokens", "scores", "token_type")
    )
    if not len(tokens) == len(scores) == len(types):
        raise CheckpointError(f"{path}: {len(tokens)} tokens, {len(scores)} scores, {len(types)} token types")
    if not all(isinstance(token, str) and token for token in tokens) or len(set(tokens)) < len(tokens):
        raise CheckpointError(f"{path}: its {len(tokens)} tokens are not different texts, none of them empty")
    if not all(isinstance(score, float) and abs(score) < MAX_SCORE for score in scores):
        raise CheckpointError(f"{path}: the scores of its {len(tokens)} tokens are not all finite numbers")
    if not all(type(kind) is int and NORMAL <= kind <= BYTE for kind in types):
        raise CheckpointError(f"{path}: its token types are not all from {NORMAL} to {BYTE}")
    if types.count(UNKNOWN) > 1:
        raise CheckpointError(f"{path}: {types.count(UNKNOWN)} tokens are said to be the unknown one")
    bytes_as_tokens = {token for token, kind in zip(tokens, types, strict=True) if kind == BYTE}
    if bytes_as_tokens and bytes_as_tokens != {f"<0x{byte:02X}>" for byte in range(256)}:
        raise CheckpointError(f"{path}: its {len(bytes_as_tokens)} tokens for single bytes are not <0x00> to <0xFF>")

    merged = [scores[i] for i, token in enumerate(tokens) if types[i] == NORMAL and len(token) > 1]
    if len(merged) > 1 and len(set(merged)) == 1:  # as some converters write them
        raise CheckpointError(
            f"{path}: all merged tokens have the same score, {merged[0]}, so the order of merges is unknown; pass the "
            f"model's own tokenizer.model as tokenizer_path"
        )
    if UNKNOWN not in types:  # converters write CONTROL where tokenizer_config.json calls it special
        unknown_id = file.get("tokenizer.ggml.unknown_token_id", int, UNKNOWN_ID)
        if not 0 <= unknown_id < len(tokens):
            raise CheckpointError(f"{path}: unknown_token_id {unknown_id} is not one of the {len(tokens)} tokens")
        types[unknown_id] = UNKNOWN
    known = set(tokens)
    for i, kind in enumerate(types):
        escaped = tokens[i].replace(" ", SPACE)
        if kind == USER_DEFINED and escaped not in known:  # converters undo the escaping
            tokens[i] = escaped
    return tokens, scores, types


def user_defined_as_control(proto: bytes) -> tuple[bytes, set[int]]:
    """Make a model's user-defined pieces control pieces, which no text is encoded to.

    By itself sentencepiece recognises them in every text. Pieces with spaces are left as they are.

    Args:
        proto: a valid serialized ModelProto.

    Returns:
        The changed model, and the ids of the pieces.
    """
    if bytes([TYPE << 3, USER_DEFINED]) not in proto:
        return proto, set()
    changed: list[bytes] = []
    ids: set[int] = set()
    count = 0
    for number, value, field in read_fields(proto):
        if number == PIECES and isinstance(value, bytes):
            piece = {key: part for key, part, _ in read_fields(value)}
            text = piece.get(TEXT)
            if piece.get(TYPE) == USER_DEFINED and isinstance(text, bytes) and "▁".encode() not in text:
                ids.add(count)
                field = bytes_field(PIECES, value + int_field(TYPE, CONTROL))
            count += 1
        changed.append(field)
    return b"".join(changed), ids
