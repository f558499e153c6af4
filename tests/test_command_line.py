"""The command line: help, versions and mistakes are told without importing what only the commands need."""

import inspect
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import llama
from llama.__main__ import BENCH, BENCHMARKS, COMMANDS


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([], 0, "COMMAND is one of the following"),
        (["--help"], 0, "COMMAND is one of the following"),
        (["--version"], 0, "llama "),
        (["chta"], 2, "did you mean chat?"),
        (["--ckpt_dir", "x"], 2, "must come after a command"),
    ],
)
def test_torch_is_imported_by_commands_only(args, code, message):
    program = f"""
import sys
from llama.__main__ import main
sys.argv = ["llama", *{args}]
try:
    main()
finally:
    sys.exit("torch was imported" if "torch" in sys.modules else None)
"""
    # The program's own exit code is lost, but not what it prints.
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert message in result.stdout + result.stderr
    finished = subprocess.run([sys.executable, "-m", "llama", *args], capture_output=True, text=True, cwd=ROOT)
    assert finished.returncode == code
    assert finished.stdout + finished.stderr == result.stdout + result.stderr


def test_the_version_is_the_packages():
    result = subprocess.run([sys.executable, "-m", "llama", "--version"], capture_output=True, text=True, cwd=ROOT)
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert result.stdout == f"llama {version}\n"


def test_summaries_are_those_of_the_commands(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    for name, command in (COMMANDS | {"bench": BENCH}).items():
        docstring = inspect.getdoc(command.load())
        assert " ".join(docstring.partition("\n\n")[0].split()) == command.summary, name


def test_what_the_package_offers():
    """Its names are imported when they are first used; so are the modules that the reference's package has."""
    program = """
import sys
import llama
assert "torch" not in sys.modules
assert set(llama.__all__) <= set(dir(llama))
assert llama.model.Transformer is llama.Transformer
assert llama.generation.Llama is llama.Llama
assert llama.tokenizer.Tokenizer is llama.Tokenizer
from llama import *
assert all(name in globals() for name in llama.__all__)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
    with pytest.raises(AttributeError, match="module 'llama' has no attribute 'Lama'"):
        llama.Lama  # noqa: B018
