"""Running functions as programs: a function's signature and docstring become its options and its help (with fire)."""

import contextlib
import difflib
import functools
import importlib
import inspect
import io
import logging
import os
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import fire
from fire import core, decorators, helptext, trace

from llama.cli.terminal import escape_control_characters
from llama.errors import DownloadError, InputError

Command = Callable[..., None]


class LazyCommand(NamedTuple):
    """A command whose module is imported when it is needed, since importing torch takes over a second.

    Attributes:
        module, function: where it is.
        summary: the first sentence of the function's docstring.
    """

    module: str
    function: str
    summary: str

    def load(self) -> Command:
        command: Command = getattr(importlib.import_module(self.module), self.function)
        return command


class EscapingFormatter(logging.Formatter):
    """Escapes control characters, since a message may quote a file, and must not be able to control the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return escape_control_characters(super().format(record))


def run(component: Command | Mapping[str, LazyCommand], name: str | None = None, args: list[str] | None = None) -> None:
    """Call a function with the arguments of the command line.

    Unlike `fire.Fire`, this rejects an unknown option before it calls the function, not after. The value of a parameter
    whose type includes `str` is the argument as it was typed; other values are parsed as Python literals. A parameter
    named after a Python keyword, such as `from_`, becomes an option without the underscore, `--from`.

    An error ends the program with one line on standard error and exit code 1, or 2 if the command line itself is wrong;
    with `--debug`, its traceback is printed too. Log messages go to standard error.

    Args:
        component: a function, or a mapping from command names to commands.
        name: the program's name in help and errors; by default the name of the script.
        args: the arguments; by default those of the program.
    """
    args = sys.argv[1:] if args is None else args
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    name = name or os.path.basename(sys.argv[0])
    if isinstance(component, Mapping) and args and not args[0].startswith("-"):
        if args[0] not in component:
            exit_with_usage_error(f"{args[0]!r} is not a command of {name}", args[0], component)
        component, name = component[args[0]].load(), f"{name} {args.pop(0)}"
    if isinstance(component, Mapping) or {"-h", "--help"} & set(args):
        if args and not {"-h", "--help"} & set(args):
            exit_with_usage_error(f"{args[0]} must come after a command of {name}")
        print(help_text(component, name))
        return
    set_up_streams()
    call = bind(component, name, args)
    try:
        call()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the program that reads our output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if debug:
            traceback.print_exc()
        expected = isinstance(error, InputError | DownloadError | MemoryError | OSError | ArithmeticError)
        kind = "" if expected else f"{type(error).__name__}: "
        hint = "" if expected or debug else " (--debug shows where)"
        sys.exit(escape_control_characters(f"error: {kind}{error}") + hint)


def set_up_streams() -> None:
    """Log to standard error, and let neither malformed input nor the output's encoding raise UnicodeError."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if stream is sys.stdin else "backslashreplace")
    handler = logging.StreamHandler()
    handler.setFormatter(EscapingFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def bind(function: Command, name: str, args: list[str]) -> Callable[[], None]:
    """Parse the arguments of a command line into a call of a function, without calling it.

    Args:
        function: the function to call.
        name: the program's name, for error messages.
        args: the arguments; if they don't fit the function, the program ends with exit code 2.
    """
    parameters = inspect.signature(function).parameters
    for parameter in parameters:
        if parameter.endswith("_"):
            option = "--" + parameter.removesuffix("_")
            args = [re.sub(rf"^{option}(?=$|=)", f"{option}_", arg) for arg in args]
    types = {key: str(parameter.annotation) for key, parameter in parameters.items()}
    args = list(with_explicit_values(name, args, types))
    calls: list[Callable[[], None]] = []

    @functools.wraps(function)
    def record_call(*positional: Any, **options: Any) -> None:
        calls.append(functools.partial(function, *positional, **options))

    decorators.SetParseFn(str, *(key for key, type_name in types.items() if "str" in type_name))(record_call)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            fire.Fire(record_call, command=args, name=name, serialize=lambda result: None)
    except core.FireExit as fire_exit:
        failed = fire_exit.trace.elements[-1]
        problem = failed.ErrorAsStr() if failed.HasError() else printed.getvalue().splitlines()[0]
        problem = re.sub(r"(\w+)_$", r"\1", problem)
        unknown = re.match(r"Could not consume arg: (.*)", problem)
        if unknown is None:
            exit_with_usage_error(f"{name}: {problem}")
        kind = "unknown option" if unknown[1].startswith("-") else "unexpected argument"
        options = [f"--{key.rstrip('_')}" for key in parameters]
        exit_with_usage_error(f"{name}: {kind} {unknown[1]!r}", unknown[1], options)
    return calls[0]


def with_explicit_values(name: str, args: list[str], types: Mapping[str, str]) -> Iterator[str]:
    """Give every option of a command line an explicit value.

    This is needed because fire takes the argument after an option for its value, or else the value True.

    Args:
        name: the program's name, for the error where an option lacks its value.
        args: the arguments.
        types: the type annotation of each option, by its name.
    """
    for arg, following in zip(args, [*args[1:], "--"], strict=False):
        option = arg.removeprefix("--") if arg.startswith("--") else ""
        if "bool" in types.get(option, "") and following.lower() not in ("true", "false"):
            yield f"{arg}=True"
        elif option in types and "bool" not in types[option] and following.startswith("--"):
            exit_with_usage_error(f"{name}: --{option.rstrip('_')} needs a value")
        else:
            yield arg


def exit_with_usage_error(message: str, typed: str = "", known: Iterable[str] = ()) -> NoReturn:
    """End the program with exit code 2 because of a wrong command line.

    Args:
        message: what is wrong.
        typed: the wrong argument; the most similar name among `known` is suggested.
        known: the names there are.
    """
    similar = difflib.get_close_matches(typed.split("=")[0], list(known), 1)
    hint = f"did you mean {similar[0]}?" if similar else "see --help"
    print(f"error: {message}; {hint}", file=sys.stderr)
    sys.exit(2)


def help_text(component: Command | Mapping[str, LazyCommand], name: str) -> str:
    """Return the text of `--help`: fire's, with types as they are written in code, and options without underscores."""
    described: Any = component
    if isinstance(component, Mapping):
        described = {key: _documented_function(command.summary) for key, command in component.items()}
    text: str = helptext.HelpText(described, trace=trace.FireTrace(described, name=name)).replace(f"'{name}'", name)
    text = re.sub(r"(?<=--)(\w+)_(?=\W)|\b([A-Z]+)_(?=\W)", lambda match: match[1] or match[2], text)
    text = re.sub(r"(?<=Type: )Optional\[(.*)\]", r"\1", text)
    text = text.replace("Type: Optional[str | pathlib...\n", "Type: str | Path\n")  # which fire has cut off
    text = text.replace(" | None\n", "\n").replace("pathlib.Path", "Path").replace("Type: Optional\n", "Type: str\n")
    for letter, count in Counter(re.findall(r"^    -(\w), --", text, re.MULTILINE)).items():
        if letter == "h" or count > 1:  # fire abbreviates options, but here -h is --help, and others may be ambiguous
            text = text.replace(f"    -{letter}, --", "    --")
    if isinstance(component, Mapping):
        text += f"\n\n{name} COMMAND --help describes a command; {name} --version prints the version. "
        text += "--debug adds a traceback to an error message."
    return text


def _documented_function(docstring: str) -> Command:
    """A function that stands for a command in the list of commands."""

    def function() -> None: ...

    function.__doc__ = docstring
    return function
