"""Running a function from the command line, with fire."""

import functools
import inspect
import logging
import re
import sys
from collections.abc import Callable
from typing import Any

import fire

from llama.errors import DownloadError, InputError


class _Call:
    """A call that is still to be made."""

    def __init__(self, make: Callable[[], None]) -> None:
        self._make = make  # private, so that fire lists no commands


def run(main: Callable[..., None]) -> None:
    """Call `main` with the arguments of the command line; its signature and docstring make the options and `--help`.

    Unlike `fire.Fire(main)`, this refuses an unknown option before `main` begins its work, not after. Errors of the
    user's making end the program with their message and exit code 1, without a traceback. Log messages go to standard
    error. A parameter that is named after a word of Python's, such as `from_`, is given without the underscore.
    """
    for name in inspect.signature(main).parameters:
        if name.endswith("_"):
            option = "--" + name.removesuffix("_")
            sys.argv[1:] = [re.sub(rf"^{option}(?=$|=)", f"{option}_", word) for word in sys.argv[1:]]
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    @functools.wraps(main)
    def prepare(*args: Any, **options: Any) -> _Call:
        return _Call(functools.partial(main, *args, **options))

    try:
        fire.Fire(prepare, serialize=lambda call: call._make() if isinstance(call, _Call) else call)
    except (InputError, DownloadError, MemoryError, OSError) as error:
        sys.exit(f"error: {error}")
