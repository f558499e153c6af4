"""Added tokens: a text is cut at them as Hugging Face's tokenizers cut it."""

import json
import random
import shutil

import pytest
import tokenizers
from conftest import examples, write_llama3_tokenizer, write_tokenizer_json
from hypothesis import example, given
from hypothesis import strategies as st

from llama import Tokenizer
from llama.errors import CheckpointError
from llama.vocab.added_tokens import AddedToken, AddedTokenSplitter

LETTERS = "ab_<> \n\u3000\u00e9-"
contents = st.text(LETTERS, min_size=1, max_size=4)
flags = st.fixed_dictionaries({name: st.booleans() for name in ("lstrip", "rstrip", "single_word", "normalized")})
lists_of_tokens = st.dictionaries(contents, flags, min_size=1, max_size=6)


def hugging_face_split(tokens: list[AddedToken], text: str) -> list[str | int]:
    """The parts that Hugging Face's tokenizers make of a text, with a vocabulary of single characters."""
    characters = {character: i + 1000 for i, character in enumerate(LETTERS)}
    engine = tokenizers.Tokenizer(tokenizers.models.BPE(characters, []))
    for token in tokens:
        flags = {name: getattr(token, name) for name in ("lstrip", "rstrip", "single_word", "normalized", "special")}
        engine.add_tokens([tokenizers.AddedToken(token.content, **flags)])
    ids = {engine.token_to_id(token.content): token.id for token in tokens}
    encoding = engine.encode(text, add_special_tokens=False)
    parts: list[str | int] = []
    for i, token in zip(encoding.ids, encoding.tokens, strict=True):
        if i in ids:
            parts.append(ids[i])
        elif parts and isinstance(parts[-1], str):
            parts[-1] += token
        else:
            parts.append(token)
    return parts


@examples(500)
@given(lists_of_tokens, st.text(LETTERS, max_size=12) | st.lists(contents, max_size=6).map("".join))
@example({"ab": {"single_word": True}}, "ab ab_ -ab-éab")
@example({"ab": {}, "abb": {}, "ba": {}}, "abbabba")
@example({"ab": {"normalized": True}, "bb": {}}, "abbab")
@example({"  ": {"lstrip": True, "rstrip": True}}, "    a  ")
def test_a_text_is_cut_as_hugging_faces_tokenizers_cut_it(flags_by_content, text):
    tokens = [AddedToken(content, i, **flags) for i, (content, flags) in enumerate(flags_by_content.items())]
    tokens = [token for token in tokens if len(token.content) > 1 or token.content not in LETTERS]
    assert AddedTokenSplitter(tokens).split(text, "all") == hugging_face_split(tokens, text)


# The files beside a tokenizer.


def token(content: str, **flags: bool) -> dict:
    """An added token as tokenizer_config.json has it."""
    default = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return default | flags | {"content": content}


EOT = token("<|eot_id|>", lstrip=True, special=False)
NAMED = {"__type": "AddedToken"}  # where no id is given
THINK = token("<think>", special=False)

# What is written into the files, by their names; the ids of the tokenizer.json's own added tokens are 268 to 523.
FOLDERS = {
    "as it is": {},
    "a new token": {
        "tokenizer_config.json": {"added_tokens_decoder": {"524": THINK, "525": token("<x>", rstrip=True)}}
    },
    "other flags": {"tokenizer_config.json": {"added_tokens_decoder": {"277": EOT, "256": token("th", special=False)}}},
    "another id": {"tokenizer_config.json": {"added_tokens_decoder": {"300": EOT}}},
    "named tokens": {
        "tokenizer_config.json": {"pad_token": "<|reserved_special_token_7|>", "unk_token": None, "sep_token": "th"}
    },
    "a name of its own": {"tokenizer_config.json": {"image_token": "<|eot_id|>", "add_bos_token": True}},
    "more names": {"tokenizer_config.json": {"extra_special_tokens": {"image_token": "<|eot_id|>"}}},
    "extra tokens": {
        "tokenizer_config.json": {"additional_special_tokens": ["in", NAMED | token("er", single_word=True)]}
    },
    "older files": {
        "added_tokens.json": {"<pad>": 525, "<think>": 524},
        "special_tokens_map.json": {"pad_token": "<pad>", "bos_token": token("<|end_of_text|>")},
    },
    "older files that don't count": {
        "tokenizer_config.json": {"added_tokens_decoder": {}},
        "added_tokens.json": {"<think>": 524},
        "special_tokens_map.json": {"pad_token": "th"},
    },
}


def write_files(folder, files):
    for name, values in files.items():
        known = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps(known | values))


@pytest.mark.parametrize("files", FOLDERS.values(), ids=FOLDERS)
def test_added_tokens_of_a_folder_are_those_of_transformers(tmp_path, files):
    import transformers

    write_tokenizer_json(tmp_path)
    write_files(tmp_path, files)
    ours, theirs = Tokenizer(tmp_path / "tokenizer.json"), transformers.AutoTokenizer.from_pretrained(tmp_path)
    flags = ("content", "special", "lstrip", "rstrip", "single_word", "normalized")
    assert {t.id: [getattr(t, flag) for flag in flags] for t in ours.engine.added_tokens} == {
        i: [getattr(t, flag) for flag in flags] for i, t in theirs.added_tokens_decoder.items()
    }
    assert ours.engine.template_tokens == theirs.special_tokens_map
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    some = [t.content for t in ours.engine.added_tokens if t.id > 520 or t.id < 280]
    generator = random.Random(0)
    for _ in range(100):
        text = "".join(generator.choices([" ", "\n", "the", "in", "er", "x", *some], k=8))
        ids = ours.encode(text, bos=False, eos=False, allowed_special="all")
        assert ids == theirs.encode(text, add_special_tokens=False), text
        assert ids == ours.engine.encode_parts(ours.engine.split(text))


REFUSED = {
    "the id of another token": ({"added_tokens_decoder": {"256": token("<x>")}}, "'th' and '<x>' both have the id 256"),
    "an id twice": (
        {"added_tokens_decoder": {"600": token("<x>"), "0600": token("<y>")}},
        "'<x>' and '<y>' both have the id 600",
    ),
    "a negative id": ({"added_tokens_decoder": {"-1": token("<x>")}}, "the id of the added token '<x>' is '-1'"),
    "a huge id": ({"added_tokens_decoder": {"9" * 5000: token("<x>")}}, "the id of the added token '<x>' is '9999"),
    "an empty token": ({"added_tokens_decoder": {"600": token("")}}, "the token '' must have 1 to 256 characters"),
    "a long token": ({"pad_token": "x" * 257}, "the token 'xxx.* must have 1 to 256 characters"),
    "half a surrogate pair": ({"pad_token": "x\ud800"}, "must have 1 to 256 characters of Unicode"),
    "a token that is a number": ({"pad_token": 5}, "content is 5, not of type str"),
    "flags that are none": ({"added_tokens_decoder": {"600": token("<x>", lstrip=0)}}, "lstrip is 0, not of type bool"),
    "a list of tokens": ({"added_tokens_decoder": [token("<x>")]}, "added_tokens_decoder is .* not of type dict"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_impossible_added_tokens_are_refused(tmp_path, changes, message):
    write_tokenizer_json(tmp_path)
    write_files(tmp_path, {"tokenizer_config.json": changes})
    with pytest.raises(CheckpointError, match=message) as error:
        Tokenizer(tmp_path / "tokenizer.json")
    assert str(tmp_path) in str(error.value)


def test_a_token_of_the_vocabulary_that_only_the_configuration_calls_added(tmp_path):
    """No merges make it, and the vocabulary need not have any for it."""
    write_tokenizer_json(tmp_path)
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    values["model"] |= {"vocab": values["model"]["vocab"] | {"<x>": 524}, "ignore_merges": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"no merge makes the tokens \['<x>'\]"):
        Tokenizer(tmp_path / "tokenizer.json")
    write_files(tmp_path, {"tokenizer_config.json": {"added_tokens_decoder": {"524": token("<x>")}}})
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.engine.split("a<x>") == ["a", 524]
    assert 524 not in tokenizer.encode("a<x>", bos=False, eos=False)


def test_a_token_without_an_id_is_plain_text(tmp_path):
    """transformers would give it an id for which the model has no embedding."""
    write_tokenizer_json(tmp_path)
    write_files(tmp_path, {"tokenizer_config.json": {"pad_token": "[PAD]", "additional_special_tokens": ["<more>"]}})
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.n_words == 524
    assert tokenizer.engine.template_tokens["pad_token"] == "[PAD]"
    assert tokenizer.engine.split("[PAD]<more>") == ["[PAD]<more>"]


def test_tokens_beyond_the_embedding_are_left_out(tmp_path, caplog):
    write_tokenizer_json(tmp_path)
    more = {"added_tokens_decoder": {"524": token("<x>"), "525": token("<pad>")}}
    write_files(tmp_path, {"tokenizer_config.json": more, "config.json": {"vocab_size": 525}})
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.n_words == 525
    assert tokenizer.engine.split("<x><pad>") == [524, "<pad>"]
    assert "['<pad>'] left out: the model has 525 tokens" in caplog.text


NEIGHBOURS = {
    "tokenizer_config.json": {
        "chat_template": "{{ bos_token }}",
        "eos_token": "<|eot_id|>",
        "added_tokens_decoder": {"276": token("<|eom_id|>"), "524": THINK},
        "add_bos_token": False,
    },
    "generation_config.json": {"eos_token_id": [269, 276]},
}


def test_the_files_beside_a_tokenizer_model_of_llama_3(tmp_path):
    path = write_llama3_tokenizer(tmp_path / "tokenizer.model")
    alone = Tokenizer(path)
    write_files(tmp_path, NEIGHBOURS)
    tokenizer = Tokenizer(path)
    assert (tokenizer.chat_template, tokenizer.engine.chat_template_source) == (
        "{{ bos_token }}",
        "tokenizer_config.json",
    )
    assert tokenizer.engine.template_tokens == {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_tokens) == (268, 277, {269, 276, 277})
    assert not tokenizer.add_bos
    assert alone.special_tokens["<|reserved_special_token_4|>"] == 276 == tokenizer.special_tokens["<|eom_id|>"]
    assert tokenizer.encode("<think><|eom_id|>", bos=False, eos=False)[0] == 524
    (tmp_path / "params.json").write_text("{}")  # a folder of Meta's: as if the others weren't there
    tokenizer = Tokenizer(path)
    for name in ("chat_template", "template_tokens", "special_tokens", "stop_tokens", "add_bos", "n_words", "eos_id"):
        assert getattr(tokenizer.engine, name) == getattr(alone.engine, name)
    (tmp_path / "params.json").unlink()
    write_files(tmp_path, {"generation_config.json": {"eos_token_id": 9999}})
    with pytest.raises(CheckpointError, match=r"lacks tokens that the files beside it name as ends of a text.*9999"):
        Tokenizer(path)


def test_the_files_beside_a_tokenizer_model_of_llama_2(tmp_path, llama2_path):
    shutil.copy(llama2_path, tmp_path)
    path, alone = tmp_path / "tokenizer.model", Tokenizer(llama2_path)
    write_files(tmp_path, {"added_tokens.json": {"<|im_end|>": 320}, "config.json": {"vocab_size": 321}})
    write_files(tmp_path, {"tokenizer_config.json": {"chat_template": "{{ bos_token }}", "eos_token": "<|im_end|>"}})
    tokenizer = Tokenizer(path)
    assert tokenizer.special_tokens == {"<|im_end|>": 320}
    assert (tokenizer.eos_id, tokenizer.stop_tokens, tokenizer.n_words) == (320, {320}, 321)
    assert tokenizer.engine.template_tokens == {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
    (tmp_path / "params.json").write_text("{}")  # files of both layouts: those of Meta's count
    tokenizer = Tokenizer(path)
    for name in ("chat_template", "template_tokens", "special_tokens", "stop_tokens", "add_bos", "n_words", "eos_id"):
        assert getattr(tokenizer.engine, name) == getattr(alone.engine, name)
    (tmp_path / "config.json").unlink()  # `save_checkpoint` writes tokenizer_config.json, but no config.json
    assert Tokenizer(path).special_tokens == {"<|im_end|>": 320}
    write_files(tmp_path, {"added_tokens.json": {"<x>": 300}})
    with pytest.raises(CheckpointError, match="and '<x>' both have the id 300"):
        Tokenizer(path)
