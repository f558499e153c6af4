"""The script that checks the library on a GPU: without one, that it runs to its end, and that a fault fails it."""

import json
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, run_python

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does"),
]

BENCHMARKS = ROOT / "benchmarks"
SCRIPT = BENCHMARKS / "cuda_acceptance.py"


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


def checks_of(path: Path) -> dict[str, dict]:
    """Each check in a JSON file, by name."""
    return {check["name"]: check for check in json.loads(path.read_text())["checks"]}


@pytest.mark.parametrize(
    ("command", "n_checks", "value"),
    [
        ("correctness", 26, "beside transformers"),
        ("processes", 9, "all processes had ended after"),
        ("speed", 17, "captured, batch 1, context 8"),
    ],
)
def test_each_command_runs_to_its_end_without_a_gpu(tmp_path, command, n_checks, value):
    out = tmp_path / "out.json"
    result = run_python(SCRIPT, command, "--dry", "--out", out)
    assert result.returncode == 0, result.stdout + result.stderr
    checks = checks_of(out)
    assert len(checks) == n_checks
    assert {check["status"] for check in checks.values()} == {"passed"}
    assert value in {entry["what"] for check in checks.values() for entry in check["values"]}
    table = result.stdout[result.stdout.index(f"| {command}, dry |") :]
    assert all(f"| {name} | passed |" in table for name in checks)
    assert table.endswith(f"\n{n_checks} passed, 0 failed, 0 skipped\n")


def test_a_fault_of_the_library_fails_its_check_and_no_other(tmp_path):
    """Sampling forgets top-p here."""
    broken = tmp_path / "broken.py"
    broken.write_text(
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "import cuda_acceptance\n"
        "if '--child' in sys.argv:\n"
        "    import llama.sampling\n"
        "    original = llama.sampling.sample_top_p\n"
        "    llama.sampling.sample_top_p = lambda probs, p, generator=None: original(probs, 1, generator=generator)\n"
        "sys.exit(cuda_acceptance.main())\n"
    )
    out = tmp_path / "out.json"
    result = run_python(broken, "correctness", "--dry", "--out", out, "--only", "sampled", "stop", "streams")
    assert result.returncode == 1
    checks = checks_of(out)
    sampled = checks["sampled tokens beside torch.multinomial's"]
    assert (sampled["status"], "mismatches" in sampled["detail"]) == ("failed", True)
    assert checks["stop tokens and strings"]["status"] == checks["streams"]["status"] == "passed"
    assert result.stdout.endswith("\n2 passed, 1 failed, 0 skipped\n")
    assert json.loads(out.read_text())["passed"] is False


def test_whatever_a_check_does_the_others_run(tmp_path):
    """Checks that raise, kill their process, hang, or are optional and hang; the last one still runs."""
    program = tmp_path / "program.py"
    program.write_text(
        f"import os, sys, time; sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "from pathlib import Path\n"
        "from on_cuda.report import *\n"
        "def fail(context):\n"
        "    context.record('so far', 0.123456, 'ms', limit=2)\n"
        "    require(1 > 2, 'one is | less')\n"
        "def skip(context): raise Skipped('not here')\n"
        "CHECKS = [\n"
        "    Check('fails', fail),\n"
        "    Check('dies', lambda context: os._exit(7)),\n"
        "    Check('hangs', lambda context: time.sleep(60), 0.5),\n"
        "    Check('is slow', lambda context: time.sleep(60), 0.5, optional=True),\n"
        "    Check('has no time', fail, 10_000, optional=True),\n"
        "    Check('skips', skip),\n"
        "    Check('alone', lambda context: print('this is no event'), alone=True),\n"
        "    Check('ends', lambda context: None),\n"
        "]\n"
        "if sys.argv[1] == 'child':\n"
        "    run_checks(CHECKS, int(sys.argv[2]), False, float(sys.argv[3]))\n"
        "else:\n"
        "    report = Report('all', False, Path(sys.argv[1]))\n"
        "    supervise(report, [sys.executable, __file__, 'child'], 100)\n"
        "    print(report.table())\n"
    )
    out = tmp_path / "out.json"
    result = run_python(program, out)
    assert result.returncode == 0, result.stderr
    checks = checks_of(out)
    statuses = {"fails": "failed", "dies": "failed", "hangs": "failed", "is slow": "skipped", "has no time": "skipped"}
    statuses |= {"skips": "skipped", "alone": "passed", "ends": "passed"}
    assert {name: check["status"] for name, check in checks.items()} == statuses
    assert checks["fails"]["values"] == [{"what": "so far", "value": 0.123456, "unit": "ms", "limit": 2}]
    assert "exit status 7" in checks["dies"]["detail"]
    assert "took too long" in checks["hangs"]["detail"]
    assert "so far: 0.1235 ms (limit 2)" in result.stdout
    assert r"one is \| less" in result.stdout  # its bar doesn't end the cell
    assert result.stdout.endswith("\n2 passed, 3 failed, 3 skipped\n")


def test_a_program_that_can_not_start_has_failed(tmp_path, benchmarks):
    from on_cuda.report import Report, supervise

    report = Report("all", False, None)
    supervise(report, [sys.executable, "-c", "import sys; sys.exit(3)"], 100)
    assert not report.passed
    assert "exit status 3" in report.checks[0]["detail"]


def test_wheels_are_of_what_is_needed_beside_torch(benchmarks):
    from on_cuda.wheels import PACKAGES, requirements

    brought, needed = requirements(("torch",), "3.12"), requirements(PACKAGES, "3.12")
    assert {"torch", "jinja2", "sympy"} <= brought
    assert {"fairscale", "tiktoken", "gguf", "safetensors", "transformers", "tokenizers", "numpy"} <= needed - brought


def test_wheels_are_imported_first(tmp_path, benchmarks, monkeypatch):
    from on_cuda.wheels import install_wheels

    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "before")
    with pytest.raises(FileNotFoundError, match="no wheels"):
        install_wheels(tmp_path, tmp_path / "target")
    with zipfile.ZipFile(tmp_path / "a_package_in_a_wheel-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("a_package_in_a_wheel.py", "VALUE = 5")
    install_wheels(tmp_path, tmp_path / "target")
    import a_package_in_a_wheel

    assert a_package_in_a_wheel.VALUE == 5
    assert run_python("-c", "import a_package_in_a_wheel").returncode == 0


def test_counts_of_a_step(benchmarks, monkeypatch):
    import on_cuda.count

    import llama.positions

    monkeypatch.setattr(llama.positions, "FIXED_STEPS_ON", llama.positions.FIXED_STEPS_ON)  # which counting changes
    sizes = {"dim": 256, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 512, "vocab_size": 1000}
    two, three = (on_cuda.count.count_step(sizes | {"n_layers": n}, context=127) for n in (2, 3))
    matrices = 2 * 256 * 256 + 2 * 128 * 256 + 3 * 256 * 512  # wq, wo; wk, wv; w1, w2, w3
    cache = 2 * 2 * 128 * 64  # keys and values of 2 heads, at 128 positions, of 64 features
    assert three.needed - two.needed == 2 * (matrices + 2 * 256 + cache)
    assert two.needed == 2 * (2 * (matrices + 2 * 256 + cache) + 256 + 1000 * 256)  # the embedding is not read whole
    assert three.kernels["mm"] - two.kernels["mm"] == 7
    assert three.kernels[on_cuda.count.ATTENTION] == three.blocks + 1 == 3
    assert three.n_kernels - two.n_kernels <= 30
    assert sum(three.moved.values()) > three.needed
    # With less bandwidth everything takes longer; a step can't be faster than its weights are read.
    for counts in (two, three):
        assert counts.floor(1e9) < counts.captured(1e9) <= counts.uncaptured(1e9)
        assert counts.captured(1e12) < counts.captured(1e9)
        assert counts.uncaptured(1e12) == counts.host()
    sampled = on_cuda.count.count_step(sizes, context=127, temperature=0.6)
    assert sampled.needed == three.needed
    assert sampled.kernels["sort"] == sampled.kernels["exponential_"] == 1
    # docs/cuda.md shows what `python benchmarks/cuda_acceptance.py count` prints.
    step = on_cuda.count.count_step(on_cuda.count.SIZES["8B"])
    row = f"| 8B | 1 | 128 | {step.n_kernels} | {step.n_views} | {step.needed / 1e9:.2f}, "
    assert row in (ROOT / "docs" / "cuda.md").read_text()
