"""Reading and writing Hugging Face's tokenizer.json: the ids are those of Hugging Face's own libraries."""

import json
import random
import shutil

import pytest
import tokenizers
from conftest import examples
from conftest import write_tokenizer_json as write_example
from hypothesis import example, given
from hypothesis import strategies as st

from llama import ChatFormat, Tokenizer
from llama.default_model import default_checkpoint
from llama.gguf_file import GGUFFile
from llama.vocab.split_steps import LLAMA3_STEPS, SMOLLM_STEPS
from llama.vocab.tokenizer_json import write_tokenizer_json
from llama.vocab.vocabulary import byte_level_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tokenizer.json and the files beside it. Tests must not change it."""
    folder = tmp_path_factory.mktemp("json")
    write_example(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer(folder / "tokenizer.json")


def random_texts(count):
    generator = random.Random(0)
    pools = [
        "the user in there",
        "abc XYZ",
        "0123456789٣½",
        " \n\t\r\u00a0\u2028",
        ".,!?'\"<|>{}",
        "éß中文🙂ि",
        "\x04\x1d",
    ]
    for _ in range(count):
        pool = "".join(generator.sample(pools, generator.randint(1, 4)))
        yield "".join(generator.choice(pool) for _ in range(generator.randint(1, 24)))


def test_attributes(tokenizer):
    special = tokenizer.special_tokens
    assert tokenizer.n_words == 524
    assert tokenizer.bos_id == special["<|begin_of_text|>"] == 268
    assert tokenizer.eos_id == special["<|eot_id|>"] == 277
    assert tokenizer.stop_tokens == {269, 276, 277}
    assert tokenizer.add_bos
    assert tokenizer.chat_template == "{{ bos_token }}"
    assert len(special) == 256


@examples(200)
@given(st.text(max_size=40) | st.text("the us\n 'ing1é🙂<|>", max_size=40))
@example("<|end_of_text|>")
@example("the<|eot_id|> us<|begin_of_text|>")
def test_same_ids_as_tokenizers(folder, tokenizer, text):
    """The package tokenizers takes the name of a special token in a text for the token; ours does only if allowed."""
    engine = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(text, bos=False, eos=False, allowed_special="all")
    assert ids == engine.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text == engine.decode(ids, skip_special_tokens=False)
    plain = tokenizer.encode(text, bos=False, eos=False)
    assert tokenizer.decode(plain) == text
    assert not set(plain) & set(tokenizer.special_tokens.values())


def test_same_ids_as_tokenizer_model(tokenizer, llama3):
    for text in random_texts(300):
        assert tokenizer.encode(text, bos=True, eos=False) == llama3.encode(text, bos=True, eos=False)


def change(folder, target, edit, file="tokenizer.json"):
    """Copy the folder and change one of its files; returns the path of the copy's tokenizer.json."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    values = json.loads((target / file).read_text())
    edit(values)
    (target / file).write_text(json.dumps(values))
    return target / "tokenizer.json"


def test_without_the_files_beside_it(folder, tmp_path):
    """BOS is then in the post-processor, and the stop tokens are known by name."""
    shutil.copy(folder / "tokenizer.json", tmp_path)
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_tokens) == (268, 269, {269, 277})
    assert tokenizer.add_bos


def test_whether_a_text_begins_with_bos(folder, tmp_path):
    path = change(folder, tmp_path / "a", lambda c: c.update(add_bos_token=False), "tokenizer_config.json")
    assert not Tokenizer(path).add_bos
    path = change(folder, tmp_path / "b", lambda t: t.update(post_processor=None))
    tokenizer = Tokenizer(path)
    assert not tokenizer.add_bos
    assert tokenizer.bos_id == 268  # from tokenizer_config.json
    path = change(tmp_path / "b", tmp_path / "c", lambda c: c.update(add_bos_token=True), "tokenizer_config.json")
    assert Tokenizer(path).add_bos


def test_one_or_several_eos_ids(folder, tmp_path):
    for eos_ids, stop_tokens in ((270, {270, 269, 277}), ([270, 3], {270, 3, 269, 277}), (None, {269, 277})):
        path = change(folder, tmp_path, lambda c, ids=eos_ids: c.update(eos_token_id=ids), "generation_config.json")
        assert Tokenizer(path).stop_tokens == stop_tokens
    (tmp_path / "config.json").write_text('{"eos_token_id": 271}')  # used if generation_config.json has none
    assert Tokenizer(path).stop_tokens == {269, 271, 277}
    change(folder, tmp_path, lambda c: None, "generation_config.json")
    (tmp_path / "config.json").write_text('{"eos_token_id": 271}')
    assert Tokenizer(path).stop_tokens == {269, 276, 277}


def test_chat_templates_in_other_places(folder, tmp_path):
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "chat"}]
    path = change(folder, tmp_path, lambda c: c.update(chat_template=several), "tokenizer_config.json")
    assert Tokenizer(path).chat_template == "chat"
    change(folder, tmp_path, lambda c: c.pop("chat_template"), "tokenizer_config.json")
    assert Tokenizer(path).chat_template is None
    (tmp_path / "chat_template.jinja").write_text("in a file")
    assert Tokenizer(path).chat_template == "in a file"
    change(folder, tmp_path, lambda c: None, "tokenizer_config.json")
    tokenizer = Tokenizer(path)  # with a template in both files
    assert (tokenizer.chat_template, tokenizer.engine.chat_template_source) == ("in a file", "chat_template.jinja")


def test_added_tokens_that_are_not_special(folder, tmp_path):
    """Such as <think> of DeepSeek's distilled Llamas: they are recognised in every text."""

    def edit(values):
        values["added_tokens"][13] |= {"content": "<think>", "special": False}

    tokenizer = Tokenizer(change(folder, tmp_path, edit))
    text = "the<think> user"
    engine = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = tokenizer.encode(text, bos=False, eos=False)
    assert ids == engine.encode(text, add_special_tokens=False).ids
    assert 268 + 13 in ids
    assert "<think>" not in tokenizer.special_tokens
    assert tokenizer.decode(ids) == text


def test_a_gap_in_the_ids(folder, tmp_path):
    def edit(values):
        values["added_tokens"][-1]["id"] += 10

    tokenizer = Tokenizer(change(folder, tmp_path, edit))
    assert tokenizer.n_words == 534
    assert tokenizer.decode([104, 525, 105]) == "hi"
    (tmp_path / "written").mkdir()
    write_tokenizer_json(tmp_path / "written", tokenizer.vocabulary)
    engine = tokenizers.Tokenizer.from_file(str(tmp_path / "written" / "tokenizer.json"))
    assert special_ids_are_the_same(tokenizer, engine)


PRE_TOKENIZERS = {
    "gpt-2": tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(True), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "a pattern that does not match everything": tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\p{L}+|\d"), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


@pytest.mark.parametrize("pre_tokenizer", PRE_TOKENIZERS.values(), ids=PRE_TOKENIZERS)
def test_pre_tokenizers(folder, tmp_path, pre_tokenizer):
    engine = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    engine.pre_tokenizer = pre_tokenizer
    engine.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    for text in random_texts(1500):
        assert tokenizer.encode(text, bos=False, eos=False) == engine.encode(text, add_special_tokens=False).ids, text


def set_model(**changes):
    return lambda values: values["model"].update(changes)


def set_steps(*steps):
    return lambda values: values.update(pre_tokenizer={"type": "Sequence", "pretokenizers": list(steps)})


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
SPLIT = {"type": "Split", "pattern": {"Regex": "a|b"}, "behavior": "Isolated", "invert": False}

UNSUPPORTED = {
    "sentencepiece of another kind": (
        lambda v: v["model"].update(byte_fallback=True, ignore_merges=False),
        r"does more than replace spaces.*tokenizer\.model",
    ),
    "unigram": (set_model(type="Unigram"), "holds a tokenizer of kind 'Unigram', and only 'BPE' is read from JSON"),
    "an end-of-word suffix": (set_model(end_of_word_suffix="</w>"), "end_of_word_suffix is '</w>'"),
    "a normalizer": (lambda v: v.update(normalizer={"type": "NFC"}), r"the normalizer \{'type': 'NFC'\}"),
    "no vocabulary": (lambda v: v["model"].pop("vocab"), "lacks 'vocab'"),
    "no model": (lambda v: v.pop("model"), "lacks 'model'"),
    "no merges": (lambda v: v["model"].pop("merges"), "lacks 'merges'"),
    "the same id twice": (lambda v: v["model"]["vocab"].update({"!": 70}), "are not different integers"),
    "an id that is a string": (lambda v: v["model"]["vocab"].update({"!": "7"}), "are not different integers"),
    "a huge id": (lambda v: v["model"]["vocab"].update({"!": 2**40}), "are not different integers"),
    "an added token without a name": (lambda v: v["added_tokens"][0].pop("content"), "lacks 'content'"),
    "merges out of order": (lambda v: v["model"]["merges"].reverse(), "is out of order"),
    "a merge of three": (set_model(merges=[["t", "h", "e"]]), "the merge 't h e' is out of order"),
    "a character that stands for no byte": (lambda v: v["model"]["vocab"].update({"あ": 9999}), "stands for no byte"),
    "no pre-tokenizer": (lambda v: v.update(pre_tokenizer=None), "the pre_tokenizer None is not supported"),
    "metaspace": (set_steps({"type": "Metaspace"}), "the pre_tokenizer .*Metaspace.* is not supported"),
    "a prefix space": (
        set_steps(SPLIT, BYTE_LEVEL | {"add_prefix_space": True}),
        "the pre_tokenizer .* is not supported",
    ),
    "an unknown behavior": (set_steps(SPLIT | {"behavior": "Merged"}, BYTE_LEVEL), "the pre_tokenizer .*Merged"),
    "no bytes": (set_steps(SPLIT), "the pre_tokenizer .* is not supported"),
    "bytes twice": (set_steps(BYTE_LEVEL, BYTE_LEVEL), "the pre_tokenizer .* is not supported"),
    "too many steps": (set_steps(*[SPLIT] * 30, BYTE_LEVEL), "the pre_tokenizer .* is not supported"),
    "a pattern that matches the empty text": (
        set_steps(SPLIT | {"pattern": {"Regex": r"\p{L}*"}}, BYTE_LEVEL),
        "its split pattern .* matches an empty text",
    ),
    "merges that are numbers": (set_model(merges=[5]), "its merges are not all pairs of tokens"),
    "merges that are null": (set_model(merges=[None]), "its merges are not all pairs of tokens"),
    "unknown bytes": (
        lambda v: v["model"].update(unk_token="!", vocab={k: i for k, i in v["model"]["vocab"].items() if k != "#"}),
        "unk_token '!' stands for some bytes",
    ),
    "a token that no merge makes": (
        lambda v: v["model"].update(ignore_merges=False, vocab=v["model"]["vocab"] | {"xyz": 9000}),
        r"no merge makes the tokens \['xyz'\]",
    ),
    "an invalid pattern": (set_steps(SPLIT | {"pattern": {"Regex": "(("}}, BYTE_LEVEL), r"its split pattern '\(\("),
}


@pytest.mark.parametrize(("edit", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_tokenizers_are_refused(folder, tmp_path, edit, message):
    path = change(folder, tmp_path, edit)
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer(path)
    assert isinstance(error.value, AssertionError)
    assert str(path) in str(error.value)


def test_a_tokenizer_without_eos(folder, tmp_path):
    path = change(folder, tmp_path, lambda t: t.update(added_tokens=t["added_tokens"][:1]))
    for name in ("generation_config.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=r"no token that ends a text is named: generation_config\.json should have"):
        Tokenizer(path)


def test_eos_ids_outside_the_vocabulary(folder, tmp_path):
    path = change(folder, tmp_path, lambda c: c.update(eos_token_id=[269, 9999]), "generation_config.json")
    with pytest.raises(ValueError, match=r"not all the ids that end a text, \[269, 277, 9999\], are among"):
        Tokenizer(path)


def same_tokenizer(a, b):
    names = ["n_words", "bos_id", "eos_id", "stop_tokens", "special_tokens", "add_bos", "chat_template"]
    return {name: getattr(a, name) for name in names} == {name: getattr(b, name) for name in names}


def special_ids_are_the_same(tokenizer, engine):
    return all(engine.token_to_id(name) == i for name, i in tokenizer.special_tokens.items())


def test_written_and_read_again(llama3, tmp_path):
    import transformers

    write_tokenizer_json(tmp_path, llama3.vocabulary)
    read_back = Tokenizer(tmp_path / "tokenizer.json")
    assert same_tokenizer(read_back, llama3)
    assert special_ids_are_the_same(llama3, tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in random_texts(300):
        assert read_back.encode(text, bos=False, eos=False) == llama3.encode(text, bos=False, eos=False)
        assert theirs.encode(text) == llama3.encode(text, bos=True, eos=False)
        assert theirs.decode(theirs.encode(text, add_special_tokens=False)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (268, 269)


@pytest.mark.real
def test_the_default_models_tokenizer_written_and_read_again(smollm, tmp_path):
    import transformers

    write_tokenizer_json(tmp_path, smollm.vocabulary)
    assert smollm.vocabulary.split_steps == SMOLLM_STEPS
    read_back = Tokenizer(tmp_path / "tokenizer.json")
    assert same_tokenizer(read_back, smollm)
    engine = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert special_ids_are_the_same(smollm, engine)
    assert engine.encode("<|im_start|>user\nhi<|im_end|>").ids[0] == 1
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for dialog in (
        [{"role": "user", "content": "Hello, world 12"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the <b>"}],
    ):
        expected = theirs.apply_chat_template(dialog, add_generation_prompt=True, return_dict=False)
        assert ChatFormat(read_back).encode_dialog_prompt(dialog) == expected
    for text in random_texts(3000):
        ids = smollm.encode(text, bos=False, eos=False)
        assert read_back.encode(text, bos=False, eos=False) == ids
        assert engine.encode(text).ids == ids, repr(text)


@pytest.mark.real
def test_llama3s_tokenizer_written_and_read_again(real_llama3, tmp_path):
    write_tokenizer_json(tmp_path, real_llama3.vocabulary)
    assert real_llama3.vocabulary.split_steps == LLAMA3_STEPS
    read_back = Tokenizer(tmp_path / "tokenizer.json")
    assert same_tokenizer(read_back, real_llama3)
    engine = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert special_ids_are_the_same(real_llama3, engine)
    for text in random_texts(3000):
        ids = real_llama3.encode(text, bos=True, eos=False)
        assert read_back.encode(text, bos=True, eos=False) == ids
        assert engine.encode(text).ids == ids, repr(text)


@pytest.mark.real
def test_every_token_of_the_default_model_is_made_by_merges(smollm):
    """So its ids can serve as ranks."""
    file = GGUFFile(default_checkpoint())
    ordinary = {t: i for i, t in enumerate(file.get("tokenizer.ggml.tokens", list)) if t not in smollm.special_tokens}
    merges = file.get("tokenizer.ggml.merges", list)
    assert byte_level_ranks(ordinary, merges, file.path, ignore_merges=False) == smollm.vocabulary.ranks
    with pytest.raises(ValueError, match="no merge makes the tokens"):
        byte_level_ranks(ordinary, merges[:-1], file.path, ignore_merges=False)
