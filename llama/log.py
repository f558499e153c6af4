"""Messages for people on standard error: above progress bars, and unable to control the terminal."""

import contextlib
import logging
import sys


class EscapingFormatter(logging.Formatter):
    """Escapes control characters, since a message may quote a file, and must not be able to control the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return escape_control_characters(super().format(record))


class LogHandler(logging.Handler):
    """Writes log messages to standard error; where a progress bar is shown there, above it.

    Those of other libraries only count from a warning on: what they do is no news to the user of a command.
    """

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(EscapingFormatter("%(message)s"))
        self.addFilter(lambda record: record.name == "llama" or record.levelno >= logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print_message(self.format(record))
        except Exception:  # such as arguments that don't fit the message, which is no reason for its caller to fail
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Print a traceback and the record, where standard error can take them."""
        with contextlib.suppress(ValueError):  # it is closed, or its encoding lacks a character
            super().handleError(record)


def print_message(text: str) -> None:
    """Print a line on standard error, if there is one; where a progress bar is shown there, above it."""
    from tqdm import tqdm  # not at the top, since neither help nor a usage error needs it

    if sys.stderr is not None:  # instead of which tqdm would take standard output
        tqdm.write(text, file=sys.stderr)


def escape_control_characters(text: str) -> str:
    """Replace control characters other than newlines and tabs by visible symbols, so that none controls a terminal."""
    return "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    if character in "\n\t" or not (ord(character) < 32 or 127 <= ord(character) < 160):
        return character
    return chr(0x2400 + ord(character)) if ord(character) < 32 else f"\\x{ord(character):02x}"
