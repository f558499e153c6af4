"""Runs a command in this process: what it does is the same as in one of its own, without the seconds that starting one
takes. Only its log messages don't reach standard error, since pytest collects them (`caplog`)."""

import importlib.util
import io
import signal
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from conftest import ROOT

import llama.__main__
from llama import Llama
from llama.cli import run


class Finished(NamedTuple):
    """The outcome of a command, named as `subprocess.CompletedProcess` names it."""

    returncode: int
    stdout: str
    stderr: str


class Stdin(io.TextIOWrapper):
    """Standard input with these bytes in it: a pipe, or a terminal."""

    def __init__(self, content: bytes, is_terminal: bool = False) -> None:
        super().__init__(io.BytesIO(content), encoding="utf-8")
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


class TerminalOutput(io.StringIO):
    """Standard output or standard error, or both, as a terminal that keeps what is written to it."""

    def isatty(self) -> bool:
        return True

    def wait_for(self, text: str) -> None:
        """Wait until another thread has written a text."""
        deadline = time.monotonic() + 20
        while text not in self.getvalue():
            assert time.monotonic() < deadline, f"only {self.getvalue()!r} was written"
            time.sleep(0.01)


def example(name: str) -> Callable[..., None]:
    """The main function of an example script."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def record_builds(monkeypatch) -> list[tuple[object, object]]:
    """The `quantize` and `compile` of each `Llama.build` from now on, in which nothing is compiled."""
    builds, build = [], Llama.build

    def record(*args, quantize=None, compile=False, **options) -> Llama:
        builds.append((quantize, compile))
        return build(*args, quantize=quantize, **options)

    monkeypatch.setattr(Llama, "build", staticmethod(record))
    return builds


class Runner:
    """Runs commands; made by the fixture `runner`."""

    def __init__(self, monkeypatch, capsys) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def call(self, program: Callable[[], None], stdin: str | Stdin = "") -> Finished:
        """Call a function that ends as a program does: by returning, or by SystemExit."""
        self.monkeypatch.setattr(sys, "stdin", stdin if isinstance(stdin, Stdin) else Stdin(stdin.encode()))
        self.capsys.readouterr()
        on_ctrl_c = signal.getsignal(signal.SIGINT)  # which a program sets until its process ends
        code: object = 0
        try:
            program()
        except SystemExit as exit_request:
            code = exit_request.code
        finally:
            signal.signal(signal.SIGINT, on_ctrl_c)
        printed = self.capsys.readouterr()
        if isinstance(code, str):  # Python would print it
            return Finished(1, printed.out, printed.err + code + "\n")
        return Finished(code or 0, printed.out, printed.err)

    def run(self, function: Callable[..., None], *args: object, name: str = "program") -> Finished:
        """Run a function as a program."""
        return self.call(lambda: run(function, name, [str(arg) for arg in args]))

    def llama(self, *args: object, stdin: str | Stdin = "") -> Finished:
        """Run the command `llama`."""
        self.monkeypatch.setattr(sys, "argv", ["llama", *map(str, args)])
        return self.call(llama.__main__.main, stdin)
