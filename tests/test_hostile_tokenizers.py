"""Damaged and hostile tokenizer files: only this library's exceptions are raised, within seconds."""

import copy
import json
import os
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import write_llama2_tokenizer, write_llama3_tokenizer, write_tokenizer_json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_hostile_files import damage
from test_split_steps import FALCON_STEPS

from llama import Tokenizer
from llama.errors import CheckpointError, InputError, MissingFileError
from llama.vocab import text_splitter
from llama.vocab.pre_tokenizer import write_pre_tokenizer

TEXT = "the <think>  user 12\n<|eot_id|> é中🙂 <x>"


def token(content: str, **flags: Any) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "rstrip": True, "single_word": False, "normalized": True} | flags


def byte_level(folder: Path) -> Path:
    write_tokenizer_json(folder)
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    values["pre_tokenizer"] = write_pre_tokenizer(FALCON_STEPS)
    path.write_text(json.dumps(values))
    return path


def sentencepiece(folder: Path) -> Path:
    path = write_llama2_tokenizer(folder / "tokenizer.model")
    (folder / "tokenizer.txt").unlink()
    (folder / "tokenizer.vocab").unlink()
    return path


def with_neighbours(folder: Path, first_id: int, older: bool) -> None:
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "image_token": "<x>"}
    config |= {"chat_template": [{"name": "default", "template": "{{ bos_token }}"}], "pad_token": token("<x>")}
    added = {"<think>": first_id, "<x>": first_id + 1}
    if older:
        config["additional_special_tokens"] = ["<x>", token("<y>")]
        (folder / "added_tokens.json").write_text(json.dumps(added))
        names = {"eos_token": token("<x>"), "unk_token": "<x>"}
        (folder / "special_tokens_map.json").write_text(json.dumps(names))
    else:
        config["added_tokens_decoder"] = {str(i): token(name, special="x" in name) for name, i in added.items()}
        config["extra_special_tokens"] = {"video_token": "<think>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, first_id]}))
    (folder / "config.json").write_text(json.dumps({"vocab_size": first_id + 2}))


KINDS = {"byte-level": (byte_level, 524), "sentencepiece": (sentencepiece, 320)}

any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("(a|aa)+$"),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=4,
)


@st.composite
def change_json(draw: st.DrawFn, content: bytes) -> bytes:
    """The content with a value somewhere in it replaced, removed, or moved to another key."""
    values = copy.deepcopy(json.loads(content))
    at = values
    for _ in range(draw(st.integers(0, 5))):
        keys = list(range(len(at))) if isinstance(at, list) else list(at)
        key = draw(st.sampled_from(keys)) if keys else None
        if key is None or not isinstance(at[key], list | dict):
            break
        at = at[key]
    keys = list(range(len(at))) if isinstance(at, list) else list(at)
    if keys:
        key = draw(st.sampled_from(keys))
        kind = draw(st.sampled_from(["replace", "replace", "remove", "another"]))
        if kind == "replace":
            at[key] = draw(any_json)
        elif kind == "remove":
            del at[key]
        else:
            at[key] = at[draw(st.sampled_from(keys))]
    return json.dumps(values).encode()


@pytest.mark.slow
@pytest.mark.parametrize("older", [False, True], ids=["", "older files"])
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_refused_with_our_own_exceptions(tmp_path, monkeypatch, record_property, kind, older):
    monkeypatch.setattr(text_splitter, "TIME_LIMIT", 0.2)
    write, first_id = KINDS[kind]
    path = write(tmp_path)
    with_neighbours(tmp_path, first_id, older)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    outcomes: Counter[str] = Counter()

    @settings(max_examples=300, suppress_health_check=list(HealthCheck), deadline=3000)
    @given(st.data())
    def open_damaged_file(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(files)))
        is_json = name.endswith(".json") and data.draw(st.booleans())
        (tmp_path / name).write_bytes(data.draw((change_json if is_json else damage)(files[name])))
        try:
            outcomes[open_and_encode(path)] += 1
        finally:
            (tmp_path / name).write_bytes(files[name])

    assert open_and_encode(path) == "opened"
    open_damaged_file()
    counts = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
    record_property("summary", f"damaged tokenizers, {kind}{' (older files)' if older else ''}: {counts}")
    assert outcomes["CheckpointError"] > 50
    assert outcomes["opened"] > 20


def open_and_encode(path: Path) -> str:
    """What comes of it: the name of the exception that was raised, or that it was opened."""
    try:
        tokenizer = Tokenizer(path)
    except (InputError, MissingFileError) as error:
        if str(path.parent) not in str(error):
            raise ValueError("the message doesn't name the file") from error
        return type(error).__name__
    try:
        ids = tokenizer.encode(TEXT, bos=False, eos=True, allowed_special="all" if tokenizer.special_tokens else ())
        ids += tokenizer.engine.encode_parts(tokenizer.engine.split(TEXT))
    except InputError as error:
        if str(path) not in str(error):
            raise ValueError("the message doesn't name the file") from error
        return type(error).__name__
    tokenizer.decode(ids)
    for i in (0, *ids, tokenizer.n_words - 1):
        tokenizer.token_text(i)
    return "opened"


def test_many_and_long_added_tokens(tmp_path):
    """A text is split in time that doesn't depend on their number."""
    write_tokenizer_json(tmp_path)
    added = {str(1000 + i): token("<" + "x" * (i % 250) + str(i)) for i in range(20_000)}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    start = time.monotonic()
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    tokenizer.encode("<xx" * 10_000, bos=False, eos=False)
    assert time.monotonic() - start < 5


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes among its files")
@pytest.mark.timeout(30)  # opening a pipe waits for ever
@pytest.mark.parametrize("kind", KINDS)
def test_pipes_in_place_of_a_tokenizer_and_its_neighbours(tmp_path, kind):
    names = ["tokenizer_config.json", "generation_config.json", "config.json", "chat_template.jinja"]
    names += ["special_tokens_map.json", "added_tokens.json"] if kind == "sentencepiece" else []
    write, _ = KINDS[kind]
    path = write(tmp_path)
    for name in [*names, path.name]:
        kept = tmp_path / "kept"
        if (tmp_path / name).exists():
            (tmp_path / name).rename(kept)
        os.mkfifo(tmp_path / name)
        with pytest.raises(CheckpointError, match=rf"{tmp_path / name} is a pipe, not a file"):
            Tokenizer(path)
        (tmp_path / name).unlink()
        if kept.exists():
            kept.rename(tmp_path / name)
    assert open_and_encode(path) == "opened"


@pytest.mark.parametrize(("kind", "size"), [("ranks", 2**40), ("pieces", 2**40), ("template", 2**30)])
def test_files_that_would_fill_the_memory(tmp_path, kind, size):
    """They are sparse, so they take no space."""
    path = sentencepiece(tmp_path) if kind != "ranks" else write_llama3_tokenizer(tmp_path / "tokenizer.model")
    large = path
    if kind == "template":
        large = tmp_path / "chat_template.jinja"
        large.write_text("{{ bos_token }}")
    os.truncate(large, size)
    with pytest.raises(CheckpointError, match=rf"{large} has {size} bytes, too many for a file of settings or of tok"):
        Tokenizer(path)


def test_a_damaged_neighbour_is_named(tmp_path):
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json"):
        folder = tmp_path / name.replace(".", "")
        folder.mkdir()
        path = sentencepiece(folder)
        (folder / name).write_text("[1]")
        with pytest.raises(InputError, match=rf"{folder / name} must hold a JSON object"):
            Tokenizer(path)
    shutil.rmtree(tmp_path)
