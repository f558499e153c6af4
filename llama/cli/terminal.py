"""What the commands share of the terminal: reading a text, a person's lines, and Ctrl-C; and showing text safely."""

import os
import re
import select
import signal
import sys
from collections.abc import Callable
from typing import Any

from llama.errors import InputError

try:
    import termios
except ImportError:  # Windows: Ctrl-C is an exception there
    termios = None  # type: ignore[assignment]

CTRL_C = b"\x03"
KEYS = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|O.|.)?")  # that write nothing, such as arrows; and what comes with a paste


def visible(text: str) -> str:
    """A text that can't steer a terminal: control characters, but for new lines and tabs, as the signs for them."""
    return "".join(_sign(character) for character in text)


def _sign(character: str) -> str:
    if character in "\n\t" or not (ord(character) < 32 or 127 <= ord(character) < 160):
        return character
    return chr(0x2400 + ord(character)) if ord(character) < 32 else f"\\x{ord(character):02x}"


def show(text: str) -> None:
    """Print a part of a text that a model wrote; into a pipe or file, as it is."""
    print(visible(text) if sys.stdout.isatty() else text, end="", flush=True)


def text_given(text: str | None) -> str:
    """A command's text: its argument, or else what is piped into it, without its last line end.

    Raises:
        InputError: there is neither; or several processes would share what is piped in.
    """
    if text is not None:
        return text
    if sys.stdin is None or sys.stdin.isatty():
        raise InputError('no text: give one, in quotes ("…"), or pipe one in')
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("no text: several processes can't share standard input; give the text as an argument")
    return sys.stdin.read().removesuffix("\n")


class Keyboard:
    """A person's lines, and whether they have pressed Ctrl-C since; or the lines of a pipe or file.

    While it is open on a terminal, Ctrl-C is a key like others and no signal, since a signal would end torchrun, and
    every process with it. However the program is told to end, the terminal gets back what it had.
    """

    def __init__(self) -> None:
        self._terminal = sys.stdin is not None and sys.stdin.isatty()
        self._typed = b""  # during an answer, for the next line
        self._read: Callable[[str], str] = self._read_pipe
        self._before: list[Any] | None = None
        if self._terminal:
            self._read = line_editor()

    def __enter__(self) -> "Keyboard":
        if self._terminal and termios is not None:
            self._before = termios.tcgetattr(sys.stdin)
            for number in (signal.SIGTERM, signal.SIGHUP):  # torchrun's, when another process has died
                signal.signal(number, lambda number, _: sys.exit(128 + number))
            keys = termios.tcgetattr(sys.stdin)
            keys[3] &= ~(termios.ECHO | termios.ICANON)
            keys[6][termios.VINTR] = b"\0"
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, keys)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before is not None:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._before)

    def read(self) -> str:
        """The next message; it may have several lines.

        Raises:
            EOFError: Ctrl-D, or the end of the file.
            KeyboardInterrupt: Ctrl-C.
        """
        typed, self._typed = KEYS.sub("", self._typed.decode("utf-8", "replace")), b""
        line = self._read("".join(character for character in typed if character.isprintable()))
        return line.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # bytes that are no text

    def interrupted(self) -> bool:
        """Whether Ctrl-C was pressed since the last line. Other keys are kept for the next one."""
        while self._before is not None and select.select([sys.stdin], [], [], 0)[0]:
            typed = os.read(sys.stdin.fileno(), 1024)
            if not typed:  # the terminal is gone
                return True
            if CTRL_C in typed:
                self._typed = b""
                return True
            self._typed += typed
        return False

    def _read_pipe(self, _typed: str) -> str:
        line = sys.stdin.readline() if sys.stdin is not None else ""
        if not line:
            raise EOFError
        return line.rstrip("\n")


def line_editor() -> Callable[[str], str]:
    """A function that lets a person type a message, beginning with what they have typed already.

    Enter ends it; Alt-Enter, or Enter after a backslash, begins another line; pasted lines stay together. Arrow keys
    bring earlier messages back.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output

    keys = KeyBindings()

    @keys.add("enter")
    def _enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.char_before_cursor == "\\":
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        "> ",
        multiline=True,
        prompt_continuation="… ",
        key_bindings=keys,
        output=create_output(always_prefer_tty=True),  # not into a pipe
    )
    return lambda typed: session.prompt(default=typed)
