"""Jupyter notebooks: whether the program is one, and its log messages, which are shown there without any set-up."""

import logging
import sys

from llama.log import LogHandler

LEVEL = logging.INFO - 1  # shows what INFO does; since nobody else sets this level, it is known to be ours

logger = logging.getLogger("llama")
handler = LogHandler()


def in_notebook() -> bool:
    """Whether the program runs in a Jupyter kernel. IPython isn't imported to find out."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


def show_log() -> None:
    """In a notebook, show the library's log messages from INFO on, unless the user has set up logging."""
    if in_notebook() and not logger.hasHandlers() and logger.level == logging.NOTSET:
        logger.addHandler(handler)
        logger.addFilter(give_way)
        logger.setLevel(LEVEL)


def give_way(record: logging.LogRecord) -> bool:
    """A filter of the logger: as soon as the user has set up logging, only those settings count.

    Without it, the user's handler would show every message a second time, and those below the user's level too.
    """
    if handler in logger.handlers and (logging.getLogger().handlers or logger.handlers != [handler]):
        logger.removeHandler(handler)
        if logger.level == LEVEL:
            logger.setLevel(logging.NOTSET)
    return logger.isEnabledFor(record.levelno)
