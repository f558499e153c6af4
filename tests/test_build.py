"""`Llama.build`: its arguments, its errors, its memory, and that it changes no process-wide state."""

import logging
import threading
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load, run_python, same_weights, tiny_args, tiny_model, write_meta_checkpoint
from test_finetune_parallel import write_pairs

import llama.checkpoint.memory
from llama import Llama, Tokenizer
from llama.checkpoint import save_checkpoint
from llama.checkpoint.memory import cache_bytes, free_host_memory, weight_bytes
from llama.device import default_dtype
from llama.finetune import finetune

STATE = """
import logging, os, random, signal, sys, threading, warnings
import numpy, torch

def state(stage):
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "torch's random state": torch.get_rng_state().tolist() if stage != "built" else None,  # build seeds it
        "python's random state": random.getstate(),
        "numpy's random state": numpy.random.get_state()[1].tolist(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "backends": (torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32),
        "sdp": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()),
        "process group": torch.distributed.is_initialized(),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "streams": (sys.stdout, sys.stderr),
        "warnings": list(warnings.filters),
        "logging": (logging.root.level, list(logging.root.handlers), logging.getLogger("llama").level),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
        "hooks": (sys.excepthook, threading.excepthook, sys.displayhook),
        "recursion limit": sys.getrecursionlimit(),
        "import path": list(sys.path),
    }

def compare(before, after, stage):
    changed = [name for name in before if before[name] != after[name] and None not in (before[name], after[name])]
    assert not changed, (stage, changed)

start = state("start")
import llama
compare(start, state("imported"), "importing")
built = llama.Llama.build(sys.argv[1], None, 64, 2, seed=5)
compare(start, state("built"), "building")
assert torch.initial_seed() == 5
before = state("before")
built.generate([[5, 6], [7, 8, 9]], 8, temperature=0, logprobs=True, echo=True)
built.text_completion(["the user"], temperature=0, max_gen_len=3)
compare(before, state("generated"), "generating")
built.generate([[5, 6], [7, 8, 9]], 8)
after = state("sampled")
after["torch's random state"] = None  # sampling advances it
compare(before, after, "sampling")
print("unchanged")
"""


@pytest.mark.slow
def test_no_process_wide_state_is_changed(tiny_checkpoint, tmp_path):
    (tmp_path / "state.py").write_text(STATE)
    run = run_python(tmp_path / "state.py", tiny_checkpoint, PYTHONPATH=str(ROOT))
    assert run.stdout == "unchanged\n", run.stderr


@pytest.mark.slow
def test_the_test_of_process_wide_state_can_fail(tiny_checkpoint, tmp_path):
    (tmp_path / "state.py").write_text(STATE.replace("import llama\n", "import llama; torch.set_num_threads(3)\n"))
    run = run_python(tmp_path / "state.py", tiny_checkpoint, PYTHONPATH=str(ROOT))
    assert "'importing', ['threads']" in run.stderr


def test_the_callers_default_dtype_changes_nothing(tiny_checkpoint):
    first = Llama.build(tiny_checkpoint, None, 64, 2, dtype=torch.float32).generate([[5, 6], [7]], 9, 0, logprobs=True)
    torch.set_default_dtype(torch.float64)
    try:
        built = Llama.build(tiny_checkpoint, None, 64, 2, dtype=torch.float32)
        assert built.generate([[5, 6], [7]], 9, 0, logprobs=True) == first
        assert built.model.cache.keys.dtype == torch.float32
        assert built.model.freqs_cis.dtype == torch.complex64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_the_callers_default_device_changes_nothing(tiny_checkpoint, tmp_path, quantize):
    """Such as "meta", on which nothing can be computed."""

    def everything(folder):
        llama = Llama.build(tiny_checkpoint, None, 64, 4, device="cpu", dtype=torch.float32, quantize=quantize)
        prompts = [[5, 6], [7, 8, 9]]
        results = [
            llama.generate(prompts, 9, 0, logprobs=True, echo=True),
            llama.generate(prompts, 9, 0.8, seed=3, num_return_sequences=2, top_k=20),
            llama.generate(prompts, 9, 1.5, 1.0, seed=3),
            llama.generate(prompts, 9, num_beams=2),
            llama.generate(prompts[:1], 9, 0, reuse_cache=True),
            llama.generate(prompts, 0, logprobs=True, echo=True),
            [list(piece) for piece in llama.text_completion_stream(["the user"], 0, max_gen_len=9, stop="e")],
        ]
        folder.mkdir()
        for layout in ("meta", "hf"):
            save_checkpoint(folder / layout, llama.model, llama.tokenizer, layout=layout)
        llama = Llama.build(folder / "hf", None, 64, 4, dtype=torch.float32)
        return [*results, llama.generate(prompts, 9, 0)]

    expected = everything(tmp_path / "expected")
    with torch.device("meta"):
        actual = everything(tmp_path / "actual")
    assert actual == expected
    for layout in ("meta", "hf"):
        assert same_weights(load(tmp_path / "actual" / layout), load(tmp_path / "expected" / layout))


@pytest.mark.parametrize("train", ["all", "lora"])
def test_the_callers_default_device_does_not_matter_to_finetuning(tiny_checkpoint, tmp_path, train):
    data = write_pairs(tmp_path / "data.jsonl", 4)
    options = {"train": train, "epochs": 1, "batch_size": 2, "max_seq_len": 96, "dtype": "float32", "lr": 1e-2}
    finetune(data, tmp_path / "expected", tiny_checkpoint, **options)
    with torch.device("meta"):
        finetune(data, tmp_path / "actual", tiny_checkpoint, **options)
    assert same_weights(load(tmp_path / "actual"), load(tmp_path / "expected"))
    assert not same_weights(load(tmp_path / "actual"), load(tiny_checkpoint))


def test_the_same_seed_samples_the_same_tokens(tiny_checkpoint):
    def sample(seed):
        return Llama.build(tiny_checkpoint, None, 64, 2, seed=seed).generate([[5, 6]], 20, 1.5, 1.0)

    assert sample(3) == sample(3) != sample(4)


def test_build_leaves_the_random_state_as_seeded(tiny_checkpoint):
    """As in the reference, no random numbers are used between seeding and the first sampled token."""
    built = Llama.build(tiny_checkpoint, None, 64, 2, seed=11, dtype=torch.float32)
    first = built.generate([[5, 6]], 20, 1.5, 1.0)
    torch.manual_seed(11)
    assert built.generate([[5, 6]], 20, 1.5, 1.0) == first


def test_several_models_in_one_process(tiny_checkpoint, tmp_path, llama3_path):
    first = Llama.build(tiny_checkpoint, None, 64, 2, dtype=torch.float32)
    tokens = first.generate([[5, 6]], 10, 0)
    other = tiny_model(seed=9, n_layers=3, vocab_size=Tokenizer(llama3_path).n_words)
    folder = write_meta_checkpoint(tmp_path / "other", other, llama3_path)
    second = Llama.build(folder, llama3_path, 32, 4, dtype=torch.float32)
    assert second.generate([[5, 6]], 10, 0) != tokens
    assert first.generate([[5, 6]], 10, 0) == tokens
    assert second.model.n_layers == 3


def test_positional_arguments_of_the_reference(tiny_checkpoint):
    built = Llama.build(str(tiny_checkpoint), str(tiny_checkpoint / "tokenizer.model"), 64, 2, 1, 7)
    assert (built.model.params.max_seq_len, built.model.params.max_batch_size) == (64, 2)
    assert torch.initial_seed() == 7
    assert built.tokenizer.n_words == built.model.params.vocab_size
    assert len(built.text_completion(["the user"], 0.6, 0.9, 5, True, True)[0]["tokens"]) >= 6
    dialog = [{"role": "user", "content": "the user"}]
    assert set(built.chat_completion([dialog], 0.6, 0.9, 5, True)[0]) == {"generation", "tokens", "logprobs"}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 1), "max_seq_len=0 must be a whole number of at least 1"),
        ((-5, 1), "max_seq_len=-5 must be"),
        ((8193, 1), "max_seq_len=8193 is over this model's limit of 8192"),
        ((64, 0), "max_batch_size=0 must be a whole number of at least 1"),
        ((2.5, 1), r"max_seq_len=2\.5 must be"),
        ((64, True), "max_batch_size=True must be"),
        ((64, 1, "1"), "model_parallel_size='1' must be a whole number"),
        ((64, 1, 0), "model_parallel_size=0 must be a whole number of at least 1"),
    ],
)
def test_invalid_sizes_are_refused(tiny_checkpoint, sizes, message):
    with pytest.raises(ValueError, match=message) as error:
        Llama.build(tiny_checkpoint, None, *sizes)
    assert isinstance(error.value, AssertionError)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "dtype='float16' must be torch.bfloat16"),
        ({"dtype": torch.int8}, "dtype=torch.int8 must be torch.bfloat16"),
        ({"dtype": torch.complex64}, "dtype=torch.complex64 must be"),
        ({"device": "meta"}, "device='meta' can't be used here: only cuda, cpu and mps can"),
    ],
)
def test_invalid_dtypes_and_devices_are_refused(tiny_checkpoint, options, message):
    with pytest.raises(ValueError, match=message) as error:
        Llama.build(tiny_checkpoint, None, 64, 1, **options)
    assert isinstance(error.value, AssertionError)


def test_one_token_of_context(tiny_checkpoint):
    built = Llama.build(tiny_checkpoint, None, 1, 1)
    assert built.generate([[5]], 4) == ([[]], None)
    assert built.generate([[5]], 0, logprobs=True, echo=True) == ([[5]], [[0.0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype(tiny_checkpoint, dtype):
    built = Llama.build(tiny_checkpoint, None, 64, 2, dtype=dtype)
    assert {weight.dtype for weight in built.model.parameters()} == {dtype}
    assert built.model.cache.keys.dtype == dtype
    assert len(built.generate([[5, 6], [7]], 4, 0)[0]) == 2


def test_default_dtype(tiny_checkpoint, monkeypatch):
    built = Llama.build(tiny_checkpoint, None, 64, 2)
    assert built.model.norm.weight.dtype == default_dtype(torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False, "avx2": True}, raising=False)
    assert default_dtype(torch.device("cpu")) == torch.float32
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert default_dtype(torch.device("cpu")) == torch.bfloat16


def test_computed_bytes_are_those_of_the_model():
    for changes in ({}, {"tie_embeddings": True}, {"n_kv_heads": 1, "head_dim": 48}):
        model = tiny_model(**changes).to(torch.bfloat16)
        args = model.params
        assert weight_bytes(args, torch.bfloat16, 1) == sum(weight.nbytes for weight in model.parameters())
        cache = model.setup_cache()
        assert cache_bytes(args, torch.bfloat16, 1) == (cache.keys.numel() + cache.values.numel()) * 2
    args = tiny_args(n_kv_heads=2)
    assert cache_bytes(args, torch.bfloat16, 4) == cache_bytes(args, torch.bfloat16, 2)  # a kv head isn't split
    assert weight_bytes(args, torch.bfloat16, 4) > weight_bytes(args, torch.bfloat16, 1) / 4


def test_the_log_says_how_much_memory_it_takes(tiny_checkpoint, caplog):
    with caplog.at_level(logging.INFO, "llama"):
        Llama.build(tiny_checkpoint, None, 4096, 2, dtype=torch.float32)
    assert (
        "0.00 GB of weights and 0.01 GB of KV cache (max_batch_size=2 x max_seq_len=4096) in float32 on cpu"
        in caplog.text
    )
    assert f"loaded {tiny_checkpoint} in" in caplog.text


@pytest.mark.skipif(free_host_memory() is None, reason="free memory is known only on Linux")
def test_a_cache_larger_than_memory_is_refused_before_it_is_allocated(tiny_checkpoint):
    with pytest.raises(
        MemoryError, match=r"not enough memory for .* GB of KV cache \(max_batch_size=100000000 x"
    ) as error:
        Llama.build(tiny_checkpoint, None, 8192, 10**8, dtype=torch.float32)
    assert "build with quantize='int8' or 'int4', a 16-bit dtype, a lower max_batch_size or" in str(error.value)
    assert "GB are free)" in str(error.value)  # so it was checked beforehand


def test_running_out_of_memory_says_what_to_lower(tiny_checkpoint, monkeypatch):
    """Where the free memory isn't known, the error is torch's."""
    monkeypatch.setattr(llama.checkpoint.memory, "free_host_memory", lambda: None)
    with pytest.raises(MemoryError, match=r"max_batch_size=100000000 x .*lower max_batch_size or max_seq_len"):
        Llama.build(tiny_checkpoint, None, 8192, 10**8, dtype=torch.bfloat16)


def test_weights_larger_than_memory_only_get_a_warning(tiny_checkpoint, monkeypatch, caplog):
    monkeypatch.setattr(llama.checkpoint.memory, "free_host_memory", lambda: 10**6)
    Llama.build(tiny_checkpoint, None, 64, 2, dtype=torch.float32)
    assert "only 0.00 GB of memory are free; 0.00 GB of weights" in caplog.text


def test_a_progress_bar_only_on_a_terminal(tiny_checkpoint, capfd):
    Llama.build(tiny_checkpoint, None, 64, 2)
    out, err = capfd.readouterr()
    assert "loading" not in out + err


def test_the_public_names():
    import llama.generation
    import llama.model
    import llama.tokenizer

    public = {
        llama: "Llama ModelArgs Transformer Tokenizer Dialog Message Role ChatFormat sample_top_p "
        "CompletionPrediction ChatPrediction",
        llama.generation: "Llama CompletionPrediction ChatPrediction sample_top_p Dialog Message Role",
        llama.model: "ModelArgs RMSNorm precompute_freqs_cis reshape_for_broadcast apply_rotary_emb repeat_kv "
        "Attention FeedForward TransformerBlock Transformer",
        llama.tokenizer: "Tokenizer ChatFormat Dialog Message Role",
    }
    for module, names in public.items():
        for name in names.split():
            assert hasattr(module, name), (module.__name__, name)


@pytest.mark.slow
def test_checks_survive_python_O(tmp_path):
    script = tmp_path / "optimised.py"
    script.write_text(
        "from llama import Llama\n"
        "try:\n    Llama.build('/nowhere', None, 8, 1)\n"
        "except AssertionError as error:\n    print(type(error).__name__)\n"
    )
    assert run_python("-O", script, PYTHONPATH=str(ROOT)).stdout == "MissingFileError\n"


def test_building_in_a_thread(tiny_checkpoint):
    """As a server may."""
    built = []
    thread = threading.Thread(target=lambda: built.append(Llama.build(tiny_checkpoint, None, 32, 1)))
    thread.start()
    thread.join()
    assert built[0].generate([[5]], 2, 0)[0] == Llama.build(tiny_checkpoint, None, 32, 1).generate([[5]], 2, 0)[0]


def test_home_and_relative_paths(tiny_checkpoint, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tiny_checkpoint.parent))
    monkeypatch.setenv("USERPROFILE", str(tiny_checkpoint.parent))
    assert Llama.build(f"~/{tiny_checkpoint.name}", None, 32, 1)
    monkeypatch.chdir(tiny_checkpoint.parent)
    assert Llama.build(tiny_checkpoint.name, Path(tiny_checkpoint.name) / "tokenizer.model", 32, 1)
