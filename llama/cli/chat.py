"""`llama chat`: a conversation with a model.

Under torchrun the first process has the keyboard and the conversation. It broadcasts each request to the others, and
after each piece of the answer whether to stop, so that all of them make the same steps.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, cast

import torch.distributed as dist

from llama.chat_format import ChatFormat
from llama.cli.build import build_draft, build_llama, open_draft
from llama.cli.terminal import (
    Keyboard,
    interrupting,
    print_piece,
    require_stdout,
    status_line,
)
from llama.dialog import Dialog, Message, check_dialog
from llama.distributed import broadcast_object, is_first_rank
from llama.errors import InputError
from llama.files import check_json_depth, require_file, writable_file
from llama.generation import Llama
from llama.log import escape_control_characters
from llama.output_folder import write_whole
from llama.sampling_options import SamplingOptions
from llama.sampling_params import SamplingParams

# Tokens of the context that are kept free for an answer; a quarter of the context if that is less.
RESERVED_FOR_ANSWER = 256

HELP = """/reset              start a new conversation; the system message stays
/system TEXT        set the system message; without TEXT, remove it
/temperature T      set the sampling temperature; 0 always takes the most likely token
/save FILE          save the conversation as JSON
/load FILE          continue a saved conversation
/stats              show the speed of the last answer, and how much of the context is used
/help               show this list
/quit               leave (or type Ctrl-D)
Enter sends a message. Alt-Enter, or a backslash before Enter, begins another line. Ctrl-C stops an answer.
To send a message that begins with a slash, type two slashes."""


class ChatRequest(NamedTuple):
    """What the model is asked for. `max_gen_len` is None for as many tokens as the context allows."""

    dialog: list[Message]
    temperature: float
    top_p: float
    max_gen_len: int | None


class Answer(NamedTuple):
    """The model's answer."""

    text: str
    n_tokens: int
    seconds: float
    ended: str  # "stop", "length" or "interrupted"
    proposals: tuple[int, int] | None  # proposed and accepted tokens; None without any, or if it was interrupted


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
    quantize: str | None = None,
    compile: bool = False,
    prompt_lookup: int | None = None,
    draft: str | None = None,
    chat_format: str | None = None,
) -> None:
    """Talk with a model. In the conversation, /help lists the commands.

    To run a model on several processes: torchrun --nproc_per_node N -m llama chat --ckpt_dir ...

    Args:
        ckpt_dir: the checkpoint of a chat model: a folder in Meta's or Hugging Face's layout, or a GGUF file; by
            default SmolLM2-135M-Instruct, which is downloaded once
        tokenizer_path: the tokenizer file; by default the one that comes with the checkpoint
        system: system message: how the model should behave
        temperature: sampling temperature; 0 always takes the most likely token
        top_p: sample only from the most likely tokens that together reach this probability (nucleus sampling)
        max_gen_len: maximum number of tokens of an answer; by default as many as the context allows
        seed: random seed: the same seed samples the same tokens; by default a different one each time
        max_seq_len: size of the context: how many tokens of the conversation the model sees; by default 4096, or the
            model's own maximum if that is smaller, or draft's
        dtype: float32, float16 or bfloat16; by default bfloat16 if the device supports it or with quantize, else
            float16 on CUDA and float32 on the CPU; counts for draft, too
        quantize: int8 or int4: keep the weights in 8 or 4 bits, which takes about a half or a third of the memory, and
            loses some precision; counts for draft, too
        compile: compile the decoding step, so that it takes less time; compiling takes some 10 to 30 s, and only the
            first time, since its result is kept on disk; counts for draft, too
        prompt_lookup: speculative decoding: propose up to this many tokens at a time, those that followed when the
            latest ones occurred before; it takes less time where an answer quotes the conversation
        draft: speculative decoding: the checkpoint of a smaller model with the same tokenizer, which proposes tokens;
            it takes less time where that often says the same
        chat_format: llama2, llama3 or chatml; by default the chat template that the model's files carry, or without one
            the format that its control tokens tell
    """
    # Checks the options before the model is loaded, which may take minutes.
    require_stdout()
    SamplingParams(1 if max_gen_len is None else max_gen_len, temperature, top_p, seed=seed)
    draft_checkpoint = open_draft(draft, prompt_lookup)
    llama = build_llama(
        ckpt_dir,
        tokenizer_path,
        max_seq_len,
        dtype,
        seed,
        chat_format,
        quantize=quantize,
        compile=compile,
        draft=draft_checkpoint,
    )
    formatter = cast(ChatFormat, llama.formatter)  # raises InputError if the model has no chat format
    options: SamplingOptions = {
        "prompt_lookup_num_tokens": prompt_lookup,
        "draft_model": build_draft(draft_checkpoint, llama, dtype, quantize, compile),
        "reuse_cache": True,
    }
    if not is_first_rank():
        while (request := broadcast_object(None)) is not None:
            try:
                answer(llama, request, options, lambda: False)
            except (InputError, ArithmeticError):
                continue  # the first process reports it
        return
    try:
        with Keyboard() as keyboard:
            settings = ChatRequest([], temperature, top_p, max_gen_len)
            conversation = Conversation(llama, formatter, keyboard, settings, options)
            if system is not None:
                conversation.execute(f"/system {system}")
            conversation.run()
    finally:
        broadcast_object(None)


def answer(llama: Llama, request: ChatRequest, options: SamplingOptions, interrupted: Callable[[], bool]) -> Answer:
    """Print a model's answer while it is generated, to its end or until `interrupted()`.

    One process asks that at any time, since a long prompt takes long to prefill. Several ask it after each piece: every
    process takes the same pieces, and stops at the same one whatever goes wrong on the first, so that the next object
    that is broadcast is a request for all of them.
    """
    text, n_tokens, ended, proposals = "", 0, "interrupted", None
    several = dist.is_initialized()
    watch = interrupting((lambda: False) if several else interrupted)
    prompt_length = len(llama.formatter.encode_dialog_prompt(request.dialog))
    status = status_line(f"prefilling the prompt of {prompt_length} tokens ...")
    begin = time.monotonic()
    stream = llama.chat_completion_stream(
        [request.dialog], request.temperature, request.top_p, request.max_gen_len, **options
    )
    # Ctrl-C raises KeyboardInterrupt where standard input is not a terminal, and on Windows. The stream is closed at
    # once, even if an error is raised, because the other processes wait for that before they take the next request.
    with contextlib.suppress(KeyboardInterrupt), contextlib.closing(stream), watch as heard, status as remove_status:
        for piece in stream:
            remove_status()
            text += piece.text
            n_tokens += piece.token is not None
            ended, proposals = piece.ended or ended, piece.proposals
            output_error = None
            try:
                print_piece(piece.text)
            except OSError as error:  # such as a closed pipe
                output_error = error
            stop = broadcast_object(output_error is not None or heard.is_set() or (several and interrupted()))
            if output_error is not None:
                raise output_error
            if stop:
                break
    return Answer(text, n_tokens, time.monotonic() - begin, ended, proposals)


class Conversation:
    """A dialog with a model, and the commands that change it.

    Args:
        llama: the model.
        formatter: its chat format.
        keyboard: where the user's messages and commands come from.
        settings: the options that are broadcast with every request; its dialog is not used.
        options: the others, which each rank has from its command line.
    """

    def __init__(
        self,
        llama: Llama,
        formatter: ChatFormat,
        keyboard: Keyboard,
        settings: ChatRequest,
        options: SamplingOptions,
    ) -> None:
        self.llama, self.formatter, self.options = llama, formatter, options
        self.keyboard, self.settings = keyboard, settings
        self.dialog: list[Message] = []
        self.last_answer: Answer | None = None
        self.used_tokens = 0  # tokens in the context after the last answer
        self.n_dropped = 0  # oldest messages of the dialog that the model no longer sees
        self.own_files: set[Path] = set()  # which this conversation was saved to or loaded from, and may overwrite

    @property
    def max_seq_len(self) -> int:
        """The size of the context in tokens."""
        return self.llama.model.params.max_seq_len

    def run(self) -> None:
        """Answer messages and execute commands until the user leaves."""
        notify(f"The context has {self.max_seq_len} tokens. /help lists the commands.")
        while True:
            try:
                line = self.keyboard.read_message()
            except EOFError:
                return
            except KeyboardInterrupt:
                continue
            try:
                if line.startswith("/") and not line.startswith("//"):
                    if line.strip() == "/quit":
                        return
                    self.execute_or_report(line)
                elif line.strip():
                    self.send(line[line.startswith("//") :])
            except (InputError, ArithmeticError) as error:
                notify(f"error: {error}")

    def send(self, message: str) -> None:
        """Send a message and print the answer. A message that gets no answer is removed from the dialog again."""
        self.dialog.append({"role": "user", "content": message})
        answered = False
        try:
            request = self.settings._replace(dialog=self.visible_dialog())
            broadcast_object(request)
            try:
                reply = answer(self.llama, request, self.options, self.keyboard.interrupted)
            finally:
                print(flush=True)
            answered = bool(reply.text)
        finally:
            if not answered:
                self.dialog.pop()
        self.last_answer, self.used_tokens = reply, self._prompt_length(request.dialog) + reply.n_tokens
        if answered:
            self.dialog.append({"role": "assistant", "content": reply.text})
        else:
            notify("(no answer; the message is not kept)")
        if reply.ended == "interrupted":
            notify("(stopped)")
        elif reply.ended == "length" and reply.n_tokens == request.max_gen_len:
            notify(f"(the answer ends at max_gen_len={request.max_gen_len})")
        elif reply.ended == "length":
            notify(f"(the answer ends where the context of {self.max_seq_len} tokens is full)")

    def visible_dialog(self) -> list[Message]:
        """Return the dialog without its oldest messages, as many as must go to leave enough tokens for an answer.

        Raises:
            InputError: even the last message alone is too long, or the chat format refuses the dialog.
        """
        reserved = min(RESERVED_FOR_ANSWER, self.max_seq_len // 4)
        refusal = self.formatter.refusal(self.dialog)
        if refusal is not None:
            raise InputError(f"{refusal} The message is not kept")
        n_system = int(self.dialog[0]["role"] == "system")  # a system message is never dropped
        n_dropped = self.n_dropped
        while True:
            visible = self.dialog[:n_system] + self.dialog[n_system + n_dropped :]
            length = self._prompt_length(visible)
            if length + reserved <= self.max_seq_len or len(visible) <= n_system + 1:
                break
            n_dropped += min(2, len(visible) - n_system - 1)
        if length >= self.max_seq_len:
            raise InputError(
                f"the message takes {length} tokens, but the context has only {self.max_seq_len}; it is not kept"
            )
        if n_dropped > self.n_dropped:
            notify(f"(the context is full: the model no longer sees the first {n_dropped} messages)")
        self.n_dropped = n_dropped
        return visible

    def _prompt_length(self, dialog: Dialog) -> int:
        return len(self.formatter.encode_dialog_prompt(dialog))

    def execute_or_report(self, line: str) -> None:
        """Execute a command; print what is wrong with it, or with the file that it names."""
        try:
            self.execute(line)
        except (ValueError, OSError) as error:
            notify(f"error: {error}")

    def execute(self, line: str) -> None:
        """Execute a command: a line that begins with a slash."""
        name, argument = [*line.strip().split(None, 1), ""][:2]
        if name == "/help":
            notify(HELP)
        elif name == "/reset":
            self._replace_dialog([message for message in self.dialog[:1] if message["role"] == "system"])
            notify("(a new conversation)")
        elif name == "/system":
            others = [message for message in self.dialog if message["role"] != "system"]
            dialog: list[Message] = [{"role": "system", "content": argument}, *others] if argument else others
            self._check_chat_format(dialog)
            self._replace_dialog(dialog)
            notify("(the system message is set)" if argument else "(there is no system message)")
        elif name == "/temperature":
            self._set_temperature(argument)
        elif name == "/save":
            self._save(argument)
        elif name == "/load":
            self._load(argument)
        elif name == "/stats":
            self._print_stats()
        else:
            raise InputError(f"{name!r} is not a command; /help lists them. Two slashes begin a message")

    def _check_chat_format(self, dialog: list[Message]) -> None:
        """Raise InputError now, and not at the next message, if the chat format doesn't support these roles."""
        self._prompt_length([*dialog, {"role": "user", "content": "?"}])

    def _replace_dialog(self, dialog: list[Message]) -> None:
        self.dialog, self.n_dropped, self.used_tokens = dialog, 0, 0

    def _set_temperature(self, value: str) -> None:
        try:
            temperature = float(value)
        except ValueError:
            raise InputError(f"temperature={value!r} must be a number of at least 0") from None
        SamplingParams(1, temperature)  # checks the range
        self.settings = self.settings._replace(temperature=temperature)
        notify(f"(temperature {temperature:g})")

    def _save(self, name: str) -> None:
        path = writable_file(name, "the file to save to")
        if path.exists() and path not in self.own_files:
            raise InputError(f"{path} is there already; give the name of a new file")
        write_whole(path, json.dumps(self.dialog, indent=1, ensure_ascii=False) + "\n")
        self.own_files.add(path)
        notify(f"(saved {len(self.dialog)} messages to {path})")

    def _load(self, name: str) -> None:
        path = require_file(name, "the file to load").absolute()
        try:
            dialog = json.loads(path.read_text(encoding="utf-8"))
            check_json_depth(dialog)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is not a saved conversation: {error}") from None
        if dialog != []:
            check_dialog(dialog)
            self._check_chat_format(dialog)
        self._replace_dialog(dialog)
        self.own_files.add(path)
        notify(f"(loaded {len(dialog)} messages from {path})")

    def _print_stats(self) -> None:
        notify(f"context: {self.used_tokens} of {self.max_seq_len} tokens")
        if self.last_answer is not None and self.last_answer.seconds:
            rate = self.last_answer.n_tokens / self.last_answer.seconds
            notify(
                f"last answer: {self.last_answer.n_tokens} tokens in {self.last_answer.seconds:.1f} s, "
                f"{rate:.1f} tokens/s"
            )
            if self.last_answer.proposals is not None:
                n_proposed, n_accepted = self.last_answer.proposals
                notify(f"{n_accepted} of {n_proposed} proposed tokens accepted")


def notify(text: str) -> None:
    """Print a message of this program itself, apart from what the model writes: on standard error."""
    print(escape_control_characters(text), file=sys.stderr, flush=True)
