"""The processes in which chat templates are rendered, so that a hostile template can be stopped whatever it does."""

import functools
import json
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import IO, Any, cast

from llama.errors import CheckpointError, InputError

MAX_START_SECONDS = 60.0  # for starting a process, which may have to read Python from a slow disk
MAX_SECONDS = 2.0  # for an answer; an ordinary template takes a millisecond
CHARACTERS_PER_SECOND = 1e6  # for each that many of the dialog, an answer may take a second more
MAX_SOURCE = 200_000  # characters of a template

# Modules come from where this process has them from, and never from the working directory.
PATHS = [str(Path(__file__).parent.parent), *(os.path.abspath(path) for path in sys.path if path)]
PROGRAM = "import sys; sys.path[:] = sys.argv[1:]; from llama.template_sandbox import main; main()"


class HostileTemplateError(CheckpointError):
    """A template reaches for what it must not, or takes too much time or memory."""


def render(source: str, origin: str, renderings: list[dict[str, Any]]) -> list[str]:
    """What a chat template writes.

    Args:
        source: the template.
        origin: the file it is from, for error messages.
        renderings: for each text to be written, the variables that the template sees, all of them JSON values.

    Raises:
        InputError: the template refuses a dialog; the message has its words.
        CheckpointError: it isn't valid Jinja, fails, or is hostile.
        OSError: no process can be started.
    """
    if len(source) > MAX_SOURCE:
        raise CheckpointError(f"{origin}: the chat template has {len(source)} characters, more than {MAX_SOURCE}")
    texts = []
    for answer in template_process(source, os.getpid()).answers(renderings):
        if isinstance(answer, str):
            texts.append(answer)
        elif answer["kind"] == "refused":
            raise InputError(f"the model's chat template refuses the dialog: {answer['text']}")
        elif answer["kind"] == "hostile":
            raise HostileTemplateError(f"{origin}: the chat template is stopped: {answer['text']}")
        else:
            raise CheckpointError(f"{origin}: the chat template fails: {answer['text']}")
    return texts


@functools.lru_cache(maxsize=8)
def template_process(source: str, parent: int) -> "TemplateProcess":
    """The process of a template. `parent` is the id of this process, since one that is forked needs another."""
    return TemplateProcess(source)


class TemplateProcess:
    """A process that renders one template: see `llama.template_sandbox`. It is started when it is needed.

    Args:
        source: the template.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def answers(self, renderings: list[dict[str, Any]]) -> list[Any]:
        """The texts that the template writes. The last may be an object that says what went wrong: its kind and a text.

        Without renderings there is such an object, if something is wrong with the template itself.
        """
        answers: list[Any] = []
        with self._lock:
            if not renderings:
                answer = self._answer(None)
                return [answer] if isinstance(answer, dict) else []
            for variables in renderings:
                answers.append(self._answer(variables))
                if isinstance(answers[-1], dict):
                    break
        return answers

    def _answer(self, variables: dict[str, Any] | None) -> Any:
        """The answer to one rendering, or the one to the template itself."""
        for _ in range(2):  # again, if the process has ended for no reason that is known
            if self._process is None or self._process.poll() is not None:
                process = start_process()
                weakref.finalize(self, end_process, process, os.getpid())
                answer = ask(process, self._source)
                if answer != "ready":
                    end_process(process, os.getpid())
                    return answer
                self._process = process
            answer = "ready" if variables is None else ask(self._process, variables)
            if answer != ENDED:
                break
        return answer


# What a process has to say that has ended by itself, be it killed or out of memory.
ENDED = {"kind": "hostile", "text": "its process has ended"}


def start_process() -> subprocess.Popen[str]:
    """A new process that has said that it is started; OSError if it isn't."""
    if not sys.executable:
        raise OSError("chat templates are rendered in a process of their own, and Python doesn't know its own program")
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", PROGRAM, *PATHS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
        start_new_session=True,  # so that Ctrl-C at a terminal doesn't reach it
    )
    if exchange(process, "", MAX_START_SECONDS) != "started":
        raise OSError(f"the process for chat templates did not start with {sys.executable}")
    return process


def ask(process: subprocess.Popen[str], request: Any) -> Any:
    """What a process answers."""
    line = json.dumps(request) + "\n"
    return exchange(process, line, MAX_SECONDS + len(line) / CHARACTERS_PER_SECOND)


def exchange(process: subprocess.Popen[str], line: str, seconds: float) -> Any:
    """Send a line to a process, and return the value in the one that it answers.

    If that takes too long, or is interrupted, the process is ended, since an answer may still be to come.
    """
    stdin, stdout = cast(IO[str], process.stdin), cast(IO[str], process.stdout)
    late = threading.Event()

    def stop() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    answer: Any = None
    try:
        timer.start()
        stdin.write(line)
        stdin.flush()
        answer = json.loads(stdout.readline())
    except (OSError, ValueError):  # the process has ended, or its code is not ours
        answer = None
    finally:
        timer.cancel()
        if answer is None:
            end_process(process, os.getpid())
    if answer is None and late.is_set():
        return {"kind": "hostile", "text": f"it takes over {seconds:.1f} seconds"}
    return ENDED if answer is None else answer


def end_process(process: subprocess.Popen[str], parent: int) -> None:
    """End a process that the process with the id `parent` has started, which a fork of that must leave alone."""
    if os.getpid() == parent:
        process.kill()
        process.communicate()
