"""The program of the process that renders a chat template; `llama.template_process` starts it.

A template is a program too, and may be hostile, since it comes with a model's files. Jinja's sandbox keeps it from
Python's own objects. What else it may do, such as loop for ever or fill the memory, happens in this process alone,
whose memory is limited, and which is killed if it takes too long.

Standard input and output are lines of JSON. First comes "started". Then the template is read, and answered by "ready".
Each further line has the variables of a rendering, and is answered by what was rendered. An answer that is an object
says what went wrong.
"""

import datetime
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_MEMORY = 2**30  # bytes of address space
MAX_SECONDS = 300.0  # for an answer; the program that waits for it stops this process far sooner
MAX_TEXT = 200_000  # characters of what is rendered, and some more for each message and each of its characters


def main() -> None:
    """Answer the lines of standard input."""
    limit_memory()
    reply("started")
    template: jinja2.Template | None = None
    for line in sys.stdin:
        set_alarm(MAX_SECONDS)
        try:
            request = json.loads(line)
            if template is None:
                template = TemplateEnvironment().from_string(request)
                reply("ready")
            else:
                reply(render(template, request))
        except Exception as error:  # a template can raise anything, and so can its compilation
            reply(describe(error))
        set_alarm(0)


def reply(answer: Any) -> None:
    print(json.dumps(answer), flush=True)


def limit_memory() -> None:
    """Limit the memory of this process, where the system can do that."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    except (ImportError, OSError, ValueError):  # Windows has no such limit, and macOS may refuse it
        return


def set_alarm(seconds: float) -> None:
    """End this process after some time, where the system can do that: the program that started it may be gone."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def render(template: jinja2.Template, variables: dict[str, Any]) -> str:
    """What a template writes.

    Raises:
        MemoryError: it is far longer than the messages.
    """
    messages = variables["messages"]
    max_text = MAX_TEXT + 1000 * len(messages) + 16 * sum(len(message["content"]) for message in messages)
    chunks, length = [], 0
    for chunk in template.generate(variables):
        chunks.append(chunk)
        length += len(chunk)
        if length > max_text:
            raise MemoryError(f"it writes over {max_text} characters")
    return "".join(chunks)


def describe(error: Exception) -> dict[str, str]:
    """What went wrong: the name of a kind, and a text for people."""
    kind = "failed"
    if type(error) is jinja2.TemplateError:  # by the template's own raise_exception
        kind = "refused"
    elif isinstance(error, SecurityError | MemoryError | RecursionError):
        kind = "hostile"
    try:
        text = str(error)[:300]
    except Exception:  # the text may be made of what the template has passed
        text = ""
    if isinstance(error, MemoryError) and not text:
        text = "no more memory"
    line = f" in line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
    return {"kind": kind, "text": text if kind == "refused" else f"{type(error).__name__}{line}: {text}"}


class Generation(Extension):
    """The block `{% generation %}…{% endgeneration %}` around what the assistant says: rendered as its content."""

    tags = {"generation"}  # noqa: RUF012  jinja2's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [nodes.Scope(body, lineno=line)]


class TemplateNamespace(Namespace):
    """Jinja's `namespace`, without names that begin with an underscore."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        attributes = dict(*args, **kwargs)
        for name in attributes:
            check_attribute(name)
        super().__init__(attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        check_attribute(name)
        super().__setitem__(name, value)


def check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no attribute {name!r}")


class TemplateDict:
    """Python's `dict`, of which a template gets no method that changes another dictionary."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """The environment that chat templates are compiled and rendered in, as transformers sets it up."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
        self.filters["tojson"] = to_json
        self.globals |= {
            "raise_exception": raise_exception,
            "strftime_now": strftime_now,
            "dict": TemplateDict(),
            "namespace": TemplateNamespace,
        }

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        raise SecurityError(f"it reaches for {attribute!r} of a {type(obj).__name__}")


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def to_json(
    value: Mapping[str, Any] | Sequence[Any] | str | float | None,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own `tojson` escapes characters for HTML; chat templates are rendered without these escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
