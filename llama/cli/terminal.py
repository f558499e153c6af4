"""What the commands share of the terminal: a text from the command line or a pipe, messages that a user types, Ctrl-C,
safe printing, and a line that says what takes long."""

import contextlib
import json
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from llama.errors import InputError
from llama.log import escape_control_characters

try:
    import termios
except ImportError:  # Windows, where Ctrl-C raises KeyboardInterrupt
    termios = None  # type: ignore[assignment]

CTRL_C = b"\x03"
ENTER = re.compile(rb"(?<![\\\x1b])\r")  # not after a backslash or Alt, where it begins another line
ESCAPE_SEQUENCE = re.compile(r"\x1b(?!\r)(\[[0-?]*[ -/]*[@-~]|O.|.)?")  # arrow keys, and the marks around pasted text
EDITING_KEYS = "\r\n\x1b\x7f\b\x15\x17"  # Enter, Alt before it, Backspace, Ctrl-U and Ctrl-W

STATUS_DELAY = 0.5  # seconds: what takes less needs no explanation

# Characters that JSON may hold as they are, but a terminal or UTF-8 can't take.
UNSAFE_IN_JSON = re.compile(r"[\x7f-\x9f\ud800-\udfff]")


def on_ctrl_c(handler: Callable[[int, FrameType | None], object]) -> None:
    """Set what happens at Ctrl-C, unless whoever started the program has it ignored."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)


def exit_at_once(_number: int, _frame: FrameType | None) -> NoReturn:
    """End the program as Ctrl-C does, where Python would answer with a traceback: while it imports, or ends."""
    os._exit(130)


def open_closed_streams() -> None:
    """Open the null device under the number of each standard stream that is closed.

    Otherwise the next file that is opened gets the number, and with it what libraries print there.
    """
    number = os.open(os.devnull, os.O_RDWR)
    while number <= 2:
        number = os.open(os.devnull, os.O_RDWR)
    os.close(number)


def require_stdout() -> None:
    """Raise InputError, before minutes of work, if the result would be printed to nowhere."""
    if sys.stdout is None:
        raise InputError("standard output is closed: there is nowhere to print to")


def discard_unwritable_output() -> None:
    """Discard what can't be written to standard output: Python would try again at its end, and print a traceback."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:  # a closed pipe, a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def to_json(value: object) -> str:
    """Return a value as one line of JSON that can be printed anywhere."""
    text = json.dumps(value, ensure_ascii=str(sys.stdout.encoding).lower() not in ("utf-8", "utf8"))
    return UNSAFE_IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def print_piece(text: str) -> None:
    """Print a part of a generated text at once: escaped on a terminal, unchanged into a pipe or file."""
    print(escape_control_characters(text) if sys.stdout.isatty() else text, end="", flush=True)


@contextlib.contextmanager
def status_line(text: str) -> Iterator[Callable[[], None]]:
    """Within the block, if it takes long, show a line on standard error where that is a terminal.

    Yields:
        A function that removes the line before the block's end, which is needed before anything else is printed.
    """
    removed = threading.Event()

    def show() -> None:
        if not removed.wait(STATUS_DELAY):
            from tqdm import tqdm  # not at the top, as in `print_message`, which keeps log messages above the line

            with tqdm(desc=text, bar_format="{desc}", leave=False, file=sys.stderr):
                removed.wait()

    thread = threading.Thread(target=show, daemon=True, name="status line")

    def remove() -> None:
        removed.set()
        if thread.ident is not None:  # it was started
            thread.join()

    if sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":  # several processes share one terminal
        thread.start()
    try:
        yield remove
    finally:
        remove()


def text_or_stdin(text: str | None) -> str:
    """Return a command's text argument, or if there is none, standard input without its last newline.

    Raises:
        InputError: there is neither, or several processes would share standard input.
    """
    if text is not None:
        return replace_surrogates(text)
    if sys.stdin is None or sys.stdin.isatty():
        raise InputError('no text: give one, in quotes ("…"), or pipe one in')
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("no text: several processes can't share standard input; give the text as an argument")
    return sys.stdin.read().removesuffix("\n")


def replace_surrogates(text: str) -> str:
    """Replace what Python makes of typed bytes that are not valid UTF-8, which no tokenizer or file takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@contextlib.contextmanager
def interrupting(interrupted: Callable[[], bool]) -> Iterator[threading.Event]:
    """Within the block, raise KeyboardInterrupt in the main thread, which runs it, as soon as `interrupted()`.

    Yields:
        Whether that has been. (Where the program was started so as to ignore Ctrl-C, nothing is raised.)
    """
    lock, ended, heard = threading.Lock(), threading.Event(), threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            if interrupted():
                heard.set()
                with lock:
                    if not ended.is_set():
                        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                return

    watcher = threading.Thread(target=watch, daemon=True, name="watch for Ctrl-C")
    watcher.start()
    try:
        yield heard
    finally:
        with lock:
            ended.set()
        watcher.join()


class Keyboard:
    """Reads a user's messages from a terminal, or the lines of a pipe or file, and notices Ctrl-C in between.

    While it is open on a terminal, Ctrl-C is an ordinary key and sends no signal, because a signal would end torchrun
    and with it every process. The terminal's settings are restored however the program ends.
    """

    def __init__(self) -> None:
        self._is_terminal = sys.stdin is not None and sys.stdin.isatty()
        self._typed_ahead = b""  # keys typed during an answer: whole messages, and the beginning of one
        self._saved_settings: list[Any] | None = None
        self._read_line: Callable[[str], str] = line_editor() if self._is_terminal else read_stdin_line

    def __enter__(self) -> "Keyboard":
        if self._is_terminal and termios is not None:
            self._saved_settings = termios.tcgetattr(sys.stdin)
            for number in (signal.SIGTERM, signal.SIGHUP):  # torchrun sends SIGTERM when another process has died
                signal.signal(number, lambda number, _: sys.exit(128 + number))
            settings = termios.tcgetattr(sys.stdin)
            settings[0] &= ~termios.ICRNL  # Enter is \r, as where a message is edited
            settings[3] &= ~(termios.ECHO | termios.ICANON)
            settings[6][termios.VINTR] = b"\0"
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, settings)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._saved_settings is not None:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._saved_settings)

    def read_message(self) -> str:
        """Return the next message, which may have several lines.

        What was typed during an answer comes first, a message at a time, as if it were typed now.

        Raises:
            EOFError: the user typed Ctrl-D, or the pipe or file has ended.
            KeyboardInterrupt: the user typed Ctrl-C.
        """
        enter = ENTER.search(self._typed_ahead)
        end = len(self._typed_ahead) if enter is None else enter.end()
        keys, self._typed_ahead = self._typed_ahead[:end], self._typed_ahead[end:]
        text = ESCAPE_SEQUENCE.sub("", keys.decode("utf-8", "replace"))
        message = self._read_line("".join(key for key in text if key.isprintable() or key in EDITING_KEYS))
        return replace_surrogates(message)

    def interrupted(self) -> bool:
        """Return whether Ctrl-C was pressed since the last message; other keys are kept for the next messages."""
        while self._saved_settings is not None and select.select([sys.stdin], [], [], 0)[0]:
            keys = os.read(sys.stdin.fileno(), 1024)
            if not keys:  # the terminal was closed
                return True
            if CTRL_C in keys:
                self._typed_ahead = b""
                return True
            self._typed_ahead += keys
        return False


def read_stdin_line(_keys: str) -> str:
    """Return the next line of a pipe or file; EOFError at its end."""
    line = sys.stdin.readline() if sys.stdin is not None else ""
    if not line:
        raise EOFError
    return line.rstrip("\n")


def line_editor() -> Callable[[str], str]:
    """Return a function that lets the user edit a message, after some keys that were typed before, and returns it.

    Enter ends the message. Alt-Enter, or a backslash before Enter, begins another line; pasted lines stay together. The
    arrow keys bring back earlier messages.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.input.typeahead import store_typeahead
    from prompt_toolkit.input.vt100_parser import Vt100Parser
    from prompt_toolkit.key_binding import KeyBindings, KeyPress, KeyPressEvent
    from prompt_toolkit.output import create_output

    key_bindings = KeyBindings()

    @key_bindings.add("enter")
    def _end_message(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.char_before_cursor == "\\":
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @key_bindings.add("escape", "enter")
    def _begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        "> ",
        multiline=True,
        prompt_continuation="… ",
        key_bindings=key_bindings,
        output=create_output(always_prefer_tty=True),  # also where standard output is a pipe
    )

    def edit(keys: str) -> str:
        key_presses: list[KeyPress] = []
        Vt100Parser(key_presses.append).feed_and_flush(keys)
        store_typeahead(session.input, key_presses)
        return session.prompt()

    return edit
