"""The comparison with other libraries: what it computes from its measurements, and a small one from end to end."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny_model
from run_command import Runner

from llama.checkpoint import save_checkpoint

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import compare

    return compare


def result(**changes):
    """What `measure` returns of three rounds in which llama.cpp is twice, three times and four times as fast."""
    decode = {"ours": [0.2, 0.3, 0.8], "ours compiled": [0.1, 0.1, 0.2], "llama.cpp": [0.1, 0.1, 0.2]}
    return {
        "model": "smollm2",
        "group": "float32",
        "rounds": 3,
        "threads": 2,
        "processor": "a processor",
        "sizes": {"weights": 10**9, "cache": 0, "matrix numbers": 10**9},
        "bandwidth": 1e10,
        "arithmetic": 1e12,
        "values": {
            "load": {name: [1.0, 1.0, 1.0] for name in decode},
            "load + 2 tokens, nothing compiled before": {"ours compiled": [30.0]},
            "memory": {name: [5e8, 5e8, 5e8] for name in decode},
            "decode, batch 8, context 512": decode,
        },
    } | changes


def cells(lines, case):
    (line,) = (line for line in lines if line.startswith(f"| {case} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_ratios_are_taken_within_each_round(compare):
    case = "decode, batch 8, context 512"
    assert compare.ratios(result(), case, "ours", "llama.cpp") == pytest.approx([2, 3, 4])
    assert compare.ratios(result(), case, "llama.cpp", "ours") == pytest.approx([1 / 4, 1 / 3, 1 / 2])


def test_a_table_says_what_each_took_and_in_multiples_of_one(compare):
    lines = list(compare.table(result(), "ours compiled"))
    assert lines[2].split(" | ")[1:] == ["ours", "ours compiled", "llama.cpp", "ours, of the machine |"]
    decode = cells(lines, "decode, batch 8, context 512")
    # 8 rows in 0.3 s, which read 10^9 bytes at a third of the 10^10 bytes a second of the machine
    assert decode == ["26.7 tok/s (3.00x, 2.00-4.00)", "80.0 tok/s", "80.0 tok/s (1.00x, 1.00-1.00)", "33% of memory"]
    assert cells(lines, "memory")[2] == "500 MB (1.00x, 1.00-1.00)"
    assert cells(lines, "load + 2 tokens, nothing compiled before") == ["", "30.00 s", "", ""]


def test_tables_compare_with_ours_of_the_same_bits(compare):
    assert compare.ours(compare.GROUPS["float32"]) == ["ours", "ours compiled"]
    assert compare.ours(compare.GROUPS["int4"]) == ["ours int4", "ours int4 compiled"]


def test_a_picture_of_several_groups(compare, tmp_path):
    pytest.importorskip("matplotlib")
    compare.plot([result(), result(group="bfloat16"), result(model="1b")], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--models", "2b", "error: models=2b must be some of smollm2,1b\n"),
        ("--rounds", "0", "error: rounds=0 must be a whole number of at least 1\n"),
        ("--peers", "transformers", "error: peers=transformers must begin with ours, which the others are compared "),
    ],
)
def test_mistakes_in_its_options(compare, monkeypatch, capsys, tmp_path, option, value, message):
    result = Runner(monkeypatch, capsys).run(compare.main, "--out", tmp_path / "out", option, value)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(message)
    assert not (tmp_path / "out").exists()


def test_it_names_the_processor(compare):
    name = compare.processor()
    assert torch.backends.cpu.get_cpu_capability() in name
    assert ("avx512f" in name) == (" avx512f " in Path("/proc/cpuinfo").read_text())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiles")
def test_measures_ours_from_end_to_end(compare, tmp_path, monkeypatch):
    """Eager and compiled, each in its process; they compute the same tokens, or it raises."""

    def write_tiny_weights(model, dtype, layouts, folder):
        assert layouts == {"meta"}
        save_checkpoint(folder / "meta", tiny_model().to(dtype))
        return {"weights": 1, "cache": 1, "matrix numbers": 1}

    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    class SmallWorker(compare.Worker):
        """All caches are of one size, so that the second process finds what the first one has compiled."""

        def __init__(self, contestant, folder, dtype, threads, max_batch_size, max_seq_len):
            super().__init__(contestant, folder, dtype, threads, 8, 192)

    monkeypatch.setattr(compare, "Worker", SmallWorker)
    # Shared with the other tests: what the compiler finds out about the processor, and its precompiled headers.
    Path(default_cache_dir()).mkdir(parents=True, exist_ok=True)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "inductor").symlink_to(default_cache_dir())
    monkeypatch.setattr(compare, "write_weights", write_tiny_weights)
    monkeypatch.setattr(compare, "CASES", {case: compare.CASES[case] for case in ("decode, batch 8, context 128",)})
    contestants = {
        "ours": compare.Contestant("ours", "meta"),
        "ours compiled": compare.Contestant("ours", "meta", compile=True),
    }
    measured = compare.measure("smollm2", "float32", contestants, rounds=1, threads=1, folder=tmp_path)
    values = measured["values"]
    assert values["decode, batch 8, context 128"].keys() == contestants.keys()
    assert values["load + 2 tokens"]["ours"] > values["load + 1 token"]["ours"] > values["load"]["ours"]
    assert values[compare.FIRST_COMPILATION].keys() == {"ours compiled"}
    assert list((tmp_path / "cache").rglob("*.pt2"))  # it began with nothing, and kept this for the next process
    assert list(compare.table(measured, "ours"))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_ours_reads_the_files_that_llama_cpp_quantizes(compare, tmp_path, kind):
    pytest.importorskip("llama_cpp")
    import peers
    import weights

    model = tiny_model(dim=256)
    weights.write_gguf(tmp_path / "gguf", model)
    weights.quantize_gguf(tmp_path / "gguf", kind, tmp_path / kind)
    quantized = peers.Ours(tmp_path / kind, torch.float32, 1, 96).model
    for name, weight in model.state_dict().items():
        error = (quantized.state_dict()[name] - weight).abs().mean() / weight.abs().mean()
        assert error < (0.01 if kind == "Q8_0" else 0.15), name
