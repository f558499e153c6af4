"""`llama chat`, typed at a pseudo-terminal as a person would."""

import json
import os
import re
import signal
import subprocess
import sys
import termios
import time

import pexpect
import pytest
import torch
from conftest import ROOT, run_python, tiny_model, write_llama2_tokenizer, write_llama3_tokenizer, write_meta_checkpoint

from llama import Llama, Tokenizer
from llama.cli.terminal import visible

QUICK = ("--temperature", 0, "--max_gen_len", 4, "--ckpt_dir")
PROMPT = r"\x1b\[\?2004h.*?>"  # the terminal may paste, and the sign to type at
ALONE = [sys.executable, "-m", "llama"]
UNDER_TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "llama"]


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A chat model that never stops by itself: its end tokens are never the likeliest."""
    folder = tmp_path_factory.mktemp("talker")
    tokenizer_path = write_llama3_tokenizer(folder / "ranks")
    tokenizer = Tokenizer(tokenizer_path)
    model = tiny_model(vocab_size=tokenizer.n_words)
    with torch.no_grad():
        model.output.weight[list(tokenizer.stop_tokens)] = 0
    return write_meta_checkpoint(folder / "model", model, tokenizer_path)


class Terminal:
    """A program at a terminal of its own."""

    def __init__(self, command, *options):
        environment = os.environ | {"PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm", "OMP_NUM_THREADS": "1"}
        self.process = pexpect.spawn(
            command[0],
            [*command[1:], "chat", *map(str, options)],
            env=environment | {"PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            encoding="utf-8",
            timeout=60,
            dimensions=(40, 300),
        )
        self.ready()

    def ready(self) -> str:
        """Wait until something can be typed; what was shown before."""
        self.process.expect(PROMPT)
        return re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", self.process.before).replace("\r", "")

    def type(self, keys: str) -> str:
        self.process.send(keys + "\r")
        return self.ready()

    def begin(self, message: str) -> None:
        """Ask, and wait for the first of the answer."""
        self.process.send(message + "\r")
        self.process.expect(r"\x1b\[\?2004l")  # the line is read
        self.process.expect(r"\S")

    def leave(self, keys: str = "/quit\r") -> int:
        self.process.send(keys)
        self.process.expect(pexpect.EOF)
        self.process.close()
        return self.process.exitstatus


def answers(llama, *turns, **options):
    """What a dialog comes to when each of these is said and answered."""
    dialog = []
    for turn in turns:
        dialog.append({"role": "user", "content": turn})
        dialog.append(llama.chat_completion([dialog], **options)[0]["generation"])
    return dialog


@pytest.mark.parametrize("command", [ALONE, UNDER_TORCHRUN], ids=["alone", "torchrun"])
def test_a_conversation(talker, tmp_path, command):
    """Turns, Ctrl-C in the middle of an answer, and every command."""
    saved = tmp_path / "saved.json"
    options = ("--ckpt_dir", talker, "--temperature", 0, "--max_seq_len", 8000, "--dtype", "float32")
    terminal = Terminal(command, *options)
    assert "/system TEXT" in terminal.type("/help")

    # An answer that would take many seconds is stopped, and what came of it stays.
    # What is typed meanwhile, arrow keys and a pasted text among it, waits for the next line.
    terminal.begin("the user")
    terminal.process.send("\x1b[A/st\x1b[200~ats\x1b[201~")
    time.sleep(0.2)
    terminal.process.send("\x03")
    assert "(stopped)" in terminal.ready()
    terminal.process.send("\x03")
    terminal.ready()
    stats = terminal.type("/stats")
    assert 0 < int(re.search(r"context: (\d+) of 8000 tokens", stats)[1]) < 7900
    assert float(re.search(r"([\d.]+) tokens/s", stats)[1]) > 0
    assert "(saved 2 messages" in terminal.type(f"/save {saved}")
    begun = json.loads(saved.read_text())
    assert [message["role"] for message in begun] == ["user", "assistant"]
    assert begun[0]["content"] == "the user"
    llama = Llama.build(talker, None, 8000, 1, dtype=torch.float32)
    whole = llama.chat_completion([begun[:1]], 0, max_gen_len=len(begun[1]["content"]) + 20)[0]["generation"]["content"]
    assert whole.startswith(begun[1]["content"].rstrip("\ufffd"))

    # Commands, and mistakes in them.
    assert "(the system message is set)" in terminal.type("/system be in the ring")
    assert "(temperature 0.5)" in terminal.type("/temperature 0.5")
    assert "error: temperature=-1.0 must be a number of at least 0" in terminal.type("/temperature -1")
    assert "error: '/nonsense' is no command" in terminal.type("/nonsense")
    assert "error: the file to load='/nowhere' does not exist" in terminal.type("/load /nowhere")
    other = tmp_path / "other.json"
    other.write_text("not a conversation")
    assert "is there already; give the name of a new file" in terminal.type(f"/save {other}")
    assert "is no saved conversation" in terminal.type(f"/load {other}")
    assert other.read_text() == "not a conversation"

    # A new conversation keeps the system message; a saved one comes back.
    assert "(a new conversation)" in terminal.type("/reset")
    assert "(saved 1 messages" in terminal.type(f"/save {saved}")
    assert json.loads(saved.read_text()) == [{"role": "system", "content": "be in the ring"}]
    saved.write_text(json.dumps(begun))
    assert "(loaded 2 messages" in terminal.type(f"/load {saved}")

    # Ctrl-C at the prompt forgets what was typed; a backslash goes on with another line; arrows bring back.
    terminal.process.send("nonsense\x03")
    terminal.ready()
    terminal.type("/system in\\\rthe user")
    terminal.type(f"/save {saved}")
    assert json.loads(saved.read_text()) == [{"role": "system", "content": "in\nthe user"}, *begun]
    assert "(saved 3 messages" in terminal.type("\x1b[A")
    assert terminal.leave() == 0


def test_answers_are_those_of_chat_completion(talker, tmp_path):
    """Two turns, at the settings that were typed, as a program would get them; then Ctrl-D leaves."""
    saved = tmp_path / "saved.json"
    options = ("--ckpt_dir", talker, "--temperature", 0, "--max_gen_len", 12, "--dtype", "float32")
    terminal = Terminal(ALONE, *options)
    assert "(cut: max_gen_len=12)" in terminal.type("the user")
    terminal.type("//in the ring")
    terminal.type(f"/save {saved}")
    assert terminal.leave("\x04") == 0
    llama = Llama.build(talker, None, 4096, 1, dtype=torch.float32)
    found = json.loads(saved.read_text())
    # What is shown, and asked for again, is the text; so the second turn reads what came of the first.
    assert found == answers(llama, "the user", "/in the ring", temperature=0, max_gen_len=12)


def test_when_the_context_is_full(talker):
    """Old turns are left out, and it is said; an answer that the end cuts, and a message that can't fit, too."""
    options = ["--ckpt_dir", talker, "--temperature", "0", "--max_seq_len", "200", "--max_gen_len", "40"]
    lines = ["the user"] * 5 + ["in " * 300, "the user", "/stats"]
    shown = chat_with(lines, *options)
    assert "(the context is full: the model no longer sees the first 2 messages)" in shown.stderr
    assert re.search(r"error: the message makes \d+ tokens, and the context has 200; it is not kept", shown.stderr)
    assert "context: " in shown.stderr
    assert len(shown.stdout.split("\n")) >= 7  # six answers; that of the long message isn't there
    shown = chat_with(["the user"], *options[:-2])
    assert "(cut: the context of 200 tokens is full)" in shown.stderr


def chat_with(lines, *options) -> subprocess.CompletedProcess:
    """A chat whose lines come from a pipe."""
    return subprocess.run(
        [*ALONE, "chat", *map(str, options)],
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=100,
    )


def test_a_model_that_refuses(tmp_path):
    """Llama 2's format answers in the model's place, and knows only some orders of roles."""
    tokenizer_path = write_llama2_tokenizer(tmp_path / "tokenizer.model")
    model = tiny_model(vocab_size=Tokenizer(tokenizer_path).n_words)
    folder = write_meta_checkpoint(tmp_path / "model", model, tokenizer_path)
    saved = tmp_path / "saved.json"
    saved.write_text(json.dumps([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]))
    options = ["--ckpt_dir", folder, "--max_gen_len", "4", "--max_seq_len", "96", "--system", "be kind"]
    shown = chat_with([f"/load {saved}", "[INST]", "the user"], *options)
    assert shown.returncode == 0, shown.stderr
    assert "Llama 2 takes an optional system message" in shown.stderr
    assert "error: Error: special tags are not allowed as part of the prompt. The message is not kept" in shown.stderr
    assert "(no answer" not in shown.stderr
    assert len(shown.stdout.strip()) > 0  # what is said then is answered


def test_keys_during_an_answer_wait_for_the_next_line(talker):
    terminal = Terminal(ALONE, "--ckpt_dir", talker, "--temperature", 0, "--max_gen_len", 1500, "--dtype", "float32")
    terminal.begin("the user")
    terminal.process.send("\x1b[A/sta\x1bOB\x1b[200~ts\x1b[201~")
    terminal.ready()
    assert "last answer: 1500 tokens" in terminal.type("")


@pytest.mark.parametrize("answering", [False, True])
def test_the_terminal_is_as_before_when_the_program_is_ended(talker, answering):
    terminal = Terminal(ALONE, "--ckpt_dir", talker, "--temperature", 0, "--max_seq_len", 8000)
    before = termios.tcgetattr(os.openpty()[1])
    if answering:
        terminal.begin("the user")
    terminal.process.kill(signal.SIGTERM)
    terminal.process.expect(pexpect.EOF)
    after = termios.tcgetattr(terminal.process.child_fd)
    wanted = termios.ECHO | termios.ICANON | termios.ISIG
    assert (after[3] & wanted, after[6][termios.VINTR]) == (before[3] & wanted | wanted, before[6][termios.VINTR])


@pytest.mark.parametrize("command", [ALONE, UNDER_TORCHRUN], ids=["alone", "torchrun"])
def test_nobody_reads_the_answers_any_more(talker, command):
    words = " ".join([*command, f"chat --ckpt_dir {talker} --temperature 0 --max_gen_len 3000"])
    shown = subprocess.run(
        ["bash", "-c", f"yes 'the user' | head -4 | {words} | head -c 5; ended=${{PIPESTATUS[2]}}; echo; echo $ended"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=100,
    )
    assert int(shown.stdout.split()[-1]) != 0
    assert "Broken pipe" not in shown.stderr


def test_files_that_are_no_conversations(talker, tmp_path):
    """Each is refused, and the conversation goes on."""
    (tmp_path / "surrogate.json").write_text('[{"role": "user", "content": "\\ud800"}]')
    (tmp_path / "deep.json").write_text("[" * 100000)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    lines = [f"/load {tmp_path / name}" for name in ("deep.json", "binary.json", "surrogate.json")]
    shown = chat_with([*lines, f"/save {tmp_path / 'x.json'}", "/reset", "the user", "/stats"], *QUICK, talker)
    assert shown.returncode == 0
    assert shown.stderr.count("is no saved conversation") == 2
    assert "error: 'utf-8' codec can't encode" in shown.stderr
    assert "last answer: 4 tokens" in shown.stderr


def test_what_a_model_says_can_t_steer_the_terminal():
    assert visible("a\x1b[2J\r\x07b\n\tc\x9bd\x7fé😀") == "a␛[2J␍␇b\n\tc\\x9bd\\x7fé😀"


def test_mistakes_are_found_before_the_model_is_loaded():
    for options, message in (
        (["--temperature", "-1"], "error: temperature=-1 must be a number of at least 0"),
        (["--seed", "x"], "error: seed='x' must be a whole number of at least 0, and below 2**64"),
        (["--sytem", "x"], "error: llama chat has no use for '--sytem'; did you mean --system?"),
    ):
        run = run_python("-m", "llama", "chat", *options)
        assert (run.returncode != 0, run.stderr) == (True, message + "\n")
