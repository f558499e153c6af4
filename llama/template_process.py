"""The processes in which chat templates are rendered, so that a hostile template can be stopped whatever it does."""

import functools
import json
import os
import subprocess
import sys
import threading
import weakref
from typing import IO, Any, cast

from llama.errors import CheckpointError, InputError

MAX_START_SECONDS = 60.0  # for starting a process, which may have to read Python from a slow disk
MAX_SECONDS = 2.0  # for an answer, and one second more for a million characters; ordinary ones take a millisecond
MAX_SOURCE = 200_000  # characters of a template

# With the paths of this process and no others: not the working directory's, nor those of environment variables.
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
    """
    if len(source) > MAX_SOURCE:
        raise CheckpointError(f"{origin}: the chat template has {len(source)} characters, more than {MAX_SOURCE}")
    answer = template_process(source, os.getpid()).answer(renderings)
    if isinstance(answer, list):
        return answer
    if answer["kind"] == "refused":
        raise InputError(f"the model's chat template refuses the dialog: {answer['text']}")
    if answer["kind"] == "hostile":
        raise HostileTemplateError(f"{origin}: the chat template is stopped: {answer['text']}")
    raise CheckpointError(f"{origin}: the chat template fails: {answer['text']}")


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

    def answer(self, renderings: list[dict[str, Any]]) -> Any:
        """The texts that the template writes, or an object that says what went wrong, by `kind` and `text`."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = start_process()
                answer = ask(self._process, self._source)
                if answer != "ready":
                    end_process(self._process, os.getpid())
                    return answer
                weakref.finalize(self, end_process, self._process, os.getpid())
            return ask(self._process, renderings)


def start_process() -> subprocess.Popen[str]:
    """A new process that has said that it is started."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", PROGRAM, *sys.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # so that Ctrl-C at a terminal doesn't reach it
    )
    if read_line(process, MAX_START_SECONDS) != "started":
        end_process(process, os.getpid())
        raise OSError(f"the process for chat templates did not start with {sys.executable}")
    return process


def ask(process: subprocess.Popen[str], request: Any) -> Any:
    """What a process answers; where it doesn't, it is ended, and the answer says so."""
    answer = None
    line = json.dumps(request) + "\n"
    seconds = MAX_SECONDS + len(line) / 1e6
    try:
        pipe = cast(IO[str], process.stdin)
        pipe.write(line)
        pipe.flush()
        answer = read_line(process, seconds)
    except BrokenPipeError:  # the process has ended
        pass
    finally:
        if answer is None:  # also if Ctrl-C has interrupted this, and the answer is still to come
            end_process(process, os.getpid())
    if answer is None:
        return {"kind": "hostile", "text": f"it takes over {seconds:.1f} seconds, or too much memory"}
    return answer


def read_line(process: subprocess.Popen[str], seconds: float) -> Any:
    """The value in the next line that a process writes; None, if it ends, or takes longer and is killed."""
    timer = threading.Timer(seconds, process.kill)
    timer.daemon = True
    timer.start()
    line = cast(IO[str], process.stdout).readline()
    timer.cancel()
    return json.loads(line) if line.endswith("\n") else None


def end_process(process: subprocess.Popen[str], parent: int) -> None:
    """End a process that the process with the id `parent` has started, which a fork of that must leave alone."""
    if os.getpid() == parent:
        process.kill()
        process.communicate()
