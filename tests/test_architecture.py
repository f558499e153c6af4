"""The shape of the package: its imports, the length of the core, and the functions that a call of `generate` passes."""

import ast
import re
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ScriptedTokenizer, tiny_model

import llama
from llama import Llama

PACKAGE = Path(llama.__file__).parent
CORE = ["model", "model_args", "tokenizer", "chat_format", "sampling", "decoding", "generation"]
BESIDE_THE_CORE = ["kv_cache", "batch", "streaming", "beam_search", "sampling_params", "protocols"]
WINGS = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


def module_paths() -> dict[str, Path]:
    """The package's modules by name."""
    paths = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return paths


MODULES = module_paths()


def imports_of(source: str, module: str) -> set[str]:
    """The modules of the package that `source` imports anywhere: in functions, or for type checkers alone, too.

    An import of a subpackage's module doesn't count as one of the subpackage, whose `__init__` may import that module.
    """
    imported = set()
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package.rsplit(".", node.level - 1)[0] if node.level else ""
            origin = ".".join(filter(None, (parent, node.module)))
            for alias in node.names:
                name = f"{origin}.{alias.name}"
                imported.add(name if name in MODULES else origin)
    return imported & MODULES.keys()


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    return {module: imports_of(path.read_text(), module) for module, path in MODULES.items()}


def wings_of(modules: set[str]) -> set[str]:
    return {name for name in (module.partition(".")[2].partition(".")[0] for module in modules) if name in WINGS}


def test_how_imports_are_found():
    source = """
import os, llama.errors
from llama import distributed, Llama
from .sampling import sample
if TYPE_CHECKING:
    from llama.checkpoint import memory, load_model
def function():
    from llama.vocab.vocabulary import Vocabulary
"""
    modules = {"errors", "distributed", "sampling", "checkpoint", "checkpoint.memory", "vocab.vocabulary"}
    assert imports_of(source, "llama.batch") == {"llama"} | {f"llama.{module}" for module in modules}
    assert wings_of(imports_of(source, "llama.batch")) == {"checkpoint", "vocab"}


def test_there_is_no_import_cycle(imports):
    order = list(TopologicalSorter(imports).static_order())  # CycleError names the modules
    assert len(order) == len(MODULES)


def test_the_core_knows_only_two_wings(imports):
    """`generation` loads checkpoints; `tokenizer` opens files of vocabularies, and chat templates write their tokens.

    Neither the core nor what it imports at the top of the package knows another.
    """
    assert {"checkpoint", "cli", "finetune", "vocab"} <= WINGS
    allowed = {"llama.generation": {"checkpoint"}, "llama.tokenizer": {"vocab"}, "llama.chat_template": {"vocab"}}
    seen: set[str] = set()
    to_do = {f"llama.{module}" for module in CORE + BESIDE_THE_CORE}
    while to_do:
        module = to_do.pop()
        seen.add(module)
        assert wings_of(imports[module]) <= allowed.get(module, set()), module
        to_do |= {imported for imported in imports[module] - seen if not wings_of({imported})}
    assert "llama.model_lock" in seen


def test_private_parts_of_torch_are_used_in_few_modules():
    private = re.compile(r"torch\._C\b|torch import _C\b|\b_cdata\b|_hooks\b")
    users = [module for module, path in MODULES.items() if private.search(path.read_text())]
    assert users == ["llama.cpu_matmul", "llama.fast_kernels", "llama.step_form"]


def test_the_core_has_at_most_1300_lines():
    lengths = {module: len(MODULES[f"llama.{module}"].read_text().splitlines()) for module in CORE}
    assert sum(lengths.values()) <= 1300, lengths


# The network, and where it is:
NOT_COUNTED = ["model.py", "kv_cache.py", "positions.py", "parallel.py", "cpu_matmul.py", "fast_kernels.py", "fused.py"]
NOT_COUNTED += ["device.py"]


def functions_called(function) -> set[tuple[str, str]]:
    """The file and name of each function of the package that `function` calls, without lambdas and comprehensions."""
    called = set()

    def profile(frame, event, argument):
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_name
        if event == "call" and path.is_relative_to(PACKAGE) and not name.startswith("<"):
            called.add((path.name, frame.f_code.co_qualname if sys.version_info >= (3, 11) else name))

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return called


def test_few_functions_stand_between_generate_and_the_network():
    llama = Llama(tiny_model(), ScriptedTokenizer())
    llama.generate([[5]], 1)  # the first call also makes the cache and the lock
    called = functions_called(lambda: llama.generate([[5, 6, 7]], 8, 0.8, 0.9))
    outside = {(file, name) for file, name in called if file not in NOT_COUNTED}
    assert len(outside) <= 19, sorted(outside)
    names = {name for _, name in called}
    assert {"Llama.generate", "prefill", "decode", "sample", "sample_top_p"} <= {name for _, name in outside}
    assert {"Attention.forward", "apply_rotary_emb", "linear"} <= names
