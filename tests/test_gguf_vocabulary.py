"""Tokenizers in GGUF files are those of the folders they were converted from."""

import json
import re

import pytest
import transformers
from conftest import tiny_model, write_gguf
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from test_sentencepiece_proto import CONTROL, TEXTS, UNUSED, USER_DEFINED, as_converted, train  # noqa: F401 - a fixture

from llama import Llama, Tokenizer
from llama.chat_format import ChatFormat
from llama.errors import CheckpointError
from llama.vocab import AddedToken
from llama.vocab.split_steps import SMOLLM_STEPS

TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
DIALOG = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi </s><|im_end|><think> 🙂\n\n  there"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": " <s>"},
]


@pytest.fixture(scope="module")
def original(train) -> ModelProto:  # noqa: F811
    return train()


def write(folder, original, model=None, **changes):
    """A GGUF file of a tiny model with a sentencepiece vocabulary."""
    metadata = {f"tokenizer.ggml.{key}": value for key, value in as_converted(original).items()}
    folder.mkdir(exist_ok=True)
    return write_gguf(folder / "model.gguf", model or tiny_model(n_layers=1), **metadata | changes)


def with_more(original, added: dict[str, int]) -> dict:
    """The metadata of a vocabulary with more tokens, given with their types."""
    metadata = as_converted(original)
    return {
        "tokenizer.ggml.tokens": metadata["tokens"] + list(added),
        "tokenizer.ggml.token_type": metadata["token_type"] + list(added.values()),
        "tokenizer.ggml.scores": metadata["scores"] + [-1000.0] * len(added),
    }


def test_a_sentencepiece_vocabulary(tmp_path, original):
    expected = SentencePieceProcessor(model_proto=original.SerializeToString())
    tokenizer = Tokenizer(write(tmp_path, original))
    for text in TEXTS:
        ids = tokenizer.encode(text, bos=False, eos=False)
        assert ids == expected.encode(text)
        assert tokenizer.decode(ids) == expected.decode(ids)
    assert tokenizer.encode("a", bos=True, eos=True) == [1, *expected.encode("a"), 2]
    assert (tokenizer.n_words, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (800, 1, 2, -1)
    assert (tokenizer.stop_tokens, tokenizer.special_tokens, tokenizer.add_bos) == ({2}, {}, True)
    without = {"tokenizer.ggml.bos_token_id": ..., "tokenizer.ggml.eos_token_id": ...}
    ids = Tokenizer(write(tmp_path, original, **without)).encode("a", bos=True, eos=True)
    assert ids == [1, *expected.encode("a"), 2]
    without_bos = {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True}
    assert not Tokenizer(write(tmp_path, original, **without_bos)).add_bos


def test_the_same_as_from_the_folder(tmp_path, original):
    """Added tokens, named tokens, chat template: GGUF metadata say the same as the files in Hugging Face's layout."""
    added = {"<|im_start|>": CONTROL, "<|im_end|>": CONTROL, "<think>": USER_DEFINED, "<pad>": CONTROL}
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(original.SerializeToString())
    entries = {i: {"content": name, "special": True} for i, name in enumerate(["<unk>", "<s>", "</s>"])}
    entries |= {800 + i: {"content": name, "special": kind == CONTROL} for i, (name, kind) in enumerate(added.items())}
    config = {"added_tokens_decoder": {str(i): entry | {"normalized": False} for i, entry in entries.items()}}
    config |= {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>", "pad_token": "<pad>"}
    config |= {"chat_template": TEMPLATE, "tokenizer_class": "LlamaTokenizer", "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 801]}))
    path = write(
        tmp_path / "gguf",
        original,
        **with_more(original, added),
        **{
            "tokenizer.ggml.eos_token_id": 801,
            "tokenizer.ggml.eot_token_id": 2,
            "tokenizer.ggml.padding_token_id": 803,
            "tokenizer.chat_template": TEMPLATE,
        },
    )
    ours, expected = Tokenizer(path), Tokenizer(folder / "tokenizer.model")
    assert ours.special_tokens == {"<|im_start|>": 800, "<|im_end|>": 801, "<pad>": 803}
    for name in ("n_words", "bos_id", "eos_id", "stop_tokens", "special_tokens", "chat_template", "add_bos"):
        assert getattr(ours, name) == getattr(expected, name), name
    assert ours.engine.template_tokens == expected.engine.template_tokens
    assert ours.engine.added_tokens == expected.engine.added_tokens
    assert ours.engine.chat_template_source == "tokenizer.chat_template"
    for text in ("<s> a<think>b <|im_end|>", "<think>", " <think> <pad>"):
        for allowed in ((), "all"):
            ids = ours.encode(text, bos=False, eos=False, allowed_special=allowed)
            assert ids == expected.encode(text, bos=False, eos=False, allowed_special=allowed)
            assert (802 in ids, 801 in ids) == (True, allowed == "all" and "<|im_end|>" in text)

    prompt = ChatFormat(ours).encode_dialog_prompt(DIALOG)
    assert prompt == ChatFormat(expected).encode_dialog_prompt(DIALOG)
    assert (prompt.count(801), 2 in prompt, 1 in prompt) == (4, False, False)
    innocent = [{"role": message["role"], "content": re.sub("<.*?>", "", message["content"])} for message in DIALOG]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert ChatFormat(ours).encode_dialog_prompt(innocent) == theirs.apply_chat_template(
        innocent, add_generation_prompt=True, return_dict=False
    )


def test_a_chat_from_a_file_with_a_sentencepiece_vocabulary(tmp_path, original):
    path = write(tmp_path, original, tiny_model(vocab_size=800), **{"tokenizer.chat_template": TEMPLATE})
    llama = Llama.build(path, None, 96, 1, device="cpu")
    answer = llama.chat_completion([[{"role": "user", "content": "Hi"}]], temperature=0, max_gen_len=4, logprobs=True)
    assert len(answer[0]["tokens"]) == 4
    plain = Llama.build(write(tmp_path, original, tiny_model(vocab_size=800)), None, 96, 1, device="cpu")
    assert type(plain.formatter).__name__ == "Llama2Format"


def test_padding_up_to_the_size_of_the_embedding(tmp_path, original):
    path = write(tmp_path, original, **with_more(original, {f"[PAD{i}]": UNUSED for i in range(800, 832)}))
    tokenizer = Tokenizer(path)
    assert tokenizer.n_words == 832
    assert tokenizer.special_tokens == {}
    assert max(tokenizer.encode("[PAD831]", bos=False, eos=False)) < 800
    assert tokenizer.token_text(831) == "[PAD831]"


def test_what_a_byte_level_vocabulary_says(tmp_path):
    metadata = {"tokenizer.chat_template": "{{ bos_token }}", "tokenizer.ggml.bos_token_id": 0}
    metadata |= {"tokenizer.ggml.unknown_token_id": 2**31, "tokenizer.ggml.padding_token_id": 261}
    engine = Tokenizer(write_gguf(tmp_path / "model.gguf", tiny_model(), **metadata)).engine
    named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|reserved_1|>"}
    assert engine.template_tokens == named
    assert (engine.chat_template, engine.chat_template_source) == ("{{ bos_token }}", "tokenizer.chat_template")
    without = Tokenizer(write_gguf(tmp_path / "model.gguf", tiny_model())).engine
    assert without.template_tokens == {"eos_token": "<|im_end|>"}
    assert (without.chat_template, without.chat_template_source) == (None, None)


@pytest.mark.parametrize(("kind", "special"), [(CONTROL, True), (USER_DEFINED, False), (UNUSED, True)])
def test_added_tokens_of_a_byte_level_vocabulary(tmp_path, kind, special):
    types = [3] * 2 + [1] * 258 + [kind] + [3] * 59
    path = write_gguf(tmp_path / "model.gguf", tiny_model(), **{"tokenizer.ggml.token_type": types})
    tokenizer = Tokenizer(path)
    assert AddedToken("<|reserved_0|>", 260, special=special) in tokenizer.engine.added_tokens
    assert len(tokenizer.engine.added_tokens) == 62
    assert ("<|reserved_0|>" in tokenizer.special_tokens) == special
    assert (260 in tokenizer.encode("a<|reserved_0|>", bos=False, eos=False)) == (not special)


@pytest.mark.parametrize("pre", ["smollm", "starcoder", "refact"])
def test_pre_tokenizers_that_split_off_each_digit(tmp_path, pre):
    """Their tokenizer.json has Digits(individual_digits) and then ByteLevel."""
    path = write_gguf(tmp_path / "model.gguf", tiny_model(), **{"tokenizer.ggml.pre": pre})
    assert Tokenizer(path).vocabulary.split_steps == SMOLLM_STEPS


@pytest.mark.parametrize("end", ["eos", "eot", "eom"])
@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level"])
def test_every_id_that_ends_a_text(tmp_path, original, kind, end):
    def write_file(ids):
        metadata = {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items()}
        if kind == "sentencepiece":
            return write(tmp_path, original, **metadata)
        return write_gguf(tmp_path / "model.gguf", tiny_model(), **metadata)

    ids = {"eos": 4, "eot": 5, "eom": 6}
    assert {4, 5, 6} <= Tokenizer(write_file(ids)).stop_tokens
    with pytest.raises(CheckpointError, match=r"model\.gguf: .*9999.* (is not one of|are among)"):
        Tokenizer(write_file(ids | {end: 9999}))
