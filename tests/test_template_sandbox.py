"""The sandbox of chat templates: what Jinja renders there, and hostile templates that are stopped."""

# ruff: noqa: E501  (templates stand in one line)

import time

import jinja2
import pytest
from jinja2.exceptions import SecurityError

from llama import template_sandbox
from llama.template_sandbox import BUDGET, Budget, LimitError, TemplateEnvironment

MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "x"}]
ENVIRONMENT = TemplateEnvironment()


def render(source: str, **variables) -> str:
    budget = Budget(len(source), 6)
    chunks = []
    for chunk in ENVIRONMENT.from_string(source).generate({"messages": MESSAGES, BUDGET: budget} | variables):
        budget.check_values(chunk)
        chunks.append(chunk)
    return "".join(chunks)


def transformers_render(source: str, **variables) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    ((text,), _) = render_jinja_template([MESSAGES], chat_template=source, **variables)
    return text


ORDINARY = [
    "{% for m in messages %}{{ loop.index }}/{{ loop.length }} {{ loop.first }} {{ loop.last }} {{ m.role }}\n{% endfor %}",
    "{% for m in messages if m.role == 'user' %}{{ m['content'] }}{{ loop.revindex }}{% else %}none{% endfor %}",
    "{% for m in messages | reverse %}{{ loop.previtem is defined }}{{ m.role }}{{ loop.changed(m.role) }}{% endfor %}",
    "{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "{% for key, value in messages[0].items() %}{{ key ~ '=' ~ value ~ ';' }}{% endfor %}",
    "{% for a in [[1, [2]], [3, []]] recursive %}{% if a is iterable %}({{ loop(a) }}){% else %}{{ a }}{% endif %}{% endfor %}",
    "{% for x in missing %}{{ x }}{% else %}empty{% endfor %}|{{ missing }}|{{ missing is defined }}",
    "{% set ns = namespace(a=1, b='x') %}{% set ns.a = ns.a + 1 %}{{ ns.a }}{{ ns.b }}",
    "{% macro f(x, y=2) %}[{{ x }}{{ y }}{{ varargs }}{{ kwargs }}]{% endmacro %}{{ f(1) }}{{ f('a', y='b') }}",
    "{% macro f() %}<{{ caller(3) }}>{% endmacro %}{% call(n) f() %}{{ n * 2 }}{% endcall %}",
    "{% set text %}  {{ messages | length }} messages {% endset %}{{ text | trim }}!",
    "{% set (a, b) = (1, 2) %}{{ a + b }}{{ (1, 2) }}{{ [1, 'a', none, true] }}{{ {'a': [1]} }}",
    "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ '<é>' | tojson }}{{ 'é' | tojson(ensure_ascii=true) }}",
    "{{ messages | map(attribute='role') | join(', ') }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "{{ messages | map(attribute='content') | map('upper') | list | last }}{{ messages | rejectattr('role', 'eq', 'user') | list }}",
    "{{ 'a-b-c'.split('-')[-1] }}{{ 'abc'[::-1] }}{{ 'x'.join(['1', '2']) }}{{ 'abc'.replace('b', 'BB') | upper }}{{ 'a' in 'abc' }}",
    "{{ '%s is %d' % ('a', 3) }}{{ '%s' | format('b') }}{{ '{} {x}'.format(1, x=2) }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 3 }}",
    "{{ ' a '.strip() }}{{ 'a,b'.startswith('a') }}{{ 'Ab' | lower | title | capitalize }}{{ '5' | int + 1 }}{{ 1.5 | round }}",
    "{{ [3, 1] | sort }}{{ {'b': 1, 'a': 2} | dictsort }}{{ [1, 1] | unique | list }}{{ [1, 2, 3] | batch(2) | list }}",
    "{{ 'x' | default('y') }}{{ missing | default('y') }}{{ '' | default('z', true) }}{{ (none or 'a') and 'b' }}{{ 1 if missing }}",
    "{{ 'a\nb' | indent(2) }}{{ '<b>' | e }}{{ '<b>' | safe }}{{ [1, 2] | sum }}{{ messages | first | items | list }}",
    "{{ dict(a=1).a }}{{ cycler('a', 'b').next() }}{% set j = joiner(',') %}{{ j() }}{{ j() }}{{ 'a' 'b' }}{{ 'abc' | list }}",
    "  {%- if true -%}\n  x\n  {%- endif %}\n  {% if true %}\n y\n  {% endif %}\n{# gone #}\nz\n",
    "{% generation %}{{ messages[1].content }}{% endgeneration %}{% raw %}{{ raw }}{% endraw %}{% filter upper %}a{% endfilter %}",
    "{% with a = 1 %}{{ a }}{% endwith %}{{ a }}{% block x %}b{% endblock %}{% if 'b' is in ['a', 'b'] and 3 is odd %}c{% endif %}",
    "{{ strftime_now('%Y') }}{{ add_generation_prompt }}{{ tools is none }}{{ documents is none }}{{ tools }}",
]


@pytest.mark.parametrize("source", ORDINARY)
def test_the_text_of_transformers(source):
    expected = transformers_render(source, add_generation_prompt=True)
    assert render(source, add_generation_prompt=True, tools=None, documents=None) == expected


REFUSED = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ '{0.__class__}'.format('') }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ raise_exception.__globals__ }}",
    "{{ self.__init__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(a=1) }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ namespace(__class__=1) }}",
    "{{ 'a'.translate({97: 'x'}) }}",
    "{{ (messages | string).__len__() }}",
]


@pytest.mark.parametrize("source", REFUSED)
def test_what_a_template_must_not_reach(source):
    with pytest.raises(SecurityError):
        render(source)


LOOP = "{%% for i in range(100) %%}%s{%% endfor %%}"
ENDLESS = {
    "loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}",
    "text": "{{ 'a' * 10 ** 10 }}",
    "wide fields": "{{ 'a' | center(10 ** 9) }}",
    "wide fields of methods": "{{ 'a'.ljust(1000000000) }}",
    "formats": "{{ '%1000000000d' % 1 }}",
    "formats by method": "{{ '{:1000000000}'.format(1) }}",
    "formats by filter": "{{ '%1000000000d' | format(1) }}",
    "widths as arguments": "{{ '%*d' % (1000000000, 1) }}",
    "widths in widths": "{{ '{:{w}}'.format(1, w=1000000000) }}",
    "dates": "{{ strftime_now('%1000000000d') }}",
    "powers": "{{ 10 ** 9999 ** 9999 }}",
    "numbers": "{% set ns = namespace(n=2) %}" + LOOP % "{% set ns.n = ns.n * ns.n %}",
    "doubling by ~": "{% set ns = namespace(s='x') %}" + LOOP % "{% set ns.s = ns.s ~ ns.s %}",
    "doubling by +": "{% set ns = namespace(s='x') %}" + LOOP % "{% set ns.s = ns.s + ns.s %}",
    "doubling by replace": "{% set ns = namespace(s='x') %}" + LOOP % "{% set ns.s = ns.s.replace('x', 'xx') %}",
    "a filter's replace": "{% set ns = namespace(s='x') %}" + LOOP % "{% set ns.s = ns.s | replace('', 'xx') %}",
    "lists": "{% set ns = namespace(s=[1]) %}" + LOOP % "{% set ns.s = [ns.s, ns.s] %}" + "{{ ns.s == ns.s }}",
    "tuples": "{% set ns = namespace(s=(1,)) %}" + LOOP % "{% set ns.s = (ns.s, ns.s) %}" + "{{ {ns.s: 1} }}",
    "dicts": "{% set ns = namespace(s={}) %}"
    + LOOP % "{% set ns.s = {'a': ns.s, 'b': ns.s} %}"
    + "{{ ns.s | tojson }}",
    "dicts by dict": "{% set ns = namespace(s={}) %}" + LOOP % "{% set ns.s = dict(a=ns.s, b=ns.s) %}" + "{{ ns.s }}",
    "joining": "{{ (['x' * 100000] * 10000) | join }}",
    "joining by method": "{{ ('x' * 100000).join(range(9999) | map('string')) }}",
    "joining by filter": "{{ range(9999) | map('string') | join('x' * 100000) }}",
    "sums": "{{ ([range(9999) | list] * 9999) | sum(start=[]) }}",
    "mapped joins": "{{ ([range(9999)] * 9999) | map('join') | list }}",
    "indents": "{{ ('a\n' * 50000) | indent(9999) }}",
    "many in one": "{% set s = 'x' * 1000000 %}{{ " + " ~ ".join(["s"] * 5000) + " }}",
    "kept text": "{% set s %}{% for i in range(9999) %}{{ 'x' * 100000 }}{% endfor %}{% endset %}{{ s | length }}",
    "slices": "{{ range(10) | slice(1000000) | list }}",
    "ranges": "{{ range(10 ** 9) | list }}",
}


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_templates_that_would_not_end_or_fill_the_memory(monkeypatch, source):
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", 1.0)
    begin = time.monotonic()
    with pytest.raises((LimitError, OverflowError)):
        render(source)
    assert time.monotonic() - begin < 60


@pytest.mark.parametrize(
    "source",
    ["{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}"],
)
def test_endless_recursion(source):
    with pytest.raises(RecursionError):
        render(source)


@pytest.mark.parametrize(
    "source", ["{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}", "{% if 1 %}" * 3000 + "{% endif %}" * 3000]
)
def test_deep_nesting_is_refused(source):
    with pytest.raises((RecursionError, SyntaxError, MemoryError)):
        render(source)


@pytest.mark.parametrize("source", ["{% import 'os' as os %}", "{% include '/etc/passwd' %}", "{% extends 'x' %}"])
def test_other_files_are_not_read(source):
    with pytest.raises(TypeError, match="no loader"):
        render(source)


def test_a_template_s_own_exception():
    with pytest.raises(jinja2.TemplateError, match="no such role") as error:
        render("{{ raise_exception('no such role') }}")
    assert type(error.value) is jinja2.TemplateError


def test_a_long_dialog_is_within_the_limits():
    messages = [{"role": "user", "content": "word " * 2000}] * 1000
    source = (
        "{% for m in messages %}{{ loop.index ~ m.content | trim }}{% if m == messages[-1] %}{% endif %}{% endfor %}"
    )
    budget = Budget(len(source), sum(len(message["content"]) for message in messages))
    text = "".join(ENVIRONMENT.from_string(source).generate({"messages": messages, BUDGET: budget}))
    assert len(text) == 1000 * 9999 + sum(len(str(number)) for number in range(1, 1001))
