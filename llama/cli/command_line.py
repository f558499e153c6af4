"""Running functions as programs: argparse's options and help come from a function's signature and docstring."""

import argparse
import ast
import difflib
import functools
import importlib
import inspect
import io
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

import llama
from llama.cli.terminal import (
    discard_unwritable_output,
    exit_at_once,
    on_ctrl_c,
    open_closed_streams,
)
from llama.errors import DownloadError, InputError
from llama.log import LogHandler, escape_control_characters, print_message

Command = Callable[..., None]

OTHER_NAMES = {"max_new_tokens": "--max_gen_len", "max_tokens": "--max_gen_len", "model": "--ckpt_dir"}  # elsewhere
OPTION = re.compile("--|-[A-Za-z]")  # how one begins; a negative number is none

OWN_OPTIONS = ("--help", "--version")  # those of a program with several commands


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
    """Return the call that a command line asks for: of a command, or of what prints the version.

    Args:
        component, name: see `run`.
        args: the arguments; if they are wrong, or ask for help, the program ends.
    """
    if isinstance(component, Mapping):
        parser = Parser(name, epilog=f"{name} COMMAND --help: its options. --debug adds a traceback to an error.")
        parser.add_argument("--version", action="store_true", help="print the version and exit")
        commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
        for key, command in component.items():
            commands.add_parser(key, help=command.summary)
        if args and not args[0].startswith("-") and args[0] not in component:
            parser.error(f"{args[0]!r} is not a command; {suggestion(args[0], component)}")
        chosen, _ = parser.parse_known_args(args[:1] or ["--help"])
        if chosen.version:
            return functools.partial(print, f"{name} {llama.__version__}")
        if chosen.command is None:
            if difflib.get_close_matches(args[0], OWN_OPTIONS, 1):
                parser.error(f"unknown option {args[0]!r}; {suggestion(args[0], OWN_OPTIONS)}")
            parser.error(f"{args[0]} must come after a command; see --help")
        component, name, args = component[chosen.command].load(), f"{name} {chosen.command}", args[1:]
    return bind(component, name, args)


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line, as other errors are reported."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, escape_control_characters(f"error: {self.prog}: {message}\n"))

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where an error becomes a message
        super().exit(status, message)


def bind(function: Command, name: str, args: list[str]) -> Callable[[], None]:
    """Parse the arguments of a command line into a call of a function, without calling it.

    A parameter `max_gen_len` is the option `--max_gen_len VALUE` or `--max_gen_len=VALUE`; parameters that are not
    keyword-only take arguments without a name, too, in their order. What follows `--` is no option. The value of a
    parameter whose type includes `str` is the argument as it was typed; other values are parsed as Python literals. An
    option may only be given several times if its type includes `list`.

    Args:
        function: the function to call.
        name: the program's name, for help and errors.
        args: the arguments; if they don't fit the function, or ask for help, the program ends.
    """
    parser, parameters = make_parser(function, name), options_of(function)
    end = args.index("--") if "--" in args else len(args)
    options, unnamed = parser.parse_known_args(args[:end])
    for arg in filter(OPTION.match, unnamed):
        parser.error(f"unknown option {arg!r}; {suggestion(arg, [f'--{key}' for key in parameters])}")
    unnamed += args[end + 1 :]
    given: dict[str, Any] = vars(options)  # of a flag, whether it is on; of others, each text that was typed
    for key, parameter in parameters.items():
        if unnamed and key not in given and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            given[key] = [unnamed.pop(0)]
        if key not in given and parameter.default is parameter.empty:
            parser.error(f"--{key} is missing; see --help")
    if unnamed:
        parser.error(f"unexpected argument {unnamed[0]!r}; see --help")
    for key, texts in given.items():
        if isinstance(texts, list) and not has_type(parameters[key], "list"):
            if len(texts) > 1:
                parser.error(f"--{key} is given {len(texts)} times; give it once")
            given[key] = texts[0] if has_type(parameters[key], "str") else literal(texts[0])
    return functools.partial(function, **{parameters[key].name: value for key, value in given.items()})


def make_parser(function: Command, name: str) -> Parser:
    """Return the parser of a function's options, which collects the texts that each of them is given.

    Args:
        function: the function. A flag, a parameter of type bool, is off by default.
        name: the program's name.
    """
    text, _, sections = (inspect.getdoc(function) or "").partition("\nArgs:\n")
    arguments = re.split(r"^(?=\S)", sections, maxsplit=1, flags=re.MULTILINE)[0]
    descriptions = dict(re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", arguments, re.MULTILINE))
    parameters = options_of(function)
    in_order = [key for key, parameter in parameters.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    required = [key for key in in_order if parameters[key].default is inspect.Parameter.empty]
    positional = in_order if len(in_order) == 1 else required  # others are better given by name
    usage = [key.upper() if key in required else f"[{key.upper()}]" for key in positional]
    parser = Parser(
        name,
        usage=" ".join([name, *usage, "[options]"]),
        description=text,
        argument_default=argparse.SUPPRESS,  # the function has its defaults
        allow_abbrev=False,  # but for single letters, which the help shows
    )
    for key, parameter in parameters.items():
        is_flag = has_type(parameter, "bool")
        has_default = not is_flag and parameter.default not in (None, parameter.empty)
        default = f" (default: {parameter.default})" if has_default else ""
        shown = (descriptions.get(parameter.name, "") + default).replace("%", "%%")
        is_unique = sum(other.startswith(key[0]) for other in parameters) == 1 and key[0] != "h"
        names = [f"-{key[0]}", f"--{key}"] if is_unique else [f"--{key}"]
        action = "store_true" if is_flag else "append"
        parser.add_argument(*names, dest=key, action=action, help=shown)
        if "_" in key:
            parser.add_argument("--" + key.replace("_", "-"), dest=key, action=action, help=argparse.SUPPRESS)
        for value in ("true", "True", "false", "False") if is_flag else ():
            name, const = f"--{key}={value}", value.lower() == "true"  # argparse lets an option's name contain "="
            parser.add_argument(name, dest=key, action="store_const", const=const, help=argparse.SUPPRESS)
    return parser


def options_of(function: Command) -> dict[str, inspect.Parameter]:
    """Return the parameters of a function by the names of their options.

    One named after a Python keyword, such as `from_`, is an option without the underscore.
    """
    return {key.rstrip("_"): parameter for key, parameter in inspect.signature(function).parameters.items()}


def has_type(parameter: inspect.Parameter, name: str) -> bool:
    """Return whether a parameter's annotation includes a type, given by its name."""
    return name in str(parameter.annotation)


def literal(text: str) -> Any:
    """Return the value of a Python literal, such as a number; other texts as they are."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text  # the function says what would be right


def suggestion(typed: str, known: Iterable[str]) -> str:
    """Return what to do about a wrong name: the right one, or the most similar one among those there are."""
    known, name = list(known), typed.split("=")[0]
    other_name = OTHER_NAMES.get(name.replace("-", "_").lstrip("_"))
    similar = [other_name] if other_name in known else difflib.get_close_matches(name, known, 1)
    return f"did you mean {similar[0]}?" if similar else "see --help"
