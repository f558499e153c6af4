"""The command line: how options are written; help, versions and mistakes, for which torch isn't imported; and how a
program ends whose output is closed or full, or at Ctrl-C."""

import inspect
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, examples
from hypothesis import given
from hypothesis import strategies as st
from run_command import TerminalOutput
from tqdm import tqdm

import llama
from llama.__main__ import COMMANDS
from llama.cli.command_line import bind
from llama.cli.terminal import status_line, to_json
from llama.log import LogHandler


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([], 0, "usage: llama [-h] [--version] COMMAND ..."),
        (["--help"], 0, "usage: llama [-h] [--version] COMMAND ..."),
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
    assert llama.__version__ == version


def test_summaries_are_those_of_the_commands():
    for name, command in COMMANDS.items():
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
assert "__version__" in dir(llama)
from llama import *
assert all(name in globals() for name in llama.__all__)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
    with pytest.raises(AttributeError, match="module 'llama' has no attribute 'Lama'"):
        llama.Lama  # noqa: B018


# How options are written


def program(text: str, second: str = "x", *, stop: str | list[str] | None = None, size: int = 1, flag: bool = False):
    pass


texts = st.text(st.characters(exclude_categories=["Cs"]))


@given(texts, st.none() | texts, st.lists(texts), st.integers() | st.floats(allow_nan=False, allow_infinity=False),
       st.booleans(), st.randoms())  # fmt: skip
@examples(500)
def test_values_arrive_as_they_were_typed(text, second, stops, size, flag, random):
    """In any order, with and without names, whatever is in a text."""
    options = [[f"--stop={stop}"] for stop in stops] + [[f"--size={size}"]]
    options += [[random.choice(["-f", "--flag", "--flag=true", "--flag=True"])]] * flag
    random.shuffle(options)
    named = random.random() < 0.5
    args = [arg for option in options for arg in option] + ([f"--text={text}"] if named else [])
    unnamed = ([] if named else [text]) + ([] if second is None else [second])
    call = bind(program, "program", [*args, "--", *unnamed])
    expected = {"text": text, "size": size} | ({} if second is None else {"second": second})
    expected |= {"stop": [arg.removeprefix("--stop=") for (arg, *_) in options if "--stop" in arg]} if stops else {}
    assert (call.args, call.keywords) == ((), expected | ({"flag": True} if flag else {}))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["x", "-s", "1"], "unknown option '-s'; see --help"),  # it could be --second, --stop or --size
        (["x", "--siz=1"], "unknown option '--siz=1'; did you mean --size?"),
        (["x", "--size", "1", "--size", "2"], "--size is given 2 times; give it once"),
        (["x", "--size"], "argument --size: expected one argument"),
        (["x", "--size", "--flag"], "argument --size: expected one argument"),
        (["x", "--flag=no"], "argument -f/--flag: ignored explicit argument 'no'"),
        (["x", "--flags"], "unknown option '--flags'; did you mean --flag?"),
        (["x", "--sise=2"], "unknown option '--sise=2'; did you mean --size?"),
        (["x", "y", "z"], "unexpected argument 'z'; see --help"),
        (["x", "--text", "y", "z"], "unexpected argument 'z'; see --help"),
        (["x", "-5", "--unknown"], "unknown option '--unknown'; see --help"),
        ([], "--text is missing; see --help"),
        (["\x1b[2J", "y", "\x9b2J"], "unexpected argument '\\x9b2J'; see --help"),
        (["x", "--\x1b[2J"], "unknown option '--\\x1b[2J'; see --help"),
    ],
)
def test_a_wrong_command_line_is_told(capsys, args, message):
    with pytest.raises(SystemExit, match="2"):
        bind(program, "program", args)
    assert capsys.readouterr() == ("", f"error: program: {message}\n")


# What reaches the terminal


@given(st.dictionaries(st.text(), st.text() | st.lists(st.text())))
def test_json_holds_no_control_characters(value):
    text = to_json(value)
    assert json.loads(text) == value
    assert not re.search("[\x00-\x1f\x7f-\x9f\ud800-\udfff]", text)


def test_json_where_the_output_s_encoding_lacks_characters(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "latin-1", errors="backslashreplace"))
    assert to_json("é€😀") == r'"\u00e9\u20ac\ud83d\ude00"'


def displayed(text: str) -> list[str]:
    """The lines that a terminal shows of a text: a carriage return goes back to the line's beginning."""
    lines = []
    for line in text.split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


def test_what_is_quick_or_not_at_a_terminal_has_no_status_line(monkeypatch, capsys):
    monkeypatch.setattr("llama.cli.terminal.STATUS_DELAY", 0.05)
    with status_line("waiting"):
        time.sleep(0.15)
    assert capsys.readouterr() == ("", "")
    terminal = TerminalOutput()
    monkeypatch.setattr(sys, "stderr", terminal)
    with status_line("waiting") as remove:
        remove()
        time.sleep(0.15)
    monkeypatch.setenv("RANK", "1")
    with status_line("waiting"):
        time.sleep(0.15)
    assert terminal.getvalue() == ""


def test_log_messages_do_not_collide_with_a_status_line(monkeypatch):
    terminal = TerminalOutput()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("llama.cli.terminal.STATUS_DELAY", 0.05)
    with status_line("waiting"):
        terminal.wait_for("waiting")
        LogHandler().handle(logging.LogRecord("llama", logging.INFO, "", 0, "message", (), None))
        assert displayed(terminal.getvalue()) == ["message", "waiting"]
    assert displayed(terminal.getvalue()) == ["message", ""]


def test_log_messages_do_not_collide_with_a_progress_bar(monkeypatch):
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    handler = LogHandler()
    with tqdm(range(3), "training", file=stderr, ncols=40, mininterval=0, miniters=1) as bar:
        for i in bar:
            handler.handle(logging.LogRecord("llama", logging.INFO, "", 0, "step %d \x1b", (i,), None))
    *messages, bar_line, end = displayed(stderr.getvalue())
    assert messages == ["step 0 ␛", "step 1 ␛", "step 2 ␛"]
    assert bar_line.startswith("training: 100%")
    assert end == ""


@pytest.mark.parametrize(
    ("name", "level", "shown"),
    [
        ("llama", logging.INFO, True),
        ("matplotlib.font_manager", logging.INFO, False),
        ("torch.distributed", logging.WARNING, True),
    ],
)
def test_what_other_libraries_do_is_not_logged(name, level, shown):
    assert bool(LogHandler().filter(logging.LogRecord(name, level, "", 0, "x", (), None))) == shown


def log_to(stream: io.TextIOBase | None, monkeypatch, message: str, *args: object) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    LogHandler().handle(logging.LogRecord("llama", logging.INFO, "", 0, message, args, None))


def test_a_message_that_can_t_be_written_is_no_error_of_its_caller(monkeypatch, capsys):
    """As with the handlers of logging itself, which tell of it if they can."""
    stderr = io.StringIO()
    log_to(stderr, monkeypatch, "%d steps", "several")
    assert "Logging error" in stderr.getvalue()
    assert stderr.getvalue().endswith("Message: '%d steps'\nArguments: ('several',)\n")
    closed = io.StringIO()
    closed.close()
    ascii_only = io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True)
    for stream in (closed, ascii_only, None):
        log_to(stream, monkeypatch, "é")
    log_to(ascii_only, monkeypatch, "what comes next")
    assert ascii_only.buffer.getvalue().endswith(b"what comes next\n")
    assert capsys.readouterr().out == ""


# How a program ends

# Programs that don't import torch, for speed.
LIGHT = "import logging, os, sys, threading, time; from llama.cli import run\n"


def start(program: str, shell: str = "{}", **environment: str) -> subprocess.CompletedProcess:
    """Run a Python program by a line of bash, in which it is {}."""
    command = shell.format('"$PYTHON" -c "$PROGRAM"')
    environment |= {"PYTHON": sys.executable, "PROGRAM": program, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=os.environ | environment, timeout=60
    )


bash = pytest.mark.skipif(os.name != "posix", reason="runs bash")


@bash
@pytest.mark.parametrize(
    ("shell", "output"),
    [
        ("{} > /dev/full; echo $?", "1\n"),
        ("{} | true; echo ${{PIPESTATUS[0]}}", "141\n"),
        ("{} 2>&-; echo $?", "result\n0\n"),
        ("{} >&-; echo $?", "0\n"),
        ("{} <&- >&- 2>&-; echo $?", "0\n"),
    ],
)
def test_output_that_can_t_be_written(shell, output):
    program = f"""{LIGHT}
def main() -> None:
    time.sleep(0.1)  # until `true` has ended
    logging.getLogger("llama").info("a message")
    print("result")
run(main)
"""
    result = start(program, shell)
    assert result.stdout == output
    messages = ["a message"] * ("2>&-" not in shell) + ["error: [Errno 28] No space left on device"] * ("full" in shell)
    assert result.stderr.splitlines() == messages


@bash
@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_that_can_t_be_written(option):
    result = start("", f'"$PYTHON" -m llama {option} > /dev/full')
    assert (result.returncode, result.stderr) == (1, "error: [Errno 28] No space left on device\n")


@bash
def test_a_closed_stream_s_number_goes_to_no_file():
    program = f"""{LIGHT}
def main(file: str) -> None:
    with open(file, "w") as opened:
        assert opened.fileno() > 2
        opened.write("content")
        os.write(1, b"from a library")
        os.write(2, b"from a library")
run(main, args=[os.environ["FILE"]])
"""
    result = start(program, "{} <&- >&- 2>&-", FILE=os.devnull)
    assert result.returncode == 0


def interrupt(*command: str, times: int = 1, **environment: str) -> tuple[int, str, float]:
    """Press Ctrl-C when a program has printed a line. Returns its exit code, its messages, and the seconds it took."""
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )
    process.stdout.readline()
    begin = time.monotonic()
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    _, messages = process.communicate(timeout=60)
    return process.returncode, messages, time.monotonic() - begin


posix = pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")


@posix
@pytest.mark.parametrize("command", ["llama complete x", "llama.finetune --data x --out_dir y"])
def test_ctrl_c_while_torch_is_imported(tmp_path, command):
    """Within the first second, in which Python's own answer is a traceback."""
    # Modules in C may turn the interruption into an error of their own.
    lines = ["import time", "print('importing', flush=True)", "try:", "    time.sleep(60)"]
    lines += ["except KeyboardInterrupt:", "    raise SystemError('initialization of torch._C failed')"]
    (tmp_path / "torch.py").write_text("\n".join(lines))
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    assert interrupt("-m", *command.split(), PYTHONPATH=path)[:2] == (130, "")


@posix
def test_ctrl_c_in_a_command():
    """It ends what the command does; and a second one, or more, what its threads still do."""
    program = f"""{LIGHT}
def main() -> None:
    thread = threading.Thread(target=time.sleep, args=({{}},))
    try:
        print("begun", flush=True)
        thread.start()
        thread.join()
    finally:
        print("tidied up", file=sys.stderr)
run(main)
"""
    assert interrupt("-c", program.format(0.5))[:2] == (130, "tidied up\n")
    code, messages, seconds = interrupt("-c", program.format(60), times=3)
    assert (code, messages) == (130, "tidied up\n")
    assert seconds < 30


@posix
def test_ctrl_c_stays_ignored_where_it_was():
    """As for programs in the background of a script."""
    program = f"""{LIGHT}
def main() -> None:
    print("begun", flush=True)
    time.sleep(0.5)
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
run(main)
"""
    assert interrupt("-c", program)[:2] == (0, "")
