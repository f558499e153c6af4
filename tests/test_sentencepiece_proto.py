"""Sentencepiece vocabularies in GGUF files: the ids are those of the model they were converted from."""

import random

import pytest
from conftest import ROOT, tiny_model, write_gguf
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from llama.errors import CheckpointError
from llama.gguf_file import GGUFFile
from llama.vocab.sentencepiece_proto import gguf_sentencepiece_proto

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

FRAGMENTS = [
    *("the", " model", "token", "s", "Llama", " checkpoint", "ing", "12", "3.14", ".", ",", "!", "(", "'s", "x" * 40),
    *(" ", "  ", " " * 9, "\t", "\n", "\r\n", "\n\n", "\u00a0", "\u3000", "▁", "▁▁", "\x00", "\x07", "\u200b"),
    *("é", "ß", "İ", "ﬁ", "中文", "こんにちは", "עברית", "🙂", "👩‍👩‍👧", "e\u0301", "Ａ", "½", "\U00010348", "\ufffd"),
    *("<s>", "</s>", "<unk>", "<0x41>", "<tool>", "<think>", "<pad>", "[PAD900]"),
]


def random_texts(count: int = 2000) -> list[str]:
    """Each fragment, and sequences of fragments and of pieces of the README."""
    generator = random.Random(0)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    texts = ["", *FRAGMENTS, *(f" {fragment} " for fragment in FRAGMENTS)]
    while len(texts) < count:
        starts = generator.choices(range(len(readme)), k=6)
        fragments = [readme[start : start + generator.randint(1, 40)] for start in starts]
        texts.append("".join(generator.choices(FRAGMENTS + fragments * 8, k=generator.randint(1, 12))))
    return texts


TEXTS = random_texts()

MODELS = {
    "Llama 2's settings": {},
    "no byte fallback": {"byte_fallback": False},
    "no space before a text": {"add_dummy_prefix": False},
    "extra spaces removed": {"remove_extra_whitespaces": True},
    "user-defined, control and padding pieces": {
        "user_defined_symbols": ["<tool>", "<think>", "▁▁▁"],
        "control_symbols": ["<ctl>"],
        "pad_id": 3,
        "pad_piece": "<pad>",
    },
    "special pieces of other ids and names": {
        **{"unk_id": 2, "bos_id": 0, "eos_id": 1},
        **{"unk_piece": "[UNK]", "bos_piece": "[BOS]", "eos_piece": "[EOS]"},
    },
}


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Trains a sentencepiece model on this project's README."""

    def train_model(**options) -> ModelProto:
        path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer"
        settings = {"model_type": "bpe", "vocab_size": 800, "byte_fallback": True, "minloglevel": 2}
        settings |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
        SentencePieceTrainer.train(input=ROOT / "README.md", model_prefix=path, **settings | options)
        return ModelProto.FromString(path.with_suffix(".model").read_bytes())

    return train_model


@pytest.fixture(scope="module")
def original(train) -> ModelProto:
    return train(**MODELS["user-defined, control and padding pieces"])


def as_converted(original: ModelProto) -> dict:
    """What llama.cpp's converter writes for a sentencepiece model, by the last part of the metadata's keys."""
    processor = SentencePieceProcessor(model_proto=original.SerializeToString())
    return {
        "model": "llama",
        "pre": "default",
        "tokens": [piece.piece for piece in original.pieces],
        "scores": [piece.score for piece in original.pieces],
        "token_type": [piece.type for piece in original.pieces],
        "merges": ...,
        "bos_token_id": processor.bos_id(),
        "eos_token_id": processor.eos_id(),
        "unknown_token_id": processor.unk_id(),
        "add_bos_token": True,
        "add_space_prefix": original.normalizer_spec.add_dummy_prefix,
        "remove_extra_whitespaces": original.normalizer_spec.remove_extra_whitespaces,
    }


def read_back(folder, metadata) -> SentencePieceProcessor:
    """The sentencepiece model made from a GGUF file with such metadata."""
    keys = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    path = write_gguf(folder / "model.gguf", tiny_model(n_layers=1), **keys)
    return SentencePieceProcessor(model_proto=gguf_sentencepiece_proto(GGUFFile(path)))


def check_the_same(processor: SentencePieceProcessor, original: ModelProto) -> None:
    expected = SentencePieceProcessor(model_proto=original.SerializeToString())
    ids = expected.encode(TEXTS)
    assert len({i for text in ids for i in text}) > 100
    assert processor.encode(TEXTS) == ids
    assert processor.decode(ids) == expected.decode(ids)
    for special_id in ("unk_id", "bos_id", "eos_id"):
        assert getattr(processor, special_id)() == getattr(expected, special_id)()


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_the_ids_are_those_of_the_original(tmp_path, train, options):
    original = train(**options)
    processor = read_back(tmp_path, as_converted(original))
    check_the_same(processor, original)
    copy = ModelProto.FromString(processor.serialized_model_proto())
    pieces = [[(piece.piece, piece.score, piece.type) for piece in proto.pieces] for proto in (copy, original)]
    assert pieces[0] == pieces[1]
    for name in ("model_type", "vocab_size", "byte_fallback"):
        assert getattr(copy.trainer_spec, name) == getattr(original.trainer_spec, name)
    for name in ("unk", "bos", "eos"):
        assert getattr(copy.trainer_spec, f"{name}_id") == getattr(original.trainer_spec, f"{name}_id")
        assert getattr(copy.trainer_spec, f"{name}_piece") == getattr(original.trainer_spec, f"{name}_piece")


def test_unused_pieces(tmp_path, original):
    """They are merged like others, and then taken apart again."""
    used = SentencePieceProcessor(model_proto=original.SerializeToString()).encode(TEXTS)
    changed = ModelProto()
    changed.CopyFrom(original)
    for piece in changed.pieces[300:400]:
        piece.type = UNUSED
    assert SentencePieceProcessor(model_proto=changed.SerializeToString()).encode(TEXTS) != used
    check_the_same(read_back(tmp_path, as_converted(changed)), changed)


def test_padding_up_to_the_size_of_the_embedding(tmp_path, original):
    metadata = as_converted(original)
    metadata["tokens"] += [f"[PAD{i}]" for i in range(900, 932)]
    metadata["scores"] += [-10000.0] * 32
    metadata["token_type"] += [UNUSED] * 32
    processor = read_back(tmp_path, metadata)
    assert processor.vocab_size() == len(original.pieces) + 32
    check_the_same(processor, original)


def test_what_tokenizer_config_json_changes(tmp_path, original):
    """Where it lists tokens, the converter takes special ones for control tokens, the unknown one too, gives them and
    the others another score, and undoes the escaping of spaces."""
    metadata = as_converted(original)
    types = metadata["token_type"]
    assert types[0] == UNKNOWN
    types[0] = CONTROL
    for i, kind in enumerate(types):
        if kind in (CONTROL, USER_DEFINED):
            metadata["scores"][i] = -1000.0
            metadata["tokens"][i] = metadata["tokens"][i].replace("▁", " ")
    assert "   " in metadata["tokens"]
    check_the_same(read_back(tmp_path, metadata), original)
    del metadata["unknown_token_id"]  # by default 0
    check_the_same(read_back(tmp_path, metadata), original)


def test_spaces_in_added_tokens(tmp_path, original):
    """They are escaped only in user-defined pieces, and only if that makes none of the others."""
    metadata = as_converted(original)
    assert "▁the" in metadata["tokens"]
    added = {"<a b>": USER_DEFINED, " the": USER_DEFINED, "<a control>": CONTROL}
    metadata["tokens"] += list(added)
    metadata["token_type"] += added.values()
    metadata["scores"] += [-1000.0] * 3
    processor = read_back(tmp_path, metadata)
    assert [processor.id_to_piece(i) for i in (800, 801, 802)] == ["<a▁b>", " the", "<a control>"]
    assert processor.encode("<a b>")[-1] == 800
    check_the_same(processor, original)


def test_what_metadata_need_not_say(tmp_path, original):
    metadata = as_converted(original)
    for key in ("bos_token_id", "eos_token_id", "unknown_token_id", "add_space_prefix", "remove_extra_whitespaces"):
        del metadata[key]
    check_the_same(read_back(tmp_path, metadata | {"eos_token_id": ...}), original)


def item(values: list, **changes) -> list:
    """A copy of a list with other items at the places `at_3`."""
    changed = list(values)
    for place, value in changes.items():
        changed[int(place.removeprefix("at_"))] = value
    return changed


REFUSED = {
    "fewer scores": (lambda m: {"scores": m["scores"][1:]}, r"800 tokens, 799 scores, 800 token types"),
    "no scores": (lambda m: {"scores": ...}, "lacks 'tokenizer.ggml.scores'"),
    "scores that are texts": (lambda m: {"scores": m["tokens"]}, "the scores of its 800 tokens are not all finite"),
    "a score that is no number": (lambda m: {"scores": item(m["scores"], at_700=float("nan"))}, "not all finite"),
    "an infinite score": (lambda m: {"scores": item(m["scores"], at_700=float("-inf"))}, "not all finite"),
    "the same score for all": (
        lambda m: {"scores": [-1000.0 if len(token) > 1 else 0.0 for token in m["tokens"]]},
        "the same score, -1000.0, .* tokenizer_path",
    ),
    "tokens that are numbers": (lambda m: {"tokens": m["token_type"]}, "tokens are not different texts"),
    "an empty token": (lambda m: {"tokens": item(m["tokens"], at_700="")}, "not different texts, none of them empty"),
    "a token twice": (lambda m: {"tokens": item(m["tokens"], at_700=m["tokens"][701])}, "not different texts"),
    "type 0": (lambda m: {"token_type": item(m["token_type"], at_700=0)}, "its token types are not all from 1 to 6"),
    "type 7": (lambda m: {"token_type": item(m["token_type"], at_700=7)}, "its token types are not all from 1 to 6"),
    "a byte less": (lambda m: {"token_type": item(m["token_type"], at_20=NORMAL)}, "255 tokens for single bytes are"),
    "another name of a byte": (lambda m: {"tokens": item(m["tokens"], at_20="<0x1g>")}, "256 tokens for single bytes"),
    "two unknown tokens": (lambda m: {"token_type": item(m["token_type"], at_700=UNKNOWN)}, "2 tokens are said to be"),
    "BOS outside": (lambda m: {"bos_token_id": 800}, "bos 800 or eos 2 is not one of the 800 tokens"),
    "EOS outside": (lambda m: {"eos_token_id": 2**31}, "bos 1 or eos 2147483648 is not one of the 800 tokens"),
    "unknown outside": (
        lambda m: {"unknown_token_id": 800, "token_type": item(m["token_type"], at_0=CONTROL)},
        "unknown_token_id 800 is not one of the 800 tokens",
    ),
    "normalization": (lambda m: {"precompiled_charsmap": [1, 2, 3]}, "its tokenizer normalizes texts"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_metadata(tmp_path, original, change, message):
    metadata = as_converted(original)
    with pytest.raises(CheckpointError, match=message) as error:
        read_back(tmp_path, metadata | change(metadata))
    assert "model.gguf" in str(error.value)
