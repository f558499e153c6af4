"""Sentencepiece's kind of `tokenizer.json`, as transformers 5 saves the tokenizers of the Llama 2 family."""

import json
import random
import time

import pytest
from chat_templates import STYLES, random_content, random_dialog, write_folder
from conftest import examples, load, same_weights, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from llama import ChatFormat, Tokenizer
from llama.checkpoint import save_checkpoint
from llama.checkpoint.convert import convert
from llama.errors import CheckpointError, InputError

NAMES = ["Alpaca", "Vicuna", "Zephyr"]  # with added tokens; with `legacy`; with neither

# Before transformers 5: what replaces spaces stands in the normalizer.
OLD_NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}


def saved_by_transformers(folder, style):
    """A folder with `tokenizer.json` and no `tokenizer.model`."""
    import transformers

    write_folder(folder / "model", style)
    transformers.AutoTokenizer.from_pretrained(folder / "model").save_pretrained(folder / "json")
    assert not (folder / "json" / "tokenizer.model").exists()
    return folder / "json"


@pytest.fixture(scope="module", params=NAMES)
def folder(request, tmp_path_factory):
    return saved_by_transformers(tmp_path_factory.mktemp("json"), STYLES[request.param])


@pytest.fixture(scope="module")
def pair(folder):
    import transformers

    return Tokenizer(folder / "tokenizer.json"), transformers.AutoTokenizer.from_pretrained(folder)


def test_the_ids_of_transformers(pair):
    ours, theirs = pair
    generator = random.Random(8)
    formatter = ChatFormat(ours)
    for _ in range(200):
        dialog = random_dialog(generator)
        expected = theirs.apply_chat_template(dialog, add_generation_prompt=True, return_dict=False)
        assert formatter.encode_dialog_prompt(dialog) == expected, dialog
    assert ours.add_bos == (theirs("the").input_ids[0] == theirs.bos_token_id)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, -1)
    assert ours.n_words == len(theirs)


def test_the_ids_of_sentencepiece(pair, original):
    generator = random.Random(9)
    for text in [random_content(generator) for _ in range(500)] + ["", " ", "\x00\x04", "▁", "é\u0301🙂中" * 9]:
        assert pair[0].encode(text, bos=True, eos=True) == original.encode(text, bos=True, eos=True)
        assert pair[0].decode(pair[0].encode(text, bos=False, eos=False)) == original.decode(
            original.encode(text, bos=False, eos=False)
        )


@pytest.fixture(scope="module")
def original(folder):
    """The tokenizer that was saved as JSON."""
    return Tokenizer(folder.parent / "model" / "tokenizer.model")


@examples(300)
@given(st.text("the house▁ \n🙂é<s>", max_size=30))
def test_any_text(pair, original, text):
    assert pair[0].encode(text, bos=False, eos=False) == original.encode(text, bos=False, eos=False)


def test_a_checkpoint_without_tokenizer_model(tmp_path):
    """It loads, and is converted to Meta's layout and back with the same ids."""
    folder = saved_by_transformers(tmp_path, STYLES["Alpaca"])
    tokenizer = Tokenizer(folder / "tokenizer.json")
    model = tiny_model(vocab_size=tokenizer.n_words)
    save_checkpoint(tmp_path / "hf", model, layout="hf")
    for path in folder.iterdir():
        (tmp_path / "hf" / path.name).write_bytes(path.read_bytes())
    assert same_weights(load(tmp_path / "hf"), model)
    convert(tmp_path / "hf", tmp_path / "meta")
    convert(tmp_path / "meta", tmp_path / "back", layout="hf")
    dialog = [{"role": "user", "content": "the <think> house"}]
    expected = ChatFormat(tokenizer).encode_dialog_prompt(dialog)
    for name in ("meta", "back"):
        assert ChatFormat(Tokenizer(tmp_path / name / "tokenizer.model")).encode_dialog_prompt(dialog) == expected


def change_json(folder, target, change):
    """A copy of a folder with a changed `tokenizer.json`; returns that file."""
    target.mkdir(exist_ok=True)
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    values = json.loads((target / "tokenizer.json").read_text())
    change(values)
    (target / "tokenizer.json").write_text(json.dumps(values))
    return target / "tokenizer.json"


def test_the_form_before_transformers_5(folder, pair, tmp_path):
    path = change_json(folder, tmp_path, lambda values: values.update(normalizer=OLD_NORMALIZER, pre_tokenizer=None))
    for text in ("the house", " the", "", "a  b"):
        assert Tokenizer(path).encode(text, bos=False, eos=False) == pair[0].encode(text, bos=False, eos=False)


def set_model(**changes):
    return lambda values: values["model"].update(changes)


def swap_merges(values):
    merges = values["model"]["merges"]
    merges[1], merges[-1] = merges[-1], merges[1]


def rename_bytes(values):
    vocabulary = values["model"]["vocab"]
    values["model"]["vocab"] = {token.replace("<0x0", "<0y0"): i for token, i in vocabulary.items()}


REFUSED = {
    "no merges": (
        set_model(merges=[]),
        r"no merge is listed for .*; put the model's own tokenizer\.model",
    ),
    "merges in another order": (swap_merges, "is out of order"),
    "a merge of three": (lambda values: values["model"]["merges"].append("t h e"), "is not a pair of tokens"),
    "a merge of nothing": (lambda values: values["model"]["merges"].append(None), "is not a pair of tokens"),
    "a merge to no token": (lambda values: values["model"]["merges"].append(["z", "z"]), "is not a pair|out of order"),
    "no bytes": (lambda values: values["model"]["vocab"].pop("<0x00>"), "are not texts with the ids 0, 1, 2"),
    "other bytes": (
        lambda values: values["model"].update(
            vocab={k.replace("0x0", "0y0"): v for k, v in values["model"]["vocab"].items()}
        ),
        r"has no tokens \['<0x00>'",
    ),
    "ids that are no numbers": (
        lambda values: values["model"]["vocab"].update({"the": "x"}),
        "are not texts with the ids 0, 1, 2",
    ),
    "whole words first": (set_model(ignore_merges=True), "ignore_merges is True, which is not supported"),
    "a very long token": (
        lambda values: values["model"]["vocab"].update({"x" * 600: len(values["model"]["vocab"])}),
        "its tokens are too many or too long",
    ),
    "half a character": (
        lambda values: values["model"]["vocab"].update({"\ud800": len(values["model"]["vocab"])}),
        "are not texts with the ids 0, 1, 2",
    ),
    "dropout": (set_model(dropout=0.1), r"dropout is 0\.1"),
    "lower case": (lambda values: values.update(normalizer={"type": "Lowercase"}), "does more than replace spaces"),
    "splits": (lambda values: values["pre_tokenizer"].update(split=True), "does more than replace spaces"),
    "spaces that stay": (lambda values: values.update(pre_tokenizer=None), "does more than replace spaces"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_sentencepiece_cannot_express_is_refused(tmp_path, folder, change, message):
    path = change_json(folder, tmp_path, change)
    with pytest.raises(CheckpointError, match=message) as error:
        Tokenizer(path)
    assert str(path) in str(error.value)


def test_damaged_files(folder, tmp_path):
    """Values swapped for others anywhere in the file."""
    generator = random.Random(3)
    content = (folder / "tokenizer.json").read_text()
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "tokenizer.json"
    begin = time.monotonic()
    for _ in range(150):
        at = generator.randrange(len(content))
        value = generator.choice(["null", "-1", "[]", "{}", '"', "1e999", "true", ",", "", "9" * 30, "▁"])
        path.write_text(content[:at] + value + content[at + generator.randrange(9) :])
        try:
            assert Tokenizer(path).encode("the house", bos=False, eos=False)
        except InputError:
            continue
    assert time.monotonic() - begin < 120
