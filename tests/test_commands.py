"""`llama complete`, `llama info`, and what all commands have in common.

Most tests run a command in this process; those marked slow start one, to see what only that shows.
"""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from conftest import ROOT, tiny_model, torchrun, write_gguf, write_meta_checkpoint
from run_command import Runner, Stdin, record_builds
from test_real_shapes import MODELS, model  # noqa: F401 - a fixture: the settings of published models

from llama import Llama
from llama.cli.info import info
from llama.default_model import default_checkpoint
from llama.device import dtype_name
from llama.log import EscapingFormatter
from llama.memory import footprint
from llama.quantized import QUANTIZATIONS

COMMANDS = ("chat", "complete", "inspect", "info", "convert", "finetune", "completion")
GREEDY = ["--temperature", "0", "--max_gen_len", "9", "--dtype", "float32"]


@pytest.fixture
def runner(monkeypatch, capsys):
    return Runner(monkeypatch, capsys)


def start_llama(*args, stdin="", **environment) -> subprocess.CompletedProcess:
    """Run `llama` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "llama", *map(str, args)],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


def test_help_lists_every_command(runner):
    result = runner.llama()
    assert (result.returncode, result.stderr) == (0, "")
    for name in COMMANDS:
        assert re.search(rf"^    {name}\s+[A-Z]", result.stdout, re.MULTILINE)
    assert runner.llama("--help") == result


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(runner, name):
    result = runner.llama(name, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"usage: llama {name} ")
    options = re.findall(r"^  (-\w(?: [A-Z_]+)?, )?--(\w+)", result.stdout, re.MULTILINE)
    assert len(options) >= (2 if name == "completion" else 4)
    assert "_ " not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    for args in (["-h"], ["--ckpt_dir", "x", "-h"], ["--unknown", "-h"], ["x", "y", "z", "--help"]):
        assert runner.llama(name, *args) == result


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("complete", "[TEXT]"),
        ("inspect", "[TEXT]"),
        ("chat", "[CKPT_DIR]"),
        ("info", "[CKPT_DIR]"),
        ("convert", "FROM TO"),
    ],
)
def test_the_usage_line_has_what_needs_no_name(runner, name, arguments):
    assert runner.llama(name, "--help").stdout.startswith(f"usage: llama {name} {arguments} [options]\n")


@pytest.mark.slow
def test_it_is_installed_as_llama():
    result = subprocess.run(["llama", "info", "--help"], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "usage: llama info [CKPT_DIR] [options]\n\nDescribe a checkpoint" in result.stdout


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["chta"], 2, "error: llama: 'chta' is not a command; did you mean chat?"),
        (["--ckpt_dir", "x"], 2, "error: llama: --ckpt_dir must come after a command; see --help"),
        (["--verson"], 2, "error: llama: unknown option '--verson'; did you mean --version?"),
        (["--hepl", "chat"], 2, "error: llama: unknown option '--hepl'; did you mean --help?"),
        (["complete", "hi", "--temprature", "0"], 2, "error: llama complete: unknown option '--temprature'; did you"),
        (["complete", "hi", "--top_p", "2"], 1, "error: top_p=2 must be a number between 0 and 1"),
        (["complete", "--ckpt_dir", "--top_p", "1"], 2, "error: llama complete: argument --ckpt_dir: expected one"),
        (["complete", "The", "sun"], 2, "error: llama complete: unexpected argument 'sun'; see --help"),
        (["complete", "hi", "--ckpt_dir", "/nowhere"], 1, "error: ckpt_dir='/nowhere' does not exist"),
        (["complete", "hi", "--quantize", "int5"], 1, "error: quantize='int5' must be one of ['int8', 'int4']"),
        (["complete", "hi", "--quantize", "--compile"], 2, "error: llama complete: argument -q/--quantize: expected"),
        (["complete", "hi", "--seed", "x"], 1, "error: seed='x' must be a whole number"),
        (["complete", "hi", "--prompt_lookup", "101"], 1, "error: prompt_lookup=101 must be a whole number between 1"),
        (["complete", "hi", "--draft", "/nowhere"], 1, "error: draft='/nowhere' does not exist"),
        (
            ["complete", "hi", "--ckpt_dir", "/nowhere", "--draft", ".", "--prompt_lookup", "3"],
            1,
            "error: tokens are proposed by prompt_lookup or by draft: give one of them",
        ),
        (["info", ".", "--max_batch_size", "x"], 1, "error: max_batch_size='x' must be a whole number between 1 and 2"),
        (["info", ".", "--dtype", "int3"], 1, "error: dtype='int3' must be one of ['float32', 'float16', 'bfloat16']"),
        (["info", ".", "--quantize", "int5"], 1, "error: quantize='int5' must be one of ['int8', 'int4']"),
        (["info", "/nowhere"], 1, "error: ckpt_dir='/nowhere' does not exist"),
        (["complete", "hi", "-t", "0"], 2, "error: llama complete: unknown option '-t'; see --help"),
        (
            ["complete", "hi", "--seed", "1", "--seed=2"],
            2,
            "error: llama complete: --seed is given 2 times; give it once",
        ),
        (["complete", "hi", "--json=no"], 2, "error: llama complete: argument -j/--json: ignored explicit argument"),
        (
            ["complete", "hi", "--stop", "a", "--stop="],
            1,
            "error: stop=('a', '') must be a string or a list of strings",
        ),
        (["complete", "hi", "--max_seq_len", "x"], 1, "error: max_seq_len='x' must be a whole number of at least 1"),
        (["info", ".", "--nproc", "9" * 400], 1, "error: nproc=99"),
        (["convert", "/nowhere"], 2, "error: llama convert: --to is missing; see --help"),
        (["convert", "/nowhere", "/x"], 1, "error: ckpt_dir='/nowhere' does not exist"),
        (["convert", "/nowhere", "/x", "--dtype", "int3"], 1, "error: dtype='int3' must be one of"),
        (["completion", "fish"], 1, "error: shell='fish' must be one of ['bash', 'zsh']"),
        pytest.param(["complete"], 1, "error: the text is empty, and this model needs", marks=pytest.mark.real),
        pytest.param(
            ["info", "--nproc", "2"], 1, "error: this model can't be split over 2 processes", marks=pytest.mark.real
        ),
    ],
)
def test_a_mistake_is_reported_in_one_line(runner, args, code, message):
    result = runner.llama(*args)
    assert (result.returncode, result.stderr.count("\n"), result.stdout.strip()) == (code, 1, ""), result.stderr
    assert result.stderr.startswith(message)


@pytest.mark.slow
def test_a_mistake_in_a_process_of_its_own():
    result = start_llama("complete", "hi", "--ckpt_dir", "/nowhere")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert result.stderr.startswith("error: ckpt_dir='/nowhere' does not exist")


def test_debug_adds_a_traceback(runner):
    result = runner.llama("info", "/nowhere", "--debug")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ckpt_dir='/nowhere' does not exist")


def test_an_unexpected_error_is_one_line_too(runner):
    def main() -> None:
        [][1]

    result = runner.run(main)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "error: IndexError: list index out of range (--debug shows where)\n"


def test_a_parameter_named_after_a_keyword(runner):
    """It has no underscore on the command line; and values may be given in every usual way."""
    calls = []

    def main(from_: str, to: str = "x", flag: bool = False, max_count: int | None = None) -> None:
        calls.append((from_, to, flag, max_count))

    for args, values in (
        (["--from", "a"], ("a", "x", False, None)),
        (["--from=a", "--to", "y"], ("a", "y", False, None)),
        (["a", "--flag", "--max_count", "3", "y"], ("a", "y", True, 3)),
        (["--flag", "a", "-m3"], ("a", "x", True, 3)),
        (["--max-count=3", "a"], ("a", "x", False, 3)),
        (["a", "--flag", "--flag=False"], ("a", "x", False, None)),
        (["--max-count", "-3", "--", "-a", "--to"], ("-a", "--to", False, -3)),
        (["- a", "-"], ("- a", "-", False, None)),
    ):
        assert runner.run(main, *args) == (0, "", "")
        assert calls.pop() == values
    help_text = runner.run(main, "--help").stdout
    assert "from_" not in help_text
    assert "FROM_" not in help_text


def test_complete_as_json(runner, tiny_checkpoint):
    llama = Llama.build(tiny_checkpoint, None, 96, 1, dtype=torch.float32)
    # A text that looks like a number stays as it is; standard input loses its last newline and no other.
    for args, stdin, prompt in ((["1984"], "", "1984"), ([], " the user\nin\n\n", " the user\nin\n")):
        options = ["--ckpt_dir", tiny_checkpoint, *GREEDY]
        printed = json.loads(runner.llama("complete", *args, "--json", *options, stdin=stdin).stdout)
        (expected,) = llama.text_completion([prompt], 0, max_gen_len=9, logprobs=True, details=True)
        assert printed.pop("prompt") == prompt
        assert printed["logprobs"] == pytest.approx(expected["logprobs"], abs=1e-5)
        assert printed | {"logprobs": None} == expected | {"logprobs": None}
        assert len(printed["logprobs"]) == printed["completion_tokens"] == 9
        plain = runner.llama("complete", *args, *options, stdin=stdin)
        assert plain.stdout == expected["generation"] + "\n"


def test_the_likeliest_tokens_in_json(runner, tiny_checkpoint):
    options = ["--ckpt_dir", tiny_checkpoint, *GREEDY, "--top_logprobs"]
    printed = json.loads(runner.llama("complete", "the user", "--json", *options, 3).stdout)
    for token, logprob, (first, *others) in zip(*map(printed.get, ("tokens", "logprobs", "top_logprobs")), strict=True):
        assert (first["token"], first["logprob"]) == (token, pytest.approx(logprob, abs=1e-5))
        assert len(others) == 2
    result = runner.llama("complete", "the user", *options, 3)
    assert (result.returncode, result.stderr) == (1, "error: top_logprobs=3 are printed as JSON only: add --json\n")
    result = runner.llama("complete", "the user", "--json", *options, -1)
    assert result.stderr == "error: top_logprobs=-1 must be a whole number of at least 0\n"


def write_circular(folder: Path, source: Path) -> Path:
    """Copy a checkpoint, but for layers that add nothing: the next token depends on the last one alone, so that greedy
    texts soon repeat."""
    shutil.copytree(source, folder)
    weights = torch.load(folder / "consolidated.00.pth")
    for name, weight in weights.items():
        if name.endswith(("wo.weight", "w2.weight")):
            weight.zero_()
    torch.save(weights, folder / "consolidated.00.pth")
    return folder


def test_proposed_tokens(runner, tmp_path, tiny_checkpoint):
    """The same text and logprobs as without; in JSON, how many were proposed and accepted."""
    circular = write_circular(tmp_path / "circular", tiny_checkpoint)
    args = ["complete", "the user", "--ckpt_dir", circular, *GREEDY[:2], "--max_gen_len", 80, "--dtype", "float32"]
    plain = json.loads(runner.llama(*args, "--json").stdout)
    counts = []
    for proposer in (["--prompt_lookup", 3], ["--draft", circular], ["--draft", tiny_checkpoint]):
        printed = json.loads(runner.llama(*args, *proposer, "--json").stdout)
        counts.append((printed.pop("proposed_tokens"), printed.pop("accepted_tokens")))
        assert printed["logprobs"] == pytest.approx(plain["logprobs"], abs=1e-4)
        assert printed | {"logprobs": None} == plain | {"logprobs": None}
        assert runner.llama(*args, *proposer).stdout == plain["generation"] + "\n"
    lookup, same_model, other_model = counts
    assert lookup[1] > 20
    assert same_model[0] == same_model[1] > 60
    assert 0 <= other_model[1] < other_model[0]


def test_a_draft_leaves_the_seed_as_it_is(runner, tiny_checkpoint):
    args = ["complete", "the user", "--ckpt_dir", tiny_checkpoint, "--draft", tiny_checkpoint, "--dtype", "float32"]
    args += ["--temperature", 2, "--max_gen_len", 30]
    results = [runner.llama(*args, *seed).stdout for seed in (["--seed", 5], ["--seed", 5], ["--seed", 6], [], [])]
    assert results[0] == results[1]
    assert len(set(results)) == 4
    llama, draft = (Llama.build(tiny_checkpoint, None, 96, 1, seed=5, dtype=torch.float32) for _ in range(2))
    (expected,) = llama.text_completion(["the user"], 2, max_gen_len=30, draft_model=draft)
    assert results[0] == expected["generation"] + "\n"


@pytest.mark.parametrize("command", ["chat", "complete"])
def test_a_draft_is_built_as_the_model_is(runner, tiny_checkpoint, monkeypatch, caplog, command):
    builds = record_builds(monkeypatch)
    args = [
        command,
        "--ckpt_dir",
        tiny_checkpoint,
        "--draft",
        tiny_checkpoint,
        "--max_gen_len",
        2,
        "--max_seq_len",
        500,
    ]
    with caplog.at_level(logging.INFO, logger="llama"):
        result = runner.llama(*args, "--dtype", "float16", "--quantize", "int8", "--compile", stdin="the user\n")
    assert result.returncode == 0, result.stderr
    assert builds == 2 * [("int8", True)]
    assert caplog.text.count("(max_batch_size=1 x max_seq_len=500) in float16 on") == 2


@pytest.mark.parametrize("command", ["chat", "complete"])
def test_a_draft_that_does_not_fit_is_refused_before_a_model_is_loaded(
    runner, monkeypatch, tmp_path, tiny_checkpoint, without_bos, command
):
    monkeypatch.setattr("llama.cli.build.Llama", None)
    no_tokenizer = shutil.copytree(tiny_checkpoint, tmp_path / "no tokenizer")
    (no_tokenizer / "tokenizer.model").unlink()
    no_weights = tmp_path / "no weights"
    no_weights.mkdir()
    for draft, max_seq_len, message in (
        (without_bos, 96, "it has another tokenizer: take a model of the same family, whose ids mean the same"),
        (without_bos, 129, "max_seq_len=129 is over this model's limit of 128"),
        (no_tokenizer, 96, f"its tokenizer '{no_tokenizer / 'tokenizer.model'}' does not exist; "),
        (no_weights, 96, f"no checkpoint in draft='{no_weights}': looked for "),
    ):
        args = [command, "--ckpt_dir", tiny_checkpoint, "--draft", draft, "--max_seq_len", max_seq_len]
        result = runner.llama(*args, stdin="the user\n")
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
        assert result.stderr.startswith(f"error: draft={str(draft)!r}: {message}")
        assert "ckpt_dir" not in result.stderr
        assert "tokenizer_path" not in result.stderr


@pytest.mark.parametrize("command", ["chat", "complete"])
def test_the_context_is_one_that_the_draft_has_too(runner, tmp_path, caplog, command):
    longer, shorter = (
        write_gguf(tmp_path / f"{size}.gguf", tiny_model(), **{"llama.context_length": size}) for size in (256, 128)
    )
    for checkpoint, draft in ((longer, shorter), (shorter, longer)):
        caplog.clear()
        args = [command, "--ckpt_dir", checkpoint, "--draft", draft, "--max_gen_len", 2]
        with caplog.at_level(logging.INFO, logger="llama"):
            result = runner.llama(*args, stdin="the user\n")
        assert result.returncode == 0, result.stderr
        assert caplog.text.count("(max_batch_size=1 x max_seq_len=128)") == 2


@pytest.mark.parametrize("command", ["chat", "complete"])
def test_help_says_which_options_count_for_the_draft_too(runner, command):
    shown = " ".join(runner.llama(command, "--help").stdout.split())
    for option, next_option in (("--dtype", "--quantize"), ("--quantize", "--compile"), ("--compile", "--prompt")):
        assert re.search(rf" {option} .* counts for draft, too (-\w .*)?{next_option}", shown), option
    assert "maximum if that is smaller, or draft's" in shown


def test_several_stop_strings(runner, tiny_checkpoint):
    options = ["--ckpt_dir", tiny_checkpoint, *GREEDY[:2], "--dtype", "float32"]
    whole = runner.llama("complete", "the user", *options, "--max_gen_len", 40).stdout.removesuffix("\n")
    first, second = whole[9:11], whole[5:7]
    end = min(whole.index(first), whole.index(second))
    for stops in ((first, second), (second, first)):
        result = runner.llama("complete", *options, f"--stop={stops[0]}", f"--stop={stops[1]}", "--", "the user")
        assert result.stdout == whole[:end] + "\n"


SLOW_PREFILL = """
import time
from types import SimpleNamespace
import torch
from llama import Llama
from llama.cli import complete, run

class Model:  # continues n with n + 1
    params = SimpleNamespace(max_batch_size=1, max_seq_len=32)

    def forward(self, tokens, start_pos):
        time.sleep(1.5 if tokens.shape[1] > 1 else 0)
        return 20.0 * torch.nn.functional.one_hot(tokens + 1, 50).float()

class Tokenizer:
    pad_id, eos_id, stop_tokens = -1, 2, {2}
    encode = staticmethod(lambda s, bos, eos: [1] + [int(number) for number in s.split()])
    decode = staticmethod(lambda t: " ".join(map(str, t)))

complete.build_llama = lambda *args, **options: Llama(Model(), Tokenizer())
for _ in range(2):
    run(complete.complete, args=["3 4 5", "--max_gen_len", "4", "--temperature", "0"])
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_a_long_prompt_at_a_terminal():
    """A line says that it is prefilled, until the first piece, or Ctrl-C."""
    import pexpect

    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = pexpect.spawn(sys.executable, ["-c", SLOW_PREFILL], env=environment, encoding="utf-8", timeout=60)
    status = r"\rprefilling the prompt of 4 tokens \.\.\."
    process.expect(f"^{status}\r +\r6 7 8 9\r\n{status}")
    process.sendintr()
    process.expect(pexpect.EOF)
    process.close()
    assert re.fullmatch(r"(\^C)?\r +\r\r\n", process.before)
    assert process.exitstatus == 130


@pytest.fixture
def without_bos(tmp_path):
    """A checkpoint whose texts don't begin with a token of their own, so that an empty one is no prompt."""
    return write_gguf(tmp_path / "model.gguf", tiny_model())


@pytest.mark.parametrize("command", ["complete", "inspect"])
def test_what_is_no_prompt_is_refused_before_the_model_is_loaded(
    runner, monkeypatch, tiny_checkpoint, without_bos, command
):
    result = runner.llama(command, "", "--ckpt_dir", tiny_checkpoint, "--max_gen_len", "2")
    assert result.returncode == 0, result.stderr  # its texts have one
    monkeypatch.setattr("llama.cli.build.Llama", None)
    for args in ([""], []):
        for stdin in ("", "\n"):
            result = runner.llama(command, *args, "--ckpt_dir", without_bos, stdin=stdin)
            assert (result.returncode, result.stdout) == (1, "")
            assert result.stderr.startswith("error: the text is empty, and this model needs at least one token")
    result = runner.llama(command, "x" * 97, "--ckpt_dir", without_bos, "--max_seq_len", "96")
    assert result.stderr.startswith("error: the text has 97 tokens, but max_seq_len=96: shorten it")


@pytest.mark.parametrize("args", [["chat"], ["complete", "x"], ["inspect", "x"], ["info"]])
def test_closed_output_is_refused_before_the_model_is_loaded(runner, monkeypatch, args):
    monkeypatch.setattr("llama.cli.build.open_checkpoint", None)
    monkeypatch.setattr(sys, "stdout", None)
    result = runner.llama(*args, "--ckpt_dir", "/nowhere")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith("error: standard output is closed")


def test_complete_with_quantized_weights(runner, tiny_checkpoint):
    for quantize in QUANTIZATIONS:
        result = runner.llama("complete", "the user", "--ckpt_dir", tiny_checkpoint, *GREEDY, "--quantize", quantize)
        llama = Llama.build(tiny_checkpoint, None, 96, 1, dtype=torch.float32, quantize=quantize)
        (expected,) = llama.text_completion(["the user"], 0, max_gen_len=9)
        assert (result.returncode, result.stdout) == (0, expected["generation"] + "\n"), result.stderr


@pytest.mark.parametrize("command", ["chat", "complete", "inspect"])
def test_how_weights_are_kept_and_whether_steps_are_compiled(runner, tiny_checkpoint, monkeypatch, command):
    builds = record_builds(monkeypatch)
    options = ["--ckpt_dir", tiny_checkpoint, "--max_gen_len", "2", "--max_seq_len", "512"]
    assert runner.llama(command, *options, stdin="the user\n").returncode == 0
    compiles = ["--compile"] if command != "inspect" else []  # which decodes a few tokens at most
    result = runner.llama(command, *options, "--quantize", "int8", *compiles, stdin="the user\n")
    assert result.returncode == 0, result.stderr
    assert builds == [(None, False), ("int8", bool(compiles))]


@pytest.mark.slow
def test_complete_in_a_process_of_its_own(tiny_checkpoint):
    options = ["--ckpt_dir", tiny_checkpoint, *GREEDY]
    piped = start_llama("complete", *options, stdin="the user\n")
    (expected,) = Llama.build(tiny_checkpoint, None, 96, 1, dtype=torch.float32).text_completion(
        ["the user"], 0, max_gen_len=9
    )
    assert (piped.returncode, piped.stdout) == (0, expected["generation"] + "\n"), piped.stderr
    assert "loaded" in piped.stderr  # the log


def test_arguments_are_taken_as_they_are_typed(runner, tmp_path, tiny_checkpoint, monkeypatch, caplog):
    """A path with a comma and a hash, a text after a flag, a number as text; and a model made for a short context."""
    folder = tmp_path / "1,2#3"
    folder.mkdir()
    for file in tiny_checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps(params | {"max_position_embeddings": 100}))
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO, logger="llama"):
        result = runner.llama("complete", "--json", "1984", "--ckpt_dir", "1,2#3", *GREEDY)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["prompt"] == "1984"
    assert "max_seq_len=100" in caplog.text


def test_input_that_is_not_utf_8(runner, tiny_checkpoint):
    result = runner.llama("complete", "--json", "--ckpt_dir", tiny_checkpoint, *GREEDY, stdin=Stdin(b"caf\xe9"))
    assert json.loads(result.stdout)["prompt"] == "caf\ufffd"
    argument = runner.llama("complete", "caf\udce9", "--json", "--ckpt_dir", tiny_checkpoint, *GREEDY)
    assert argument.stdout == result.stdout


@pytest.mark.slow
def test_names_in_files_cannot_control_the_terminal(tmp_path, tiny_checkpoint):
    for file in tiny_checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = torch.load(tmp_path / "consolidated.00.pth")
    torch.save(weights | {"x\x1b]0;owned\x07": torch.zeros(2)}, tmp_path / "consolidated.00.pth")
    params = json.loads((tmp_path / "params.json").read_text())
    (tmp_path / "params.json").write_text(json.dumps(params | {"y\x1b[2J": 1}))
    result = start_llama("complete", "the", "--ckpt_dir", tmp_path)
    assert result.returncode == 1
    assert "␛]0;owned␇" in result.stderr
    assert r"['y\x1b[2J']" in result.stderr
    assert "\x1b" not in result.stderr


def test_names_of_files_cannot_control_the_terminal(runner, tmp_path, tiny_checkpoint):
    """Not in what `info` and `inspect` print, nor in errors and their tracebacks."""
    folder = tmp_path / "x\x1b]0;owned\x07\x9b2J"
    folder.mkdir()
    for file in tiny_checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    for args in (
        ["info", folder],
        ["inspect", "the", "--ckpt_dir", tiny_checkpoint, "--html", folder / "page.html"],
        ["info", folder / "nowhere", "--debug"],
        ["info", f"--{folder}"],
        [str(folder)],
    ):
        result = runner.llama(*args)
        printed = result.stdout + result.stderr
        assert "x␛]0;owned␇\\x9b2J" in printed or r"x\x1b]0;owned\x07\x9b2J" in printed
        assert not re.search("[\x1b\x07\x9b]", printed)


def test_control_characters_in_json(runner, tiny_checkpoint):
    prompt = "a\x1b[2J\x7f\x9b2J é"
    result = runner.llama("complete", prompt, "--json", "--ckpt_dir", tiny_checkpoint, *GREEDY)
    assert json.loads(result.stdout)["prompt"] == prompt
    assert "é" in result.stdout
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", result.stdout)


def test_log_messages_are_escaped():
    record = logging.LogRecord("llama", logging.INFO, "", 0, "%s", ("y\x1b[2J",), None)
    assert EscapingFormatter("%(message)s").format(record) == "y␛[2J"


@pytest.mark.slow
def test_complete_under_torchrun(runner, tiny_checkpoint):
    args = ["complete", "the user", "--json", "--ckpt_dir", tiny_checkpoint, *GREEDY]
    split = torchrun(2, "-m", "llama", *args)
    assert split.returncode == 0, split.stderr
    expected, printed = json.loads(runner.llama(*args).stdout), json.loads(split.stdout)
    assert printed["tokens"] == expected["tokens"]
    assert printed["logprobs"] == pytest.approx(expected["logprobs"], abs=1e-4)


@pytest.mark.slow
def test_a_pipe_that_is_closed_early(tiny_checkpoint):
    command = f"{sys.executable} -m llama complete the --ckpt_dir {tiny_checkpoint} --max_gen_len 3000 --temperature 0"
    result = subprocess.run(
        ["bash", "-c", f"{command} | head -c 20"], capture_output=True, text=True, cwd=ROOT, timeout=100
    )
    assert "Traceback" not in result.stderr
    assert "error" not in result.stderr
    assert len(result.stdout) >= 5


def by_first_column(text: str) -> dict[str, str]:
    """The lines that `llama info` prints, by their names."""
    return {line[:14].strip(): line[14:].strip() for line in text.splitlines()}


def test_info_on_every_layout(runner, tmp_path, llama3_path):
    def describe(*args) -> dict[str, str]:
        result = runner.llama("info", *args)
        assert result.returncode == 0, result.stderr
        return by_first_column(result.stdout)

    small = tiny_model()
    write_gguf(tmp_path / "model.gguf", small)
    assert runner.llama("convert", tmp_path / "model.gguf", tmp_path / "hf", "--layout", "hf").returncode == 0
    parameters = sum(weight.numel() for weight in small.parameters())
    for path, layout in (
        (tmp_path / "model.gguf", "GGUF, F32 100%"),
        (tmp_path / "hf", "Hugging Face, 1 file of weights"),
    ):
        printed = describe(path, "--dtype", "float32", "--max_seq_len", 64, "--max_batch_size", 3)
        chat_format = "ChatML, as its tokens tell: it comes with no template"
        assert (printed["layout"], printed["chat format"]) == (layout, chat_format)
        assert printed["parameters"] == f"{parameters:,}"
        assert printed["weights"].startswith(f"{4 * parameters:,} bytes")
        assert printed["KV cache"].startswith(f"{2 * 2 * 3 * 2 * 64 * 32 * 4:,} bytes")
        assert printed["tokenizer"] == "byte-level BPE, 320 tokens"
        assert printed["shape"].startswith("dim 128, 2 layers, 4 heads of 32 over 2 kv heads, feed-forward width")
        assert printed["this machine"].endswith("it fits")
    write_gguf(tmp_path / "quantized.gguf", small, gguf.GGMLQuantizationType.Q4_0)  # but the norms
    assert describe(tmp_path / "quantized.gguf", "--max_seq_len", 64)["layout"] == "GGUF, Q4_0 100%"
    meta = write_meta_checkpoint(tmp_path / "meta", tiny_model(vocab_size=524), llama3_path, 2)
    printed = describe(meta, "--nproc", 2, "--max_seq_len", 64)
    chat_format = "Llama 3, as its tokens tell: it comes with no template"
    assert (printed["layout"], printed["chat format"]) == ("Meta, 2 files of weights", chat_format)
    assert "on each of 2 processes" in printed["memory"]
    printed = describe(meta, "--max_seq_len", 8192, "--max_batch_size", 10**7)
    assert "it does not fit: " in printed["this machine"]


def test_info_as_json(runner, tmp_path, llama3_path, monkeypatch):
    """Everything that info prints, each value by itself."""
    monkeypatch.setattr("llama.cli.info.free_memory", lambda device: 10**9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    small = tiny_model(vocab_size=524)
    folder = write_meta_checkpoint(tmp_path / "meta\x1b", small, llama3_path, 2)
    options = ["--dtype", "float32", "--max_seq_len", 64, "--max_batch_size", 3, "--nproc", 2]
    result = runner.llama("info", folder, "--json", *options)
    assert (result.returncode, result.stderr, result.stdout.count("\n")) == (0, "", 1)
    assert "\x1b" not in result.stdout
    expected = footprint(folder, dtype=torch.float32, max_seq_len=64, max_batch_size=3, model_parallel_size=2)
    assert json.loads(result.stdout) == {
        "checkpoint": str(folder),
        "layout": "Meta",
        "weight_files": 2,
        "tensor_types": None,
        "family": "Llama architecture",
        "dim": 128,
        "n_layers": 2,
        "n_heads": 4,
        "head_dim": 32,
        "n_kv_heads": 2,
        "ffn_dim": 192,
        "vocab_size": 524,
        "tie_embeddings": False,
        "max_position_embeddings": 8192,
        "rope_theta": 500000,
        "rope_scaling_factor": None,
        "parameters": sum(weight.numel() for weight in small.parameters()),
        "tokenizer": "byte-level BPE",
        "tokenizer_error": None,
        "n_words": 524,
        "stop_tokens": {"<|end_of_text|>": 269, "<|eot_id|>": 277},
        "chat_format": "Llama 3, as its tokens tell: it comes with no template",
        "chat_format_error": None,
        "dtype": "float32",
        "quantize": None,
        "max_seq_len": 64,
        "max_batch_size": 3,
        "nproc": 2,
        "weight_bytes": expected.weight_bytes,
        "cache_bytes": expected.cache_bytes,
        "total_bytes": expected.weight_bytes + expected.cache_bytes,
        "device": "cpu",
        "free_bytes": [10**9],
        "fits": True,
    }
    write_gguf(tmp_path / "model.gguf", small, gguf.GGMLQuantizationType.Q4_0)  # but the norms
    printed = json.loads(runner.llama("info", tmp_path / "model.gguf", "--json").stdout)
    assert printed["max_seq_len"] == 128  # the model's own maximum
    assert list(printed["tensor_types"]) == ["Q4_0", "F32"]
    assert sum(printed["tensor_types"].values()) == pytest.approx(1)
    (folder / "tokenizer.model").write_text("no tokenizer")
    printed = json.loads(runner.llama("info", folder, "--json", "--max_batch_size", 10**6).stdout)
    assert (printed["tokenizer"], printed["stop_tokens"], printed["chat_format"]) == (None, None, None)
    assert "tokenizer.model" in printed["tokenizer_error"]
    assert (printed["max_seq_len"], printed["fits"]) == (4096, False)
    unusable = by_first_column(runner.llama("info", folder).stdout)["tokenizer"]
    assert unusable == f"unusable: {printed['tokenizer_error']}".replace("\x1b", "␛").strip()


@pytest.mark.parametrize("quantize", QUANTIZATIONS)
def test_info_on_a_quantized_model(runner, tmp_path, llama3_path, monkeypatch, quantize):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {}, raising=False)  # float32 without quantize
    meta = write_meta_checkpoint(tmp_path, tiny_model(vocab_size=524), llama3_path)
    for options, dtype in (([], torch.bfloat16), (["--dtype", "float32"], torch.float32)):
        for nproc in (1, 2):
            args = ["--ckpt_dir", meta, "--quantize", quantize, "--max_seq_len", 64, "--nproc", nproc, *options]
            result = runner.llama("info", *args)
            assert result.returncode == 0, result.stderr
            printed = by_first_column(result.stdout)
            options_of_footprint = {"max_seq_len": 64, "max_batch_size": 1, "model_parallel_size": nproc}
            expected = footprint(meta, dtype=dtype, quantize=quantize, **options_of_footprint)
            assert printed["memory"].startswith(f"{dtype_name(dtype)}, quantize={quantize}, max_seq_len=64")
            assert printed["weights"].startswith(f"{expected.weight_bytes:,} bytes")
            assert printed["total"].startswith(f"{expected.weight_bytes + expected.cache_bytes:,} bytes")


TINY = {
    "params.json": {"dim": 128, "n_layers": 2, "n_heads": 4, "multiple_of": 64, "head_dim": 32},
    "config.json": {"model_type": "llama", "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"intermediate_size": 192, "vocab_size": 320, "head_dim": 32},
}
ABSURD = [
    ("params.json", "n_layers", 10**12),
    ("params.json", "n_heads", 10**12),
    ("params.json", "dim", 2**62),
    ("params.json", "multiple_of", 2**60),
    ("params.json", "max_position_embeddings", 2**62),
    ("config.json", "num_hidden_layers", 5000),
    ("config.json", "vocab_size", 10**15),
    ("config.json", "max_position_embeddings", 10**18),
]


@pytest.mark.parametrize(("file", "name", "size"), ABSURD)
@pytest.mark.timeout(20)
def test_info_on_absurd_sizes(runner, tmp_path, file, name, size):
    """It ends at once, also where all layers would be listed, or each number of processes tried."""
    (tmp_path / file).write_text(json.dumps(TINY[file] | {name: size}))
    for options in ([], ["--nproc", 7], ["--quantize", "int4"], ["--max_seq_len", 2**31, "--max_batch_size", 2**31]):
        result = runner.llama("info", tmp_path, *options)
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
        assert re.match(rf"error: {tmp_path / file}: \w+={size} is larger than that of any model\n", result.stderr)


FAMILIES = {"Llama 2": "Llama 2", "Llama 3 ": "Llama 3", "Llama 3.": "Llama 3.1 or later"}


def test_info_on_published_models(model, capsys):  # noqa: F811
    """From their settings alone; the numbers of parameters are those that their makers publish."""
    name, folder = model
    params, _, parameters = MODELS[name]
    for layout, described in (("meta", "Meta, without weights"), ("hf", "Hugging Face, without weights")):
        info(str(folder / layout), dtype="bfloat16", max_seq_len=4096, max_batch_size=2)
        printed = by_first_column(capsys.readouterr().out)
        assert printed["parameters"] == f"{parameters:,}"
        assert printed["weights"].startswith(f"{2 * parameters:,} bytes")
        kv_heads, head_dim = params.get("n_kv_heads", params["n_heads"]), params["dim"] // params["n_heads"]
        cache_bytes = 2 * params["n_layers"] * 2 * 4096 * kv_heads * head_dim * 2
        assert printed["KV cache"].startswith(f"{cache_bytes:,} bytes")
        assert printed["total"].startswith(f"{2 * parameters + cache_bytes:,} bytes")
        assert printed["layout"] == described
        assert printed["family"] == next(family for start, family in FAMILIES.items() if name.startswith(start))
        assert printed["tokenizer"] == "not found"


COMPLETED = r"""
for line in "$@"; do
    COMP_WORDS=($line) COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    $(complete -p llama | sed 's/.*-F \([^ ]*\) .*/\1/')
    echo "${COMPREPLY[@]}"
done
"""


@pytest.mark.skipif(os.name != "posix", reason="runs bash")
def test_completion_in_bash(runner):
    script = runner.llama("completion", "bash").stdout
    typed = ["llama in", "llama info --max", "llama complete --js", "llama complete text", "llama convert x --layout h"]
    typed += ["llama unknown -", *(f"llama {name} -" for name in COMMANDS)]
    result = subprocess.run(["bash", "-c", script + COMPLETED, "bash", *typed], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    lines = iter(result.stdout.split("\n"))
    assert [next(lines) for _ in range(6)] == ["inspect info", "--max_seq_len --max_batch_size", "--json", "", "", ""]
    for name in COMMANDS:
        shown = re.findall(r"^  (?:-\w(?: [A-Z_]+)?, )?(--\w+)", runner.llama(name, "--help").stdout, re.MULTILINE)
        assert sorted(next(lines).split()) == sorted(shown)
    zsh = runner.llama("completion", "zsh").stdout
    assert zsh.endswith(script)
    assert "bashcompinit" in zsh


@pytest.mark.slow
@pytest.mark.real
def test_the_default_model():
    default_checkpoint()
    described = start_llama("info")
    assert described.returncode == 0, described.stderr
    printed = by_first_column(described.stdout)
    assert printed["layout"] == "GGUF, Q4_1 79%, Q8_0 21%"
    assert printed["parameters"] == "134,515,008"
    assert printed["chat format"] == "the model's own template, from tokenizer.chat_template"
    completed = start_llama("complete", "I believe the meaning of life is", *GREEDY)
    assert completed.stdout == " to find a way to live a life that\n"


@pytest.mark.parametrize(
    ("arguments", "right"),
    [(["complete", "x", "--max-new-tokens=3"], "--max_gen_len"), (["chat", "--model", "x"], "--ckpt_dir")],
)
def test_options_by_the_names_of_other_programs(runner, arguments, right):
    result = runner.llama(*arguments)
    assert (result.returncode, f"did you mean {right}?" in result.stderr) == (2, True)
