"""GGUF files: every kind of quantization, rope scaling, split models, and refusing damaged and unsupported files."""

import functools
import math
import shutil
import struct

import gguf
import numpy as np
import pytest
import torch
from conftest import cut, hugging_face_twin, load, same_weights, tiny_model, write_gguf, write_llama2_tokenizer
from run_command import Runner

import llama.checkpoint.gguf
from llama import Llama
from llama.checkpoint import open_checkpoint
from llama.checkpoint.gguf import GGUFCheckpoint
from llama.errors import CheckpointError
from llama.gguf_file import GGUFFile


@pytest.mark.parametrize("tied", [False, True])
def test_gguf(tmp_path, tied):
    model = tiny_model(tie_embeddings=tied)
    path = write_gguf(tmp_path / "model.gguf", model)
    for ckpt_dir in (path, tmp_path):  # the file, or the folder it is in
        loaded = load(ckpt_dir)
        assert same_weights(loaded, model)
        assert (loaded.output.weight is loaded.tok_embeddings.weight) == tied
    assert loaded.params.norm_eps == pytest.approx(model.params.norm_eps)
    assert (loaded.params.rope_theta, loaded.params.kv_heads) == (500000, 2)
    checkpoint = open_checkpoint(path)
    assert checkpoint.settings.params["max_position_embeddings"] == 128
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
    loaded = load(write_gguf(tmp_path / "model.gguf", model, quantization)).state_dict()
    for name, weight in model.state_dict().items():
        expected = weight.numpy()
        if expected.ndim == 2:
            expected = gguf.dequantize(gguf.quantize(expected, quantization), quantization)
        assert np.array_equal(loaded[name].numpy(), expected), name


UNSUPPORTED = {
    "another architecture": ({"architecture": "qwen2"}, "architecture 'qwen2'; only 'llama'"),
    "experts": ({"llama.expert_count": 8}, r"experts: 8, and this network knows only \[0\]"),
    "rope scaling": ({"llama.rope.scaling.type": "yarn"}, "rope scaling: 'yarn', and"),
    "one of several parts": (
        {"split.count": 3},
        r"is one of a model's 3 files: name it NAME-00001-of-00003\.gguf",
    ),
    "a negative number of parts": ({"split.count": 2**32 - 3}, "is one of a model's 4294967293 files"),
    "value heads of another size": ({"llama.attention.value_length": 16}, "features per value head: 16, and"),
    "rope on half of a head": (
        {"llama.rope.dimension_count": 16},
        r"rotated features per head: 16, and .* only \[32\]",
    ),
    "a negative rotary base": ({"llama.rope.freq_base": -5.0}, r"rope_theta=-5\.0 must be a number above 0"),
    "a missing key": ({"llama.embedding_length": ...}, "lacks 'llama.embedding_length'"),
    "a wrong type": ({"llama.block_count": "two"}, "llama.block_count is 'two', not of type int"),
    "another kind of tokenizer": ({"tokenizer.ggml.model": "t5"}, r"kind 't5'.*pass the model's own tokenizer as"),
    "sentencepiece without scores": ({"tokenizer.ggml.model": "llama"}, r"lacks 'tokenizer\.ggml\.scores'"),
    "an unknown pre-tokenizer": (
        {"tokenizer.ggml.pre": "tekken"},
        r"pre is 'tekken', not one of \[.*'gpt-2', 'llama-bpe'",
    ),
    "too few token types": ({"tokenizer.ggml.token_type": [1, 2]}, "320 tokens .* 2 token types"),
    "an eos outside the vocabulary": ({"tokenizer.ggml.eos_token_id": 999}, "eos 999 is not one of the 320 tokens"),
    "more layers": ({"llama.block_count": 3}, r"missing: layers\.2\.attention\.wq\.weight"),
    "fewer layers": ({"llama.block_count": 1}, r"unexpected: layers\.1\.attention\.wq\.weight"),
    "a wider model": ({"llama.embedding_length": 256}, r"wrong shape: norm\.weight is \(128,\), should be \(256,\)"),
}


@pytest.mark.parametrize(("changes", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_files_are_refused(tmp_path, changes, message):
    path = write_gguf(tmp_path / "model.gguf", tiny_model(), **changes)
    with pytest.raises(ValueError, match=message) as error:
        Llama.build(path, None, 32, 1)
    assert isinstance(error.value, AssertionError)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("keep", [0.0, 0.0001, 0.01, 0.1, 0.5, 0.999])
def test_truncated_files_are_refused(tmp_path, keep):
    path = write_gguf(tmp_path / "model.gguf", tiny_model())
    cut(path, keep)
    with pytest.raises(ValueError, match=r"model\.gguf") as error:
        Llama.build(path, None, 32, 1)
    assert isinstance(error.value, AssertionError)


def test_a_tokenizer_of_another_size(tmp_path, llama3_path):
    path = write_gguf(tmp_path / "model.gguf", tiny_model())
    with pytest.raises(ValueError, match="has vocab_size=320, but its tokenizer has 524 tokens"):
        Llama.build(path, llama3_path, 32, 1)


def write_divisors(monkeypatch, divisors):
    """Make `write_gguf` add divisors of the rotary frequencies to the file."""
    write = gguf.GGUFWriter.write_header_to_file

    def with_divisors(writer):
        writer.add_tensor("rope_freqs.weight", np.array(divisors, dtype=np.float32))
        write(writer)

    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", with_divisors)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_divisors_of_llama3(tmp_path, monkeypatch, factor):
    """Computed as in the files of Llama 3.1 and later."""
    scaled = {"use_scaled_rope": True, "rope_scaling_factor": factor, "rope_theta": 500000.0}
    model = tiny_model(**scaled)
    divisors = []
    for j in range(16):
        wavelength = 2 * math.pi * 500000.0 ** (2 * j / 32)
        smooth = (8192 / wavelength - 1) / (4 - 1)
        blended = 1 / ((1 - smooth) / factor + smooth)
        divisors.append(1.0 if wavelength < 8192 / 4 else factor if wavelength > 8192 else blended)
    write_divisors(monkeypatch, divisors)
    loaded = load(write_gguf(tmp_path / "model.gguf", model))
    assert loaded.params.use_scaled_rope
    assert loaded.params.rope_scaling_factor == factor
    assert torch.allclose(loaded.freqs_cis, model.freqs_cis, atol=1e-6)
    assert not torch.allclose(loaded.freqs_cis, tiny_model(rope_theta=500000.0).freqs_cis, atol=1e-3)
    assert same_weights(loaded, model)


def test_other_rope_divisors(tmp_path, monkeypatch):
    model = tiny_model()
    divisors = [1.0 + 0.5 * j for j in range(16)]
    write_divisors(monkeypatch, divisors)
    loaded = load(write_gguf(tmp_path / "model.gguf", model))
    assert list(loaded.params.rope_divisors) == divisors
    angles = torch.arange(96)[:, None] * model.params.rope_theta ** (-torch.arange(16) / 16) / torch.tensor(divisors)
    assert torch.allclose(loaded.freqs_cis, torch.polar(torch.ones_like(angles), angles), atol=1e-4)


def test_rope_divisors_of_another_head_size(tmp_path, monkeypatch):
    write_divisors(monkeypatch, [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="3 rope_divisors for 16 frequencies"):
        Llama.build(write_gguf(tmp_path / "model.gguf", tiny_model()), None, 32, 1)


@pytest.mark.parametrize(("divisors", "message"), [([], "'rope_freqs.weight'.*none may be empty"), (2.0, "0 axes")])
def test_rope_divisors_that_are_none(tmp_path, monkeypatch, divisors, message):
    write_divisors(monkeypatch, divisors)
    with pytest.raises(CheckpointError, match=message):
        GGUFFile(write_gguf(tmp_path / "model.gguf", tiny_model()))


@pytest.mark.parametrize(
    "metadata",
    [
        {"llama.rope.scale_linear": 4.0},
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        {"llama.rope.scaling.factor": 4.0},
    ],
)
def test_linear_rope_scaling(tmp_path, metadata):
    model = tiny_model()
    loaded = load(write_gguf(tmp_path / "model.gguf", model, **metadata))
    assert torch.allclose(loaded.freqs_cis[::4], model.freqs_cis[:24], atol=1e-5)
    unscaled = load(write_gguf(tmp_path / "plain.gguf", model, **metadata | {"llama.rope.scaling.type": "none"}))
    assert torch.equal(unscaled.freqs_cis, model.freqs_cis)


KINDS = [kind for kind in gguf.GGMLQuantizationType if kind in gguf.quants._type_traits]


@pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])
def test_every_kind_of_quantization_and_any_slice(tmp_path, kind):
    """Blocks of random bytes, since any bytes are valid blocks."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = 12, 4 * block
    data = np.random.default_rng(0).integers(0, 256, (rows, columns // block * block_bytes), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("blk.0.ffn_down.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(data, kind)
        checkpoint = GGUFCheckpoint.__new__(GGUFCheckpoint)  # which doesn't read the settings: there are none
        checkpoint.path = tmp_path / "model.gguf"
        checkpoint._tensors = GGUFFile(checkpoint.path).tensors
        name = "blk.0.ffn_down.weight"
        for axis, start, stop in [(None, 0, 0), (0, 3, 9), (1, 0, columns), (1, block, 3 * block), (1, 1, block + 1)]:
            actual = checkpoint.read(name, axis, start, stop).float().numpy()
            part = expected if axis is None else expected[start:stop] if axis == 0 else expected[:, start:stop]
            assert np.array_equal(actual, part, equal_nan=True), (axis, start, stop)
        assert checkpoint.dtype() == {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind.name, torch.float32)


@pytest.mark.parametrize("kind", [0, 4, 6, 8, 9, 10])
def test_an_array_longer_than_the_file(tmp_path, kind):
    """By itself, the gguf package's reader would loop beyond the end of the file for hours."""
    key = b"tokenizer.ggml.scores"
    array = struct.pack("<IIQ", 9, kind, 2**40)
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key + array
    (tmp_path / "model.gguf").write_bytes(header + bytes(50))
    with pytest.raises(ValueError, match=r"model\.gguf is damaged or cut short"):
        Llama.build(tmp_path, None, 32, 1)


def test_every_name_of_llama3s_pre_tokenizer(tmp_path):
    """With Llama 3's tokenizer, a text begins with BOS unless the file says otherwise."""
    for pre in ("llama-bpe", "llama3", "llama-v3"):
        metadata = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": ...}
        path = write_gguf(tmp_path / f"{pre}.gguf", tiny_model(), **metadata)
        assert open_checkpoint(path).tokenizer().add_bos


def test_several_gguf_files(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        write_gguf(tmp_path / name, tiny_model())
    with pytest.raises(ValueError, match=r"holds 2 GGUF files; pass one of them: a\.gguf, b\.gguf"):
        Llama.build(tmp_path, None, 32, 1)


@pytest.fixture
def split(tmp_path, monkeypatch):
    """Writes a tiny model over GGUF files of at most 7 tensors each, 20 in all; the first may hold metadata only."""

    def write_split(name="model", small_first_shard=False):
        writer = functools.partial(gguf.GGUFWriter, split_max_tensors=7, small_first_shard=small_first_shard)
        folder = tmp_path / "split"
        folder.mkdir(exist_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr(gguf, "GGUFWriter", writer)
            write_gguf(folder / f"{name}.gguf", tiny_model(tie_embeddings=True))
        return sorted(folder.glob(f"{name}-*.gguf"))

    return write_split


@pytest.mark.parametrize("small_first_shard", [False, True])
def test_a_model_split_over_files(tmp_path, split, monkeypatch, capsys, small_first_shard):
    files = split(small_first_shard=small_first_shard)
    assert len(files) == 3 + small_first_shard
    tokens = torch.randint(320, (2, 64), generator=torch.Generator().manual_seed(0))
    unsplit = write_gguf(tmp_path / "unsplit.gguf", tiny_model(tie_embeddings=True))
    with torch.no_grad():
        expected = load(unsplit).forward(tokens, 0)
        for ckpt_dir in (files[0], files[-1], files[0].parent):
            assert torch.equal(load(ckpt_dir).forward(tokens, 0), expected)
        twin = hugging_face_twin(tiny_model(tie_embeddings=True))
        assert torch.allclose(expected, twin(tokens).logits, rtol=0, atol=1e-4)
    runner = Runner(monkeypatch, capsys)
    described = [runner.llama("info", path, "--max_seq_len", 64).stdout.splitlines() for path in (unsplit, files[1])]
    assert described[1][1].endswith(f"GGUF, {len(files)} files of weights, F32 100%")
    assert described[0][2:7] == described[1][2:7]  # all but the files and the free memory
    assert described[0][6].startswith("tokenizer ")
    assert runner.llama("convert", files[0].parent, tmp_path / "converted", "--layout", "hf").returncode == 0
    assert same_weights(load(tmp_path / "converted"), load(unsplit))


def test_each_file_of_a_split_model_is_opened_once(split, monkeypatch):
    opened = []

    class Recorder(GGUFFile):
        def __init__(self, path):
            opened.append(path)
            super().__init__(path)

    files = split()
    monkeypatch.setattr(llama.checkpoint.gguf, "GGUFFile", Recorder)
    open_checkpoint(files[0].parent).tokenizer()
    assert opened == files


def test_missing_files_of_a_split_model_are_named(split):
    files = split()
    files[1].unlink()
    for ckpt_dir in (files[2], files[0].parent):
        with pytest.raises(FileNotFoundError, match=r"one of a model's 3 files, .* lacks model-00002-of-00003\.gguf$"):
            open_checkpoint(ckpt_dir)


INT32 = struct.pack("<I", gguf.GGUFValueType.INT32)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"split.no", b"split.on", r"00002-of-00003\.gguf lacks 'split\.no'"),
        (b"split.count", b"split.cnuot", r"00002-of-00003\.gguf lacks 'split\.count'"),
        (b"blk.0.ffn_up.weight", b"blk.0.attn_q.weight", r"hold 20 tensors \(19 different\), and .* is 20"),
    ],
)
def test_files_of_a_split_model_must_belong_together(split, old, new, message):
    first, second, _ = split()
    second.write_bytes(second.read_bytes().replace(old, new))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(first)


def test_the_order_and_number_of_the_files_of_a_split_model(split):
    _, second, third = split()
    intact = second.read_bytes()
    shutil.copy(third, second)
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.gguf: .* are \(2, 3\), and should be \(1, 3\)"):
        open_checkpoint(third)
    second.write_bytes(intact)
    _, second_of_four, *_ = split("other", small_first_shard=True)
    shutil.copy(second_of_four, second)
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.gguf: .* are \(1, 4\), and should be \(1, 3\)"):
        open_checkpoint(third)
    with pytest.raises(CheckpointError, match=r"is one of a model's 4 files: name it NAME-00001-of-00004\.gguf"):
        open_checkpoint(second)


def test_the_number_of_tensors_of_a_split_model(split):
    first = split()[0]
    key = b"split.tensors.count" + INT32
    first.write_bytes(first.read_bytes().replace(key + struct.pack("<I", 20), key + struct.pack("<I", 21)))
    with pytest.raises(CheckpointError, match=r"hold 20 tensors \(20 different\), and split\.tensors\.count is 21"):
        open_checkpoint(first)


def test_split_models_are_told_apart_from_several(split):
    split()
    folder = split("other")[0].parent
    with pytest.raises(ValueError, match=r"holds 6 GGUF files; pass one of them: model-00001-of-00003\.gguf, "):
        open_checkpoint(folder)


def test_llama2_tokenizer_given_for_a_gguf(tmp_path):
    """A GGUF file whose own tokenizer isn't supported works with another one."""
    path = write_gguf(tmp_path / "model.gguf", tiny_model(), **{"tokenizer.ggml.model": "llama"})
    llama = Llama.build(path, write_llama2_tokenizer(tmp_path / "tokenizer.model"), 32, 1, device="cpu")
    assert llama.tokenizer.bos_id == 1
    assert len(llama.generate([[5, 6]], 3, 0)[0]) == 1
