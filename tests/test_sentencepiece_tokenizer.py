"""Sentencepiece vocabularies with added tokens: the ids are those of transformers' LlamaTokenizer."""

import json
import re
import shutil

import pytest
from conftest import examples
from hypothesis import example, given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from llama import Tokenizer
from llama.errors import CheckpointError
from llama.vocab import SentencePieceTokenizer
from llama.vocab.protobuf import bytes_field, float_field
from llama.vocab.sentencepiece_proto import PIECES, SCORE, TEXT
from llama.vocab.tokenizer_config import TokenizerConfig

CONFIG = {"tokenizer_class": "LlamaTokenizer"}
CONTENTS = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<pad>"]


def added_tokens_decoder(first_id: int) -> dict:
    """`CONTENTS` with ids from `first_id`, those of `<think>` not special, after the model's own tokens."""
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    own = {str(i): flags | {"content": content, "special": True} for i, content in enumerate(["<unk>", "<s>", "</s>"])}
    own["2"] = own["2"] | {"rstrip": True}  # as Zephyr's
    added = {
        str(first_id + i): flags | {"content": content, "special": "think" not in content}
        for i, content in enumerate(CONTENTS)
    }
    return own | added


@pytest.fixture(scope="module")
def piece_path(tmp_path_factory):
    """A model with a user-defined piece, <tool>, and a control piece, <ctl>, of its own."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "text").write_text("the house is in the other house, and the user asks\n" * 30)
    SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=310,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<tool>"],
        control_symbols=["<ctl>"],
        minloglevel=2,
    )
    return folder / "tokenizer.model"


CONFIGS = {
    "nothing added": CONFIG,
    "legacy": CONFIG | {"legacy": True},
    "no prefix": CONFIG | {"add_prefix_space": False},
    "added": CONFIG | {"added_tokens_decoder": ..., "legacy": False, "eos_token": "<|im_end|>"},
    "added, legacy": CONFIG | {"added_tokens_decoder": ..., "legacy": True},
    "no class": {"added_tokens_decoder": ...},
    "no class, not legacy": {"added_tokens_decoder": ..., "legacy": False},
    "Code Llama": {"tokenizer_class": "CodeLlamaTokenizerFast", "added_tokens_decoder": ..., "legacy": True},
    "added, no prefix": CONFIG | {"added_tokens_decoder": ..., "add_prefix_space": False},
}


# Without a class, transformers lets user-defined pieces be part of a text: these are tried with the other model only.
FOLDERS = [("llama2", name) for name in CONFIGS]
FOLDERS += [("pieces", name) for name, config in CONFIGS.items() if "tokenizer_class" in config]

# transformers adds them for Code Llama, whether or not the model has them.
INFILLING = {"▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>", "<FILL_ME>"}


@pytest.fixture(scope="module", params=FOLDERS, ids=" ".join)
def folder(request, llama2_path, piece_path, tmp_path_factory):
    """A folder with a tokenizer.model and a tokenizer_config.json."""
    model, name = request.param
    model_path = llama2_path if model == "llama2" else piece_path
    return write_folder(tmp_path_factory.mktemp("folder"), model_path, CONFIGS[name])


def write_folder(folder, model_path, config):
    shutil.copy(model_path, folder / "tokenizer.model")
    first_id = SentencePieceProcessor(model_file=str(model_path)).vocab_size()
    config = {key: added_tokens_decoder(first_id) if value is ... else value for key, value in config.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    return Tokenizer(folder / "tokenizer.model")


@pytest.fixture(scope="module")
def theirs(folder):
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder)


pieces = st.sampled_from(
    [*CONTENTS, "<s>", "</s>", "<unk>", "<tool>", "<ctl>", " ", "  ", "\n", "▁", "the", " house", "é", "🙂", "x"]
)
texts = st.lists(pieces, max_size=10).map("".join) | st.text(max_size=12)


@examples(400)
@given(texts)
@example(" the</s>  the<s>▁the<think> <think>")
def test_parts_are_encoded_as_transformers_encodes_them(ours, theirs, text):
    assert ours.engine.encode_parts(ours.engine.split(text)) == theirs.encode(text, add_special_tokens=False)


def test_tokens_are_those_of_transformers(ours, theirs):
    assert ours.engine.template_tokens == {
        name: content for name, content in theirs.special_tokens_map.items() if content not in INFILLING
    }
    assert {t.content: (t.id, t.special) for t in ours.engine.added_tokens} == {
        t.content: (i, t.special) for i, t in theirs.added_tokens_decoder.items() if t.content not in INFILLING
    }
    assert ours.n_words == 1 + max(i for content, i in theirs.get_vocab().items() if content not in INFILLING)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)


@examples(300)
@given(st.text(max_size=30) | st.text("the house▁ \n🙂", max_size=30))
def test_a_text_without_added_tokens_is_encoded_as_sentencepiece_encodes_it(folder, ours, text):
    proto = (folder / "tokenizer.model").read_bytes()
    if "add_prefix_space" in json.loads((folder / "tokenizer_config.json").read_text()):
        proto += b"\x1a\x02\x18\x00"  # normalizer_spec { add_dummy_prefix: false }
    engine = SentencePieceProcessor(model_proto=proto)
    ids = ours.encode(text, bos=False, eos=False)
    assert ids == engine.encode(text)
    assert ours.decode(ids) == engine.decode(ids)


@examples(300)
@given(texts)
def test_tokens_that_are_not_special_are_recognised_in_every_text(ours, theirs, text):
    ids = ours.encode(text, bos=False, eos=False)
    if any(token.content in text for token in ours.engine.added_tokens if not token.special):
        assert ids == theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
    special_ids = {token.id for token in ours.engine.added_tokens if token.special}
    assert not special_ids & set(ids)


@examples(300)
@given(texts)
def test_round_trip(ours, text):
    """But for spaces that the ids don't tell: of leading ones, and with `legacy` of those after an added token."""
    text = text.replace("▁", " ").strip(" ")
    if ours.engine.legacy and not ours.engine.doubles_space:
        text = re.sub("> +", ">", text)
    for allowed in ((), "all") if ours.special_tokens else ((),):
        assert ours.decode(ours.encode(text, bos=False, eos=False, allowed_special=allowed)) == text


@examples(300)
@given(texts)
def test_no_added_token_is_recognised_within_parts(ours, text):
    ids = ours.engine.encode_parts([text])
    assert not {token.id for token in ours.engine.added_tokens} & set(ids)


def test_a_continued_text_gets_no_space(llama2_path, tmp_path):
    tokenizer = Tokenizer(write_folder(tmp_path, llama2_path, CONFIGS["added, legacy"]) / "tokenizer.model")
    start, the, no_space = tokenizer.engine.split("<|im_start|>")[0], tokenizer.encode("the", False, False), [260]
    assert tokenizer.engine.encode_parts(["the", start, "the"]) == [*the, start, *the]
    assert tokenizer.engine.encode_parts(["the", start, "the"], continued=True) == [*no_space, start, *the]
    assert tokenizer.engine.encode_parts([start, "the"], continued=True) == [start, *the]


def test_special_tokens_are_recognised_if_allowed(llama2_path, tmp_path):
    tokenizer = Tokenizer(write_folder(tmp_path, llama2_path, CONFIGS["added"]) / "tokenizer.model")
    assert tokenizer.special_tokens == {"<|im_start|>": 320, "<|im_end|>": 321, "<pad>": 324}
    text = "the<|im_end|> the<pad></s>"
    ids = tokenizer.encode(text, bos=True, eos=True, allowed_special={"<|im_end|>"})
    assert [i for i in ids if i >= 320] == [321, 321]
    assert tokenizer.decode(ids) == "the<|im_end|> the<pad></s><|im_end|>"
    assert tokenizer.decode([1, 261, 2]) == "the"  # the model's own control tokens have no text
    assert [tokenizer.token_text(i) for i in (1, 13, 261, 321)] == ["<s>", "\n", " the", "<|im_end|>"]
    with pytest.raises(ValueError, match="contains '<pad>', which disallowed_special forbids"):
        tokenizer.encode(text, bos=False, eos=False, allowed_special={"<|im_end|>"}, disallowed_special="all")


def test_user_defined_pieces_that_a_file_calls_special(piece_path, tmp_path):
    """As <|im_start|> of Yi: sentencepiece by itself recognises them in every text."""
    shutil.copy(piece_path, tmp_path)
    own = Tokenizer(tmp_path / "tokenizer.model")
    tool = own.engine.split("<tool>")[0]
    assert own.special_tokens == {}
    assert own.encode("the<tool>", bos=False, eos=False) == SentencePieceProcessor(model_file=str(piece_path)).encode(
        "the<tool>"
    )
    flags = {"content": "<tool>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {str(tool): flags}}))
    tokenizer = Tokenizer(tmp_path / "tokenizer.model")
    assert tokenizer.special_tokens == {"<tool>": tool}
    assert tool not in tokenizer.encode("the<tool>", bos=False, eos=False)
    assert tokenizer.encode("the<tool>", bos=False, eos=False, allowed_special="all")[-1] == tool
    assert tokenizer.decode([261, tool]).endswith("<tool>")


METASPACE = {"type": "Metaspace", "replacement": "▁", "split": False}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
SPACES = {
    "Metaspace, always": {"pre_tokenizer": METASPACE | {"prepend_scheme": "always"}},
    "Metaspace, first": {"pre_tokenizer": METASPACE | {"prepend_scheme": "first"}},
    "Metaspace, never": {"pre_tokenizer": METASPACE | {"prepend_scheme": "never"}},
    "Prepend": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, REPLACE]}},
}


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("steps", SPACES.values(), ids=SPACES)
def test_a_tokenizer_json_beside_it(llama2_path, tmp_path, steps, kind):
    """It tells what is put before a text, if the class is none of sentencepiece's; and of added tokens."""
    import transformers

    folder = write_folder(tmp_path, llama2_path, CONFIG)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.add_tokens(
        [transformers.AddedToken("<think>", normalized=False), transformers.AddedToken("<x>", special=True)]
    )
    values = json.loads(theirs.backend_tokenizer.to_str()) | {"pre_tokenizer": None, "normalizer": None} | steps
    (folder / "tokenizer.json").write_text(json.dumps(values))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind} | names))
    ours, theirs = Tokenizer(folder / "tokenizer.model"), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.special_tokens == {"<x>": 321}
    for text in ("the", " the", "<s>the<s> the<s>", "<think>a <x>  a<think><think>\n", ""):
        assert ours.engine.encode_parts(ours.engine.split(text)) == theirs.encode(text, add_special_tokens=False)


def test_ends_of_a_text_must_be_tokens(llama2_path, tmp_path):
    shutil.copy(llama2_path, tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 320]}')
    with pytest.raises(ValueError, match=r"not all the ids that end a text, \[2, 320\], are among its 320 tokens"):
        Tokenizer(tmp_path / "tokenizer.model")


@examples(200)
@given(st.data())
def test_damaged_models_are_refused(piece_path, data):
    content = bytearray(piece_path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(0, len(content))) :]
    try:
        tokenizer = SentencePieceTokenizer(bytes(content), piece_path, TokenizerConfig())
        tokenizer.decode(tokenizer.encode("the<tool> house", (), ()))
    except CheckpointError:
        pass


def test_pieces_that_are_no_text(tmp_path, llama2_path):
    """sentencepiece loads them, and fails where a piece is asked for."""
    proto = llama2_path.read_bytes()
    piece = bytes_field(PIECES, bytes_field(TEXT, b"\xff\xfe") + float_field(SCORE, -1000.0))
    path = tmp_path / "tokenizer.model"
    path.write_bytes(proto + piece)
    SentencePieceProcessor(model_file=str(path))
    with pytest.raises(CheckpointError, match=rf"{path}: its pieces are not all texts in UTF-8: "):
        Tokenizer(path)


def test_a_model_without_a_token_that_ends_a_text(tmp_path, llama2_path):
    """Nothing could end an answer, nor an example to learn from; unless a file beside it names a token that does."""
    (tmp_path / "text").write_text("the house is in the other house, and the user asks\n" * 3)
    path = tmp_path / "tokenizer.model"
    SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(path.with_suffix("")),
        model_type="bpe",
        vocab_size=290,
        byte_fallback=True,
        eos_id=-1,
        minloglevel=2,
    )
    with pytest.raises(CheckpointError, match=rf"{path} has no token that ends a text: .*tokenizer_config\.json"):
        Tokenizer(path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<s>"}))
    assert Tokenizer(path).eos_id == 1
