"""Saving models, and converting between layouts: the result loads, here and in transformers."""

import contextlib
import errno
import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    Ranks,
    examples,
    hugging_face_logits,
    load,
    run_python,
    same_weights,
    tiny_args,
    tiny_model,
    write_gguf,
    write_llama2_tokenizer,
    write_llama3_tokenizer,
    write_meta_checkpoint,
    write_tokenizer_json,
)
from forked import fork_python
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from test_finetune_parallel import write_pairs
from test_hugging_face import MODELS, random_hugging_face_model
from test_lora_adapter import write_adapter
from torch._subclasses.fake_tensor import FakeTensorMode

from llama import Llama, ModelArgs, Tokenizer, Transformer
from llama.checkpoint import load_model, open_checkpoint, parameter_shapes, save_checkpoint
from llama.checkpoint.disk_space import full_disk_explained
from llama.checkpoint.hugging_face import split_evenly, to_config_json
from llama.checkpoint.load import set_weight
from llama.checkpoint.meta import add_implied_params, to_params_json
from llama.checkpoint.save import gather_parameters
from llama.convert import convert
from llama.default_model import default_checkpoint
from llama.finetune import finetune
from llama.finetune.run_folder import RunFolder
from llama.model_args import feed_forward_size
from llama.quantized import QUANTIZATIONS, QuantizedWeight

try:
    import resource
except ImportError:  # on Windows
    resource = None

VOCAB = 524
TOKENS = torch.randint(VOCAB, (2, 80), generator=torch.Generator().manual_seed(3))

SIZES = {
    "plain": {},
    "tied": {"tie_embeddings": True},
    "scaled rope": {"use_scaled_rope": True},
    "scaled rope, every parameter": {
        "use_scaled_rope": True,
        "rope_scaling_factor": 32.0,
        "rope_low_freq_factor": 2.0,
        "rope_high_freq_factor": 3.0,
        "rope_original_max_seq_len": 64,
    },
    "Llama 2's rotary base": {"rope_theta": 10000.0, "n_kv_heads": None},
    "linear rope scaling": {"rope_divisors": (4.0,)},
    "odd sizes": {"ffn_dim": 151, "head_dim": 34, "n_kv_heads": 1, "n_heads": 3, "dim": 120},
    "a narrow feed-forward": {"ffn_dim": 64},
    "a wide feed-forward": {"ffn_dim": 1000},
}


@pytest.mark.parametrize("layout", ["meta", "hf"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_written_and_read_again(tmp_path, llama3, layout, sizes):
    model = tiny_model(vocab_size=VOCAB, **sizes)
    save_checkpoint(tmp_path / "saved", model, llama3, layout=layout)
    loaded = load(tmp_path / "saved")
    assert same_weights(loaded, model)
    assert torch.equal(loaded.freqs_cis, model.freqs_cis)
    for name in ("kv_heads", "head_size", "ffn_size", "norm_eps", "rope_theta", "tie_embeddings"):
        assert getattr(loaded.params, name) == getattr(model.params, name), name
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS), model(TOKENS))
    if layout == "hf":
        with torch.no_grad():
            assert torch.allclose(hugging_face_logits(tmp_path / "saved", TOKENS), model(TOKENS), atol=1e-4)


REFERENCE_KEYS = set(list(asdict(ModelArgs()))[:9])


def test_params_json_has_the_references_keys_where_they_suffice():
    """So that the reference loads it; Llama 2's has neither rope_theta nor use_scaled_rope."""
    assert set(to_params_json(ModelArgs(vocab_size=32000, rope_theta=10000.0))) <= REFERENCE_KEYS - {"rope_theta"}
    assert (
        set(to_params_json(ModelArgs(vocab_size=128256, n_kv_heads=8, ffn_dim=14336, head_dim=128))) <= REFERENCE_KEYS
    )
    scaled = ModelArgs(vocab_size=128256, use_scaled_rope=True, rope_scaling_factor=8.0)
    assert set(to_params_json(scaled)) <= REFERENCE_KEYS | {"use_scaled_rope"}
    small = ModelArgs(vocab_size=128256, use_scaled_rope=True, rope_scaling_factor=32.0, dim=2048, n_layers=16)
    assert set(to_params_json(small)) <= REFERENCE_KEYS | {"use_scaled_rope"}
    assert to_params_json(ModelArgs(**asdict(small) | {"rope_scaling_factor": 8.0}))["rope_scaling_factor"] == 8.0


@given(st.integers(1, 20000), st.integers(2, 100000))
@examples(500)
def test_any_feed_forward_width_is_expressed_in_the_references_keys(dim, width):
    params = to_params_json(ModelArgs(dim=dim, n_heads=1, ffn_dim=width, vocab_size=10))
    assert "ffn_dim" not in params
    assert feed_forward_size(4 * dim, params["multiple_of"], params["ffn_dim_multiplier"]) == width


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_files_of_metas_layout_are_those_of_as_many_processes(tmp_path, llama3, shards):
    """With 4 there are more files than kv heads."""
    model = tiny_model(vocab_size=VOCAB)
    save_checkpoint(tmp_path / "saved", model, llama3, shards=shards)
    expected = write_meta_checkpoint(tmp_path / "expected", model, write_llama3_tokenizer(tmp_path / "ranks"), shards)
    files = sorted(path.name for path in (tmp_path / "saved").iterdir())
    assert files == sorted(path.name for path in expected.iterdir())
    for path in expected.glob("*.pth"):
        ours, theirs = torch.load(tmp_path / "saved" / path.name), torch.load(path)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (tmp_path / "saved" / "tokenizer.model").read_bytes() == (expected / "tokenizer.model").read_bytes()


def test_metas_layout_holds_a_tied_embedding_twice(tmp_path, llama3):
    model = tiny_model(vocab_size=VOCAB, tie_embeddings=True)
    save_checkpoint(tmp_path / "saved", model, llama3, shards=2)
    tensors = torch.load(tmp_path / "saved" / "consolidated.01.pth")
    assert torch.equal(tensors["output.weight"], tensors["tok_embeddings.weight"])
    assert "tie_embeddings" not in json.loads((tmp_path / "saved" / "params.json").read_text())
    loaded = load(tmp_path / "saved")
    assert loaded.output.weight is loaded.tok_embeddings.weight


@pytest.mark.parametrize("shards", [1, 2, 5, 20])
def test_files_of_hugging_faces_layout(tmp_path, llama3, shards):
    model = tiny_model(vocab_size=VOCAB)
    save_checkpoint(tmp_path / "saved", model, llama3, layout="hf", shards=shards)
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) == shards
    assert same_weights(load(tmp_path / "saved"), model)
    with torch.no_grad():
        assert torch.allclose(hugging_face_logits(tmp_path / "saved", TOKENS), model(TOKENS), atol=1e-4)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.integers(1, 40))
@examples(300)
def test_tensors_are_split_evenly_over_files(sizes, count):
    size_of = {str(i): size for i, size in enumerate(sizes)}
    if count > len(sizes):
        with pytest.raises(ValueError, match=f"shards={count}: this model has only {len(sizes)} tensors"):
            split_evenly(size_of, count)
        return
    shards = split_evenly(size_of, count)
    assert len(shards) == count
    assert all(shards)
    assert [name for shard in shards for name in shard] == list(size_of)
    assert max(sum(size_of[name] for name in shard) for shard in shards) <= sum(sizes) / count + 2 * max(sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_is_kept(tmp_path, llama3, dtype):
    model = tiny_model(vocab_size=VOCAB).to(dtype)
    for layout in ("meta", "hf"):
        save_checkpoint(tmp_path / layout, model, llama3, layout=layout)
        assert open_checkpoint(tmp_path / layout).dtype() == dtype
        assert same_weights(load(tmp_path / layout, dtype), model)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == str(dtype)[6:]


def load_quantized(folder, quantize, dtype=torch.float32):
    checkpoint = open_checkpoint(folder)
    args = checkpoint.settings.model_args(checkpoint.tokenizer().n_words, max_seq_len=96, max_batch_size=2)
    return load_model(checkpoint, args, device=torch.device("cpu"), dtype=dtype, quantize=quantize)


@pytest.mark.parametrize("layout", ["meta", "hf"])
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("quantize", QUANTIZATIONS)
def test_a_quantized_model_is_written_with_its_rounded_weights(
    tmp_path, llama3, llama3_path, caplog, quantize, tied, layout
):
    exact = tiny_model(vocab_size=VOCAB, tie_embeddings=tied)
    folder = write_meta_checkpoint(tmp_path / "exact", exact, llama3_path, tie_embeddings=tied)
    model = load_quantized(folder, quantize)
    save_checkpoint(tmp_path / "saved", model, llama3, layout=layout)
    assert "the weights of this model are rounded to 8 or 4 bits, and so are those that are written, as float32" in (
        caplog.text
    )
    loaded = load(tmp_path / "saved")
    n_quantized = 0
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedWeight):
            assert torch.equal(loaded.get_parameter(name), module.dequantize())
            n_quantized += 1
    assert n_quantized == 2 * 7 + 1 + tied
    with torch.no_grad():
        assert torch.allclose(loaded(TOKENS), model(TOKENS), atol=1e-4)
        assert not torch.allclose(loaded(TOKENS), exact(TOKENS), atol=0.1)


def test_a_quantized_model_is_written_in_the_dtype_of_its_activations(tmp_path, llama3, tiny_checkpoint):
    save_checkpoint(tmp_path / "saved", load_quantized(tiny_checkpoint, "int4", torch.bfloat16), llama3)
    assert open_checkpoint(tmp_path / "saved").dtype() == torch.bfloat16


@pytest.mark.parametrize("layout", ["meta", "hf"])
def test_a_quantized_model_is_saved_by_several_processes(tmp_path, monkeypatch, llama3, tiny_checkpoint, layout):
    save_checkpoint(tmp_path / "by one", load_quantized(tiny_checkpoint, "int4"), llama3, layout=layout)
    with monkeypatch.context() as patch:
        Ranks(patch, 2).run(
            lambda: save_checkpoint(tmp_path / "by two", load_quantized(tiny_checkpoint, "int4"), llama3, layout=layout)
        )
    assert same_weights(load(tmp_path / "by two"), load(tmp_path / "by one"))


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_transformers_models_through_metas_layout_and_back(tmp_path, changes):
    random_hugging_face_model(**changes).save_pretrained(tmp_path / "theirs")
    write_tokenizer_json(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "meta")
    convert(tmp_path / "meta", tmp_path / "back", "hf", shards=2)
    expected = hugging_face_logits(tmp_path / "theirs", TOKENS)
    assert torch.equal(hugging_face_logits(tmp_path / "back", TOKENS), expected)
    with torch.no_grad():
        assert torch.allclose(load(tmp_path / "meta")(TOKENS), expected, atol=1e-4)
    assert Tokenizer(tmp_path / "back" / "tokenizer.json").add_bos


@pytest.mark.parametrize(("shards", "size"), [(1, 4), (3, 2), (8, 6), (2, 8)])
@pytest.mark.parametrize("layout", ["meta", "hf"])
def test_saved_by_any_number_of_processes(tmp_path, monkeypatch, llama3, layout, shards, size):
    model = tiny_model(dim=192, n_heads=24, n_kv_heads=2 if shards != 3 else 24, vocab_size=528, multiple_of=48)
    ranks_path = write_llama3_tokenizer(tmp_path / "ranks", (b"is", b"it", b"or", b"at"))
    folder = write_meta_checkpoint(tmp_path / "one", model, ranks_path)
    with monkeypatch.context() as patch:
        ranks = Ranks(patch, size)
        ranks.run(
            lambda: save_checkpoint(
                tmp_path / "saved", load(folder), Tokenizer(ranks_path), layout=layout, shards=shards
            )
        )
    assert same_weights(load(tmp_path / "saved"), model)


SAVE = """
import sys, torch
from llama import Llama
from llama.checkpoint import save_checkpoint
torch.distributed.init_process_group("cuda:gloo")  # there are no collectives on the CPU, as with NCCL
llama = Llama.build(sys.argv[1], None, 64, 2, device="cpu", dtype=torch.float32, quantize="int4")
save_checkpoint(f"{sys.argv[2]}-int4", llama.model, llama.tokenizer)
llama = Llama.build(sys.argv[1], None, 64, 2, device="cpu", dtype=torch.float32)
for layout in ("meta", "hf"):
    save_checkpoint(f"{sys.argv[2]}-{layout}", llama.model, llama.tokenizer, layout=layout, shards=2)
    Llama.build(f"{sys.argv[2]}-{layout}", None, 64, 2, device="cpu", dtype=torch.float32)  # complete, for every rank
"""


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
def test_saved_by_real_processes(tmp_path, tiny_checkpoint, n):
    (tmp_path / "save.py").write_text(SAVE)
    run = fork_python(tmp_path / "save.py", tiny_checkpoint, tmp_path / "saved", ranks=n)
    assert run.returncode == 0, run.stderr
    for layout in ("meta", "hf"):
        assert same_weights(load(tmp_path / f"saved-{layout}"), load(tiny_checkpoint))
    quantized, exact = load(tmp_path / "saved-int4"), load(tiny_checkpoint)
    for name in ("attention.wo", "feed_forward.w1"):  # split along either axis
        rounded, weight = (model.layers[0].get_parameter(f"{name}.weight") for model in (quantized, exact))
        assert 0 < (rounded - weight).abs().max() < 0.1


FAILED = """
import contextlib, os, sys, torch
from llama import Llama
from llama.checkpoint import memory, meta, save_checkpoint
from llama.errors import InputError

def build():
    return Llama.build(sys.argv[1], None, 64, 2, device="cpu", dtype=torch.float32)

@contextlib.contextmanager
def raised(expected):
    try:
        yield
    except expected as error:
        sys.stderr.write(f"rank {os.environ['RANK']}: {type(error).__name__}\\n")
    else:
        raise SystemExit("nothing was raised")

read, free_host_memory = meta.MetaCheckpoint.read, memory.free_host_memory
if os.environ["RANK"] == "1":
    memory.free_host_memory = lambda: 0
with raised(MemoryError):
    build()
memory.free_host_memory = free_host_memory
if os.environ["RANK"] == "1":
    meta.MetaCheckpoint.read = lambda *arguments: [][0]  # as if its disk failed
with raised(IndexError):
    build()
meta.MetaCheckpoint.read = read
llama = build()
with raised(InputError):
    save_checkpoint(sys.argv[1], llama.model, llama.tokenizer)
torch.save = lambda *arguments: 1 / 0  # in the middle of writing, as if the disk failed
with raised(ZeroDivisionError):
    save_checkpoint(sys.argv[2], llama.model, llama.tokenizer)
ranks = torch.ones(1)
torch.distributed.all_reduce(ranks)  # the ranks are still at the same point
assert ranks == 2
"""


@pytest.mark.slow
def test_an_error_on_one_rank_is_raised_on_all(tmp_path, tiny_checkpoint):
    (tmp_path / "failed.py").write_text(FAILED)
    run = fork_python(tmp_path / "failed.py", tiny_checkpoint, tmp_path / "saved", ranks=2)
    assert run.returncode == 0, run.stderr
    for rank in range(2):
        for name in ("MemoryError", "IndexError", "InputError", "ZeroDivisionError"):
            assert f"rank {rank}: {name}" in run.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["failed.py"]


def test_the_tensors_of_a_gpu_are_written_from_the_cpu():
    """It may have no memory left to reorder or to join them."""
    with FakeTensorMode():
        model = Transformer(tiny_args())
        shapes = parameter_shapes(model.params)
        for name, shape in shapes.items():
            tensor = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
            set_weight(model.get_submodule(name.removesuffix(".weight")), torch.nn.Parameter(tensor))
        assert {weight.device.type for weight in model.parameters()} == {"cuda"}
        gathered = dict(gather_parameters(model))
        assert {(tensor.device.type, tensor.dtype) for tensor in gathered.values()} == {("cpu", torch.bfloat16)}
        assert {name: tuple(tensor.shape) for name, tensor in gathered.items()} == shapes


def test_a_model_with_gradients(tmp_path, llama3):
    """As in the middle of training."""
    model = tiny_model(vocab_size=VOCAB)
    model(TOKENS).sum().backward()
    save_checkpoint(tmp_path / "saved", model, llama3)
    tensors = torch.load(tmp_path / "saved" / "consolidated.00.pth")
    assert not any(weight.requires_grad for weight in tensors.values())


def test_what_can_not_be_saved(tmp_path, llama3):
    model = tiny_model(vocab_size=VOCAB)
    for options, message in (
        ({"layout": "gguf"}, r"layout='gguf' must be one of \['meta', 'hf'\]"),
        ({"shards": 0}, "shards=0 must be a whole number of at least 1"),
        ({"shards": 3}, r"shards=3: this model can't be split over 3 processes, only over one of \[1, 2, 4\]"),
        ({"shards": 50, "layout": "hf"}, "shards=50: this model has only 21 tensors"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            save_checkpoint(tmp_path / "saved", model, llama3, **options)
        assert isinstance(error.value, AssertionError)
    uneven = tiny_model(vocab_size=VOCAB, rope_divisors=tuple(float(i + 1) for i in range(16)))
    with pytest.raises(ValueError, match="can't express the rope_divisors"):
        save_checkpoint(tmp_path / "saved", uneven, llama3, layout="hf")
    assert list(tmp_path.iterdir()) == []
    save_checkpoint(tmp_path / "saved", uneven, llama3)
    assert torch.equal(load(tmp_path / "saved").freqs_cis, uneven.freqs_cis)
    with pytest.raises(ValueError, match="saved is there already; give the name of a new folder"):
        save_checkpoint(tmp_path / "saved", model, llama3)


def test_nothing_is_left_when_writing_fails(tmp_path, llama3, monkeypatch):
    monkeypatch.setattr("torch.save", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_checkpoint(tmp_path / "saved", tiny_model(vocab_size=VOCAB), llama3)
    assert list(tmp_path.iterdir()) == []


def test_not_enough_disk_space(tmp_path, llama3, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1000))
    with pytest.raises(OSError, match=r"writing takes 0\.0 GB, and only 0\.0 GB are free"):
        save_checkpoint(tmp_path / "saved", tiny_model(vocab_size=VOCAB), llama3)
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def largest_file(size):
    """While the block runs, no file of this process can be larger: writes fail as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.skipif(resource is None, reason="Windows has no such limits")
@pytest.mark.parametrize(("layout", "size"), [("meta", 600_000), ("hf", 600_000), ("meta", 100_000), ("meta", 100)])
def test_a_full_disk_is_named(tmp_path, llama3, layout, size):
    """Whichever file it is that doesn't fit: the weights, a staged tensor, the tokenizer."""
    model = tiny_model(vocab_size=VOCAB)
    with (
        largest_file(size),
        pytest.raises(OSError, match=r"the disk takes no more: writing takes 0\.0 GB, and") as error,
    ):
        save_checkpoint(tmp_path / "saved", model, llama3, layout=layout)
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(tmp_path / "saved"))
    assert list(tmp_path.iterdir()) == []
    save_checkpoint(tmp_path / "saved", model, llama3, layout=layout)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 51528128 vs 51528016"),
        RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/3"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
    ],
)
def test_every_error_of_a_full_disk_is_one(tmp_path, error):
    message = r"writing takes 1\.5 GB, and \d+\.\d GB were free before"
    with pytest.raises(OSError, match=message) as raised, full_disk_explained(tmp_path, 1_500_000_000, tmp_path):
        raise error
    assert raised.value.errno == errno.ENOSPC
    assert raised.value.__cause__ is error
    for other in (RuntimeError("a shape"), PermissionError(errno.EACCES, "no"), ZeroDivisionError()):
        with pytest.raises(type(other)) as raised, full_disk_explained(tmp_path, 1, tmp_path):
            raise other
        assert raised.value is other


@pytest.fixture(params=[0o022, 0o077, 0o007], ids=oct)
def umask(request):
    """A umask, for the time of the test."""
    previous = os.umask(request.param)
    yield request.param
    os.umask(previous)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other permissions")
@pytest.mark.parametrize("layout", ["meta", "hf"])
def test_what_is_written_has_the_permissions_that_the_umask_gives(
    tmp_path, tiny_checkpoint, llama2_path, umask, layout
):
    save_checkpoint(
        tmp_path / "saved", load(tiny_checkpoint), Tokenizer(tiny_checkpoint / "tokenizer.model"), layout=layout
    )
    convert(tiny_checkpoint, tmp_path / "parent" / "converted", layout, shards=2)
    save_checkpoint(tmp_path / "llama-2", tiny_model(), Tokenizer(llama2_path), layout=layout)
    assert_permissions(tmp_path, umask)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other permissions")
def test_what_fine_tuning_writes_has_them_too(tmp_path, tiny_checkpoint, umask):
    with RunFolder(tmp_path / "interrupted") as folder:
        folder.begin({})
        folder.save_state(1, {"weights": torch.zeros(3)}, 12)
    finetune(write_pairs(tmp_path / "data.jsonl"), tmp_path / "out", tiny_checkpoint, max_seq_len=96, epochs=1)
    assert_permissions(tmp_path, umask)


def assert_permissions(folder, umask):
    written = list(folder.rglob("*"))
    assert len(written) > 5
    for path in written:
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        assert oct(path.stat().st_mode & 0o777) == oct(expected), path


KILLED = """
import os, signal, sys, torch
from llama import Llama
from llama.checkpoint import save_checkpoint
llama = Llama.build(sys.argv[1], None, 64, 2, device="cpu")
torch.save = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
save_checkpoint(sys.argv[2], llama.model, llama.tokenizer)
"""


@pytest.mark.slow
def test_killed_in_the_middle(tmp_path, tiny_checkpoint):
    (tmp_path / "killed.py").write_text(KILLED)
    assert fork_python(tmp_path / "killed.py", tiny_checkpoint, tmp_path / "saved").returncode == -9
    assert not (tmp_path / "saved").exists()
    (leftover,) = tmp_path.glob(".saved.unfinished-*")
    with pytest.raises(FileNotFoundError):
        load(leftover)
    convert(tiny_checkpoint, tmp_path / "saved")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.py", "saved"]


def test_converting_into_a_link_or_a_folder_of_the_home(tmp_path, tiny_checkpoint, monkeypatch):
    """And a target that can't be replaced is refused before the checkpoint is even opened."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "model")
    (tmp_path / "home").symlink_to(tiny_checkpoint)
    monkeypatch.setenv("HOME", str(tmp_path))
    convert("~/home", "~/link")
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["model"]
    assert same_weights(load(tmp_path / "link"), load(tiny_checkpoint))
    with pytest.raises(ValueError, match="model is there already"):
        convert("nowhere", "~/link")


def test_paths_in_the_home(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = random_hugging_face_model()
    model.save_pretrained(tmp_path / "base")
    write_adapter(tmp_path / "adapter", model)
    write_tokenizer_json(tmp_path / "adapter")
    convert("~/base", "~/merged", adapter="~/adapter", tokenizer_path="~/adapter/tokenizer.json")
    write_tokenizer_json(tmp_path / "base")
    convert("~/base", "~/again", adapter="~/adapter")
    assert f"give tokenizer_path={tmp_path / 'adapter' / 'tokenizer.json'}" in caplog.text
    assert same_weights(load(tmp_path / "again"), load(tmp_path / "merged"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "again", "base", "merged"]


# The command line


def command(*arguments):
    return fork_python("-m", "llama.convert", *arguments)


@pytest.mark.slow
def test_the_command(tmp_path, tiny_checkpoint):
    first, second = tmp_path / "hf", tmp_path / "meta"
    run = command("--from", tiny_checkpoint, "--to", first, "--layout", "hf", "--shards", "3")
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
    assert run.stderr == f"wrote {first}\n"
    assert len(list(first.glob("model-*-of-00003.safetensors"))) == 3
    run = command(f"--from={first}", f"--to={second}", "--layout=meta", "--shards=2", "--dtype=bfloat16")
    assert run.returncode == 0, run.stderr
    assert sorted(path.name for path in second.iterdir()) == [
        "consolidated.00.pth",
        "consolidated.01.pth",
        "params.json",
        "tokenizer.model",
    ]
    assert same_weights(load(second, torch.bfloat16), load(tiny_checkpoint, torch.bfloat16))
    assert (second / "tokenizer.model").read_bytes() == (tiny_checkpoint / "tokenizer.model").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "/nowhere", "--to", "x"], "error: ckpt_dir='/nowhere' does not exist; / holds "),
        (["--from", "FOLDER", "--to", "FOLDER"], "is there already; give the name of a new folder"),
        (["--from", "FOLDER", "--to", "x", "--layout", "ggml"], "error: layout='ggml' must be one of ['meta', 'hf']"),
        (["--from", "FOLDER", "--to", "x", "--shards", "3"], "error: shards=3: this model can't be split over 3"),
        (["--from", "FOLDER", "--to", "x", "--dtype", "int4"], "error: dtype='int4' must be one of"),
        (["--from", "FOLDER", "--to", "x", "--sharts", "2"], "--sharts"),
        (["--from", "FOLDER"], "to"),
        (["--from", "FOLDER", "--to"], "error: convert.py: argument --to: expected one argument"),
    ],
)
def test_invalid_arguments_of_the_command(tmp_path, tiny_checkpoint, arguments, message):
    paths = {"FOLDER": str(tiny_checkpoint), "x": str(tmp_path / "x")}
    run = command(*(paths.get(argument, argument) for argument in arguments))
    assert run.returncode != 0
    assert message in run.stderr
    assert "Traceback" not in run.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_help():
    run = command("--help")
    for text in ("layout", "shards", "dtype", "tokenizer_path", "Any layout is read"):
        assert text in run.stdout + run.stderr


def test_from_gguf(tmp_path):
    """Including the tokenizer in the file."""
    model = tiny_model(tie_embeddings=True)
    path = write_gguf(tmp_path / "model.gguf", model)
    for layout in ("meta", "hf"):
        convert(path, tmp_path / layout, layout)
        assert same_weights(load(tmp_path / layout), model)
        ours, theirs = open_checkpoint(tmp_path / layout).tokenizer(), open_checkpoint(path).tokenizer()
        assert ours.encode("the hat 12", False, False) == theirs.encode("the hat 12", False, False)
        assert (ours.stop_tokens, ours.special_tokens) == (theirs.stop_tokens, theirs.special_tokens)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["max_position_embeddings"] == 128


def test_from_gguf_with_scaled_rope(tmp_path, monkeypatch):
    """GGUF has divisors of the frequencies, the other layouts the parameters they are computed from."""
    from test_gguf import write_divisors

    model = tiny_model(use_scaled_rope=True, rope_scaling_factor=32.0)
    plain = tiny_model()
    write_divisors(monkeypatch, (plain.freqs_cis[1].angle() / model.freqs_cis[1].angle()).tolist())
    path = write_gguf(tmp_path / "model.gguf", model)
    convert(path, tmp_path / "hf", "hf")
    scaling = json.loads((tmp_path / "hf" / "config.json").read_text())["rope_scaling"]
    assert scaling["rope_type"] == "llama3"
    assert scaling["factor"] == pytest.approx(32.0)
    assert torch.allclose(load(tmp_path / "hf").freqs_cis, model.freqs_cis, atol=1e-4)


def test_the_stop_tokens_of_scaled_rope_are_kept_by_every_layout(tmp_path, tiny_checkpoint):
    """Also where the source doesn't name <|eom_id|>, and with a tokenizer that is passed in."""
    ends = {269, 276, 277}
    model = tiny_model(vocab_size=VOCAB, use_scaled_rope=True)
    write_meta_checkpoint(tmp_path / "meta", model, tiny_checkpoint / "tokenizer.model", use_scaled_rope=True)
    convert(tmp_path / "meta", tmp_path / "hf", "hf")
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == sorted(ends)
    convert(tmp_path / "hf", tmp_path / "back")
    (tmp_path / "hf" / "generation_config.json").write_text('{"eos_token_id": 277}')
    convert(tmp_path / "hf", tmp_path / "also back")
    convert(tmp_path / "meta", tmp_path / "passed", tokenizer_path=str(tmp_path / "hf" / "tokenizer.json"))
    checkpoint = open_checkpoint(tmp_path / "meta")
    save_checkpoint(tmp_path / "saved", load(tmp_path / "meta"), checkpoint.tokenizer())
    for name in ("back", "also back", "passed", "saved"):
        assert not (tmp_path / name / "tokenizer.json").exists()
        assert open_checkpoint(tmp_path / name).tokenizer().stop_tokens == ends
        assert "tokenizer.model" in {path.name for path in (tmp_path / name).iterdir()}


def test_a_llama_2_folder_without_its_tokenizer(tmp_path, caplog):
    model = tiny_model(rope_theta=10000.0)
    path = write_llama2_tokenizer(tmp_path / "tokenizer.model")
    folder = write_meta_checkpoint(tmp_path / "llama-2-7b", model, path, 2, columns=True, vocab_size=-1)
    (folder / "tokenizer.model").unlink()
    params = json.loads((folder / "params.json").read_text())
    del params["rope_theta"]
    (folder / "params.json").write_text(json.dumps(params))
    convert(folder, tmp_path / "without", "hf")
    assert "no tokenizer is written, only the weights: tokenizer_path=" in caplog.text
    convert(folder, tmp_path / "with", "hf", tokenizer_path=str(path))
    assert (tmp_path / "with" / "tokenizer.model").read_bytes() == path.read_bytes()
    assert same_weights(load(tmp_path / "with"), model)
    with torch.no_grad():
        tokens = TOKENS.clamp(max=319)
        assert torch.allclose(hugging_face_logits(tmp_path / "with", tokens), model(tokens), atol=1e-4)
    assert json.loads((tmp_path / "with" / "config.json").read_text())["max_position_embeddings"] == 4096


def test_llama_2s_tokenizer_in_transformers(tmp_path):
    """With BOS, the space before the first word, and a stop token that only generation_config.json lists."""
    import transformers

    path = write_llama2_tokenizer(tmp_path / "tokenizer.model")
    folder = write_meta_checkpoint(tmp_path / "meta", tiny_model(), path)
    convert(folder, tmp_path / "hf", "hf")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf"), Tokenizer(path)
    for text in ("the house", "in the other  world", "user\nasks"):
        assert theirs.encode(text) == ours.encode(text, bos=True, eos=False)
    (tmp_path / "hf" / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    (tmp_path / "hf" / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    convert(tmp_path / "hf", tmp_path / "again", "hf")
    tokenizer = open_checkpoint(tmp_path / "again").tokenizer()
    assert tokenizer.stop_tokens == {2, 7}
    assert not tokenizer.add_bos


@pytest.mark.slow
@pytest.mark.parametrize("limit", [100, 8192, 16384])
def test_the_limit_of_max_seq_len_is_kept_by_every_layout(tmp_path, limit):
    for name, changes in MODELS.items():
        folder = tmp_path / name
        random_hugging_face_model(**changes | {"max_position_embeddings": limit}).save_pretrained(folder)
        write_tokenizer_json(folder)
        convert(folder, folder / "meta")
        convert(folder / "meta", folder / "back", "hf")
        expected = 4 * limit if name == "linear rope scaling" else limit  # it stretches the context fourfold
        for layout in (".", "meta", "back"):
            assert open_checkpoint(folder / layout).settings.params["max_position_embeddings"] == expected


@given(st.integers(1, 10**6), st.floats(0.01, 1000))
@examples(300)
def test_the_limit_of_a_stretched_context_is_kept(limit, factor):
    args = ModelArgs(vocab_size=10, rope_divisors=(factor,), max_position_embeddings=limit)
    config = to_config_json(args, torch.float32)
    assert config["max_sequence_length"] == limit
    assert abs(config["max_position_embeddings"] * factor - limit) <= factor
    params = to_params_json(args)  # in which 8192 goes without saying
    assert add_implied_params(Path("params.json"), params).params["max_position_embeddings"] == limit
    assert "max_sequence_length" not in to_config_json(
        ModelArgs(vocab_size=10, max_position_embeddings=limit), torch.half
    )


def test_no_limit_is_written_if_none_is_known(tmp_path, llama3):
    """As for Code Llama, whose params.json has none."""
    save_checkpoint(tmp_path / "hf", tiny_model(vocab_size=VOCAB, rope_theta=1e6), llama3, layout="hf")
    assert Llama.build(tmp_path / "hf", None, 20000, 1, device="cpu").model.params.max_seq_len == 20000


def test_metas_layout_drops_the_padding_of_embeddings(tmp_path):
    """In it, the embedding has exactly as many rows as the tokenizer has tokens."""
    random_hugging_face_model(vocab_size=576).save_pretrained(tmp_path / "hf")
    write_tokenizer_json(tmp_path / "hf")
    padded = load(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "meta", shards=4)
    converted = load(tmp_path / "meta")
    assert (padded.vocab_size, converted.vocab_size) == (576, 524)
    with torch.no_grad():
        assert torch.equal(converted(TOKENS), padded(TOKENS)[..., :524])
    save_checkpoint(tmp_path / "saved", padded, open_checkpoint(tmp_path / "hf").tokenizer())
    assert same_weights(load(tmp_path / "saved"), converted)
    convert(tmp_path / "hf", tmp_path / "again", "hf")
    assert load(tmp_path / "again").vocab_size == 576


def test_a_much_smaller_tokenizer_is_not_taken_for_padding(tmp_path):
    random_hugging_face_model(vocab_size=2048).save_pretrained(tmp_path)
    write_tokenizer_json(tmp_path)
    with pytest.raises(ValueError, match="has vocab_size=2048, but its tokenizer has 524 tokens"):
        load(tmp_path)


def test_tokenizer_json_is_written_where_tokenizer_model_does_not_suffice(tmp_path):
    random_hugging_face_model().save_pretrained(tmp_path / "hf")
    write_tokenizer_json(tmp_path / "hf")  # with <|eom_id|> among the stop tokens
    convert(tmp_path / "hf", tmp_path / "meta")
    assert {"tokenizer.model", "tokenizer.json"} <= {path.name for path in (tmp_path / "meta").iterdir()}
    ours, theirs = (open_checkpoint(tmp_path / layout).tokenizer() for layout in ("meta", "hf"))
    assert ours.stop_tokens == theirs.stop_tokens == {269, 276, 277}
    write_tokenizer_json(tmp_path / "hf", ("end_of_text", "eot_id"))
    convert(tmp_path / "hf", tmp_path / "with a template")
    assert open_checkpoint(tmp_path / "with a template").tokenizer().chat_template == "{{ bos_token }}"
    config = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(config))
    convert(tmp_path / "hf", tmp_path / "plain")
    assert not (tmp_path / "plain" / "tokenizer.json").exists()
    assert open_checkpoint(tmp_path / "plain").tokenizer().stop_tokens == {269, 277}


@pytest.mark.real
def test_the_default_model_generates_the_same_in_the_other_layouts(tmp_path):
    import transformers

    expected = " to find a way to live a life that is worth living."
    for layout in ("meta", "hf"):
        convert(default_checkpoint(), tmp_path / layout, layout)
        llama = Llama.build(tmp_path / layout, None, 128, 1, dtype=torch.float32)
        answer = llama.text_completion(["I believe the meaning of life is"], 0, max_gen_len=20)[0]["generation"]
        assert answer.startswith(expected)
        chat = llama.chat_completion(
            [[{"role": "user", "content": "Give me a tagline for a new coffee shop."}]], 0, max_gen_len=20
        )
        assert chat[0]["generation"]["content"] == "The Eternal Flame: A New Brew, A New Life"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    dialog = [{"role": "user", "content": "Give me a tagline for a new coffee shop."}]
    prompt = tokenizer.apply_chat_template(dialog, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    out = theirs.generate(prompt, max_new_tokens=20, do_sample=False)[0, prompt.shape[1] :]
    assert tokenizer.decode(out, skip_special_tokens=True) == "The Eternal Flame: A New Brew, A New Life"


CONVERT = """
import sys, threading, time
from llama.convert import convert
def anonymous_bytes():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024
import torch, gguf, safetensors.torch
peak, start = 0, anonymous_bytes()
def watch():
    global peak
    while True:
        peak = max(peak, anonymous_bytes() - start)
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
convert(sys.argv[1], sys.argv[2], sys.argv[3])
print(peak)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("source", "layout"), [("meta", "hf"), ("hf", "meta")])
def test_tensors_pass_through_memory_one_at_a_time(tmp_path, llama3_path, source, layout):
    """Converting 400 MB in 66 tensors takes little memory beside that of mapped files."""
    model = tiny_model(dim=1024, n_layers=8, n_heads=8, n_kv_heads=8, vocab_size=VOCAB, ffn_dim=2560)
    size = sum(weight.numel() for weight in model.parameters()) * 4
    assert size > 380e6
    save_checkpoint(tmp_path / "source", model, Tokenizer(llama3_path), layout=source)
    del model
    (tmp_path / "convert.py").write_text(CONVERT)
    run = run_python(tmp_path / "convert.py", tmp_path / "source", tmp_path / "target", layout, PYTHONPATH=str(ROOT))
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < size / 5
