"""Notebooks: what the library shows in a Jupyter kernel, and the notebook in docs/."""

import os
import subprocess
import sys

import nbclient
import nbformat
import pytest
from conftest import ROOT

NOTEBOOK = ROOT / "docs" / "decoding.ipynb"

PROGRESS = """
import time
from llama.checkpoint.progress import progress, progress_bar
for i in progress_bar(range(3), desc="training"):
    logger.info("step %d", i)
for i in progress(range(4), "quick", " tensors"):
    pass
for i in progress(range(3), "loading", " tensors"):
    time.sleep(0.4)
"""


def execute(notebook: nbformat.NotebookNode) -> list[str]:
    """Execute a notebook in a kernel of its own, and return what each of its code cells shows as text."""
    resources = {"metadata": {"path": ROOT / "docs"}}
    nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources=resources, record_timing=False
    ).execute()
    return ["".join(map(text_of, cell.outputs)) for cell in notebook.cells if cell.cell_type == "code"]


def text_of(output: nbformat.NotebookNode) -> str:
    return output.text if output.output_type == "stream" else output.data["text/plain"]


def keep_results(notebook: nbformat.NotebookNode) -> None:
    """Remove what isn't kept in the file: messages, which differ each time; the inspection's page, for its size."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            printed = "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
            results = [output for output in cell.outputs if output.output_type == "execute_result"]
            for result in results:
                result.data.pop("text/html", None)
            cell.outputs = [nbformat.v4.new_output("stream", text=printed)] * bool(printed) + results
    notebook.metadata.language_info = {"name": "python"}  # without the version of the Python that executed it


def execute_cells(*cells: str) -> list[str]:
    return execute(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells]))


@pytest.mark.slow
def test_messages_and_progress_are_shown_without_set_up():
    first, no_torch, progress, *after_set_up = execute_cells(
        "import llama, logging\nlogger = logging.getLogger('llama')\nlogger.info('loaded')\nlogger.debug('detail')",
        "import sys\n'torch' in sys.modules",
        PROGRESS,
        "logging.basicConfig(format='the user: %(message)s')\nlogger.info('no news')\nlogger.warning('careful')",
        "logger.setLevel('INFO')\nlogger.info('news')",
    )
    assert first == "loaded\n"
    assert no_torch == "False"
    assert "IProgress" not in progress  # what tqdm warns of where ipywidgets are not installed
    for shown in ("step 0\n", "step 1\n", "step 2\n", "training: ", "loading: "):
        assert shown in progress
    assert "quick: " not in progress  # it takes less than a second
    assert after_set_up == ["the user: careful\n", "the user: news\n"]


@pytest.mark.slow
def test_messages_are_not_shown_elsewhere():
    """In IPython at a terminal, in a process that has even imported the kernel."""
    program = "import ipykernel.zmqshell, llama, logging; logging.getLogger('llama').info('loaded'); print(llama)"
    command = [sys.executable, "-m", "IPython", "--colors=nocolor", "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"TERM": "dumb"})
    assert "module 'llama'" in result.stdout, result.stderr
    assert "loaded" not in result.stdout + result.stderr


@pytest.mark.real
@pytest.mark.slow
def test_the_notebook_in_docs():
    """It shows what is kept in the file. After a change of the notebook, run this module, which writes that."""
    notebook, kept = nbformat.read(NOTEBOOK, as_version=4), nbformat.read(NOTEBOOK, as_version=4)
    execute(notebook)
    assert "<iframe" in notebook.cells[-1].outputs[-1].data["text/html"]
    keep_results(notebook)
    for cell, kept_cell in zip(notebook.cells, kept.cells, strict=True):
        assert cell == kept_cell


if __name__ == "__main__":
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    execute(notebook)
    keep_results(notebook)
    nbformat.write(notebook, NOTEBOOK)
