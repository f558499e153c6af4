"""The memory that quantized models take, and what is said when there isn't enough, to build and in a call.

test_real_shapes.py computes the footprints of published models, test_build.py those of whole models in memory.
"""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from conftest import Ranks, ScriptedTokenizer, tiny_args, tiny_model, write_meta_checkpoint
from test_real_shapes import MODELS

import llama.checkpoint.memory
import llama.generation
from llama import Llama, ModelArgs
from llama.checkpoint import load_model, open_checkpoint
from llama.checkpoint.memory import cache_bytes, check_memory, explain_out_of_memory, free_memory, weight_bytes
from llama.memory import footprint
from llama.model import TransformerBlock
from llama.out_of_memory import is_out_of_memory, out_of_memory_explained
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
    "text",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB",
        "CUDA error: out of memory",
        "CUDA driver error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'",
        "NCCL error: unhandled cuda error\nLast error:\nFailed to CUDA calloc 8388608 bytes",
        "MPS backend out of memory",
        "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.",
        "[Errno 12] Cannot allocate memory",
    ],
)
def test_errors_that_mean_that_memory_has_run_out(text):
    error = RuntimeError(text)
    assert is_out_of_memory(error)
    with pytest.raises(MemoryError, match="less of it") as raised, out_of_memory_explained("less of it"):
        raise error
    assert raised.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        ValueError("no memory of it"),
    ],
)
def test_other_errors_stay_as_they_are(error):
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)) as raised, out_of_memory_explained("less of it"):
        raise error
    assert raised.value is error


def test_an_error_of_this_kind_is_recognised_as_torch_raises_it():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8, device="cpu")
    assert is_out_of_memory(raised.value)


class OutOfMemory(TransformerBlock):
    """A layer that runs out of memory in calls of as many tokens a row as `seq` says."""

    seq = 0

    def forward(self, x, *rest):
        if x.shape[1] == self.seq:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().forward(x, *rest)


ROWS = r", with 2 rows each \(num_return_sequences or num_beams\): give fewer prompts at a time, fewer rows each or "
ADVICE = (
    "shorter prompts; or build with quantize='int8' or 'int4', over more processes, or with a lower max_batch_size or "
    "max_seq_len, for a smaller KV cache"
)


@pytest.mark.parametrize("seq", [5, 1])
@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({}, ": give fewer prompts at a time or " + ADVICE),
        ({"num_return_sequences": 2}, ROWS + ADVICE),
        ({"num_beams": 2}, ROWS + ADVICE),
    ],
)
def test_running_out_of_memory_in_a_call(seq, options, advice):
    llama = Llama(tiny_model(), ScriptedTokenizer())
    prompts = [[5, 6, 7, 8, 9], [10, 11]]
    expected = llama.generate(prompts, 4, 0)
    llama.model.layers[1].__class__ = OutOfMemory
    llama.model.layers[1].seq = seq
    n_rows = len(prompts) * (2 if options else 1)
    work = "prefill" if seq == 5 else rf"decode the next token of {n_rows} row\(s\):"
    message = rf"^not enough memory to {work} 2 prompt\(s\) of up to 5 tokens{advice}$"
    calls = [llama.generate] if "num_beams" in options else [llama.generate, collected(llama.generate_stream)]
    for call in calls:
        with pytest.raises(MemoryError, match=message) as raised:
            call(prompts, 4, **options)
        assert isinstance(raised.value.__cause__, torch.OutOfMemoryError)
    llama.model.layers[1].seq = 0
    assert llama.generate(prompts, 4, 0) == expected  # nothing of the failed calls is left


def collected(stream):
    return lambda *args, **options: list(stream(*args, **options))


def test_a_processor_that_fails_otherwise_is_not_explained():
    def fail(input_ids, scores):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match=r"^something else$"):
        Llama(tiny_model(), ScriptedTokenizer()).generate([[5]], 4, logits_processor=fail)


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


@pytest.fixture
def gpu(monkeypatch):
    """A GPU's memory in bytes, as torch reports it."""
    memory = {"free": 0, "reserved": 0, "allocated": 0}
    properties = SimpleNamespace(is_integrated=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (memory["free"], 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: memory["reserved"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: memory["allocated"])
    return SimpleNamespace(memory=memory, properties=properties)


@pytest.mark.parametrize("quantize", [None, "int4"])
def test_weights_and_cache_must_fit_into_a_gpu(monkeypatch, gpu, quantize):
    """Also those in the dtype: nothing is mapped there."""
    monkeypatch.setattr(llama.checkpoint.memory, "free_host_memory", lambda: 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")  # each has a GPU of its own
    args, cuda = tiny_args(vocab_size=50_000, max_seq_len=16), torch.device("cuda", 1)
    needed = weight_bytes(args, torch.bfloat16, 1, quantize) + cache_bytes(args, torch.bfloat16, 1)
    gpu.memory["free"] = needed
    check_memory(args, cuda, torch.bfloat16, quantize)
    gpu.memory["free"] = needed - 1
    with pytest.raises(MemoryError, match=r"in bfloat16 on cuda:1: build with .* processes \(0\.0. GB are free\)"):
        check_memory(args, cuda, torch.bfloat16, quantize)
    gpu.memory |= {"reserved": 10, "allocated": 9}  # torch would use the byte between them
    check_memory(args, cuda, torch.bfloat16, quantize)


def test_a_gpu_without_memory_of_its_own_uses_the_hosts(monkeypatch, gpu):
    gpu.properties.is_integrated = 1  # and what it calls free leaves out what holds cached files
    for free in (10**9, None):
        monkeypatch.setattr(llama.checkpoint.memory, "free_host_memory", lambda free=free: free)
        assert free_memory(torch.device("cuda", 0)) == free
        check_memory(tiny_args(), torch.device("cuda", 0), torch.bfloat16)
    monkeypatch.setattr(llama.checkpoint.memory, "free_host_memory", lambda: 0)
    with pytest.raises(MemoryError):
        check_memory(tiny_args(), torch.device("cuda", 0), torch.bfloat16)


def test_a_gpu_is_checked_before_anything_is_loaded(monkeypatch, gpu, tiny_checkpoint):
    monkeypatch.setattr(llama.generation.distributed, "setup", lambda device, size: torch.device("cuda", 0))
    monkeypatch.setattr(llama.generation, "load_model", None)  # which is not reached
    with pytest.raises(MemoryError, match="build with quantize='int8' or 'int4', a lower max_batch_size"):
        Llama.build(tiny_checkpoint, None, 32, 1, dtype=torch.bfloat16)


def test_every_process_of_the_machine_needs_its_memory(monkeypatch):
    args = tiny_args(max_seq_len=16)
    monkeypatch.setattr(llama.checkpoint.memory, "free_host_memory", lambda: weight_bytes(args, torch.bfloat16, 1))
    check_memory(args, CPU, torch.bfloat16, "int8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(MemoryError, match="quantize='int4'"):
        check_memory(args, CPU, torch.bfloat16, "int8")
