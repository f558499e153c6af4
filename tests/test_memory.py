"""The memory that quantized models take, and what is said when there isn't enough. (test_real_shapes.py computes the
footprints of published models, test_build.py those of whole models in memory.)"""

import json
import logging

import pytest
import torch
from conftest import Ranks, tiny_args, tiny_model, write_meta_checkpoint
from test_real_shapes import MODELS

import llama.checkpoint.memory
from llama import ModelArgs
from llama.checkpoint import load_model, open_checkpoint
from llama.checkpoint.memory import check_memory, explain_out_of_memory, weight_bytes
from llama.memory import footprint
from llama.quantized import QUANTIZATIONS

CPU = torch.device("cpu")
SIZES = {
    "plain": {},
    "tied": {"tie_embeddings": True},
    "rows that are no multiple of the groups": {"ffn_dim": 152, "head_dim": 36, "dim": 120},
    "more processes than kv heads": {"n_kv_heads": 1},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("quantize", QUANTIZATIONS)
def test_computed_bytes_are_those_of_the_model(tmp_path, llama3_path, monkeypatch, quantize, sizes, size, dtype):
    whole = tiny_model(vocab_size=524, **sizes)
    checkpoint = open_checkpoint(write_meta_checkpoint(tmp_path, whole, llama3_path, **sizes))

    def loaded_bytes() -> int:
        model = load_model(checkpoint, whole.params, device=CPU, dtype=dtype, quantize=quantize)
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}.values())

    expected = weight_bytes(whole.params, dtype, size, quantize)
    assert expected < 0.9 * weight_bytes(whole.params, dtype, size)
    assert Ranks(monkeypatch, size).run(loaded_bytes) == [expected] * size


def test_footprints_of_published_shapes(tmp_path):
    def weights(name: str, quantize: str | None, **options) -> int:
        (tmp_path / "params.json").write_text(json.dumps(MODELS[name][0]))
        sizes = {"max_seq_len": 2048, "max_batch_size": 1, "dtype": torch.bfloat16} | options
        return footprint(tmp_path, quantize=quantize, **sizes).weight_bytes

    name = "Llama 3 8B"
    dim, vocab_size, matrices = 4096, 128256, 6_979_321_856  # parameters of the layers' matrices
    exact = 2 * (vocab_size * dim + 65 * dim)  # embedding and norms
    rows = vocab_size + 32 * (4096 + 1024 + 1024 + 4096 + 14336 + 4096 + 14336)
    assert weights(name, "int8") == matrices + vocab_size * dim + 2 * rows + exact
    assert weights(name, "int4") == (matrices + vocab_size * dim) * 5 // 8 + exact
    assert weights(name, "int4") <= 0.36 * weights(name, None)
    half = weights(name, "int4", model_parallel_size=2)
    assert half == (weights(name, "int4") + 2 * 65 * dim) // 2  # the norms aren't split


def test_footprints_with_tied_embeddings():
    args = ModelArgs(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, vocab_size=128256, ffn_dim=8192)
    args.tie_embeddings = True
    whole = weight_bytes(args, torch.bfloat16, 1)
    assert whole == 2 * 1_235_814_400  # Llama 3.2 1B
    assert weight_bytes(args, torch.bfloat16, 1, "int8") < 0.51 * whole
    assert weight_bytes(args, torch.bfloat16, 1, "int4") < 0.36 * whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int5"}, r"quantize='int5' must be one of \['int8', 'int4'\]"),
        ({"quantize": "int4", "dtype": torch.float64}, "float64"),
    ],
)
def test_invalid_arguments_of_footprint(tmp_path, options, message):
    (tmp_path / "params.json").write_text(json.dumps(MODELS["Llama 3 8B"][0]))
    with pytest.raises(ValueError, match=message):
        footprint(tmp_path, **{"max_seq_len": 16, "max_batch_size": 1, "dtype": torch.float16} | options)


@pytest.mark.parametrize(
    ("dtype", "quantize", "advice"),
    [
        (torch.float32, None, "quantize='int8' or 'int4', a 16-bit dtype, a lower max_batch_size or max_seq_len, or"),
        (torch.bfloat16, None, "quantize='int8' or 'int4', a lower max_batch_size or max_seq_len, or over"),
        (torch.float32, "int8", "quantize='int4', a 16-bit dtype, a lower max_batch_size or max_seq_len, or over"),
        (torch.float16, "int4", "a lower max_batch_size or max_seq_len, or over more processes"),
    ],
)
def test_running_out_of_memory_says_what_to_change(dtype, quantize, advice):
    with (
        pytest.raises(MemoryError, match=f": build with {advice}") as error,
        explain_out_of_memory(tiny_args(), CPU, dtype, quantize),
    ):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
    assert (f"(quantize={quantize!r})" in str(error.value)) == (quantize is not None)


def test_quantized_weights_must_fit_into_the_free_memory(monkeypatch, caplog):
    """They are no mapped files. Those that stay exact may be."""
    args = tiny_args(vocab_size=50_000, max_seq_len=16)
    exact = 2 * 50_000 * 128 + 2 * 5 * 128  # embedding and norms
    quantized = weight_bytes(args, torch.bfloat16, 1, "int4") - exact
    cache = 2 * 2 * 4 * 16 * 2 * 32 * 2

    def check(free: int, quantize: str | None) -> str:
        monkeypatch.setattr(llama.checkpoint.memory, "free_host_memory", lambda: free)
        caplog.clear()
        check_memory(args, CPU, torch.bfloat16, quantize)
        return caplog.text

    with caplog.at_level(logging.INFO, "llama"):
        assert "free" not in check(quantized + cache + exact, "int4")
        assert "GB of memory are free; 0.02 GB of weights (quantize='int4') and" in check(quantized + cache, "int4")
        with pytest.raises(MemoryError, match=r"build with a lower .* processes \(0\.00 GB are free\)"):
            check(quantized + cache - 1, "int4")
        assert "GB of memory are free" in check(cache, None)  # all weights may be mapped
        with pytest.raises(MemoryError, match=r"build with quantize='int8' or 'int4'"):
            check(cache - 1, None)


def test_every_process_of_the_machine_needs_its_memory(monkeypatch):
    args = tiny_args(max_seq_len=16)
    monkeypatch.setattr(llama.checkpoint.memory, "free_host_memory", lambda: weight_bytes(args, torch.bfloat16, 1))
    check_memory(args, CPU, torch.bfloat16, "int8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(MemoryError, match="quantize='int4'"):
        check_memory(args, CPU, torch.bfloat16, "int8")
