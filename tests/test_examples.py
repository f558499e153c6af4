"""The example scripts: what they print, in this process; and started as a user starts them (marked slow)."""

import logging
import re

import pytest
from conftest import run_python, torchrun
from run_command import Runner, example, record_builds

from llama.default_model import default_checkpoint

TEXT, CHAT = "example_text_completion", "example_chat_completion"
SEPARATOR = "=====\n"


@pytest.fixture
def runner(monkeypatch, capsys):
    return Runner(monkeypatch, capsys)


@pytest.fixture(scope="module")
def downloaded():
    """Downloads the default model, so that the tests' own time is that of the examples."""
    return default_checkpoint()


# Each is started by python and by torchrun: once with the default model, which takes long, and once with a tiny one.


@pytest.mark.slow
@pytest.mark.real
def test_text_completion_without_arguments(downloaded):
    result = torchrun(1, f"{TEXT}.py")
    assert result.returncode == 0, result.stderr
    completions = re.findall(r"^> (.*?)\n\n====", result.stdout, re.MULTILINE | re.DOTALL)
    assert len(completions) == 4
    assert all(len(completion.split()) > 10 for completion in completions)
    assert result.stdout.startswith("I believe the meaning of life is\n> ")
    assert "GB of KV cache" in result.stderr


@pytest.mark.slow
@pytest.mark.real
def test_chat_completion_without_arguments(downloaded):
    result = run_python(f"{CHAT}.py")
    assert result.returncode == 0, result.stderr
    turns = re.findall(r"^(System|User|Assistant): (.+)", result.stdout, re.MULTILINE)
    assert [role for role, _ in turns].count("Assistant") == 5  # four answers, and one that is part of a prompt
    assert "Rome" in turns[-1][1]


def under_torchrun(*command):
    return torchrun(1, *command)


@pytest.mark.slow
@pytest.mark.parametrize(("start", "name"), [(run_python, TEXT), (under_torchrun, CHAT)], ids=["python", "torchrun"])
def test_in_a_process_of_its_own(tiny_checkpoint, start, name):
    result = start(f"{name}.py", "--ckpt_dir", tiny_checkpoint, "--max_gen_len", "5")
    assert result.returncode == 0, result.stderr
    assert "GB of KV cache" in result.stderr
    assert result.stdout.count(SEPARATOR) == 4


@pytest.mark.parametrize("name", [TEXT, CHAT])
def test_every_option(runner, tiny_checkpoint, name, caplog):
    options = ["--ckpt_dir", tiny_checkpoint, "--tokenizer_path", tiny_checkpoint / "tokenizer.model"]
    options += ["--temperature", "0.9", "--top_p", "0.8", "--max_seq_len", "512", "--max_gen_len", "5"]
    with caplog.at_level(logging.INFO, logger="llama"):
        result = runner.run(example(name), *options, "--max_batch_size", "3")
    assert result.returncode == 0, result.stderr
    assert "(max_batch_size=3 x max_seq_len=512)" in caplog.text
    assert result.stdout.count(SEPARATOR) == 4


@pytest.mark.parametrize("name", [TEXT, CHAT])
def test_how_weights_are_kept_and_whether_steps_are_compiled(runner, tiny_checkpoint, monkeypatch, name):
    builds = record_builds(monkeypatch)
    options = ["--ckpt_dir", tiny_checkpoint, "--max_gen_len", "2", "--max_seq_len", "512"]
    assert runner.run(example(name), *options).returncode == 0
    result = runner.run(example(name), *options, "--quantize", "int4", "--compile")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(SEPARATOR) == 4
    assert builds == [(None, False), ("int4", True)]


@pytest.mark.parametrize("name", [TEXT, CHAT])
def test_a_stream_prints_the_same(runner, tiny_checkpoint, name):
    options = ["--ckpt_dir", tiny_checkpoint, "--temperature", "0", "--max_gen_len", "20", "--max_seq_len", "512"]
    whole = runner.run(example(name), *options)
    streamed = runner.run(example(name), *options, "--stream")
    assert streamed.returncode == 0, streamed.stderr
    assert streamed.stdout == whole.stdout
    assert streamed.stdout.count(SEPARATOR) == 4


@pytest.mark.parametrize("name", [TEXT, CHAT])
def test_help(runner, name):
    result = runner.run(example(name), "--help")
    assert (result.returncode, result.stderr) == (0, "")
    options = ["ckpt_dir", "tokenizer_path", "temperature", "top_p", "max_seq_len", "max_gen_len", "max_batch_size"]
    for option in [*options, "stream", "quantize", "compile"]:
        assert f"--{option}" in result.stdout
    assert runner.run(example(name), "-h") == result
    assert "Without arguments this runs SmolLM2-135M-Instruct" in result.stdout


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        (["--temprature", "0"], "unknown option '--temprature'; did you mean --temperature?", 2),
        (["--ckpt_dir", "/nowhere"], "error: ckpt_dir='/nowhere' does not exist", 1),
        (["--ckpt_dir", "--tokenizer_path", "x"], "error: .*: argument --ckpt_dir: expected one argument", 2),
        (["--ckpt_dir", "."], r"error: no checkpoint in ckpt_dir='\.': looked for \*\.pth", 1),
    ],
)
def test_mistakes(runner, options, message, code):
    result = runner.run(example(TEXT), *options)
    assert (result.returncode, result.stdout) == (code, "")
    assert re.search(message, result.stderr)
    assert result.stderr.count("\n") == 1


def test_mistakes_in_the_values(runner, tiny_checkpoint):
    for options, message in (
        (["--temperature", "-1"], "error: temperature=-1 must be a number of at least 0\n"),
        (["--max_seq_len", "9000"], "error: max_seq_len=9000 is over this model's limit of 8192\n"),
        (["--max_batch_size", "0"], "error: max_batch_size=0 must be a whole number of at least 1\n"),
        (["--top_p", "2"], "error: top_p=2 must be a number between 0 and 1\n"),
        (["--quantize", "int5"], "error: quantize='int5' must be one of ['int8', 'int4'], or None\n"),
    ):
        result = runner.run(example(TEXT), "--ckpt_dir", tiny_checkpoint, *options)
        assert (result.returncode, result.stderr) == (1, message)
