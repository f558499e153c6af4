"""Running functions from the command line, with fire."""

import contextlib
import difflib
import functools
import inspect
import io
import logging
import os
import re
import secrets
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import fire
from fire import core, decorators, helptext, trace

from llama.checkpoint import open_checkpoint
from llama.cli.terminal import visible
from llama.default_model import default_checkpoint
from llama.device import dtype_named
from llama.errors import DownloadError, InputError
from llama.generation import Llama

Command = Callable[..., None]


class _Call:
    """A call that is still to be made. (Its parts are private, so that fire takes no word for one of them.)"""

    def __init__(self, make: Callable[[], None]) -> None:
        self._make = make


CONTEXT = 4096  # tokens, where nothing is said of it


def build(
    ckpt_dir: str | None, tokenizer_path: str | None, max_seq_len: int | None, dtype: str | None, seed: int | None
) -> Llama:
    """`Llama.build` for one row, with what a command line says.

    Args:
        ckpt_dir: None for the default model.
        max_seq_len: None for `CONTEXT`, or less if the model was made for less.
        dtype: by name.
        seed: None for another one each time.
    """
    chosen = dtype_named(dtype)
    if seed is not None and (not isinstance(seed, int) or not 0 <= seed < 2**64):
        raise InputError(f"seed={seed!r} must be a whole number of at least 0, and below 2**64")
    checkpoint = open_checkpoint(default_checkpoint() if ckpt_dir is None else ckpt_dir)
    if max_seq_len is None:
        max_seq_len = min(CONTEXT, checkpoint.settings.params.get("max_position_embeddings") or CONTEXT)
    return Llama.build(
        checkpoint,
        tokenizer_path,
        max_seq_len,
        max_batch_size=1,
        seed=secrets.randbits(63) if seed is None else seed,
        dtype=chosen,
    )


class _Visible(logging.Formatter):
    """Messages may hold names that come from files: none of them steers the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def run(component: Command | Mapping[str, Command], name: str | None = None, words: list[str] | None = None) -> None:
    """Call a function with the words of the command line; its signature and docstring make the options and `--help`.

    Unlike `fire.Fire`, this refuses an unknown option before the function begins its work, not after. What goes wrong
    ends the program with one line on standard error, and exit code 1, or 2 if the words of the command line are wrong;
    with `--debug` there is a traceback, too. Log messages go to standard error. The value of a parameter that may be a
    `str` is what was typed; others are read as Python reads them. A parameter that is named after a word of Python's,
    such as `from_`, is given without the underscore.

    Args:
        component: a function, or functions by the names of their commands.
        name: of the program, for the help; by default, the script's.
        words: the command line; by default, the program's.
    """
    words = sys.argv[1:] if words is None else list(words)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    name = name or os.path.basename(sys.argv[0])
    if isinstance(component, Mapping) and words and not words[0].startswith("-"):
        if words[0] not in component:
            wrong(f"{words[0]!r} is no command of {name}", words[0], component)
        component, name = component[words[0]], f"{name} {words.pop(0)}"
    if isinstance(component, Mapping) or {"-h", "--help"} & set(words):
        if words and not {"-h", "--help"} & set(words):
            wrong(f"{words[0]} comes after a command of {name}", words[0], component)
        print(help_text(component, name))
        return
    for stream in (sys.stdin, sys.stdout, sys.stderr):  # what an encoding lacks is no reason to end
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if stream is sys.stdin else "backslashreplace")
    handler = logging.StreamHandler()
    handler.setFormatter(_Visible("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    call = parse(component, name, words)
    try:
        call._make()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever reads our output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if debug:
            traceback.print_exc()
        ours = isinstance(error, InputError | DownloadError | MemoryError | OSError | ArithmeticError)
        kind = "" if ours else f"{type(error).__name__}: "
        sys.exit(visible(f"error: {kind}{error}") + ("" if ours or debug else " (--debug shows where)"))


def parse(function: Command, name: str, words: list[str]) -> _Call:
    """The call of a function that the words of a command line ask for."""
    parameters = inspect.signature(function).parameters
    for parameter in parameters:
        if parameter.endswith("_"):
            option = "--" + parameter.removesuffix("_")
            words = [re.sub(rf"^{option}(?=$|=)", f"{option}_", word) for word in words]

    @functools.wraps(function)
    def prepare(*args: Any, **options: Any) -> _Call:
        return _Call(functools.partial(function, *args, **options))

    kinds = {key: str(parameter.annotation) for key, parameter in parameters.items()}
    words = [*spell_out(name, words, kinds)]
    decorators.SetParseFn(str, *(key for key, kind in kinds.items() if "str" in kind))(prepare)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            call: _Call = fire.Fire(prepare, command=words, name=name, serialize=lambda result: None)
    except core.FireExit as exit:
        (result,) = exit.trace.elements[-1:]
        problem = result.ErrorAsStr() if result.HasError() else said.getvalue().splitlines()[0]
        problem = re.sub(r"(\w+)_$", r"\1", problem)
        unknown = re.match(r"Could not consume arg: (.*)", problem)
        word = "" if unknown is None else unknown[1]
        if unknown is None:
            wrong(f"{name}: {problem}", "", parameters)
        wrong(f"{name} has no use for {word!r}", word, [f"--{key.rstrip('_')}" for key in parameters])
    return call


def spell_out(name: str, words: list[str], kinds: Mapping[str, str]) -> Iterator[str]:
    """A command line on which every option has its value, since fire takes the next word for it, or True.

    Args:
        kinds: the types of the options, by name.
    """
    for word, following in zip(words, [*words[1:], "--"], strict=False):
        option = word.removeprefix("--") if word.startswith("--") else ""
        if "bool" in kinds.get(option, "") and following.lower() not in ("true", "false"):
            yield f"{word}=True"
        elif option in kinds and "bool" not in kinds[option] and following.startswith("--"):
            wrong(f"{name}: --{option.rstrip('_')} needs a value", "", ())
        else:
            yield word


def wrong(message: str, word: str, known: Any) -> NoReturn:
    """End the program with exit code 2, because of a word on the command line; `known` are those there are."""
    close = difflib.get_close_matches(word.split("=")[0], list(known), 1)
    print(f"error: {message}; " + (f"did you mean {close[0]}?" if close else "see --help"), file=sys.stderr)
    sys.exit(2)


def help_text(component: Command | Mapping[str, Command], name: str) -> str:
    """What `--help` prints: fire's text, with names and types as people write them."""
    text: str = helptext.HelpText(component, trace=trace.FireTrace(component, name=name)).replace(f"'{name}'", name)
    text = re.sub(r"(?<=--)(\w+)_(?=\W)|\b([A-Z]+)_(?=\W)", lambda match: match[1] or match[2], text)
    text = (
        re.sub(r"(?<=Type: )Optional\[(.*)\]", r"\1", text).replace(" | None\n", "\n").replace("pathlib.Path", "Path")
    )
    text = text.replace("Type: Optional\n", "Type: str\n")
    if isinstance(component, Mapping):
        text += f"\n\n{name} COMMAND --help tells more. With --debug, an error comes with a traceback."
    return text
