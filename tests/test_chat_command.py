"""`llama chat`: conversations whose lines come from a pipe, in this process; and, marked slow, typed at a terminal."""

import contextlib
import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
import torch
from chat_templates import Style, write_folder
from conftest import ROOT, tiny_model, write_llama2_tokenizer, write_llama3_tokenizer, write_meta_checkpoint
from forked import ForkedProgram
from hypothesis import given
from hypothesis import strategies as st
from run_command import Runner, TerminalOutput
from test_commands import write_circular

from llama import Llama, Tokenizer
from llama.chat_format import Llama2Format
from llama.checkpoint import save_checkpoint
from llama.cli.chat import ChatRequest, answer
from llama.errors import InputError
from llama.log import escape_control_characters
from llama.streaming import Piece

PROMPT = r"\x1b\[\?2004h.*?>"  # switches on bracketed paste, then the prompt at which to type
ALONE = ["-m", "llama"]
UNDER_TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "llama"]


@pytest.fixture
def runner(monkeypatch, capsys):
    return Runner(monkeypatch, capsys)


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """The checkpoint of a chat model whose answers never end by themselves: its stop tokens are never the likeliest."""
    folder = tmp_path_factory.mktemp("endless")
    tokenizer_path = write_llama3_tokenizer(folder / "ranks")
    tokenizer = Tokenizer(tokenizer_path)
    model = tiny_model(vocab_size=tokenizer.n_words)
    with torch.no_grad():
        model.output.weight[list(tokenizer.stop_tokens)] = 0
    return write_meta_checkpoint(folder / "model", model, tokenizer_path)


class Terminal:
    """A program at a pseudo-terminal, which Windows does not have.

    Args:
        command: see `ForkedProgram`.
    """

    def __init__(self, *command):
        import fcntl
        import termios

        from pexpect.fdpexpect import fdspawn

        self.descriptor, self.other_end = os.openpty()
        fcntl.ioctl(self.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 300, 0, 0))
        self.expected = fdspawn(self.descriptor, encoding="utf-8", timeout=60)
        self.program = ForkedProgram(*command, terminal=os.ttyname(self.other_end))

    def wait_for_prompt(self) -> str:
        """Wait until a message can be typed; return what was printed before."""
        self.expected.expect(PROMPT)
        return re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", self.expected.before).replace("\r", "")

    def send(self, keys: str) -> None:
        self.expected.send(keys)

    def type(self, keys: str) -> str:
        """Type a line; return what was printed until the next prompt."""
        self.send(keys + "\r")
        return self.wait_for_prompt()

    def begin(self, message: str) -> None:
        """Type a message, and wait for the first characters of its answer."""
        self.send(message + "\r")
        self.expected.expect(r"\x1b\[\?2004l")  # the end of the typed line
        self.expected.expect(r"\S")

    def leave(self, keys: str = "/quit\r") -> int:
        """Leave the conversation; return the exit code."""
        self.send(keys)
        self.wait_for_end()
        return self.program.processes[0].exitcode

    def wait_for_end(self) -> None:
        """Wait until the program has ended, and with it all processes that it has started."""
        import pexpect

        os.close(self.other_end)  # now only the program's processes have the terminal open
        self.expected.expect(pexpect.EOF)
        self.program.processes[0].join()


@pytest.fixture
def start_chat(monkeypatch):
    """A function that starts `llama chat` at a terminal, and waits until a message can be typed."""
    for name, value in {"PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    terminals = []

    def start(command, *options) -> Terminal:
        terminals.append(Terminal(*command, "chat", *options))
        terminals[-1].wait_for_prompt()
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.program.kill()
        os.close(terminal.descriptor)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "with_draft"), [(ALONE, False), (UNDER_TORCHRUN, True)], ids=["alone", "torchrun, with a draft"]
)
def test_a_conversation(start_chat, endless, tmp_path, command, with_draft):
    """Messages, Ctrl-C during an answer, and every command."""
    saved = tmp_path / "saved.json"
    options = ["--ckpt_dir", endless, "--temperature", 0, "--max_seq_len", 8000, "--dtype", "float32"]
    terminal = start_chat(command, *options, *(["--draft", endless] if with_draft else []))
    assert "/system TEXT" in terminal.type("/help")

    # An answer that would take many seconds is stopped, and the part that was printed is kept. What is typed meanwhile,
    # arrow keys and pasted text among it, is forgotten with Ctrl-C.
    terminal.begin("the user")
    terminal.send("\x1b[A/st\x1b[200~ats\x1b[201~")
    time.sleep(0.2)
    terminal.send("\x03")
    assert "(stopped)" in terminal.wait_for_prompt()
    terminal.send("\x03")
    terminal.wait_for_prompt()
    stats = terminal.type("/stats")
    assert 0 < int(re.search(r"context: (\d+) of 8000 tokens", stats)[1]) < 7900
    assert float(re.search(r"([\d.]+) tokens/s", stats)[1]) > 0
    assert "(saved 2 messages" in terminal.type(f"/save {saved}")
    begun = json.loads(saved.read_text())
    assert [message["role"] for message in begun] == ["user", "assistant"]
    assert begun[0]["content"] == "the user"
    llama = Llama.build(endless, None, 8000, 1, dtype=torch.float32)
    max_gen_len = len(begun[1]["content"]) + 20
    (prediction,) = llama.chat_completion([begun[:1]], 0, max_gen_len=max_gen_len)
    assert prediction["generation"]["content"].startswith(begun[1]["content"].rstrip("\ufffd"))

    # Commands, and mistakes in them.
    assert "(the system message is set)" in terminal.type("/system be in the ring")
    assert "(temperature 0.5)" in terminal.type("/temperature 0.5")
    assert "error: temperature=-1.0 must be a number of at least 0" in terminal.type("/temperature -1")
    assert "error: '/nonsense' is not a command" in terminal.type("/nonsense")
    assert "error: the file to load='/nowhere' does not exist" in terminal.type("/load /nowhere")
    other = tmp_path / "other.json"
    other.write_text("not a conversation")
    assert "is there already; give the name of a new file" in terminal.type(f"/save {other}")
    assert "is not a saved conversation" in terminal.type(f"/load {other}")
    assert other.read_text() == "not a conversation"

    # A new conversation keeps the system message; a saved one can be continued.
    assert "(a new conversation)" in terminal.type("/reset")
    assert "(saved 1 messages" in terminal.type(f"/save {saved}")
    assert json.loads(saved.read_text()) == [{"role": "system", "content": "be in the ring"}]
    saved.write_text(json.dumps(begun))
    assert "(loaded 2 messages" in terminal.type(f"/load {saved}")

    # Ctrl-C at the prompt deletes what was typed; a backslash begins another line; an arrow key brings back a command.
    terminal.send("nonsense\x03")
    terminal.wait_for_prompt()
    terminal.type("/system in\\\rthe user")
    terminal.type(f"/save {saved}")
    assert json.loads(saved.read_text()) == [{"role": "system", "content": "in\nthe user"}, *begun]
    assert "(saved 3 messages" in terminal.type("\x1b[A")
    assert terminal.leave() == 0


@pytest.mark.slow
def test_keys_during_an_answer_begin_the_next_message(start_chat, endless):
    terminal = start_chat(ALONE, "--ckpt_dir", endless, "--temperature", 0, "--max_gen_len", 700, "--dtype", "float32")
    terminal.begin("the user")
    terminal.send("\x1b[A/sta\x1bOB\x1b[200~ts\x1b[201~")
    terminal.wait_for_prompt()
    assert "last answer: 700 tokens" in terminal.type("")
    assert terminal.leave("\x04") == 0


TYPING = """
import time
from llama.cli.terminal import Keyboard
with Keyboard() as keyboard:
    while True:
        print("message:", ascii(keyboard.read_message()), flush=True)
        end, stopped = time.monotonic() + 0.2, False
        while time.monotonic() < end and not stopped:
            time.sleep(0.01)
            stopped = keyboard.interrupted()
        print("stopped" if stopped else "answered", flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_lines_typed_ahead_are_messages_of_their_own():
    """As they would be if they were typed later; with a program that only waits in the place of a model."""
    import pexpect

    environment = os.environ | {"PYTHONPATH": str(ROOT), "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"}
    process = pexpect.spawn(
        sys.executable, ["-c", TYPING], env=environment, encoding="utf-8", timeout=20, dimensions=(40, 200)
    )
    process.send("while it\rloads\r")
    process.expect("message: 'while it'")
    # Backspace, an arrow key, a backslash and Alt before Enter, Ctrl-U, and the beginning of a message.
    process.send("thf\x7fe \x1b[Aüser\rin\\\rthe\x1b\rring\r\x1bOBnon\x15last")
    for message in ("loads", r"the \\xfcser", r"in\\nthe\\nring"):
        process.expect(f"message: '{message}'")
        process.expect("answered")
    process.send("!\r")
    process.expect("message: 'last!'")
    process.send("second\rforgotten\rforgotten\rforgotten")
    process.expect("message: 'second'")
    process.send("\x03")  # Ctrl-C, which forgets them
    process.expect("stopped")
    process.send("new\r")
    process.expect("message: '(.*)'")
    assert process.match[1] == "new"
    process.close(force=True)


@pytest.mark.slow
@pytest.mark.parametrize("answering", [False, True])
def test_the_terminal_is_restored_when_the_program_is_terminated(start_chat, endless, answering):
    import termios

    terminal = start_chat(ALONE, "--ckpt_dir", endless, "--temperature", 0, "--max_seq_len", 8000)
    before = termios.tcgetattr(os.openpty()[1])
    if answering:
        terminal.begin("the user")
    terminal.program.processes[0].terminate()
    terminal.wait_for_end()
    after = termios.tcgetattr(terminal.descriptor)
    flags = termios.ECHO | termios.ICANON | termios.ISIG
    assert (after[3] & flags, after[6][termios.VINTR]) == (before[3] & flags | flags, before[6][termios.VINTR])


@pytest.mark.slow
@pytest.mark.parametrize("command", [ALONE, UNDER_TORCHRUN], ids=["alone", "torchrun"])
def test_the_output_pipe_is_closed(endless, command):
    """Every process ends, without a message."""
    chat = " ".join([sys.executable, *command, f"chat --ckpt_dir {endless} --temperature 0 --max_gen_len 3000"])
    result = subprocess.run(
        ["bash", "-c", f"yes 'the user' | head -4 | {chat} | head -c 5; code=${{PIPESTATUS[2]}}; echo; echo $code"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=100,
    )
    assert int(result.stdout.split()[-1]) != 0
    assert "Broken pipe" not in result.stderr


def chat(runner, lines, *options):
    """A conversation whose lines come from a pipe."""
    return runner.llama("chat", *options, stdin="".join(line + "\n" for line in lines))


def test_answers_are_those_of_chat_completion(runner, endless, tmp_path):
    saved = tmp_path / "saved.json"
    options = ["--ckpt_dir", endless, "--temperature", 0, "--max_gen_len", 12, "--dtype", "float32"]
    result = chat(runner, ["the user", "//in the ring", f"/save {saved}"], *options)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("(the answer ends at max_gen_len=12)") == 2
    llama = Llama.build(endless, None, 4096, 1, dtype=torch.float32)
    dialog = []
    for message in ("the user", "/in the ring"):
        dialog.append({"role": "user", "content": message})
        dialog.append(llama.chat_completion([dialog], temperature=0, max_gen_len=12)[0]["generation"])
    assert json.loads(saved.read_text()) == dialog
    assert result.stdout == f"{dialog[1]['content']}\n{dialog[3]['content']}\n"


def test_how_many_proposed_tokens_are_accepted(runner, endless, tmp_path):
    circular = write_circular(tmp_path / "circular", endless)
    options = ["--ckpt_dir", circular, "--temperature", 0, "--max_gen_len", 80, "--dtype", "float32"]
    lines = ["the user", "/stats", "in the ring", "/stats"]
    plain = chat(runner, lines, *options)
    assert "last answer: 80 tokens" in plain.stderr
    assert "proposed" not in plain.stderr
    counts = []
    for proposer in (["--prompt_lookup", 3], ["--draft", circular], ["--draft", endless]):
        result = chat(runner, lines, *options, *proposer)
        assert result.stdout == plain.stdout
        found = re.findall(r"^(\d+) of (\d+) proposed tokens accepted$", result.stderr, re.MULTILINE)
        assert len(found) == 2
        counts += [(int(n_accepted), int(n_proposed)) for n_accepted, n_proposed in found]
    assert all(20 < n_accepted <= n_proposed for n_accepted, n_proposed in counts[:2])
    assert all(60 < n_accepted == n_proposed for n_accepted, n_proposed in counts[2:4])
    assert all(n_accepted < n_proposed for n_accepted, n_proposed in counts[4:])


def test_a_full_context(runner, endless):
    """Old turns are left out; an answer may end where the context is full; a message may be too long for it."""
    options = ["--ckpt_dir", endless, "--temperature", 0, "--max_seq_len", 200]
    lines = ["the user"] * 5 + ["in " * 300, "the user", "/stats"]
    result = chat(runner, lines, *options, "--max_gen_len", 40)
    assert "(the context is full: the model no longer sees the first 2 messages)" in result.stderr
    assert re.search(
        r"error: the message takes \d+ tokens, but the context has only 200; it is not kept", result.stderr
    )
    assert re.search(r"context: \d+ of 200 tokens", result.stderr)
    assert result.stderr.count("(the answer ends at max_gen_len=40)") == 6  # the long message has no answer
    result = chat(runner, ["the user"], *options)
    assert "(the answer ends where the context of 200 tokens is full)" in result.stderr


def test_a_format_that_refuses_dialogs(runner, tmp_path):
    """Llama 2's format answers in the model's place, and accepts only some orders of roles."""
    tokenizer_path = write_llama2_tokenizer(tmp_path / "tokenizer.model")
    model = tiny_model(vocab_size=Tokenizer(tokenizer_path).n_words)
    folder = write_meta_checkpoint(tmp_path / "model", model, tokenizer_path)
    saved = tmp_path / "saved.json"
    saved.write_text(json.dumps([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]))
    options = ["--ckpt_dir", folder, "--max_gen_len", 4, "--max_seq_len", 96, "--system", "be kind", "--seed", 1]
    result = chat(runner, [f"/load {saved}", "[INST]", "the user"], *options)
    assert result.returncode == 0, result.stderr
    assert "Llama 2 takes an optional system message" in result.stderr
    assert "error: Error: special tags are not allowed as part of the prompt. The message is not kept" in result.stderr
    assert "(no answer" not in result.stderr
    assert len(result.stdout.strip()) > 0  # the answer to the last message


WITHOUT_SYSTEM = """{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system message, please') }}
{% endif %}{{ '<|' + m.role + '|>' + m.content + eos_token }}{% endfor %}"""


@pytest.fixture
def with_template(tmp_path):
    """A chat model in Hugging Face's layout whose template refuses system messages."""
    path = write_folder(tmp_path / "tokenizer", Style("sentencepiece", WITHOUT_SYSTEM))
    tokenizer = Tokenizer(path)
    save_checkpoint(tmp_path / "model", tiny_model(vocab_size=tokenizer.n_words), tokenizer, layout="hf")
    return tmp_path / "model"


def test_the_model_s_own_template(runner, caplog, with_template):
    """It is used and named; what it refuses is said at once, and the conversation goes on."""
    caplog.set_level("INFO")
    options = ["--ckpt_dir", with_template, "--max_gen_len", 4, "--temperature", 0, "--dtype", "float32"]
    result = chat(runner, ["/system be kind", "the user", "/stats"], *options)
    assert result.returncode == 0, result.stderr
    assert "the model's own template, from tokenizer_config.json" in caplog.text
    assert "error: the model's chat template refuses the dialog: No system message, please" in result.stderr
    assert "(the system message is set)" not in result.stderr
    llama = Llama.build(with_template, None, 96, 1, dtype=torch.float32)
    (prediction,) = llama.chat_completion([[{"role": "user", "content": "the user"}]], 0, max_gen_len=4)
    assert result.stdout == prediction["generation"]["content"] + "\n"
    result = chat(runner, ["the user"], *options, "--system", "be kind")
    assert result.returncode == 1
    assert result.stderr.endswith("error: the model's chat template refuses the dialog: No system message, please\n")


def test_another_chat_format(runner, with_template):
    options = ["--ckpt_dir", with_template, "--max_gen_len", 4, "--temperature", 0, "--dtype", "float32"]
    result = chat(runner, ["/system be kind", "the user"], *options, "--chat_format", "llama2")
    assert "(the system message is set)" in result.stderr
    llama = Llama.build(with_template, None, 96, 1, dtype=torch.float32)
    dialog = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "the user"}]
    formatter = Llama2Format(llama.tokenizer)
    (prediction,) = Llama(llama.model, llama.tokenizer, formatter=formatter).chat_completion([dialog], 0, max_gen_len=4)
    assert result.stdout == prediction["generation"]["content"] + "\n"
    result = chat(runner, ["the user"], *options, "--chat_format", "llama3")
    assert "Llama 3's chat format needs the special tokens ['<|begin_of_text|>'," in result.stderr


def test_files_that_are_not_conversations(runner, endless, tmp_path):
    """They are refused, and the conversation goes on."""
    (tmp_path / "surrogate.json").write_text('[{"role": "user", "content": "\\ud800"}]')
    (tmp_path / "deep.json").write_text("[" * 100000)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    lines = [f"/load {tmp_path / name}" for name in ("deep.json", "binary.json", "surrogate.json")]
    lines += [f"/save {tmp_path / 'x.json'}", "/reset", "the user", "/stats"]
    result = chat(runner, lines, "--temperature", 0, "--max_gen_len", 4, "--ckpt_dir", endless)
    assert result.returncode == 0
    assert result.stderr.count("is not a saved conversation") == 2
    assert "error: 'utf-8' codec can't encode" in result.stderr
    assert "last answer: 4 tokens" in result.stderr


def test_control_characters_are_escaped():
    assert escape_control_characters("a\x1b[2J\r\x07b\n\tc\x9bd\x7fé😀") == "a␛[2J␍␇b\n\tc\\x9bd\\x7fé😀"


@given(st.text())
def test_no_control_character_is_left(text):
    escaped = escape_control_characters(text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", escaped)
    assert escape_control_characters(escaped) == escaped


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], "error: temperature=-1 must be a number of at least 0"),
        (["--seed", "x"], "error: seed='x' must be a whole number"),
        (["--quantize", "int5"], "error: quantize='int5' must be one of ['int8', 'int4']"),
        (["--chat_format", "alpaca"], "error: chat_format='alpaca' must be one of ['llama2', 'llama3', 'chatml']"),
        (["--prompt_lookup", "x"], "error: prompt_lookup='x' must be a whole number between 1 and 100"),
        (["--draft", "x", "--prompt_lookup", "2"], "error: tokens are proposed by prompt_lookup or by draft: give one"),
        (["--draft", "/nowhere"], "error: draft='/nowhere' does not exist"),
        (["--sytem", "x"], "error: llama chat: unknown option '--sytem'; did you mean --system?"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(runner, monkeypatch, options, message):
    monkeypatch.setattr("llama.cli.build.open_checkpoint", None)
    result = runner.llama("chat", *options)
    assert result.returncode != 0
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1


def scripted(stream) -> SimpleNamespace:
    """A `Llama` that answers with this stream to prompts of 123 tokens."""
    formatter = SimpleNamespace(encode_dialog_prompt=lambda dialog: [0] * 123)
    return SimpleNamespace(chat_completion_stream=stream, formatter=formatter)


@pytest.mark.parametrize("ending", ["answer", "error", "interrupted"])
def test_what_a_terminal_shows_while_a_long_prompt_is_prefilled(monkeypatch, ending):
    terminal = TerminalOutput()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("llama.cli.terminal.STATUS_DELAY", 0.1)

    def stream(*arguments, **options):
        terminal.wait_for("...")
        terminal.write("|")  # the end of prefilling
        if ending == "error":
            raise InputError("it is too long")
        if ending == "interrupted":
            raise KeyboardInterrupt
        for text in ("The", " answer"):
            yield Piece(0, 1, None, text)

    with pytest.raises(InputError) if ending == "error" else contextlib.nullcontext():
        answer(scripted(stream), ChatRequest([], 0, 1, 10), {}, lambda: False)
    before, _, after = terminal.getvalue().partition("|")
    assert before.strip("\r") == "prefilling the prompt of 123 tokens ..."
    assert re.fullmatch(r"\r +\r" + ("The answer" if ending == "answer" else ""), after)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="not on Windows")
def test_ctrl_c_is_heard_before_the_first_piece():
    """While a long prompt is prefilled, for which this waits for ever."""
    closed = []

    def stream(*arguments, **options):
        try:
            yield SimpleQueue().get()
        finally:
            closed.append(True)

    begin = time.monotonic()
    before = threading.active_count()
    reply = answer(scripted(stream), ChatRequest([], 0, 1, 10), {}, lambda: time.monotonic() - begin > 0.3)
    assert (reply.text, reply.ended) == ("", "interrupted")
    assert time.monotonic() - begin < 5
    assert closed == [True]
    assert threading.active_count() == before
