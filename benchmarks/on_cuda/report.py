"""Runs checks one after the other, and reports on each as it ends, whatever happens to the others.

The checks run in a second process, which sends what it finds to this one, line by line. A check that crashes that
process, hangs, or leaves the GPU unusable has failed, and the next ones run in a new process. Nothing is imported here
that isn't part of Python, so that this process survives whatever is wrong with the installation.
"""

import contextlib
import gc
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

IMPORT_SECONDS = 120.0  # how long the second process may take before its first check
RESERVE_SECONDS = 10.0  # for the last lines


class Skipped(Exception):
    """Raised by a check that can't be made here; the message says why."""


class Context:
    """What a check gets.

    Attributes:
        dry: whether this is only a trial of the script: on the CPU, with tiny models.
        folder: an empty folder for files.
        deadline: the time by which all checks must have ended, as of `time.time()`.
    """

    def __init__(self, dry: bool, folder: Path, deadline: float, send: Callable[..., None]) -> None:
        self.dry, self.folder, self.deadline, self._send = dry, folder, deadline, send

    def record(self, what: str, value: float | str, unit: str = "", **details: float | str) -> None:
        """Report a value: `what` says of what. It is kept also if the check fails afterwards."""
        self._send(value={"what": what, "value": value, "unit": unit, **details})

    def seconds_left(self) -> float:
        return self.deadline - time.time()


class Check(NamedTuple):
    """A check: a function that raises an exception if something is wrong.

    Attributes:
        name: what it shows.
        run: the function.
        seconds: after this time it is ended, and has failed.
        optional: skipped where there is less time than that left, or if it takes longer; any other has failed then.
        alone: its process runs no other check, so that nothing else is in the GPU's memory.
    """

    name: str
    run: Callable[[Context], None]
    seconds: float = 60
    optional: bool = False
    alone: bool = False


def require(condition: bool, message: str) -> None:
    """Raise AssertionError, with this message, unless the condition is true."""
    if not condition:
        raise AssertionError(message)


# The second process.


def run_checks(checks: Sequence[Check], first: int, dry: bool, deadline: float) -> None:
    """Run the checks from number `first` on, in this process, and print a line of JSON for all that happens."""
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the lines

    def send(**event: Any) -> None:
        print(json.dumps(event), file=output, flush=True)

    send(plan=[[check.name, check.seconds, check.optional] for check in checks])
    for i, check in enumerate(checks[first:], first):
        if check.alone and i > first and not dry:
            break
        send(start=i)
        status, detail = "passed", ""
        with tempfile.TemporaryDirectory(prefix="cuda-acceptance-") as folder:
            context = Context(dry, Path(folder), deadline, send)
            try:
                if check.optional and context.seconds_left() < check.seconds:
                    raise Skipped(f"{context.seconds_left():.0f} s are left, and it may take {check.seconds:.0f}")
                check.run(context)
            except Skipped as reason:
                status, detail = "skipped", str(reason)
            except Exception as error:
                status, detail = "failed", f"{type(error).__name__}: {error}"
                traceback.print_exc()
        usable = free_device_memory()
        send(end=i, status=status, detail=detail)
        if not usable or (check.alone and not dry):
            break


def free_device_memory() -> bool:
    """Free what the last check has left in the GPU's memory; False if this process can't use the GPU any more."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:  # after an illegal memory access, every call fails
        traceback.print_exc()
        return False
    return True


# The first process.


class Report:
    """What is known so far; written to a file after each event.

    Args:
        command: which checks.
        dry: see `Context`.
        path: of the JSON file; None for none.
    """

    def __init__(self, command: str, dry: bool, path: Path | None) -> None:
        self.command, self.dry, self.path = command, dry, path
        self.checks: list[dict[str, Any]] = []
        self.begin = time.time()

    def start(self, name: str) -> None:
        """Begin with a check."""
        self.checks.append({"name": name, "status": "running", "detail": "", "values": [], "begin": time.time()})
        self.write()

    def value(self, value: dict[str, Any]) -> None:
        """Add a value of the check that is running."""
        self.checks[-1]["values"].append(value)
        print(f"    {describe(value)}", flush=True)
        self.write()

    def end(self, status: str, detail: str) -> None:
        """End the check that is running."""
        check = self.checks[-1]
        check |= {"status": status, "detail": detail, "seconds": round(time.time() - check.pop("begin"), 2)}
        print(f"{status:8}{check['seconds']:7.1f} s  {check['name']}{': ' * bool(detail)}{detail}", flush=True)
        self.write()

    def write(self) -> None:
        """Write the file, whole or not at all."""
        if self.path is not None:
            content = {
                "command": self.command,
                "dry": self.dry,
                "seconds": round(time.time() - self.begin, 1),
                "passed": self.passed,
                "checks": self.checks,
            }
            temporary = self.path.with_name(self.path.name + ".part")
            temporary.write_text(json.dumps(content, indent=1))
            temporary.replace(self.path)

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check["status"] in ("passed", "skipped") for check in self.checks)

    def table(self) -> str:
        """All checks and their values, in Markdown."""
        lines = [f"| {self.command}{', dry' * self.dry} | | s | |", "|---|---|---|---|"]
        for check in self.checks:
            detail = " ".join(check["detail"].split()).replace("|", "\\|")
            lines.append(f"| {check['name']} | {check['status']} | {check['seconds']:.1f} | {detail:.300} |")
            lines += [f"| | | | {describe(value)} |" for value in check["values"]]
        counts = {
            status: sum(check["status"] == status for check in self.checks)
            for status in ("passed", "failed", "skipped")
        }
        lines += ["", ", ".join(f"{count} {status}" for status, count in counts.items())]
        return "\n".join(lines)


def describe(value: dict[str, Any]) -> str:
    """A value as text: what it is of, the value with its unit, and in brackets whatever else is known of it."""

    def text(number: float | str) -> str:
        return f"{number:.4g}" if isinstance(number, float) else str(number)

    more = ", ".join(f"{name} {text(v)}" for name, v in value.items() if name not in ("what", "value", "unit"))
    return f"{value['what']}: {text(value['value'])} {value['unit']}".rstrip() + (f" ({more})" if more else "")


def supervise(report: Report, command: list[str], seconds: float) -> None:
    """Have all checks run by a second process, or by several, one after the other.

    Args:
        command: starts the process that calls `run_checks`; the number of its first check and the deadline follow.
        seconds: that all checks may take together.
    """
    deadline = time.time() + seconds - RESERVE_SECONDS
    plan: list[list[Any]] = []
    done = 0  # checks that have ended
    while done == 0 or done < len(plan):
        if plan and time.time() > deadline:
            for name, _, optional in plan[done:]:
                report.start(name)
                report.end("skipped" if optional else "failed", f"the {seconds:.0f} s for all checks were over")
            return
        process = Process([*command, str(done), str(deadline)])
        ended = run_process(process, report, plan, deadline)
        if ended == 0:  # it has not come to its first check
            report.start("start")
            report.end("failed", process.how_it_ended())
            return
        done += ended


def run_process(process: "Process", report: Report, plan: list[list[Any]], deadline: float) -> int:
    """Follow a process to its end, and return the number of checks that it has ended or not survived."""
    limit, running, ended = min(time.time() + IMPORT_SECONDS, deadline), False, 0
    while (event := process.next_event(limit)) is not None:
        if "plan" in event:
            plan[:] = event["plan"]
        elif "start" in event:
            name, check_seconds, optional = plan[event["start"]]
            report.start(name)
            limit, running = min(time.time() + check_seconds, deadline), True
        elif "value" in event:
            report.value(event["value"])
        else:
            report.end(event["status"], event["detail"])
            limit, running, ended = min(time.time() + IMPORT_SECONDS, deadline), False, ended + 1
    process.kill()
    if running:
        report.end("skipped" if optional and process.timed_out else "failed", process.how_it_ended())
        ended += 1
    return ended


class Process:
    """A process that prints events as lines of JSON."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        self.timed_out = False
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self._lines.put(line)
        self._lines.put(None)

    def next_event(self, limit: float) -> dict[str, Any] | None:
        """The next event; None at the end, or if none comes until `limit` (as of `time.time()`)."""
        try:
            line = self._lines.get(timeout=max(limit - time.time(), 0))
        except queue.Empty:
            self.timed_out = True
            return None
        event: dict[str, Any] | None = None if line is None else json.loads(line)
        return event

    def kill(self) -> None:
        """End it, and the processes that it has started; nothing happens to one that has ended."""
        if not self.timed_out:
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.timed_out = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def how_it_ended(self) -> str:
        """Why it has not ended its check."""
        self.kill()
        if self.timed_out:
            return "it took too long, and was ended"
        return f"its process ended, with exit status {self.process.returncode}; see above"
