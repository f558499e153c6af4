"""Sentencepiece vocabularies with added tokens: the ids are those of transformers' LlamaTokenizer."""

import json
import shutil

import pytest
from conftest import examples
from hypothesis import example, given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from llama import Tokenizer

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
    "added, no prefix": CONFIG | {"added_tokens_decoder": ..., "add_prefix_space": False},
}


@pytest.fixture(scope="module", params=["llama2", "pieces"])
def model_path(request, llama2_path, piece_path):
    return llama2_path if request.param == "llama2" else piece_path


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS)
def pair(request, model_path, tmp_path_factory):
    """Our tokenizer and transformers' of a folder with a tokenizer.model and a tokenizer_config.json."""
    import transformers

    folder = tmp_path_factory.mktemp("folder")
    shutil.copy(model_path, folder / "tokenizer.model")
    first_id = SentencePieceProcessor(model_file=str(model_path)).vocab_size()
    config = {key: added_tokens_decoder(first_id) if v is ... else v for key, v in request.param.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(folder / "tokenizer.model"), transformers.AutoTokenizer.from_pretrained(folder)


pieces = st.sampled_from(
    [*CONTENTS, "<s>", "</s>", "<unk>", "<tool>", "<ctl>", " ", "  ", "\n", "▁", "the", " house", "é", "🙂", "x"]
)
texts = st.lists(pieces, max_size=10).map("".join) | st.text(max_size=12)


@examples(400)
@given(texts)
@example(" the</s>  the<s>▁the<think> <think>")
def test_parts_are_encoded_as_transformers_encodes_them(pair, text):
    ours, theirs = pair
    parts = ours._engine.split(text, "all")
    assert ours._engine.encode_parts(parts) == theirs.encode(text, add_special_tokens=False)
    assert ours._engine.template_tokens == theirs.special_tokens_map
    assert {t.content: (t.id, t.special) for t in ours._engine.added_tokens} == {
        t.content: (i, t.special) for i, t in theirs.added_tokens_decoder.items()
    }
