"""Tokenizers that `save_checkpoint` writes: all that is known of them survives, here and in transformers."""

import json
import random
import shutil

import jinja2
import pytest
from chat_templates import STYLES, random_content, random_dialog, write_folder, write_gguf_tokenizer
from conftest import write_tokenizer_json

from llama import ChatFormat, Tokenizer
from llama.checkpoint.save import write_tokenizer
from llama.vocab.pre_tokenizer import write_pre_tokenizer
from llama.vocab.split_steps import DEEPSEEK_LLM_STEPS

ATTRIBUTES = ("bos_id", "eos_id", "added_tokens", "special_tokens", "n_words", "add_bos", "template_tokens")
ATTRIBUTES += ("chat_template",)


def write_and_read(folder, layout, tokenizer):
    """What comes of a tokenizer that is written in a layout."""
    folder.mkdir()
    if layout == "meta":
        (folder / "params.json").write_text("{}")
    write_tokenizer(folder, layout, tokenizer, set())
    json_path = folder / "tokenizer.json"
    return Tokenizer(json_path if json_path.exists() else folder / "tokenizer.model")


@pytest.mark.parametrize("source", ["tokenizer_config.json", "chat_template.jinja", "gguf"])
@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_a_tokenizer_with_a_chat_template_in_every_layout(tmp_path, style, source):
    """From Hugging Face's layout or GGUF to Meta's, from there to Hugging Face's and into transformers."""
    import transformers

    if source == "gguf":
        original = Tokenizer(write_gguf_tokenizer(tmp_path, style))
    else:
        original = Tokenizer(write_folder(tmp_path / "original", style, source))
    in_meta = write_and_read(tmp_path / "meta", "meta", original)
    in_hf = write_and_read(tmp_path / "hf", "hf", in_meta)
    for tokenizer in (in_meta, in_hf):
        for name in ATTRIBUTES:
            assert getattr(tokenizer.engine, name) == getattr(original.engine, name), name
        assert tokenizer.stop_tokens == original.stop_tokens
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    generator = random.Random(0)
    texts = [random_content(generator) + "".join(style.special + style.ordinary) for _ in range(20)]
    for text in texts:
        expected = original.encode(text, bos=False, eos=False)
        assert in_meta.encode(text, bos=False, eos=False) == in_hf.encode(text, bos=False, eos=False) == expected
        parts = original.engine.encode_parts(original.engine.split(text))
        assert theirs.encode(text, add_special_tokens=False) == parts
    for _ in range(5):
        dialog = random_dialog(generator, 2)
        try:
            expected = theirs.apply_chat_template(dialog, add_generation_prompt=True, return_dict=False)
        except jinja2.TemplateError:
            continue
        assert ChatFormat(in_hf).encode_dialog_prompt(dialog) == expected
        if original.engine.chat_template:
            assert ChatFormat(original).encode_dialog_prompt(dialog) == expected


def test_flags_and_split_steps_survive(tmp_path):
    import transformers

    write_tokenizer_json(tmp_path)
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    values["pre_tokenizer"] = write_pre_tokenizer(DEEPSEEK_LLM_STEPS)
    values["added_tokens"][-1] |= {"content": "<think>", "special": False, "lstrip": True, "normalized": True}
    values["added_tokens"][-2] |= {"content": "<x>", "rstrip": True, "single_word": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    original = Tokenizer(tmp_path / "tokenizer.json")
    in_meta = write_and_read(tmp_path / "meta", "meta", original)
    in_hf = write_and_read(tmp_path / "hf", "hf", in_meta)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for tokenizer in (in_meta, in_hf):
        assert tokenizer.engine.added_tokens == original.engine.added_tokens
        assert tokenizer.vocabulary.split_steps == DEEPSEEK_LLM_STEPS
    for text in ("a <think> the 12中文 <x>  b", "a<x>b <think><think>\r\n  ."):
        ids = original.encode(text, bos=False, eos=False, allowed_special="all")
        assert ids == in_meta.encode(text, bos=False, eos=False, allowed_special="all")
        assert ids == theirs.encode(text, add_special_tokens=False)


SENTENCEPIECE_CONFIGS = [{}, {"legacy": True}, {"add_prefix_space": False}, {"unk_token": None}]
SENTENCEPIECE_CONFIGS += [{"tokenizer_class": "PreTrainedTokenizerFast"}, {"tokenizer_class": "X", "legacy": False}]


@pytest.mark.parametrize("config", SENTENCEPIECE_CONFIGS)
def test_what_is_said_of_a_sentencepiece_model_survives(tmp_path, llama2_path, config):
    import transformers

    shutil.copy(llama2_path, tmp_path)
    flags = {"lstrip": False, "rstrip": True, "single_word": False, "normalized": False}
    added = {"2": {"content": "</s>", "special": True}, "320": {"content": "<|end|>", "special": True}}
    added["321"] = {"content": "<think>", "special": False}
    config = {"tokenizer_class": "LlamaTokenizer", "pad_token": "<|end|>", "eos_token": "<|end|>"} | config
    config["added_tokens_decoder"] = {i: flags | token for i, token in added.items()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 320]}')
    original = Tokenizer(tmp_path / "tokenizer.model")
    in_meta = write_and_read(tmp_path / "meta", "meta", original)
    in_hf = write_and_read(tmp_path / "hf", "hf", in_meta)
    for tokenizer in (in_meta, in_hf):
        for name in (*ATTRIBUTES, "legacy", "doubles_space", "add_prefix_space", "stop_tokens"):
            assert getattr(tokenizer.engine, name) == getattr(original.engine, name), name
    before, after = map(transformers.AutoTokenizer.from_pretrained, (tmp_path, tmp_path / "hf"))
    for text in ("the house <|end|> in", "<think> x</s>  the<unk>the", " the", "the"):
        ids = before.encode(text, add_special_tokens=False)
        assert after.encode(text, add_special_tokens=False) == ids
        assert in_meta.engine.encode_parts(in_meta.engine.split(text)) == ids
    assert before.special_tokens_map == after.special_tokens_map


def test_a_sentencepiece_model_of_metas_layout_stays_alone(tmp_path, llama2_path):
    shutil.copy(llama2_path, tmp_path)
    (tmp_path / "params.json").write_text("{}")
    original = Tokenizer(tmp_path / "tokenizer.model")
    write_and_read(tmp_path / "meta", "meta", original)
    assert sorted(path.name for path in (tmp_path / "meta").iterdir()) == ["params.json", "tokenizer.model"]
    assert (tmp_path / "meta" / "tokenizer.model").read_bytes() == llama2_path.read_bytes()
    in_hf = write_and_read(tmp_path / "hf", "hf", original)
    write_and_read(tmp_path / "again", "meta", in_hf)
    assert not (tmp_path / "again" / "tokenizer_config.json").exists()


def test_tokens_that_are_not_special_in_metas_layout(tmp_path, llama2_path):
    """tokenizer.model alone can't express them."""
    think = {"content": "<think>", "special": False, "normalized": False}
    (tmp_path / "json").mkdir()
    write_tokenizer_json(tmp_path / "json", ("end_of_text", "eot_id"))
    config = {"bos_token": "<|begin_of_text|>", "added_tokens_decoder": {"524": think}}
    (tmp_path / "json" / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "pieces").mkdir()
    shutil.copy(llama2_path, tmp_path / "pieces")
    config = {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": {"320": think}}
    (tmp_path / "pieces" / "tokenizer_config.json").write_text(json.dumps(config))
    for name, file in (("json", "tokenizer.json"), ("pieces", "tokenizer.model")):
        original = Tokenizer(tmp_path / name / file)
        written = write_and_read(tmp_path / f"{name} in meta", "meta", original)
        assert written.engine.split("the<think>") == ["the", original.n_words - 1]
        assert written.engine.added_tokens == original.engine.added_tokens
