"""Checkpoints: recognising the layout, reading Meta's, and refusing damaged, hostile and mismatched files of it."""

import json
import logging
import os
import pickle
import shutil
import sys
import zipfile

import pytest
import torch
from conftest import (
    ROOT,
    cut,
    load,
    run_python,
    same_weights,
    tiny_args,
    tiny_model,
    write_meta_checkpoint,
    write_tokenizer_json,
)

from llama import Llama, ModelArgs, Tokenizer, Transformer
from llama.checkpoint import load_model, open_checkpoint, parameter_shapes, save_checkpoint
from llama.checkpoint.meta import MetaCheckpoint

CPU = torch.device("cpu")


@pytest.fixture
def copy(tiny_checkpoint, tmp_path):
    """A copy of the tiny checkpoint, for the test to change."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "copy")


@pytest.fixture(scope="module")
def original(llama3_path):
    return tiny_model(vocab_size=Tokenizer(llama3_path).n_words)


def change_params(folder, **changes):
    path = folder / "params.json"
    params = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in params.items() if value is not ...}))


def test_meta_layout(tiny_checkpoint, original):
    model = load(tiny_checkpoint)
    assert same_weights(model, original)
    assert all(weight.requires_grad and weight.is_leaf for weight in model.parameters())


def test_weights_of_the_right_dtype_are_not_copied(tiny_checkpoint):
    checkpoint = MetaCheckpoint(tiny_checkpoint)
    args = checkpoint.settings.model_args(checkpoint.tokenizer().n_words, 96, 2)
    model = load_model(checkpoint, args, device=CPU, dtype=torch.float32)
    mapped = {tensor.data_ptr() for tensor in checkpoint._shards[0].values()}
    assert all(weight.data_ptr() in mapped for weight in model.parameters())
    converted = load_model(checkpoint, args, device=CPU, dtype=torch.bfloat16)
    assert all(weight.dtype == torch.bfloat16 for weight in converted.parameters())


@pytest.mark.parametrize("n_files", [2, 4])
def test_several_files_on_one_process(tmp_path, llama3_path, n_files):
    model = tiny_model(vocab_size=Tokenizer(llama3_path).n_words, n_kv_heads=4)
    assert same_weights(load(write_meta_checkpoint(tmp_path, model, llama3_path, n_files)), model)


def test_a_rotary_table_in_one_file_of_two(tmp_path, llama3_path):
    model = tiny_model(vocab_size=Tokenizer(llama3_path).n_words)
    folder = write_meta_checkpoint(tmp_path, model, llama3_path, 2)
    edit_tensors(folder, lambda tensors: tensors.update({"rope.freqs": torch.zeros(16)}))
    assert same_weights(load(folder), model)


def test_an_output_equal_to_the_embedding_is_tied(tmp_path, llama3_path):
    """Meta's files of Llama 3.2 1B and 3B have the embedding twice. If one parameter differs, it isn't tied."""
    model = tiny_model(vocab_size=Tokenizer(llama3_path).n_words, tie_embeddings=True)
    folder = write_meta_checkpoint(tmp_path, model, llama3_path, 2)
    loaded = load(folder)
    assert loaded.output.weight is loaded.tok_embeddings.weight
    assert same_weights(loaded, model)
    edit_tensors(folder, lambda tensors: tensors["output.weight"][-1, -1].add_(1))
    loaded = load(folder)
    assert loaded.output.weight is not loaded.tok_embeddings.weight


def test_compressed_weights_are_refused(copy):
    path = copy / "consolidated.00.pth"
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match=r"00\.pth .* is damaged or cut short"):
        Llama.build(copy, None, 32, 1)


def test_a_file_too_large_to_map(copy, monkeypatch):
    def refuse(*arguments, **options):
        raise RuntimeError("unable to mmap 99 bytes from file: Cannot allocate memory (12)")

    monkeypatch.setattr("torch.load", refuse)
    with pytest.raises(MemoryError, match=r"00\.pth \(0\.0 GB\) is larger than what this system lets a program map"):
        Llama.build(copy, None, 32, 1)


@pytest.fixture(scope="module")
def llama2_folder(tmp_path_factory, llama2_path):
    """A folder like Llama 2's: an embedding split along dim, no vocab_size, no rope_theta, a rope.freqs."""
    model = tiny_model(rope_theta=10000.0)
    folder = write_meta_checkpoint(tmp_path_factory.mktemp("llama2-7b"), model, llama2_path, 2, vocab_size=-1)
    change_params(folder, rope_theta=...)
    for i, columns in enumerate(model.tok_embeddings.weight.data.chunk(2, dim=1)):
        path = folder / f"consolidated.{i:02d}.pth"
        tensors = torch.load(path) | {"tok_embeddings.weight": columns.clone(), "rope.freqs": torch.zeros(16)}
        torch.save(tensors, path)
    return folder, model


def test_llama2_folder(llama2_folder):
    folder, model = llama2_folder
    loaded = load(folder)
    assert same_weights(loaded, model)
    assert loaded.params.rope_theta == 10000.0
    tokens = torch.randint(320, (1, 80))
    assert torch.allclose(loaded(tokens), model(tokens), atol=1e-5)


def test_slices_across_files(llama2_folder):
    folder, model = llama2_folder
    read = MetaCheckpoint(folder).read
    whole = model.state_dict()
    assert torch.equal(read("tok_embeddings.weight", 0, 100, 200), whole["tok_embeddings.weight"][100:200])
    for axis, name in ((0, "layers.0.attention.wq.weight"), (1, "layers.1.feed_forward.w2.weight")):
        length = whole[name].shape[axis]
        for start, stop in ((0, length), (0, 10), (length // 2 - 3, length // 2 + 5), (length // 2, length)):
            assert torch.equal(read(name, axis, start, stop), whole[name].narrow(axis, start, stop - start))


@pytest.mark.parametrize(
    ("family", "params", "limit"),
    [
        ("llama3", {}, 8192),
        ("llama3", {"use_scaled_rope": True}, 131072),
        ("code llama", {"rope_theta": 1000000.0}, None),
    ],
)
def test_the_limit_of_max_seq_len(copy, family, params, limit):
    change_params(copy, **params)
    checkpoint = open_checkpoint(copy)
    assert checkpoint.settings.params.get("max_position_embeddings") == limit
    vocab_size = checkpoint.tokenizer().n_words
    if limit is None:
        assert checkpoint.settings.model_args(vocab_size, 10**6, 1).max_seq_len == 10**6
        return
    assert checkpoint.settings.model_args(vocab_size, limit, 1).max_seq_len == limit
    with pytest.raises(ValueError, match=f"max_seq_len={limit + 1} is over this model's limit of {limit}"):
        checkpoint.settings.model_args(vocab_size, limit + 1, 1)


END_OF_TEXT, EOM, EOT = 269, 276, 277  # of the tiny tokenizer; 128001, 128008 and 128009 of the real one


def test_with_scaled_rope_a_message_that_calls_a_tool_ends(copy, tmp_path, llama2_path):
    """<|eom_id|> came with Llama 3.1; its tokenizer.model doesn't name it."""
    write_tokenizer_json(tmp_path, ("eot_id",))
    paths = (None, copy / "tokenizer.model", tmp_path / "tokenizer.json")
    assert open_checkpoint(copy).tokenizer().stop_tokens == {END_OF_TEXT, EOT}
    change_params(copy, use_scaled_rope=True)
    for path in paths:
        assert open_checkpoint(copy).tokenizer(path).stop_tokens == {END_OF_TEXT, EOM, EOT}
    assert open_checkpoint(copy).tokenizer(llama2_path).stop_tokens == {2}


def test_scaled_rope_with_another_token_in_place_of_eom(copy, tmp_path):
    write_tokenizer_json(tmp_path, ("eot_id",))
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace("<|eom_id|>", "<|something_else|>"))
    change_params(copy, use_scaled_rope=True)
    assert open_checkpoint(copy).tokenizer(path).stop_tokens == {END_OF_TEXT, EOT}


def test_hugging_faces_files_in_metas_folder(copy, tmp_path):
    """tokenizer.json is taken where it is ours, which is where there is no config.json."""
    write_tokenizer_json(copy, ("end_of_text", "eom_id"))
    assert EOM in open_checkpoint(copy).tokenizer().stop_tokens
    (copy / "config.json").write_text("{}")
    assert open_checkpoint(copy).tokenizer().stop_tokens == {END_OF_TEXT, EOT}
    (copy / "tokenizer.model").unlink()
    assert EOM in open_checkpoint(copy).tokenizer().stop_tokens


def test_beyond_4096_llama2_only_warns(llama2_folder, caplog):
    checkpoint = open_checkpoint(llama2_folder[0])
    checkpoint.settings.model_args(320, 4096, 1)
    assert not caplog.records
    assert checkpoint.settings.model_args(320, 5000, 1).max_seq_len == 5000
    assert "max_seq_len=5000: this model was trained for at most 4096 tokens" in caplog.text


@pytest.mark.parametrize(
    ("dim", "n_layers", "params", "factor"),
    [(2048, 16, {}, 32.0), (3072, 28, {}, 32.0), (4096, 32, {}, 8.0), (2048, 16, {"rope_scaling_factor": 8}, 8)],
)
def test_the_rope_factor_of_small_models(copy, dim, n_layers, params, factor):
    change_params(copy, dim=dim, n_layers=n_layers, use_scaled_rope=True, **params)
    assert open_checkpoint(copy).settings.model_args(524, 10, 1).rope_scaling_factor == factor


def test_unknown_keys_are_named(copy, caplog):
    change_params(copy, use_sliding_window=True, vision_chunk_size=448, max_batch_size=3)
    with caplog.at_level(logging.WARNING):
        args = open_checkpoint(copy).settings.model_args(524, 10, 1)
    assert "params.json: 2 unknown keys, which are ignored: ['use_sliding_window', 'vision_chunk_size']" in caplog.text
    assert args.max_batch_size == 1


def test_many_unknown_keys_are_told_in_one_short_line(copy, caplog):
    change_params(copy, **{f"key\n{i}": i for i in range(10_000)})
    with caplog.at_level(logging.WARNING):
        open_checkpoint(copy)
    (message,) = caplog.messages
    assert "10000 unknown keys, which are ignored: ['key\\n0', 'key\\n1', " in message
    assert len(message.splitlines()) == 1
    assert len(message) < 1000


def test_a_broken_link(copy):
    (copy / "consolidated.00.pth").unlink()
    (copy / "consolidated.00.pth").symlink_to(copy / "gone.pth")
    with pytest.raises(ValueError, match=r"consolidated\.00\.pth can't be read"):
        Llama.build(copy, None, 32, 1)


def edit_tensors(folder, edit):
    path = folder / "consolidated.00.pth"
    tensors = torch.load(path)
    edit(tensors)
    torch.save(tensors, path)


def test_every_wrong_tensor_is_listed(copy):
    def edit(tensors):
        del tensors["norm.weight"], tensors["layers.1.attention.wo.weight"]
        tensors["layers.0.attention.wq.weight"] = torch.zeros(128, 64)
        tensors["lora.weight"] = torch.zeros(3)

    edit_tensors(copy, edit)
    with pytest.raises(ValueError, match=r"4 tensor\(s\)") as error:
        Llama.build(copy, None, 32, 1)
    assert isinstance(error.value, AssertionError)
    message = str(error.value)
    assert str(copy) in message
    assert "missing: norm.weight (128,)" in message
    assert "missing: layers.1.attention.wo.weight (128, 128)" in message
    assert "unexpected: lora.weight (3,)" in message
    assert "wrong shape: layers.0.attention.wq.weight is (128, 64), should be (128, 128)" in message


def test_parameter_shapes_are_those_of_the_network():
    for changes in ({}, {"tie_embeddings": True}, {"head_dim": 48, "ffn_dim": 200, "n_kv_heads": 1}):
        args = tiny_args(**changes)
        shapes = {name: tuple(weight.shape) for name, weight in Transformer(args).named_parameters()}
        assert parameter_shapes(args) == shapes


def test_a_tokenizer_of_another_size(copy, llama2_path):
    with pytest.raises(ValueError, match="has vocab_size=524, but its tokenizer has 320 tokens") as error:
        Llama.build(copy, llama2_path, 32, 1)
    assert isinstance(error.value, AssertionError)


class Bomb:
    """Unpickled, it would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_hostile_pickle_does_not_run(copy, tmp_path):
    target = tmp_path / "made-by-the-pickle"
    edit_tensors(copy, lambda tensors: tensors.update({"norm.weight": Bomb(str(target))}))
    with pytest.raises(ValueError, match=r"00\.pth would call .*mkdir.*refused, not run") as error:
        Llama.build(copy, None, 32, 1)
    assert isinstance(error.value, AssertionError)
    assert not target.exists()
    (copy / "consolidated.00.pth").write_bytes(pickle.dumps(Bomb(str(target))))  # without a zip file around it
    with pytest.raises(ValueError, match="is not a PyTorch file"):
        Llama.build(copy, None, 32, 1)
    assert not target.exists()


DAMAGES = {
    "cut weights": (lambda f: cut(f / "consolidated.00.pth"), r"consolidated\.00\.pth \(\d+ bytes\) is damaged or cut"),
    "empty weights": (lambda f: (f / "consolidated.00.pth").write_bytes(b""), r"consolidated\.00\.pth is empty"),
    "weights are a web page": (
        lambda f: (f / "consolidated.00.pth").write_text("<html>Log in</html>"),
        r"consolidated\.00\.pth is a web page",
    ),
    "weights are an LFS pointer": (
        lambda f: (f / "consolidated.00.pth").write_text("version https://git-lfs.github.com/spec/v1\n"),
        r"consolidated\.00\.pth is a Git LFS pointer",
    ),
    "weights are a list": (
        lambda f: torch.save([1, 2], f / "consolidated.00.pth"),
        "something other than named tensors",
    ),
    "nested weights": (
        lambda f: torch.save({"model": {"a": torch.zeros(1)}}, f / "consolidated.00.pth"),
        "something other than named tensors",
    ),
    "params cut": (lambda f: cut(f / "params.json"), r"params\.json is not JSON"),
    "params are a list": (lambda f: (f / "params.json").write_text("[]"), r"params\.json must hold a JSON object"),
    "params are binary": (lambda f: (f / "params.json").write_bytes(b"\xff\xfe\x00"), r"params\.json is not JSON"),
    "params lack a key": (lambda f: change_params(f, n_layers=...), r"params\.json lacks 'n_layers'"),
    "a string for a number": (lambda f: change_params(f, dim="128"), r"params\.json: dim is '128'"),
    "a fraction for a count": (lambda f: change_params(f, n_heads=4.5), r"params\.json: n_heads is 4\.5"),
    "null for a count": (lambda f: change_params(f, dim=None), r"params\.json: dim is None, not a valid int"),
    "a boolean for a number": (lambda f: change_params(f, norm_eps=True), r"params\.json: norm_eps is True"),
    "a number for a boolean": (lambda f: change_params(f, use_scaled_rope=1), r"params\.json: use_scaled_rope is 1"),
    "an infinite number": (
        lambda f: change_params(f, ffn_dim_multiplier=float("inf")),
        "ffn_dim_multiplier=inf must be",
    ),
    "not a number": (lambda f: change_params(f, norm_eps=float("nan")), "norm_eps=nan must be a number above 0"),
    "a rotary base of zero": (lambda f: change_params(f, rope_theta=0), "rope_theta=0 must be a number above 0"),
    "rope frequency factors in the wrong order": (
        lambda f: change_params(f, rope_low_freq_factor=9),
        "rope_low_freq_factor=9 must be",
    ),
    "too many layers": (lambda f: change_params(f, n_layers=4096), "21 tensors can't hold 4096 layers"),
    "absurdly many layers": (
        lambda f: change_params(f, n_layers=10**9),
        r"params\.json: n_layers=1000000000 is larger than that of any model",
    ),
    "absurdly many heads": (
        lambda f: change_params(f, n_heads=2**20, dim=2**21),
        r"params\.json: n_heads=1048576 is larger than that of any model",
    ),
    "an absurd width": (lambda f: change_params(f, dim=2**40), "dim=1099511627776 is larger than that of any model"),
    "a huge width": (lambda f: change_params(f, dim=2**30, n_heads=4), r"wrong shape: norm\.weight"),
    "deeply nested params": (lambda f: (f / "params.json").write_text("[" * 10**5), r"params\.json is not JSON"),
    "integer weights": (
        lambda f: edit_tensors(f, lambda t: t.update({"norm.weight": torch.ones(128, dtype=torch.int8)})),
        r"norm\.weight is stored as torch\.int8, not as one of \[torch\.float64",
    ),
    "sparse weights": (
        lambda f: edit_tensors(f, lambda t: t.update({"norm.weight": torch.ones(128).to_sparse()})),
        r"consolidated\.00\.pth would call torch\.\w+\.\w+ while it is read",
    ),
    "weights on the meta device": (
        lambda f: edit_tensors(f, lambda t: t.update({"norm.weight": torch.ones(128, device="meta")})),
        r"would call torch\._utils\._rebuild_meta_tensor_no_storage while",
    ),
    "eight-bit weights": (
        lambda f: edit_tensors(f, lambda t: t.update({"norm.weight": torch.ones(128).to(torch.float8_e4m3fn)})),
        r"would call torch\._utils\._rebuild_tensor_v3 while",
    ),
    "an expanded tensor": (
        lambda f: edit_tensors(f, lambda t: t.update({"norm.weight": torch.ones(1).expand(128)})),
        r"norm\.weight has shape \(128,\), larger than its data in the file",
    ),
    "a huge multiplier": (lambda f: change_params(f, ffn_dim_multiplier=1e308), "ffn_dim_multiplier=1e\\+308 is too"),
    "a negative number of layers": (lambda f: change_params(f, n_layers=-1), r"n_layers=-1 must be at least 1"),
    "a multiple of zero": (lambda f: change_params(f, multiple_of=0), r"multiple_of=0 must be at least 1"),
    "files with different tensors": (
        lambda f: torch.save({"norm.weight": torch.zeros(128)}, f / "consolidated.01.pth"),
        r"01\.pth and .*00\.pth hold different tensors: .* are in only one",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_checkpoints(copy, damage, message):
    damage(copy)
    with pytest.raises(ValueError, match=message) as error:
        Llama.build(copy, None, 32, 1)
    assert isinstance(error.value, AssertionError)


def test_no_checkpoint_in_the_folder(tmp_path, tiny_checkpoint):
    with pytest.raises(FileNotFoundError, match=r"ckpt_dir='.*/nowhere' does not exist; .* holds ") as error:
        Llama.build(tmp_path / "nowhere", None, 32, 1)
    assert isinstance(error.value, AssertionError)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*and found nothing"):
        Llama.build(tmp_path, None, 32, 1)
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=r"found model-.* but their model\.safetensors\.index\.json isn't"):
        Llama.build(tmp_path, None, 32, 1)
    (tmp_path / "pytorch_model-00001-of-00002.bin").touch()
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"found pytorch.* but their pytorch_model\.bin\.index\.json isn't"):
        Llama.build(tmp_path, None, 32, 1)
    shutil.copytree(tiny_checkpoint, tmp_path / "original")
    with pytest.raises(FileNotFoundError, match=r"pass ckpt_dir='.*original'"):
        Llama.build(tmp_path, None, 32, 1)
    for path in (" --tokenizer_path", "", True, None, "~nobody_of_that_name/x", "x" * 5000):
        with pytest.raises(ValueError, match=r"ckpt_dir=.* is not a path") as error:
            Llama.build(path, None, 32, 1)
        assert isinstance(error.value, AssertionError)
    with pytest.raises(ValueError, match="is one of a checkpoint's files: pass its folder"):
        Llama.build(tiny_checkpoint / "consolidated.00.pth", None, 32, 1)
    (tmp_path / "incomplete").mkdir()
    shutil.copy(tiny_checkpoint / "consolidated.00.pth", tmp_path / "incomplete")
    with pytest.raises(FileNotFoundError, match=r"params\.json"):
        Llama.build(tmp_path / "incomplete", None, 32, 1)
    shutil.copy(tiny_checkpoint / "params.json", tmp_path / "incomplete")
    with pytest.raises(FileNotFoundError, match=r"tokenizer_path=.*tokenizer\.model' does not exist"):
        Llama.build(tmp_path / "incomplete", None, 32, 1)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("layout", ["meta", "hf"])
def test_peak_memory_of_400_mb_is_about_one_copy(tmp_path, layout):
    """After loading, and after a forward pass, as measured by the program whose results are in the README."""
    model = Transformer(ModelArgs(dim=1024, n_layers=8, n_heads=16, n_kv_heads=8, vocab_size=2048))
    size = 4 * sum(weight.numel() for weight in model.parameters())
    assert size > 390e6
    save_checkpoint(tmp_path / "model", model, layout=layout)
    del model
    run = run_python(ROOT / "benchmarks" / "loading.py", "ours", tmp_path / "model", PYTHONPATH=str(ROOT))
    assert run.returncode == 0, run.stderr
    measured = json.loads(run.stdout)
    assert measured["peak when loaded"] < 0.3 * size  # of Hugging Face's weights, wq and wk are copied to reorder them
    assert 0.9 * size < measured["peak"] < 1.2 * size
