"""Chat templates in a process of their own: what they render, what they must not reach, and how they are stopped."""

# ruff: noqa: E501  (templates stand in one line)

import os
import subprocess
import sys
import time

import pytest

from llama import template_process
from llama.errors import CheckpointError, InputError
from llama.template_process import HostileTemplateError, TemplateProcess

MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "x"}]


def render(source: str, **variables) -> str:
    (text,) = template_process.render(source, "the file", [{"messages": MESSAGES, **variables}])
    return text


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
    "{{ (messages | string).__len__() }}",
]


@pytest.mark.parametrize("source", REFUSED)
def test_what_a_template_must_not_reach(source):
    with pytest.raises(HostileTemplateError, match="the file: the chat template is stopped: SecurityError: "):
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
    "powers": "{{ 10 ** 9999 ** 9999 }}",
    "numbers": "{% set ns = namespace(n=2) %}" + LOOP % "{% set ns.n = ns.n * ns.n %}",
    "doubling by ~": "{% set ns = namespace(s='x') %}" + LOOP % "{% set ns.s = ns.s ~ ns.s %}",
    "doubling by +": "{% set ns = namespace(s='x') %}" + LOOP % "{% set ns.s = ns.s + ns.s %}",
    "doubling by replace": "{% set ns = namespace(s='x') %}" + LOOP % "{% set ns.s = ns.s.replace('x', 'xx') %}",
    "a filter's replace": "{% set ns = namespace(s='x') %}" + LOOP % "{% set ns.s = ns.s | replace('', 'xx') %}",
    "lists": "{% set ns = namespace(s=[1], t=[1]) %}"
    + LOOP % "{% set ns.s = [ns.s, ns.s] %}{% set ns.t = [ns.t, ns.t] %}"
    + "{{ ns.s == ns.t }}",
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
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive loops": "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "tests": "{{ range(99999) | select('in', [0.5] * 1900000) | list }}",
    "searching": "{% set s = 'a' * 1200000 %}{{ s.rfind('ab' + 'a' * 500000) }}",
    "stripping": "{{ ('🙂' * 900000).strip('😀' * 900000 + '🙂') }}" * 9,
    "hash collisions": "{{ range(0, 99999 * (2 ** 61 - 1), 2 ** 61 - 1) | unique | list | length }}",
    "long numbers": "{% set x = ('7' * 1900000) | int(base=16) %}{{ x % (x // 3) }}" * 9,
    "widths within widths": "{{ '{:{a}{a}{a}}'.format(1, a=999) }}",
    "bytes": "{{ ('x'.encode() * 3000000000) | length }}",
    "texts of tuples": "{{ raise_exception(('x' * 10 ** 9, 'y' * 10 ** 9)) }}",
    "compiling": "{{ 'a' | center(10 ** 9) }}",
}


@pytest.mark.slow
@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_templates_that_would_not_end_or_fill_the_memory(monkeypatch, source):
    monkeypatch.setattr(template_process, "MAX_SECONDS", 0.5)
    begin = time.monotonic()
    with pytest.raises(CheckpointError):
        render(source)
    assert time.monotonic() - begin < 30  # usually below one second


@pytest.mark.parametrize(
    "source", ["{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}", "{% if 1 %}" * 3000 + "{% endif %}" * 3000]
)
def test_deep_nesting_is_refused(source):
    with pytest.raises(CheckpointError, match=r"RecursionError|SyntaxError|MemoryError|takes over"):
        render(source)


@pytest.mark.parametrize("source", ["{% import 'os' as os %}", "{% include '/etc/passwd' %}", "{% extends 'x' %}"])
def test_other_files_are_not_read(source):
    with pytest.raises(CheckpointError, match="fails: TypeError: no loader"):
        render(source)


def test_a_template_s_own_exception():
    with pytest.raises(InputError, match=r"^the model's chat template refuses the dialog: no such role$") as error:
        render("{{ raise_exception('no such role') }}")
    assert not isinstance(error.value, CheckpointError)
    # Its words may be no text, and may not even become one.
    for words in ("[('f' * 5000) | int(base=16)]", "'\\ud800'", "messages"):
        with pytest.raises(InputError, match=r"the file: the chat template fails|template refuses the dialog: "):
            render(f"{{{{ raise_exception({words}) }}}}")


def test_a_template_changes_no_message():
    with pytest.raises(CheckpointError):
        render("{{ dict.update(messages[0], content='y') }}")
    assert render("{{ dict.fromkeys(['a'], 1) }}") == "{'a': 1}"


def test_half_of_a_surrogate_pair():
    assert render("{{ '\\ud800' }}") == "\ud800"


def test_long_dialogs():
    messages = [{"role": "user", "content": "word " * 2000}] * 1000
    source = (
        "{% for m in messages %}{{ loop.index ~ m.content | trim }}{% if m == messages[-1] %}{% endif %}{% endfor %}"
    )
    (text,) = template_process.render(source, "", [{"messages": messages}])
    assert len(text) == 1000 * 9999 + sum(len(str(number)) for number in range(1, 1001))
    short = [{"role": "user", "content": "x"}] * 5000
    source = "{% for m in messages %}{{ messages | length }}{{ 'some text that a template writes' }}{% endfor %}"
    assert len(template_process.render(source, "", [{"messages": short}])[0]) == 5000 * 36


def test_a_process_is_kept_and_replaced():
    process = TemplateProcess("{{ messages | length }}")
    rendering = {"messages": MESSAGES}
    assert process.answers([rendering, rendering]) == ["2", "2"]
    first = process._process
    assert process.answers([rendering]) == ["2"]
    assert process._process is first
    first.kill()  # as the system does when memory runs out
    first.wait()
    assert process.answers([rendering]) == ["2"]
    second = process._process
    del process
    assert second.wait(timeout=30) is not None  # it ends with the object


def test_a_template_that_was_stopped_is_tried_again(monkeypatch):
    """The machine may just have been busy."""
    source = "{% for i in range(9999) %}{% for j in messages %}{% endfor %}{% endfor %}done"
    monkeypatch.setattr(template_process, "MAX_SECONDS", 0.01)
    with pytest.raises(HostileTemplateError, match=r"it takes over 0\.0 seconds"):
        render(source, messages=MESSAGES * 99)
    monkeypatch.undo()
    assert render(source) == "done"


def test_modules_of_the_working_directory_are_not_imported(tmp_path):
    (tmp_path / "jinja2.py").write_text("raise SystemExit('imported')")
    (tmp_path / "json.py").write_text("raise SystemExit('imported')")
    code = f"""if True:
        import json, os, sys
        sys.path.insert(0, "")
        from llama import template_process
        os.chdir({str(tmp_path)!r})
        assert template_process.render("x", "", [dict(messages=[])]) == ["x"]"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_an_interrupted_start_is_made_good(monkeypatch):
    process = TemplateProcess("{{ messages | length }}")
    rendering = {"messages": MESSAGES}

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(template_process, "ask", interrupt)
        with pytest.raises(KeyboardInterrupt):
            process.answers([rendering])
    assert process.answers([rendering]) == ["2"]


def test_without_a_program_to_start(monkeypatch):
    monkeypatch.setattr(sys, "executable", None)
    with pytest.raises(OSError, match="Python doesn't know its own program"):
        TemplateProcess("x").answers([{"messages": []}])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_has_processes_of_its_own():
    """And leaves those of its parent alone when it ends."""
    code = """if True:
        import os, sys
        from llama import template_process
        variables = lambda: [{"messages": [{"content": str(os.getpid())}]}]
        render = lambda: template_process.render("{{ messages[0].content }}", "", variables())
        assert render() == [str(os.getpid())]
        child = os.fork()
        assert render() == [str(os.getpid())]
        if child:
            assert os.waitpid(child, 0)[1] == 0
            assert render() == [str(os.getpid())]
        sys.exit(0)"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_reaches_the_program_alone():
    """The answer that comes later is not taken for that of the next question."""
    code = """if True:
        import signal, threading, os
        from llama import template_process
        slow = "{% for i in range(n) %}{% for j in range(9999) %}{% endfor %}{% endfor %}{{ n }}"
        render = lambda n: template_process.render(slow, "", [{"messages": [], "n": n}])
        assert render(1) == ["1"]
        threading.Timer(0.3, os.killpg, (os.getpgrp(), signal.SIGINT)).start()
        try:
            render(9000)
            raise SystemExit("not interrupted")
        except KeyboardInterrupt:
            assert render(2) == ["2"]"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, start_new_session=True
    )
    assert result.returncode == 0, result.stderr


def test_the_process_ends_with_the_program():
    code = """if True:
        import os
        from llama import template_process
        template_process.render("x", "", [{"messages": []}])
        print(template_process.template_process("x", os.getpid())._process.pid, flush=True)
        os._exit(1)  # as if it were killed"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    pid = int(result.stdout)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("the process is still there")
