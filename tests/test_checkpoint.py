"""Checkpoints: Meta's layout and GGUF, and everything that can be wrong with them."""

import json
import logging
import os
import pickle
import shutil

import gguf
import numpy as np
import pytest
import torch
from conftest import tiny_args, tiny_model, write_llama2_tokenizer, write_meta_checkpoint

from llama import Llama, Tokenizer, Transformer
from llama.checkpoint import MetaCheckpoint, load_model, open_checkpoint, parameter_shapes
from llama.vocabulary import _gpt2_characters

CPU = torch.device("cpu")


def load(folder, dtype=torch.float32, **sizes) -> Transformer:
    checkpoint = open_checkpoint(folder)
    args = checkpoint.model_args(checkpoint.tokenizer().n_words, **({"max_seq_len": 96, "max_batch_size": 2} | sizes))
    return load_model(checkpoint, args, device=CPU, dtype=dtype)


def same_weights(a: Transformer, b: Transformer) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def copy(tiny_checkpoint, tmp_path):
    """The tiny checkpoint, to be spoiled."""
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
    args = checkpoint.model_args(checkpoint.tokenizer().n_words, 96, 2)
    model = load_model(checkpoint, args, device=CPU, dtype=torch.float32)
    mapped = {part.data_ptr() for part in checkpoint._parts[0].values()}
    assert all(weight.data_ptr() in mapped for weight in model.parameters())
    other = load_model(checkpoint, args, device=CPU, dtype=torch.bfloat16)
    assert all(weight.dtype == torch.bfloat16 for weight in other.parameters())


@pytest.mark.parametrize("n_files", [2, 4])
def test_files_of_more_ranks_than_ours(tmp_path, llama3_path, n_files):
    model = tiny_model(vocab_size=Tokenizer(llama3_path).n_words, n_kv_heads=4)
    assert same_weights(load(write_meta_checkpoint(tmp_path, model, llama3_path, n_files)), model)


@pytest.fixture(scope="module")
def llama2_folder(tmp_path_factory, llama2_path):
    """A folder as Llama 2's are: an embedding split by columns, no vocab_size, no rope_theta, a rope.freqs."""
    model = tiny_model(rope_theta=10000.0)
    folder = write_meta_checkpoint(tmp_path_factory.mktemp("llama2-7b"), model, llama2_path, 2, vocab_size=-1)
    change_params(folder, rope_theta=...)
    for i, columns in enumerate(model.tok_embeddings.weight.data.chunk(2, dim=1)):
        path = folder / f"consolidated.{i:02d}.pth"
        part = torch.load(path) | {"tok_embeddings.weight": columns.clone(), "rope.freqs": torch.zeros(16)}
        torch.save(part, path)
    return folder, model


def test_llama2_folder(llama2_folder):
    folder, model = llama2_folder
    found = load(folder)
    assert same_weights(found, model)
    assert found.params.rope_theta == 10000.0
    tokens = torch.randint(320, (1, 80))
    assert torch.allclose(found(tokens), model(tokens), atol=1e-5)


def test_a_slice_across_column_split_files(llama2_folder):
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
def test_the_longest_context(copy, family, params, limit):
    change_params(copy, **params)
    checkpoint = open_checkpoint(copy)
    assert checkpoint.max_seq_len == limit
    words = checkpoint.tokenizer().n_words
    if limit is None:
        assert checkpoint.model_args(words, 10**6, 1).max_seq_len == 10**6
        return
    assert checkpoint.model_args(words, limit, 1).max_seq_len == limit
    with pytest.raises(ValueError, match=f"max_seq_len={limit + 1} is over this model's limit of {limit}"):
        checkpoint.model_args(words, limit + 1, 1)


def test_past_4096_llama2_only_warns(llama2_folder, caplog):
    checkpoint = open_checkpoint(llama2_folder[0])
    checkpoint.model_args(320, 4096, 1)
    assert not caplog.records
    assert checkpoint.model_args(320, 5000, 1).max_seq_len == 5000
    assert "max_seq_len=5000: this model was made for at most 4096" in caplog.text


@pytest.mark.parametrize(
    ("dim", "n_layers", "given", "factor"),
    [(2048, 16, {}, 32.0), (3072, 28, {}, 32.0), (4096, 32, {}, 8.0), (2048, 16, {"rope_scaling_factor": 8}, 8)],
)
def test_the_rope_factor_of_small_models(copy, dim, n_layers, given, factor):
    change_params(copy, dim=dim, n_layers=n_layers, use_scaled_rope=True, **given)
    assert open_checkpoint(copy).model_args(524, 10, 1).rope_scaling_factor == factor


def test_unknown_keys_are_named(copy, caplog):
    change_params(copy, use_sliding_window=True, vision_chunk_size=448, max_batch_size=3)
    with caplog.at_level(logging.WARNING):
        args = open_checkpoint(copy).model_args(524, 10, 1)
    assert "unknown keys, which are ignored: use_sliding_window, vision_chunk_size" in caplog.text
    assert args.max_batch_size == 1


def test_a_link_to_nowhere(copy):
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


def test_the_shape_table_is_the_networks():
    for changes in ({}, {"tie_embeddings": True}, {"head_dim": 48, "ffn_dim": 200, "n_kv_heads": 1}):
        args = tiny_args(**changes)
        shapes = {name: tuple(weight.shape) for name, weight in Transformer(args).named_parameters()}
        assert parameter_shapes(args) == shapes


def test_a_vocabulary_that_doesn_t_agree(copy, llama2_path):
    with pytest.raises(ValueError, match="has vocab_size=524, but its tokenizer has 320 words") as error:
        Llama.build(copy, llama2_path, 32, 1)
    assert isinstance(error.value, AssertionError)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_hostile_pickle_does_not_run(copy, tmp_path):
    target = tmp_path / "made-by-the-bomb"
    edit_tensors(copy, lambda tensors: tensors.update({"norm.weight": Bomb(str(target))}))
    with pytest.raises(ValueError, match=r"00\.pth would call .*mkdir.*refused, not run") as error:
        Llama.build(copy, None, 32, 1)
    assert isinstance(error.value, AssertionError)
    assert not target.exists()
    (copy / "consolidated.00.pth").write_bytes(pickle.dumps(Bomb(str(target))))  # and a bare pickle
    with pytest.raises(ValueError, match="is not a PyTorch file"):
        Llama.build(copy, None, 32, 1)
    assert not target.exists()


def cut(path, keep=0.6):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


SPOILED = {
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
    "a word for a number": (lambda f: change_params(f, dim="128"), r"params\.json: dim is '128'"),
    "a fraction for a count": (lambda f: change_params(f, n_heads=4.5), r"params\.json: n_heads is 4\.5"),
    "null for a count": (lambda f: change_params(f, dim=None), r"params\.json: dim is None"),
    "a flag for a number": (lambda f: change_params(f, norm_eps=True), r"params\.json: norm_eps is True"),
    "a number for a flag": (lambda f: change_params(f, use_scaled_rope=1), r"params\.json: use_scaled_rope is 1"),
    "an infinite number": (
        lambda f: change_params(f, ffn_dim_multiplier=float("inf")),
        "ffn_dim_multiplier=inf must be",
    ),
    "not a number": (lambda f: change_params(f, norm_eps=float("nan")), "norm_eps=nan must be a number above 0"),
    "no rotation": (lambda f: change_params(f, rope_theta=0), "rope_theta=0 must be a number above 0"),
    "rope bands that cross": (lambda f: change_params(f, rope_low_freq_factor=9), "rope_low_freq_factor=9 must be"),
    "a million layers": (lambda f: change_params(f, n_layers=10**12), r"1000000000000 layers can't lie in 21 tensors"),
    "a huge width": (lambda f: change_params(f, dim=2**40, n_heads=4), r"wrong shape: norm\.weight"),
    "deep params": (lambda f: (f / "params.json").write_text("[" * 10**5), r"params\.json is not JSON"),
    "whole numbers for weights": (
        lambda f: edit_tensors(f, lambda t: t.update({"norm.weight": torch.ones(128, dtype=torch.int8)})),
        r"norm\.weight is no plain tensor of floating-point numbers, but torch\.int8",
    ),
    "sparse weights": (
        lambda f: edit_tensors(f, lambda t: t.update({"norm.weight": torch.ones(128).to_sparse()})),
        r"consolidated\.00\.pth",
    ),
    "weights on no device": (
        lambda f: edit_tensors(f, lambda t: t.update({"norm.weight": torch.ones(128, device="meta")})),
        r"norm\.weight is no plain tensor",
    ),
    "a negative count": (lambda f: change_params(f, n_layers=-1), r"n_layers=-1 must be at least 1"),
    "no multiple": (lambda f: change_params(f, multiple_of=0), r"multiple_of=0 must be at least 1"),
    "files that differ": (
        lambda f: torch.save({"norm.weight": torch.zeros(128)}, f / "consolidated.01.pth"),
        r"01\.pth and .*00\.pth hold different tensors",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILED.values(), ids=SPOILED)
def test_damaged_checkpoints(copy, spoil, message):
    spoil(copy)
    with pytest.raises(ValueError, match=message) as error:
        Llama.build(copy, None, 32, 1)
    assert isinstance(error.value, AssertionError)


def test_no_checkpoint_there(tmp_path, tiny_checkpoint):
    with pytest.raises(FileNotFoundError, match=r"ckpt_dir='.*/nowhere' does not exist; .* holds ") as error:
        Llama.build(tmp_path / "nowhere", None, 32, 1)
    assert isinstance(error.value, AssertionError)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*and found nothing"):
        Llama.build(tmp_path, None, 32, 1)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=r"found model\.safetensors\. That is Hugging Face's layout"):
        Llama.build(tmp_path, None, 32, 1)
    shutil.copytree(tiny_checkpoint, tmp_path / "original")
    with pytest.raises(FileNotFoundError, match=r"pass ckpt_dir='.*original'"):
        Llama.build(tmp_path, None, 32, 1)
    for mistake in (" --tokenizer_path", "", True, None, "~nobody_of_that_name/x", "x" * 5000):
        with pytest.raises(ValueError, match=r"ckpt_dir=.* is no path") as error:
            Llama.build(mistake, None, 32, 1)
        assert isinstance(error.value, AssertionError)
    with pytest.raises(ValueError, match="is one of a checkpoint's files: pass its folder"):
        Llama.build(tiny_checkpoint / "consolidated.00.pth", None, 32, 1)
    (tmp_path / "half").mkdir()
    shutil.copy(tiny_checkpoint / "consolidated.00.pth", tmp_path / "half")
    with pytest.raises(FileNotFoundError, match=r"params\.json"):
        Llama.build(tmp_path / "half", None, 32, 1)
    shutil.copy(tiny_checkpoint / "params.json", tmp_path / "half")
    with pytest.raises(FileNotFoundError, match=r"tokenizer_path=.*tokenizer\.model' does not exist"):
        Llama.build(tmp_path / "half", None, 32, 1)


def write_gguf(path, model, quantization=gguf.GGMLQuantizationType.F32, **changes):
    """A GGUF file of a tiny model with a byte-level vocabulary, written by the gguf package."""
    args = model.params
    writer = gguf.GGUFWriter(path, changes.pop("architecture", "llama"))
    tokens = ["<|im_start|>", "<|im_end|>", *_gpt2_characters(), "th", "he"]
    tokens += [f"<|reserved_{i}|>" for i in range(args.vocab_size - len(tokens))]
    metadata = {
        "llama.block_count": args.n_layers,
        "llama.context_length": 128,
        "llama.embedding_length": args.dim,
        "llama.feed_forward_length": args.ffn_size,
        "llama.attention.head_count": args.n_heads,
        "llama.attention.head_count_kv": args.kv_heads,
        "llama.attention.layer_norm_rms_epsilon": args.norm_eps,
        "llama.rope.freq_base": float(args.rope_theta),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token.startswith("<|") else 1 for token in tokens],
        "tokenizer.ggml.merges": ["t h", "h e"],
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
    }
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    add[bool] = writer.add_bool
    for key, value in (metadata | changes).items():
        if value is not ...:
            add[type(value)](key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, args.n_layers)
    for name, weight in model.named_parameters():
        array = weight.detach().numpy()
        kind = quantization if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(names.get_name(name, [".weight"]), gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [False, True])
def test_gguf(tmp_path, tied):
    model = tiny_model(tie_embeddings=tied)
    path = write_gguf(tmp_path / "model.gguf", model)
    for ckpt_dir in (path, tmp_path):  # the file, or a folder that holds just it
        found = load(ckpt_dir)
        assert same_weights(found, model)
        assert (found.output.weight is found.tok_embeddings.weight) == tied
    assert found.params.norm_eps == pytest.approx(model.params.norm_eps)
    assert (found.params.rope_theta, found.params.kv_heads) == (500000, 2)
    checkpoint = open_checkpoint(path)
    assert checkpoint.max_seq_len == 128
    tokenizer = checkpoint.tokenizer()
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("the hat", bos=False, eos=False)]
    assert pieces == ["th", "e", " ", "h", "a", "t"]
    assert tokenizer.stop_tokens == {1}
    llama = Llama.build(path, None, 64, 2, device="cpu")
    assert set(llama.text_completion(["the"], 0, max_gen_len=3)[0]) == {"generation"}


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16", "BF16"])
def test_quantized_gguf(tmp_path, kind):
    model = tiny_model()
    quantization = gguf.GGMLQuantizationType[kind]
    found = load(write_gguf(tmp_path / "model.gguf", model, quantization)).state_dict()
    for name, weight in model.state_dict().items():
        want = weight.numpy()
        if want.ndim == 2:
            want = gguf.dequantize(gguf.quantize(want, quantization), quantization)
        assert np.array_equal(found[name].numpy(), want), name


GGUF_CHANGES = {
    "another architecture": ({"architecture": "qwen2"}, "architecture 'qwen2'; only 'llama'"),
    "experts": ({"llama.expert_count": 8}, "experts: 8, but this network knows only 0"),
    "rope scaling": ({"llama.rope.scaling.type": "yarn"}, "rope scaling: 'yarn', but"),
    "stretched rope": ({"llama.rope.scale_linear": 4.0}, r"rope scale: 4\.0, but this network knows only 1\.0"),
    "rope on half of a head": ({"llama.rope.dimension_count": 16}, "rotated features a head: 16, but .* only 32"),
    "a negative scale": ({"llama.rope.freq_base": -5.0}, r"rope_theta=-5\.0 must be a number above 0"),
    "a missing key": ({"llama.embedding_length": ...}, "lacks the metadata key 'llama.embedding_length'"),
    "a wrong type": ({"llama.block_count": "two"}, "metadata llama.block_count has the unusable value 'two'"),
    "sentencepiece": ({"tokenizer.ggml.model": "llama"}, r"kind 'llama'.*pass the model's own tokenizer\.model"),
    "unknown pieces": ({"tokenizer.ggml.pre": "tekken"}, r"tokenizer.ggml.pre is 'tekken', not one of \['llama-bpe'"),
    "types of other tokens": ({"tokenizer.ggml.token_type": [1, 2]}, "320 tokens .* 2 token types"),
    "an end that is no token": ({"tokenizer.ggml.eos_token_id": 999}, "eos 999 is not one of the 320 tokens"),
    "more layers": ({"llama.block_count": 3}, r"missing: layers\.2\.attention\.wq\.weight"),
    "fewer layers": ({"llama.block_count": 1}, r"unexpected: layers\.1\.attention\.wq\.weight"),
    "a wider model": ({"llama.embedding_length": 256}, r"wrong shape: norm\.weight is \(128,\), should be \(256,\)"),
}


@pytest.mark.parametrize(("changes", "message"), GGUF_CHANGES.values(), ids=GGUF_CHANGES)
def test_gguf_files_that_can_t_be_run(tmp_path, changes, message):
    path = write_gguf(tmp_path / "model.gguf", tiny_model(), **changes)
    with pytest.raises(ValueError, match=message) as error:
        Llama.build(path, None, 32, 1)
    assert isinstance(error.value, AssertionError)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("keep", [0.0, 0.0001, 0.01, 0.1, 0.5, 0.999])
def test_cut_gguf(tmp_path, keep):
    path = write_gguf(tmp_path / "model.gguf", tiny_model())
    cut(path, keep)
    with pytest.raises(ValueError, match=r"model\.gguf") as error:
        Llama.build(path, None, 32, 1)
    assert isinstance(error.value, AssertionError)


def test_a_vocabulary_that_doesn_t_agree_with_a_gguf(tmp_path, llama3_path):
    path = write_gguf(tmp_path / "model.gguf", tiny_model())
    with pytest.raises(ValueError, match="has vocab_size=320, but its tokenizer has 524 words"):
        Llama.build(path, llama3_path, 32, 1)


def test_divisors_of_the_rotation_are_not_ignored(tmp_path, monkeypatch):
    """Llama 3.1's GGUF files carry them."""
    write = gguf.GGUFWriter.write_header_to_file

    def with_divisors(writer):
        writer.add_tensor("rope_freqs.weight", np.ones(16, dtype=np.float32))
        write(writer)

    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", with_divisors)
    path = write_gguf(tmp_path / "model.gguf", tiny_model())
    with pytest.raises(ValueError, match="tensors of rope_freqs: 1, but this network knows only 0"):
        Llama.build(path, None, 32, 1)


def test_several_gguf_files(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        write_gguf(tmp_path / name, tiny_model())
    with pytest.raises(ValueError, match=r"holds 2 GGUF files; pass one of them: a\.gguf, b\.gguf"):
        Llama.build(tmp_path, None, 32, 1)


def test_llama2_tokenizer_given_for_a_gguf(tmp_path):
    """A GGUF whose own tokenizer can't be read runs with the one it is given."""
    path = write_gguf(tmp_path / "model.gguf", tiny_model(), **{"tokenizer.ggml.model": "llama"})
    llama = Llama.build(path, write_llama2_tokenizer(tmp_path / "tokenizer.model"), 32, 1, device="cpu")
    assert llama.tokenizer.bos_id == 1
    assert len(llama.generate([[5, 6]], 3, 0)[0]) == 1
