"""Running functions as programs: a function's signature and docstring become its options and its help."""

import ast
import difflib
import functools
import importlib
import inspect
import io
import logging
import os
import re
import shutil
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

from llama.cli.terminal import (
    discard_unwritable_output,
    escape_control_characters,
    exit_at_once,
    on_ctrl_c,
    open_closed_streams,
)
from llama.errors import DownloadError, InputError

Command = Callable[..., None]

HELP_OPTION = re.compile(r"--?h(elp)?(=.*)?", re.DOTALL)
OPTION = re.compile("--|-[A-Za-z]")  # how one begins; a negative number is none
MAX_HELP_WIDTH = 100  # characters


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
        except OSError:  # nobody reads the messages
            self.handleError(record)


def print_message(text: str) -> None:
    """Print a line on standard error; where a progress bar is shown there, above it."""
    from tqdm import tqdm  # not at the top, since neither help nor a usage error needs it

    tqdm.write(text, file=sys.stderr)


def run(component: Command | Mapping[str, LazyCommand], name: str | None = None, args: list[str] | None = None) -> None:
    """Call a function with the arguments of the command line.

    Options are checked before the function is called. See `bind` for how they are written.

    An error ends the program with one line on standard error and exit code 1, or 2 if the command line itself is wrong;
    with `--debug`, its traceback is printed too. Ctrl-C ends it with exit code 130. Log messages go to standard error.

    Args:
        component: a function, or a mapping from command names to commands.
        name: the program's name in help and errors; by default the name of the script.
        args: the arguments; by default those of the program.
    """
    args = list(sys.argv[1:] if args is None else args)
    name = name or os.path.basename(sys.argv[0])
    end = args.index("--") if "--" in args else len(args)  # of the options
    debug = "--debug" in args[:end]
    args = [arg for arg in args[:end] if arg != "--debug"] + args[end:]
    set_up_streams()
    try:
        call = find_call(component, name, args)
        on_ctrl_c(signal.default_int_handler)
        call()
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where an error becomes a message
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the program that reads our output has closed it
        discard_unwritable_output()
        sys.exit(141)
    except Exception as error:
        if debug:
            print_message(escape_control_characters(traceback.format_exc().rstrip()))
        discard_unwritable_output()
        expected = isinstance(error, InputError | DownloadError | MemoryError | OSError | ArithmeticError)
        kind = "" if expected else f"{type(error).__name__}: "
        hint = "" if expected or debug else " (--debug shows where)"
        print_message(escape_control_characters(f"error: {kind}{error}") + hint)
        sys.exit(1)
    finally:
        on_ctrl_c(exit_at_once)  # as Python ends; it may wait for a thread's last step


def set_up_streams() -> None:
    """Log to standard error; let neither malformed input nor the output's encoding raise UnicodeError.

    A standard stream that the shell has closed (`>&-`) stays closed to this program, but nothing else takes its place.
    """
    open_closed_streams()
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the program ends
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if stream is sys.stdin else "backslashreplace")
    logging.basicConfig(level=logging.INFO, handlers=[LogHandler()])


def find_call(component: Command | Mapping[str, LazyCommand], name: str, args: list[str]) -> Callable[[], None]:
    """Return the call that a command line asks for: of a command, or of what prints its help or the version.

    Args:
        component, name: see `run`.
        args: the arguments; if they are wrong, the program ends with exit code 2.
    """
    if isinstance(component, Mapping) and args and not args[0].startswith("-"):
        if args[0] not in component:
            hint = suggestion(args[0], component)
            exit_with_usage_error(f"{args[0]!r} is not a command of {name}", hint)
        component, name, args = component[args[0]].load(), f"{name} {args[0]}", args[1:]
    options = args[: args.index("--")] if "--" in args else args
    if any(map(HELP_OPTION.fullmatch, options)) or (isinstance(component, Mapping) and not args):
        return functools.partial(print, help_text(component, name))
    if isinstance(component, Mapping) and args[0] == "--version":
        import importlib.metadata  # not at the top: it takes as long as everything else here

        return functools.partial(print, f"{name} {importlib.metadata.version('llama')}")
    if isinstance(component, Mapping):
        exit_with_usage_error(f"{args[0]} must come after a command of {name}")
    return bind(component, name, args)


def bind(function: Command, name: str, args: list[str]) -> Callable[[], None]:
    """Parse the arguments of a command line into a call of a function, without calling it.

    A parameter `max_gen_len` is the option `--max_gen_len VALUE` or `--max_gen_len=VALUE`; parameters that are not
    keyword-only take arguments without a name, too, in their order. One named after a Python keyword, such as `from_`,
    becomes an option without the underscore. A single letter stands for the only option that begins with it. What
    follows `--` is no option. The value of a parameter whose type includes `str` is the argument as it was typed; other
    values are parsed as Python literals. An option may only be given several times if its type includes `list`.

    Args:
        function: the function to call.
        name: the program's name, for error messages.
        args: the arguments; if they don't fit the function, the program ends with exit code 2.
    """
    parameters = options_of(function)
    texts: dict[str, list[str]] = {}  # the values of each option, as they were typed
    unnamed: list[str] = []
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        if arg == "--":
            unnamed += rest
            break
        if not OPTION.match(arg):
            unnamed.append(arg)
            continue
        key, equals, text = arg.lstrip("-").partition("=")
        option = find_option(name, arg, key, parameters)
        if not equals and is_flag(parameters[option]):
            text = rest.pop(0) if rest and rest[0].lower() in ("true", "false") else "true"
        elif not equals:
            if not rest or rest[0].startswith("--"):
                exit_with_usage_error(f"{name}: --{option} needs a value")
            text = rest.pop(0)
        texts.setdefault(option, []).append(text)
    for option, parameter in parameters.items():
        if unnamed and option not in texts and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            texts[option] = [unnamed.pop(0)]
    if unnamed:
        exit_with_usage_error(f"{name}: unexpected argument {unnamed[0]!r}")
    for option, parameter in parameters.items():
        if parameter.default is parameter.empty and option not in texts:
            exit_with_usage_error(f"{name}: --{option} is missing")
    values = {parameters[option].name: parse_value(name, option, parameters[option], texts[option]) for option in texts}
    return functools.partial(function, **values)


def options_of(function: Command) -> dict[str, inspect.Parameter]:
    """Return the parameters of a function by the names of their options."""
    return {key.rstrip("_"): parameter for key, parameter in inspect.signature(function).parameters.items()}


def find_option(name: str, arg: str, key: str, options: Iterable[str]) -> str:
    """Return the option that an argument names, in full or by its first letter.

    Args:
        name: the program's name, for error messages.
        arg: the argument, such as "-d" or "--dtype=float32".
        key: the name in it.
        options: the names there are.
    """
    key = key.replace("-", "_")
    if key in options:
        return key
    matching = [option for option in options if len(key) == 1 and option.startswith(key)]
    if len(matching) > 1:
        *others, last = (f"--{option}" for option in matching)
        exit_with_usage_error(f"{name}: -{key} is ambiguous: it could be {', '.join(others)} or {last}")
    if not matching:
        hint = suggestion(arg, [f"--{option}" for option in options])
        exit_with_usage_error(f"{name}: unknown option {arg!r}", hint)
    return matching[0]


def is_flag(parameter: inspect.Parameter) -> bool:
    """Return whether an option takes no value."""
    return "bool" in type_name(parameter)


def type_name(parameter: inspect.Parameter) -> str:
    """Return the type of an option's value, as it is written in code, without `| None`."""
    annotation = parameter.annotation
    name = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return re.sub(r"pathlib[\w.]*\.", "", name).removesuffix(" | None")


def parse_value(name: str, option: str, parameter: inspect.Parameter, texts: list[str]) -> Any:
    """Return the value of an option.

    Args:
        name: the program's name, for error messages.
        option: its name.
        parameter: what it sets.
        texts: each value that it was given, as it was typed.
    """
    if "list" in type_name(parameter):
        return texts
    if len(texts) > 1:
        exit_with_usage_error(f"{name}: --{option} is given {len(texts)} times", "give it once")
    (text,) = texts
    if is_flag(parameter):
        if text.lower() not in ("true", "false"):
            exit_with_usage_error(f"{name}: --{option} takes no value", f"--{option}=false switches it off")
        return text.lower() == "true"
    if "str" in type_name(parameter):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text  # the function says what would be right


def suggestion(typed: str, known: Iterable[str]) -> str:
    """Return what to do about a wrong name: the most similar one among those there are."""
    similar = difflib.get_close_matches(typed.split("=")[0], list(known), 1)
    return f"did you mean {similar[0]}?" if similar else "see --help"


def exit_with_usage_error(message: str, hint: str = "see --help") -> NoReturn:
    """End the program with exit code 2 because of a wrong command line.

    Args:
        message: what is wrong.
        hint: what to do about it.
    """
    print(escape_control_characters(f"error: {message}; {hint}"), file=sys.stderr)
    sys.exit(2)


def help_text(component: Command | Mapping[str, LazyCommand], name: str) -> str:
    """Return the text of `--help`, from the docstring of a function or from the summaries of commands."""
    if isinstance(component, Mapping):
        commands = "\n".join(f"     {key}\n       {command.summary}" for key, command in component.items())
        return (
            f"NAME\n    {name}\n\nSYNOPSIS\n    {name} COMMAND\n\nCOMMANDS\n    COMMAND is one of the following:\n\n"
            f"{commands}\n\n{name} COMMAND --help describes a command; {name} --version prints the version. --debug "
            f"adds a traceback to an error message."
        )
    text, _, sections = (inspect.getdoc(component) or "").partition("\nArgs:\n")
    arguments = re.split(r"^(?=\S)", sections, maxsplit=1, flags=re.MULTILINE)[0]
    descriptions = dict(re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", arguments, re.MULTILINE))
    summary, *paragraphs = filter(None, re.split(r"\n\s*\n", text.strip())) or [""]
    parameters = options_of(component)
    in_order = [key for key, parameter in parameters.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    required = [key for key in in_order if parameters[key].default is inspect.Parameter.empty]
    positional = in_order if len(in_order) == 1 else required  # others are better given by name
    synopsis = [key.upper() if key in required else f"[{key.upper()}]" for key in positional]
    entries = {key: _entry(parameter, descriptions.get(parameter.name, "")) for key, parameter in parameters.items()}
    titled = {
        "NAME": [wrapped(f"{name} - {summary}")],
        "SYNOPSIS": ["    " + " ".join([name, *synopsis, "<flags>"])],
        "DESCRIPTION": ["\n\n".join(map(wrapped, paragraphs))] if paragraphs else [],
        "POSITIONAL ARGUMENTS": [f"    {key.upper()}, --{key}={key.upper()}\n{entries[key]}" for key in positional],
        "FLAGS": [
            f"    {_written(key, parameters)}\n{entry}" for key, entry in entries.items() if key not in positional
        ],
    }
    return "\n\n".join(title + "\n" + "\n".join(lines) for title, lines in titled.items() if lines)


def _written(option: str, parameters: Mapping[str, inspect.Parameter]) -> str:
    """How an option is written, with its abbreviation if it has one. (-h is --help.)"""
    is_unique = sum(key.startswith(option[0]) for key in parameters) == 1 and option[0] != "h"
    value = f", --{option}=false" if is_flag(parameters[option]) else f"={option.upper()}"
    return f"-{option[0]}, --{option}{value}" if is_unique else f"--{option}{value}"


def _entry(parameter: inspect.Parameter, description: str) -> str:
    """What a parameter does, its type and its default."""
    details = [] if is_flag(parameter) else [type_name(parameter)]
    if parameter.default not in (None, False, inspect.Parameter.empty):
        details.append(f"default: {parameter.default}")
    return wrapped(f"{description} ({'; '.join(details)})" if details else description, 8)


def wrapped(text: str, indent: int = 4) -> str:
    """Return a paragraph in lines that fit the terminal."""
    width = min(shutil.get_terminal_size().columns, MAX_HELP_WIDTH)
    margin = " " * indent
    return textwrap.fill(
        " ".join(text.split()),
        max(width, 40),
        initial_indent=margin,
        subsequent_indent=margin,
        break_long_words=False,
        break_on_hyphens=False,
    )
