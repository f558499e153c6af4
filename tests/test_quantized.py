"""Weights of 8 and 4 bits: rounding, packing, products, GGUF's blocks, every layout, damaged weights, ranks."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import (
    Ranks,
    examples,
    run_python,
    same_weights,
    strong,
    tiny_args,
    tiny_model,
    write_gguf,
    write_llama3_tokenizer,
    write_meta_checkpoint,
)
from forked import fork_python
from hypothesis import example, given
from hypothesis import strategies as st

import llama.int4_packing
from llama import Llama, Tokenizer, Transformer
from llama.checkpoint import check_tensors, load_model, open_checkpoint, parameter_shapes, save_checkpoint, share
from llama.checkpoint.int4_blocks import INT4_BLOCKS
from llama.checkpoint.parameters import quantization_of
from llama.errors import InputError
from llama.files import release_pages
from llama.int4_packing import pack, unpack
from llama.quantized import (
    Int4Weight,
    Int8Weight,
    QuantizedWeight,
    check_quantize,
    round_to_int4,
    round_to_int8,
)

CPU = torch.device("cpu")
KINDS = ("int8", "int4")


def random_weight(out_features: int, in_features: int, seed: int = 0) -> torch.Tensor:
    """Weights with another spread and another mean in each row."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator)
    return weight * torch.linspace(0.1, 2, out_features)[:, None] + torch.linspace(-1, 1, out_features)[:, None]


def quantized(weight: torch.Tensor, kind: str, dtype: torch.dtype = torch.float32) -> QuantizedWeight:
    if kind == "int8":
        int8 = Int8Weight(*weight.shape, dtype=dtype, device=CPU)
        int8.set_rows(0, *round_to_int8(weight, dtype))
        return int8
    int4 = Int4Weight(*weight.shape, dtype=dtype, device=CPU)
    int4.set_rows(0, round_to_int4(weight, dtype))
    return int4


def by_hand(weight: torch.Tensor, kind: str, dtype: torch.dtype) -> np.ndarray:
    """The rounded weights in float64, one weight after the other, from the scales and zeros of `round_to_…`."""
    result = np.empty(weight.shape)
    if kind == "int8":
        values, scales = round_to_int8(weight, dtype)
        for row, column in np.ndindex(*weight.shape):
            result[row, column] = int(values[row, column]) * float(scales[row])
        return result
    values, scales, zeros = round_to_int4(weight, dtype)
    for row, column in np.ndindex(*weight.shape):
        group = column // 32
        result[row, column] = (int(values[row, column]) - 8) * float(scales[row, group]) + float(zeros[row, group])
    return result


# --- rounding


def test_rounding_to_8_bits():
    weight = random_weight(5, 40)
    weight[3] = 0
    values, scales = round_to_int8(weight, torch.float32)
    assert torch.equal(scales, weight.abs().amax(1) / 127)
    assert values.abs().amax(1).tolist() == [127, 127, 127, 0, 127]
    assert ((values * scales[:, None] - weight).abs() <= scales[:, None] * 0.5001).all()


def test_rounding_to_4_bits():
    weight = random_weight(16, 96)
    weight[3, 32:64] = 0.75  # all weights of a group are equal
    weight[4, :32] = 0
    values, scales, zeros = round_to_int4(weight, torch.float32)
    assert values.shape == (16, 96)
    assert scales.shape == zeros.shape == (16, 3)
    assert values.max() == 15
    assert values.min() == 0
    rounded = torch.from_numpy(by_hand(weight, "int4", torch.float32)).float()
    assert (rounded[3, 32:64] == 0.75).all()
    assert (rounded[4, :32] == 0).all()
    # Never worse than 16 values from the smallest to the largest weight of a group.
    groups = weight.view(16, 3, 32)
    low, step = groups.amin(2, keepdim=True), (groups.amax(2, keepdim=True) - groups.amin(2, keepdim=True)) / 15
    plain = ((groups - low) / step.clamp_min(1e-9)).round() * step + low
    plain_errors, errors = ((plain - groups) ** 2).sum(2), ((rounded.view(16, 3, 32) - groups) ** 2).sum(2)
    assert (errors <= plain_errors + 1e-6).all()
    assert errors.sum() < 0.98 * plain_errors.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_on_a_grid_of_16_values_are_kept(dtype):
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 16, (16, 64), generator=generator)
    values[:, [0, 32]], values[:, [1, 33]] = 0, 15
    weight = (values - 8) * 0.0625 + 0.25
    assert torch.equal(round_to_int4(weight, dtype).values, values.to(torch.uint8))
    assert torch.equal(quantized(weight, "int4", dtype).dequantize().float(), weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", [float("nan"), float("inf"), -float("inf")])
def test_damaged_weights_stay_so(kind, damage):
    weight = random_weight(16, 64)
    weight[5, 40] = damage
    rounded = quantized(weight, kind)
    assert not rounded.dequantize()[5].isfinite().all()
    others = torch.arange(16) != 5
    assert torch.equal(rounded.dequantize()[others], quantized(weight.nan_to_num(0, 0, 0), kind).dequantize()[others])
    for n_rows in (1, 40):
        assert not rounded(torch.ones(n_rows, 64))[:, 5].isfinite().any()


# --- packing


@given(st.integers(1, 13), st.integers(1, 6), st.sampled_from(["cpu", "pairs"]), st.integers(0, 9))
def test_what_is_packed_can_be_unpacked(sixteens, groups, packing, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 16, (16 * sixteens, 32 * groups), dtype=torch.uint8, generator=generator)
    packed = pack(values, packing)
    assert packed.nbytes == values.numel() / 2
    assert torch.equal(unpack(packed, packing).T + 8, values.to(torch.int8))


def pack_as_on_cuda(pairs: torch.Tensor, n_tiles: int) -> torch.Tensor:
    """What torch's `_convert_weight_to_int4pack` does on CUDA, one thread of the GPU after the other."""
    n_rows, n_pairs = pairs.shape
    packed = np.zeros((n_rows // 8, 2 * n_pairs // (16 * n_tiles), 32, n_tiles // 2), np.uint32)
    for row_tile, column_step, thread, word in np.ndindex(*packed.shape):
        row = 8 * row_tile + thread // 4
        first = (column_step * n_tiles + 2 * word) * 8 + thread % 4
        pair = [int(pairs[row, first + offset]) for offset in (0, 4, 8, 12)]
        four_bits = [byte >> 4 for byte in pair] + [byte & 15 for byte in pair]  # the first in the lowest bits
        packed[row_tile, column_step, thread, word] = sum(value << (4 * i) for i, value in enumerate(four_bits))
    return torch.from_numpy(packed.view(np.int32))


@pytest.mark.parametrize(("in_features", "n_tiles"), [(256, 8), (192, 4), (96, 2)])
def test_packing_for_cuda(monkeypatch, in_features, n_tiles):
    monkeypatch.setattr(llama.int4_packing, "pack_for_cuda", pack_as_on_cuda)
    monkeypatch.setattr("llama.quantized.best_packing", lambda device, dtype: "cuda")
    values = torch.randint(0, 16, (48, in_features), dtype=torch.uint8)
    packed = pack(values, "cuda")
    assert packed.shape == (6, in_features // (16 * n_tiles), 32, n_tiles // 2)
    assert torch.equal(unpack(packed, "cuda").T + 8, values.to(torch.int8))
    weight = random_weight(48, in_features)
    assert np.allclose(quantized(weight, "int4").dequantize(), by_hand(weight, "int4", torch.float32), atol=1e-6)


def test_packed_weights_stay_on_a_device_of_their_type():
    weight = quantized(random_weight(16, 32), "int4").to("meta")
    for use in (weight.dequantize, lambda: weight(torch.ones(1, 32, device="meta"))):
        with pytest.raises(
            InputError, match="packed for cpu can't be used on meta: build the model with device='meta'"
        ):
            use()
    assert quantized(random_weight(16, 32), "int8").to("meta").dequantize().shape == (16, 32)


# --- products


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantized_weights(kind, dtype):
    weight = random_weight(80, 96)
    result = quantized(weight, kind, dtype)
    assert (result.out_features, result.in_features, result.dtype) == (80, 96, dtype)
    expected = by_hand(weight, kind, dtype)
    assert result.dequantize().dtype == dtype
    assert np.allclose(result.dequantize().double(), expected, atol=2e-7 if dtype == torch.float32 else 0.02)
    n_scales = 80 if kind == "int8" else 2 * 80 * 3
    assert result.nbytes == 80 * 96 // (1 if kind == "int8" else 2) + n_scales * dtype.itemsize


def check_product(weight: QuantizedWeight, n_rows: int) -> None:
    """Compare the product with that of the dequantized weight, in float64."""
    x = torch.randn(n_rows, weight.in_features, generator=torch.Generator().manual_seed(1)).to(weight.dtype)
    y = weight(x)
    assert y.dtype == x.dtype
    expected = x.double() @ weight.dequantize().double().T
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[weight.dtype]
    assert (y - expected).abs().max() <= tolerance * expected.abs().max()


@examples(200)
@given(
    st.integers(1, 13),
    st.integers(1, 6),
    st.sampled_from([1, 2, 5, 16, 17, 40]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_products_in_4_bits(sixteens, groups, n_rows, dtype):
    check_product(quantized(random_weight(16 * sixteens, 32 * groups), "int4", dtype), n_rows)


@examples(200)
@given(
    st.integers(1, 150),
    st.one_of(st.integers(1, 150), st.sampled_from([16, 32, 48, 160])),
    st.sampled_from([1, 2, 5, 16, 17, 40]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@example(64, 100, 2, torch.bfloat16)
@example(16, 40, 1, torch.bfloat16)
def test_products_in_8_bits(out_features, in_features, n_rows, dtype):
    check_product(quantized(random_weight(out_features, in_features), "int8", dtype), n_rows)


@pytest.mark.parametrize("kind", KINDS)
def test_products_in_several_portions(monkeypatch, kind):
    monkeypatch.setattr("llama.quantized.EXPANDED_AT_ONCE", 64 * 96)
    weight = quantized(random_weight(208, 96), kind)
    check_product(weight, 20)
    x = torch.randn(2, 3, 20, 96)
    assert torch.allclose(weight(x)[1, 2], weight(x[1, 2]), atol=1e-5)
    assert weight(x[:0]).shape == (0, 3, 20, 208)


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_on_other_processors(capability):
    """torch packs weights, and multiplies, in another way on processors without AVX-512, and without AVX2."""
    isa = {"avx2": "AVX2", "default": "SSE41"}[capability]
    process = run_python(
        "-m",
        "pytest",
        "-q",
        __file__,
        "-k",
        "products or unpacked",
        ATEN_CPU_CAPABILITY=capability,
        ONEDNN_MAX_CPU_ISA=isa,
    )
    assert process.returncode == 0, process.stdout


def test_large_sums_in_float16():
    weight = quantized(torch.full((1, 4096), 1.0), "int8", torch.float16)
    assert weight(torch.full((20, 4096), 2.0, dtype=torch.float16))[0] == pytest.approx(8192, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_rows", [2, 20])
def test_gradients_flow_through(kind, n_rows):
    weight = quantized(random_weight(16, 32), kind, torch.bfloat16)
    x = torch.randn(n_rows, 32, dtype=torch.bfloat16, requires_grad=True)
    weight(x).sum().backward()
    expected = weight.dequantize().float().sum(0)
    assert (x.grad - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.slow  # imports torch's compiler
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_in_one_graph(kind):
    weight = quantized(random_weight(80, 96), kind, torch.bfloat16)
    compiled = torch.compile(weight, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for n_rows in (1, 2, 7, 16, 17, 40):
            x = torch.randn(n_rows, 96, dtype=torch.bfloat16)
            assert torch.equal(compiled(x), weight(x))


def test_vectors_of_tokens():
    weight = quantized(random_weight(20, 32), "int8")
    tokens = torch.tensor([[3, 0, 19], [19, 3, 3]])
    assert torch.equal(weight.rows(tokens), weight.dequantize()[tokens])


# --- GGUF's blocks

BLOCK_SIZES = {"Q4_0": (32, 18), "Q4_1": (32, 20), "Q4_K": (256, 144)}  # weights, bytes


@pytest.mark.parametrize("kind", BLOCK_SIZES)
@examples(50)
@given(seed=st.integers(0, 2**32 - 1))
def test_blocks_of_gguf_files(kind, seed):
    random = np.random.default_rng(seed)
    n_weights, n_bytes = BLOCK_SIZES[kind]
    blocks = random.integers(0, 256, (4, 3, n_bytes), dtype=np.uint8)
    n_halfs = 1 if kind == "Q4_0" else 2
    blocks[..., : 2 * n_halfs] = random.normal(0, 0.1, (4, 3, n_halfs)).astype(np.float16).view(np.uint8)
    quantization = gguf.GGMLQuantizationType[kind]
    values, scales, zeros = INT4_BLOCKS[quantization](torch.from_numpy(blocks))
    weight = (values.float() - 8).view(4, -1, 32) * scales[..., None] + zeros[..., None]
    expected = gguf.dequantize(blocks.reshape(4, -1), quantization)
    assert expected.shape == (4, 3 * n_weights)
    np.testing.assert_allclose(weight.flatten(1), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("kind", "tolerance"), [("Q4_0", 0), ("Q4_1", 1e-6), ("Q8_0", None), ("BF16", None)])
def test_blocks_are_taken_as_they_are(tmp_path, kind, tolerance):
    path = write_gguf(tmp_path / "model.gguf", tiny_model(), gguf.GGMLQuantizationType[kind])
    plain, loaded = load(path), load(path, "int4")
    rounded_anew = False
    for name in parameter_shapes(plain.params):
        layer = name.removesuffix(".weight")
        weight, expected = loaded.get_submodule(layer).weight, plain.get_submodule(layer).weight
        if isinstance(weight, Int4Weight):
            if tolerance is not None:
                assert (weight.dequantize() - expected).abs().max() <= tolerance
            assert torch.allclose(weight.dequantize(), expected, atol=0.15)
            rounded_anew |= not torch.allclose(weight.dequantize(), expected, atol=1e-3)
        else:
            assert layer.endswith(("norm", "tok_embeddings"))
            assert torch.equal(weight, expected)
    assert rounded_anew == (tolerance is None)


# --- models


def load(folder, quantize=None, dtype=torch.float32, **sizes) -> Transformer:
    """The network of a checkpoint of any layout, on the CPU."""
    checkpoint = open_checkpoint(folder)
    sizes = {"max_seq_len": 96, "max_batch_size": 4} | sizes
    args = checkpoint.settings.model_args(checkpoint.settings.params["vocab_size"], **sizes)
    check_tensors(checkpoint, args)
    return load_model(checkpoint, args, device=CPU, dtype=dtype, quantize=quantize)


def dequantized(model: Transformer) -> Transformer:
    """A plain network with the weights that the quantized ones stand for."""
    plain = Transformer(model.params)
    weights = {}
    for name in parameter_shapes(model.params):
        weight = model.get_submodule(name.removesuffix(".weight")).weight
        weights[name] = weight.dequantize() if isinstance(weight, QuantizedWeight) else weight
    if model.params.tie_embeddings:
        weights["output.weight"] = weights["tok_embeddings.weight"]
    plain.load_state_dict(weights)
    return plain


SIZES = {"ffn_dim": 256, "n_kv_heads": 4}  # so that four processes have whole groups of 32 input features


def write_checkpoints(folder, tied: bool) -> dict[str, object]:
    """The same model in every layout: the path of each."""
    path = write_llama3_tokenizer(folder / "tokenizer.model")
    model = tiny_model(vocab_size=Tokenizer(path).n_words, tie_embeddings=tied, **SIZES)
    save_checkpoint(folder / "hf", model, Tokenizer(path), layout="hf")
    return {
        "meta": write_meta_checkpoint(folder / "meta", model, path, **SIZES),
        "two files": write_meta_checkpoint(folder / "two", model, path, 2, columns=not tied, **SIZES),
        "hf": folder / "hf",
        "gguf": write_gguf(folder / "model.gguf", model),
    }


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_layout(tmp_path, kind, tied):
    checkpoints = write_checkpoints(tmp_path, tied)
    models = {layout: load(path, kind) for layout, path in checkpoints.items()}
    plain = load(checkpoints["meta"])
    expected = dequantized(models["meta"])
    for layout, model in models.items():
        assert same_weights(dequantized(model), expected), layout
        assert not any(parameter.is_meta for parameter in [*model.parameters(), *model.buffers()])
    for name in parameter_shapes(plain.params):
        weight = models["meta"].get_submodule(name.removesuffix(".weight")).weight
        if isinstance(weight, QuantizedWeight):
            exact = plain.get_parameter(name)
            expected_kind = quantization_of(name, plain.params, kind, 1)
            assert isinstance(weight, Int8Weight if expected_kind == "int8" else Int4Weight)
            assert torch.equal(weight.dequantize(), quantized(exact, expected_kind).dequantize()), name
        else:
            assert name.endswith("norm.weight") or (name == "tok_embeddings.weight" and not tied)
            assert torch.equal(weight, plain.get_parameter(name))
    if tied:
        assert models["meta"].output.weight is models["meta"].tok_embeddings.weight


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_network_computes_with_the_rounded_weights(tmp_path, kind, tied):
    model = load(write_checkpoints(tmp_path, tied)["meta"], kind)
    plain = dequantized(model)
    tokens = torch.randint(0, model.vocab_size, (4, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(model(tokens), plain(tokens), atol=2e-4)
        for start, stop in ((0, 20), (20, 21), (21, 30)):
            ours, theirs = (m(tokens[:, start:stop], start) for m in (model, plain))
            assert torch.allclose(ours, theirs, atol=2e-4)
    ours, theirs = (Llama(m, Tokenizer(tmp_path / "tokenizer.model")) for m in (model, plain))
    prompts = [[7, 8, 9], [100] * 40, [5, 6, 5, 6, 5], [200, 201]]
    assert ours.generate(prompts, 20, 0) == theirs.generate(prompts, 20, 0)
    beams = [llama.generate(prompts[:2], 12, num_beams=2, num_return_sequences=2)[0] for llama in (ours, theirs)]
    assert beams[0] == beams[1]
    scores = [llama.generate(prompts, 0, logprobs=True, echo=True)[1] for llama in (ours, theirs)]
    for one, other in zip(*scores, strict=True):
        assert one == pytest.approx(other, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_16_bits(tmp_path, kind, dtype):
    model = load(write_checkpoints(tmp_path, True)["meta"], kind, dtype)
    assert model.norm.weight.dtype == model.tok_embeddings.weight.dtype == dtype
    tokens = torch.randint(0, model.vocab_size, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = dequantized(model.float() if kind == "int8" else load(tmp_path / "meta", kind))(tokens)
        model = load(tmp_path / "meta", kind, dtype)
        expected = dequantized(model)(tokens)
        ours = model(tokens)
        steps = torch.cat([model(tokens[:, i : i + 1], i) for i in range(30)], dim=1)
    assert (ours - expected).std() < 0.05 * expected.std()
    assert (steps - expected).std() < 0.05 * expected.std()
    assert (ours - exact).std() < 0.25 * exact.std()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["layers.1.feed_forward.w2", "layers.0.attention.wv", "tok_embeddings"])
def test_a_damaged_weight_is_an_error(tmp_path, llama3_path, kind, name):
    model = tiny_model(vocab_size=Tokenizer(llama3_path).n_words, tie_embeddings=True)
    model.get_submodule(name).weight.data[7, 40] = float("nan")
    damaged = load(write_gguf(tmp_path / "model.gguf", model), kind)
    with pytest.raises(ArithmeticError):
        Llama(damaged, Tokenizer(llama3_path)).generate([[7, 8, 9]], 5, 0)


def test_which_parameters_are_quantized():
    args = tiny_args(**SIZES)
    kinds = {name: quantization_of(name, args, "int4", 1) for name in parameter_shapes(args)}
    assert {name for name, kind in kinds.items() if kind is None} == {
        "tok_embeddings.weight",
        "norm.weight",
        *(f"layers.{i}.{norm}.weight" for i in range(2) for norm in ("attention_norm", "ffn_norm")),
    }
    assert set(kinds.values()) == {None, "int4"}
    assert {quantization_of(name, args, None, 1) for name in kinds} == {None}
    tied = tiny_args(tie_embeddings=True, **SIZES)
    for kind in KINDS:
        assert quantization_of("tok_embeddings.weight", tied, kind, 1) == "int8"
    # Where a process's input features are no whole groups, or its output features too few for torch's product.
    w1, w2 = ("layers.0.feed_forward.w1.weight", "layers.0.feed_forward.w2.weight")
    assert [quantization_of(w2, tiny_args(ffn_dim=192), "int4", size) for size in (1, 2, 4)] == ["int4", "int4", "int8"]
    assert [quantization_of(w1, tiny_args(ffn_dim=192), "int4", size) for size in (1, 2, 4)] == ["int4"] * 3
    assert quantization_of(w1, tiny_args(ffn_dim=200), "int4", 1) == "int8"


def test_what_can_be_asked_for():
    for kind in (None, *KINDS):
        check_quantize(kind, torch.bfloat16)
    check_quantize(None, torch.float64)
    with pytest.raises(InputError, match=r"quantize='int5' must be one of \['int8', 'int4'\], or None"):
        check_quantize("int5", torch.bfloat16)
    with pytest.raises(InputError, match="not float64"):
        check_quantize("int8", torch.float64)


# --- split over processes


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_hold_slices_of_the_same_weights(monkeypatch, tmp_path, kind, size):
    checkpoints = write_checkpoints(tmp_path, False)
    expected = dequantized(load(checkpoints["meta"], kind))
    shapes = parameter_shapes(expected.params)
    for path in checkpoints.values():
        with monkeypatch.context() as patch:
            models = Ranks(patch, size).run(lambda path=path: load(path, kind))
        for name, shape in shapes.items():
            for rank, model in enumerate(models):
                weight = model.get_submodule(name.removesuffix(".weight")).weight
                weight = weight.dequantize() if isinstance(weight, QuantizedWeight) else weight
                axis, start, stop = share(name, shape, expected.params, rank, size)
                whole = expected.get_parameter(name)
                assert torch.equal(weight, whole if axis is None else whole.narrow(axis, start, stop - start)), name


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_that_hold_the_same_kv_head(monkeypatch, tmp_path, llama3_path, kind):
    sizes = {"ffn_dim": 256, "n_kv_heads": 2}
    model = tiny_model(vocab_size=Tokenizer(llama3_path).n_words, **sizes)
    path = write_meta_checkpoint(tmp_path / "meta", model, llama3_path, **sizes)
    tokens = torch.randint(0, model.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = load(path, kind)(tokens)
    for logits in Ranks(monkeypatch, 4).run(lambda: load(path, kind)(tokens)):
        assert torch.allclose(logits, expected, atol=2e-4)


GENERATE = """
import json, sys, torch
from pathlib import Path
from llama.checkpoint import check_tensors, load_model, open_checkpoint
from llama import Llama, distributed
checkpoint = open_checkpoint(sys.argv[1])
args = checkpoint.settings.model_args(checkpoint.tokenizer().n_words, 96, 4)
device = distributed.setup("cpu", None)
prompts = [[7, 8, 9], [100] * 40, [5, 6, 5, 6, 5], [200, 201]]
results = []
for kind in ("int8", "int4"):
    model = load_model(checkpoint, args, device=device, dtype=torch.float32, quantize=kind)
    llama = Llama(model, checkpoint.tokenizer())
    results += [llama.generate(prompts, 20, 0)[0], llama.generate(prompts[:2], 12, num_beams=2)[0]]
Path(sys.argv[2] + str(distributed.model_parallel_rank())).write_text(json.dumps(results))
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_real_ranks_generate_the_same_tokens(tmp_path, size):
    tied = size == 2
    checkpoints = write_checkpoints(tmp_path, tied)
    (tmp_path / "generate.py").write_text(GENERATE)
    one = fork_python(tmp_path / "generate.py", checkpoints["meta"], tmp_path / "one.")
    assert one.returncode == 0, one.stderr
    several = fork_python(tmp_path / "generate.py", checkpoints["hf"], tmp_path / "several.", ranks=size)
    assert several.returncode == 0, several.stderr
    results = {(tmp_path / f"several.{rank}").read_text() for rank in range(size)}
    assert results == {(tmp_path / "one.0").read_text()}


# --- memory


def resident_kilobytes(path) -> int:
    """How much of a mapped file is in this process's memory."""
    total, is_mapping = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            is_mapping = line.endswith(str(path))
        elif is_mapping and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


@pytest.mark.skipif("sys.platform != 'linux'")
@pytest.mark.parametrize("layout", ["meta", "hf", "gguf"])
def test_the_memory_of_mapped_files_is_given_back(tmp_path, layout, llama3_path):
    sizes = {"vocab_size": Tokenizer(llama3_path).n_words, "ffn_dim": 4096, "tie_embeddings": True}
    model = strong(Transformer(tiny_args(**sizes)))
    if layout == "gguf":
        path = file = write_gguf(tmp_path / "model.gguf", model)
    else:
        path = tmp_path / layout
        save_checkpoint(path, model, Tokenizer(llama3_path), layout=layout)
        (file,) = [*path.glob("*.pth"), *path.glob("*.safetensors")]
    assert file.stat().st_size > 12e6
    checkpoint = open_checkpoint(path)
    args = checkpoint.settings.model_args(sizes["vocab_size"], 96, 1)
    for kind in KINDS:
        kept = load_model(checkpoint, args, device=CPU, dtype=torch.bfloat16, quantize=kind)
        assert resident_kilobytes(file) < 1000
        assert kept.params.ffn_size == 4096
    plain = load_model(checkpoint, args, device=CPU, dtype=torch.float32)  # what was given back is read again
    assert same_weights(plain, model)
    assert resident_kilobytes(file) > 10000


def test_other_memory_is_kept():
    tensor = torch.arange(10**6)
    release_pages(tensor.data_ptr(), tensor.nbytes)
    assert torch.equal(tensor, torch.arange(10**6))
