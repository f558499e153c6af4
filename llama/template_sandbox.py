"""Jinja for chat templates, which come with model files and may be hostile.

Templates are set up as Hugging Face's transformers sets them up, and see the same names, filters and functions. They
run in Jinja's sandbox, which keeps them from Python's own objects, and within limits: every loop, call, filter and
operator first checks how long the template has run and how much text it has made, so that none runs for ever or fills
the memory.
"""

import datetime
import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_SECONDS = 5.0  # that one rendering may take; an ordinary template takes a millisecond
MAX_SOURCE = 100_000  # characters of a template
MAX_SIZE = 2_000_000  # characters and items that a template may make, beyond a multiple of the dialog's
MAX_NUMBER = 10_000  # as an argument of a function or filter, such as the width of a field
MAX_LOOP_TEXT = 2_000_000_000  # steps of all loops, times the length of the template

# Names of a variable and of filters that no template can spell.
BUDGET, COUNTED_STEPS, CONCATENATED, CHECKED = "the budget", "counted steps", "concatenated", "checked"


class LimitError(Exception):
    """A template runs too long, or makes too much text."""


class Budget:
    """What one rendering may still use.

    Args:
        source_length: characters of the template.
        dialog_length: characters of the dialog.
    """

    def __init__(self, source_length: int, dialog_length: int) -> None:
        self.deadline = time.monotonic() + MAX_SECONDS
        self.max_size = MAX_SIZE + 16 * dialog_length
        self.output_size = 0
        self.steps_left = MAX_LOOP_TEXT // (source_length + 1)

    def check_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise LimitError(f"it runs for over {MAX_SECONDS:.0f} seconds")

    def check_size(self, size: int) -> None:
        if size > self.max_size:
            raise LimitError("it makes too much text")

    def check_values(self, *values: Any) -> int:
        """Check the time and the values of an operation before it is done; returns their size."""
        self.check_time()
        size, to_do = 0, list(values)
        while to_do:
            value = to_do.pop()
            if isinstance(value, str | bytes | range):
                size += len(value)
            elif isinstance(value, Mapping):
                to_do += [*value.keys(), *value.values()]
            elif isinstance(value, list | tuple):
                self.check_size(size + len(value))
                to_do += value
            size += 1
            self.check_size(size)
        return size

    def check_output(self, value: Any) -> None:
        """Check a value that becomes text of the output, or of a part of it that a template keeps."""
        self.output_size += self.check_values(value)
        self.check_size(self.output_size)


def check_call(budget: Budget, name: str, text: Any, args: Iterable[Any]) -> None:
    """Check a call of a function, filter or method before it is made.

    Args:
        budget: what the rendering may still use.
        name: of the function, filter or method.
        text: what a filter or method is applied to; None for a function.
        args: the other arguments.
    """
    args = list(args)
    budget.check_values(text, *args)
    if name != safe_range.__name__ and any(isinstance(arg, int) and abs(arg) > MAX_NUMBER for arg in args):
        raise LimitError(f"it passes a number above {MAX_NUMBER} to {name}")
    strings = [value for value in (text, *args) if isinstance(value, str)]
    if name == "replace" and len(strings) > 2:
        budget.check_size(len(text) + (text.count(strings[1]) if strings[1] else len(text) + 1) * len(strings[2]))
    if name == "indent":  # every line of the text
        budget.check_size(sum(map(len, strings)) * (1 + max((arg for arg in args if isinstance(arg, int)), default=4)))
    if name == "join":
        separators = [len(value) for value in strings]
        lengths = [len(value) for value in (text, *args) if isinstance(value, list | tuple | range | Mapping)]
        budget.check_size(max(separators, default=0) * max(lengths, default=1))
    if name in ("format", "strftime_now"):
        check_format(*strings)


def check_format(*formats: Any) -> None:
    """Raise LimitError if a format asks for a field of many thousands of characters."""
    if any(isinstance(text, str) and re.search(r"\d{5}", text) for text in formats):
        raise LimitError(f"it formats a field wider than {MAX_NUMBER} characters")


class Generation(Extension):
    """The block `{% generation %}…{% endgeneration %}` around what the assistant says: rendered as its content."""

    tags = {"generation"}  # noqa: RUF012  jinja2's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [nodes.Scope(body, lineno=line)]


class TemplateNamespace(Namespace):
    """Jinja's `namespace`, without names that begin with an underscore."""

    def __repr__(self) -> str:  # without what it holds, which may be large
        return "<Namespace>"

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


class PutUnderLimits(NodeTransformer):
    """Passes what a loop runs over, what `~` joins, and written lists, tuples and dicts through filters.

    Jinja's sandbox lets its environment check all else: attributes, calls, filters and the other operators.
    """

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = apply_filter(COUNTED_STEPS, node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return apply_filter(CONCATENATED, nodes.List(node.nodes, lineno=node.lineno))

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return apply_filter(CHECKED, node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return apply_filter(CHECKED, node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return apply_filter(CHECKED, node) if node.ctx == "load" else node  # else the names of an assignment


def apply_filter(name: str, node: nodes.Node) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """The environment that chat templates are compiled and rendered in."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    unsafe_methods = frozenset({"translate", "maketrans", "expandtabs", "format_map"})  # of strings: they may grow much

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[Generation, "jinja2.ext.loopcontrols"],
            optimized=False,  # what a template computes from constants is checked when it runs
            finalize=check_output,
        )
        for name in ("wordwrap", "urlize"):  # slow on long text, and no chat template needs them
            del self.filters[name]
        del self.globals["lipsum"]
        self.filters["tojson"] = to_json
        self.filters = {name: limited_filter(name, function) for name, function in self.filters.items()}
        self.filters |= {
            COUNTED_STEPS: counted_steps,
            CONCATENATED: limited_filter(CONCATENATED, lambda items: "".join(map(str, items))),
            CHECKED: limited_filter(CHECKED, lambda value: value),
        }
        self.globals |= {
            "raise_exception": raise_exception,
            "strftime_now": strftime_now,
            "namespace": TemplateNamespace,
        }

    def _generate(
        self, source: nodes.Template, name: str | None, filename: str | None, defer_init: bool = False
    ) -> str:
        return super()._generate(PutUnderLimits().visit(source), name, filename, defer_init)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        is_growing = isinstance(obj, str) and attr in self.unsafe_methods
        return not is_growing and super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        raise SecurityError(f"it reaches for {attribute!r} of a {type(obj).__name__}")

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        name, text = getattr(__obj, "__name__", ""), getattr(__obj, "__self__", None)
        # What `str.format` is applied to is hidden in Jinja's own version of it, which `functools.update_wrapper` made.
        text = getattr(getattr(__obj, "__wrapped__", None), "__self__", text)
        args = tuple(list(arg) if isinstance(arg, Iterator) else arg for arg in args)  # to see how long they are
        check_call(__context[BUDGET], name, text if isinstance(text, str) else None, [*args, *kwargs.values()])
        result = super().call(__context, __obj, *args, **kwargs)
        __context[BUDGET].check_values(result)
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget: Budget = context[BUDGET]
        budget.check_values(left, right)
        if operator == "%":
            check_format(left)
            if isinstance(left, str):
                check_call(budget, "format", left, right if isinstance(right, tuple) else [right])
        elif isinstance(left, int | float) and isinstance(right, int | float):
            if abs(left) > 2**64 or abs(right) > (64 if operator == "**" else 2**64):
                raise LimitError("it computes with very large numbers")
        elif operator == "*":
            sequence, count = (right, left) if isinstance(left, int) else (left, right)
            if isinstance(count, int) and isinstance(sequence, str | list | tuple):
                budget.check_size(len(sequence) * count)
        result = super().call_binop(context, operator, left, right)
        budget.check_values(result)
        return result


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own `tojson` escapes characters for HTML; chat templates are rendered without these escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@jinja2.pass_context
def check_output(context: Context, value: Any) -> Any:
    """Called with every value before it becomes text."""
    cast(Budget, context[BUDGET]).check_output(value)
    return value


@jinja2.pass_context
def counted_steps(context: Context, items: Iterable[Any]) -> Any:
    """What a loop runs over, with a check at each step."""
    budget: Budget = context[BUDGET]
    if isinstance(items, jinja2.Undefined):
        return items  # Jinja's loops are lenient with these
    return CountedSteps(items, budget)


class CountedSteps:
    """Iterates over `items`, counting the steps; it has their length, which `loop.length` and others ask for."""

    def __init__(self, items: Iterable[Any], budget: Budget) -> None:
        self.items, self.budget = items, budget

    def __len__(self) -> int:
        return len(cast("list[Any]", self.items))  # raises TypeError for an iterator, as Jinja expects

    def __iter__(self) -> Iterator[Any]:
        for item in self.items:
            self.budget.steps_left -= 1
            if self.budget.steps_left < 0:
                raise LimitError("its loops take too many steps")
            self.budget.check_time()
            yield item


def limited_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that first checks its arguments against the limits."""
    passed = getattr(function, "jinja_pass_arg", None)  # what Jinja passes to this filter before its arguments, if any

    @jinja2.pass_context
    @functools.wraps(function)
    def limited(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        if name == "join" and isinstance(value, Iterator):
            value = list(value)  # to see how long it is
        check_call(context[BUDGET], name, value, [*args, *kwargs.values()])
        first = {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}
        result = function(*([] if passed is None else [first[passed.name]]), value, *args, **kwargs)
        context[BUDGET].check_values(result)
        return result

    return limited
