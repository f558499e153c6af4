"""The example scripts, as a user runs them."""

import re

import pytest
from conftest import run_python, torchrun

from llama.default_model import default_checkpoint

TEXT, CHAT = "example_text_completion.py", "example_chat_completion.py"


@pytest.fixture(scope="module")
def fetched():
    """The default model is in the cache, so that the examples' time is their own."""
    return default_checkpoint()


@pytest.mark.real
@pytest.mark.parametrize("run", [run_python, lambda *command: torchrun(1, *command)], ids=["python", "torchrun"])
def test_text_completion_with_no_arguments(fetched, run):
    result = run(TEXT)
    assert result.returncode == 0, result.stderr
    answers = re.findall(r"^> (.*?)\n\n====", result.stdout, re.MULTILINE | re.DOTALL)
    assert len(answers) == 4
    assert all(len(answer.split()) > 10 for answer in answers)
    assert result.stdout.startswith("I believe the meaning of life is\n> ")
    assert "GB of KV cache" in result.stderr


@pytest.mark.real
@pytest.mark.parametrize("run", [run_python, lambda *command: torchrun(1, *command)], ids=["python", "torchrun"])
def test_chat_completion_with_no_arguments(fetched, run):
    result = run(CHAT)
    assert result.returncode == 0, result.stderr
    turns = re.findall(r"^(System|User|Assistant): (.+)", result.stdout, re.MULTILINE)
    assert [who for who, _ in turns].count("Assistant") == 5  # one of them is in a dialog
    assert "Rome" in turns[-1][1]


@pytest.mark.parametrize("example", [TEXT, CHAT])
def test_a_model_of_ones_own(tiny_checkpoint, example):
    options = ["--ckpt_dir", tiny_checkpoint, "--tokenizer_path", tiny_checkpoint / "tokenizer.model"]
    options += ["--temperature", "0.9", "--top_p", "0.8", "--max_seq_len", "512", "--max_gen_len", "5"]
    result = run_python(example, *options, "--max_batch_size", "3")
    assert result.returncode == 0, result.stderr
    assert "(max_batch_size=3 x max_seq_len=512)" in result.stderr
    assert result.stdout.count("=====\n") == 4


@pytest.mark.parametrize("example", [TEXT, CHAT])
def test_streamed_it_is_the_same(tiny_checkpoint, example):
    options = ["--ckpt_dir", tiny_checkpoint, "--temperature", "0", "--max_gen_len", "20", "--max_seq_len", "512"]
    whole = run_python(example, *options)
    streamed = run_python(example, *options, "--stream")
    assert streamed.returncode == 0, streamed.stderr
    assert streamed.stdout == whole.stdout
    assert streamed.stdout.count("=====\n") == 4


@pytest.mark.parametrize("example", [TEXT, CHAT])
def test_help(example):
    result = run_python(example, "--help")
    assert result.returncode == 0
    shown = result.stdout + result.stderr
    for option in [
        "ckpt_dir",
        "tokenizer_path",
        "temperature",
        "top_p",
        "max_seq_len",
        "max_gen_len",
        "max_batch_size",
    ]:
        assert f"--{option}=" in shown
    assert "With no arguments this runs SmolLM2-135M-Instruct" in shown


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        (["--temprature", "0"], "has no use for '--temprature'; did you mean --temperature?", 2),
        (["--ckpt_dir", "/nowhere"], "error: ckpt_dir='/nowhere' does not exist", 1),
        (
            ["--ckpt_dir", "--tokenizer_path", "x"],
            "error: .*: --ckpt_dir needs a value",
            2,
        ),
        (["--ckpt_dir", "."], r"error: no checkpoint in ckpt_dir='\.': looked for \*\.pth", 1),
    ],
)
def test_mistakes(options, message, code):
    """One clear line, at once, and no traceback."""
    result = run_python(TEXT, *options)
    assert result.returncode == code
    assert re.search(message, result.stderr)
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_mistakes_in_the_values(tiny_checkpoint):
    for options, message in (
        (["--temperature", "-1"], "error: temperature=-1 must be a number of at least 0"),
        (["--max_seq_len", "9000"], "error: max_seq_len=9000 is over this model's limit of 8192"),
        (["--max_batch_size", "0"], "error: max_batch_size=0 must be a whole number of at least 1"),
        (["--top_p", "2"], "error: top_p=2 must be between 0 and 1"),
    ):
        result = run_python(TEXT, "--ckpt_dir", tiny_checkpoint, *options)
        assert (result.returncode, result.stderr.splitlines()[-1]) == (1, message)
