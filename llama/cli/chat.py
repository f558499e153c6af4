"""`llama chat`: a conversation with a model.

The first process has the keyboard and the conversation. What the network is asked, it tells the others: the same turns,
and after each piece of an answer whether to go on.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from llama.chat_format import Dialog, Message, check_dialog
from llama.cli.command_line import build
from llama.cli.terminal import Keyboard, show, visible
from llama.distributed import is_first_rank, object_broadcaster
from llama.errors import InputError
from llama.files import require_path, writable_file, write_whole
from llama.generation import Llama
from llama.sampling_params import SamplingParams

ROOM = 256  # tokens that an answer should have, or a quarter of the context if that is less

HELP = """/reset              begin anew; the system message stays
/system TEXT        set the system message; without a text, remove it
/temperature T      how freely to draw; 0 always takes the likeliest token
/save FILE          write the conversation, as JSON
/load FILE          go on with a conversation that was saved
/stats              the last answer's speed, and how much of the context is used
/help               this
/quit               leave, as Ctrl-D does
Enter sends. Alt-Enter, or a backslash before Enter, begins another line. Ctrl-C stops an answer.
A message that begins with a slash is written with two."""


class Turn(NamedTuple):
    """What a model is asked for."""

    dialog: list[Message]
    temperature: float
    top_p: float
    max_gen_len: int | None


class Reply(NamedTuple):
    """What came of it."""

    text: str
    tokens: int
    seconds: float
    ended: str  # "stop", "length", or "interrupted"


def chat(
    ckpt_dir: str | None = None,
    *,
    tokenizer_path: str | None = None,
    system: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_gen_len: int | None = None,
    seed: int | None = None,
    max_seq_len: int | None = None,
    dtype: str | None = None,
) -> None:
    """Talk with a model. /help lists what can be typed beside messages.

    With no --ckpt_dir this runs SmolLM2-135M-Instruct, which is fetched once. For a model on several processes:
    torchrun --nproc_per_node N -m llama chat --ckpt_dir ...

    Args:
        ckpt_dir: the checkpoint of a chat model: a folder in Meta's or Hugging Face's layout, or a GGUF file
        tokenizer_path: the tokenizer's file, where it isn't with the checkpoint
        system: a system message: how the model should behave
        temperature: how freely to draw; 0 always takes the likeliest token
        top_p: draw from the likeliest tokens that together have this probability
        max_gen_len: longest answer, in tokens; by default as long as the context allows
        seed: a number; the same one draws the same tokens again
        max_seq_len: the context: what is remembered of the conversation, in tokens; by default 4096, or what the model
            was made for if that is less
        dtype: float32, float16 or bfloat16; by default bfloat16 where the machine computes in it
    """
    SamplingParams(
        1 if max_gen_len is None else max_gen_len, temperature, top_p
    )  # before the model takes its time to load
    llama = build(ckpt_dir, tokenizer_path, max_seq_len, dtype, seed)
    llama.formatter  # noqa: B018 - a model without a chat format is refused now
    tell = object_broadcaster()
    if not is_first_rank():
        while (turn := tell(None)) is not None:
            try:
                answer(llama, turn, tell, lambda: False)
            except (InputError, ArithmeticError):
                continue  # the first process says so
        return
    try:
        with Keyboard() as keyboard:
            conversation = Conversation(llama, keyboard, tell, Turn([], temperature, top_p, max_gen_len))
            if system is not None:
                conversation.command(f"/system {system}")
            conversation.run()
    finally:
        tell(None)


def answer(llama: Llama, turn: Turn, tell: Callable[[Any], Any], interrupted: Callable[[], bool]) -> Reply:
    """Show a model's answer as it comes, until its end, or until `interrupted()`, which is asked after each piece.

    Every process stops at the same piece, whatever goes wrong on the first: the next thing they are told is a turn.
    """
    text, tokens, ended = "", 0, "interrupted"
    begin = time.monotonic()
    stream = llama.chat_completion_stream(
        [turn.dialog], turn.temperature, turn.top_p, turn.max_gen_len, reuse_cache=True
    )
    with contextlib.suppress(KeyboardInterrupt):  # where Ctrl-C is no key
        for piece in stream:
            text += piece.text
            tokens += piece.token is not None
            ended = piece.ended or ended
            failure = None
            try:
                show(piece.text)
            except OSError as error:  # nobody reads it any more
                failure = error
            stop = tell(failure is not None or interrupted())
            if failure is not None:
                raise failure
            if stop:
                break
    return Reply(text, tokens, time.monotonic() - begin, ended)


class Conversation:
    """A dialog, and what is typed to go on with it."""

    def __init__(self, llama: Llama, keyboard: Keyboard, tell: Callable[[Any], Any], settings: Turn) -> None:
        self.llama, self.keyboard, self.tell = llama, keyboard, tell
        self.settings = settings
        self.dialog: list[Message] = []
        self.last: Reply | None = None
        self.used = 0  # tokens of the context, after the last answer
        self.left_out = 0  # of the dialog's messages, since they don't fit the context any more
        self.files: set[Path] = set()  # that this conversation was saved to or loaded from

    def run(self) -> None:
        """RowOutput until the person leaves."""
        say(f"A context of {self.llama.model.params.max_seq_len} tokens. /help lists what can be typed.")
        while True:
            try:
                line = self.keyboard.read()
            except EOFError:
                return
            except KeyboardInterrupt:
                continue
            try:
                if line.startswith("/") and not line.startswith("//"):
                    if line.strip() == "/quit":
                        return
                    try:
                        self.command(line)
                    except (ValueError, OSError) as error:  # of files, too
                        say(f"error: {error}")
                elif line.strip():
                    self.say_to_model(line[line.startswith("//") :])
            except (InputError, ArithmeticError) as error:
                say(f"error: {error}")

    def say_to_model(self, message: str) -> None:
        """One turn: a message and its answer. If there is no answer, the message isn't kept either."""
        self.dialog.append({"role": "user", "content": message})
        reply = None
        try:
            turn = self.settings._replace(dialog=self.fit())
            self.tell(turn)
            try:
                reply = answer(self.llama, turn, self.tell, self.keyboard.interrupted)
            finally:
                print(flush=True)
        finally:
            if reply is None or not reply.text:
                self.dialog.pop()
        self.last, self.used = reply, self._length(turn.dialog) + reply.tokens
        if reply.text:
            self.dialog.append({"role": "assistant", "content": reply.text})
        else:
            say("(no answer; the message is not kept)")
        if reply.ended == "interrupted":
            say("(stopped)")
        elif reply.ended == "length" and reply.tokens == turn.max_gen_len:
            say(f"(cut: max_gen_len={turn.max_gen_len})")
        elif reply.ended == "length":
            say(f"(cut: the context of {self.llama.model.params.max_seq_len} tokens is full)")

    def fit(self) -> list[Message]:
        """The dialog, without as many of its oldest turns as leave no room for an answer.

        Raises:
            InputError: even the last message alone doesn't fit, or the chat format refuses the dialog.
        """
        longest = self.llama.model.params.max_seq_len
        room = min(ROOM, longest // 4)
        refusal = self.llama.formatter.refusal(self.dialog)
        if refusal is not None:
            raise InputError(f"{refusal} The message is not kept")
        first = int(self.dialog[0]["role"] == "system")  # which stays
        left_out = self.left_out
        while True:
            kept = self.dialog[:first] + self.dialog[first + left_out :]
            used = self._length(kept)
            if used + room <= longest or len(kept) <= first + 1:
                break
            left_out += min(2, len(kept) - first - 1)
        if used >= longest:
            raise InputError(f"the message makes {used} tokens, and the context has {longest}; it is not kept")
        if left_out > self.left_out:
            say(f"(the context is full: the model no longer sees the first {left_out} messages)")
        self.left_out = left_out
        return kept

    def _length(self, dialog: Dialog) -> int:
        return len(self.llama.formatter.encode_dialog_prompt(dialog))

    def command(self, line: str) -> None:
        """Do what a line that begins with a slash says."""
        name, rest = [*line.strip().split(None, 1), ""][:2]
        if name == "/help":
            say(HELP)
        elif name == "/reset":
            self._replace([message for message in self.dialog[:1] if message["role"] == "system"])
            say("(a new conversation)")
        elif name == "/system":
            others = [message for message in self.dialog if message["role"] != "system"]
            self._replace([{"role": "system", "content": rest}, *others] if rest else others)
            say("(the system message is set)" if rest else "(there is no system message)")
        elif name == "/temperature":
            self._set_temperature(rest)
        elif name == "/save":
            self._save(rest)
        elif name == "/load":
            self._load(rest)
        elif name == "/stats":
            self._stats()
        else:
            raise InputError(f"{name!r} is no command; /help lists those there are. Two slashes begin a message")

    def _replace(self, dialog: list[Message]) -> None:
        self.dialog, self.left_out, self.used = dialog, 0, 0

    def _set_temperature(self, value: str) -> None:
        try:
            temperature = float(value)
        except ValueError:
            raise InputError(f"temperature={value!r} must be a number of at least 0") from None
        SamplingParams(1, temperature)  # which refuses what is out of range
        self.settings = self.settings._replace(temperature=temperature)
        say(f"(temperature {temperature:g})")

    def _save(self, name: str) -> None:
        path = writable_file(name, "the file to save to")
        if path.exists() and path not in self.files:
            raise InputError(f"{path} is there already; give the name of a new file")
        write_whole(path, json.dumps(self.dialog, indent=1, ensure_ascii=False) + "\n")
        self.files.add(path)
        say(f"(saved {len(self.dialog)} messages to {path})")

    def _load(self, name: str) -> None:
        path = require_path(name, "the file to load").absolute()
        try:
            dialog = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is no saved conversation: {error}") from None
        if dialog != []:
            check_dialog(dialog)
            self._length(
                [*dialog, {"role": "user", "content": "?"}]
            )  # an order that the format refuses, is refused now
        self._replace(dialog)
        self.files.add(path)
        say(f"(loaded {len(dialog)} messages from {path})")

    def _stats(self) -> None:
        say(f"context: {self.used} of {self.llama.model.params.max_seq_len} tokens")
        if self.last is not None and self.last.seconds:
            rate = self.last.tokens / self.last.seconds
            say(f"last answer: {self.last.tokens} tokens in {self.last.seconds:.1f} s, {rate:.1f} tokens/s")


def say(text: str) -> None:
    """Tell the person something, beside what the model says."""
    print(visible(text), file=sys.stderr, flush=True)
