"""Programs in processes forked from one that has imported torch already, which takes each new process seconds.

What a program does is the same as if Python had been started with its arguments. `conftest.torchrun` and `run_python`
start processes as users do, for what depends on that.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parent.parent

# AdamW imports torch._dynamo, in over a second, and the plot of the losses is made by matplotlib.
PRELOADED = ["torch._dynamo", "torch.distributed.nn", "matplotlib.figure", "matplotlib.backends.backend_agg"]
PRELOADED += ["llama.finetune", "llama.cli"]

if "forkserver" in multiprocessing.get_all_start_methods():
    multiprocessing.set_forkserver_preload(PRELOADED)
    new_process = multiprocessing.get_context("forkserver").Process
else:  # Windows
    new_process = multiprocessing.get_context("spawn").Process


class Finished(NamedTuple):
    """The outcome of a program, named as `subprocess.CompletedProcess` names it.

    Attributes:
        returncode: of the first process that failed, or 0.
        stdout, stderr: of all its processes together.
    """

    returncode: int
    stdout: str
    stderr: str


class ForkedProgram:
    """A Python program that runs, in one process or in several.

    Args:
        command: a script and its arguments, or "-m", a module and its arguments.
        ranks: the number of processes, each of which has the environment that torchrun gives it; None for one process
            outside torchrun.
        terminal: the path of a terminal, which the program is to have as its own, for input and output; None for files.

    It is a context manager, which kills what still runs at the end of the block.

    Attributes:
        processes: by rank.
    """

    def __init__(self, *command: str | Path, ranks: int | None = None, terminal: str | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory()
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
        self.processes = []
        for rank in range(ranks or 1):
            variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank}
            variables |= {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            environment = dict(os.environ) | ({name: str(value) for name, value in variables.items()} if ranks else {})
            arguments = ([str(part) for part in command], environment, Path(self._folder.name), terminal)
            self.processes.append(new_process(target=run_program, args=arguments))
            self.processes[-1].start()

    def __enter__(self) -> "ForkedProgram":
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def kill(self) -> None:
        """End all processes as kill -9 does."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def finish(self, timeout: float = 300) -> Finished:
        """Wait for the end. When a process fails the others are ended, as by torchrun.

        Args:
            timeout: in seconds.
        """
        end, returncode, running = time.monotonic() + timeout, 0, list(self.processes)
        while running:
            wait([process.sentinel for process in running], max(end - time.monotonic(), 0))
            for process in running:
                returncode = returncode or process.exitcode or 0
            if returncode or time.monotonic() > end:
                self.kill()
            running = [process for process in running if process.is_alive()]
        output = {name: Path(self._folder.name, name).read_text() for name in ("stdout", "stderr")}
        if time.monotonic() > end:
            raise TimeoutError(f"the program did not end in {timeout} s: {output}")
        return Finished(returncode, **output)


def fork_python(*command: str | Path, ranks: int | None = None, timeout: float = 300) -> Finished:
    """Run a program to its end: see `ForkedProgram` and its `finish`."""
    return ForkedProgram(*command, ranks=ranks).finish(timeout)


def run_program(command: list[str], environment: dict[str, str], folder: Path, terminal: str | None) -> None:
    """What a forked process does: run the program as Python would.

    Args:
        command, terminal: see `ForkedProgram`.
        environment: its environment variables.
        folder: of the files "stdout" and "stderr", to which its output is appended unless it has a terminal.
    """
    if terminal is None:
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(file, descriptor)
            os.close(file)
    else:
        take_terminal(terminal)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    try:
        if command[0] == "-m":
            sys.argv = command[1:]
            sys.path.insert(0, str(ROOT))
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            sys.path.insert(0, str(Path(command[0]).parent))
            runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()


def take_terminal(path: str) -> None:
    """Begin a session, whose terminal this becomes: Ctrl-C typed there interrupts this process."""
    os.setsid()
    file = os.open(path, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(file, descriptor)
    os.close(file)
    sys.stdin, sys.stdout, sys.stderr = (open(i, mode, closefd=False) for i, mode in enumerate("rww"))  # noqa: SIM115
