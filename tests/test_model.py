"""The network: the logits and gradients of Hugging Face's, and what `forward` promises."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import hugging_face_twin, strong, tiny_args, tiny_model

from llama.model import (
    Attention,
    FeedForward,
    RMSNorm,
    Transformer,
    TransformerBlock,
    apply_rotary_emb,
    precompute_freqs_cis,
    repeat_kv,
    reshape_for_broadcast,
)
from llama.model_args import ModelArgs

SEQ = 80


def random_tokens(model: Transformer, batch: int = 2, seq: int = SEQ, seed: int = 1) -> torch.Tensor:
    return torch.randint(model.vocab_size, (batch, seq), generator=torch.Generator().manual_seed(seed))


VARIANTS = {
    "grouped": {},
    "no groups": {"n_kv_heads": None},
    "one kv head": {"n_kv_heads": 1},
    "rope theta of Llama 2": {"rope_theta": 10000.0},
    "scaled rope": {"use_scaled_rope": True, "rope_original_max_seq_len": 64},
    "scaled rope, factor 32": {"use_scaled_rope": True, "rope_original_max_seq_len": 64, "rope_scaling_factor": 32.0},
    "tied": {"tie_embeddings": True},
    "own head size and width": {"head_dim": 48, "ffn_dim": 200},
    "odd sizes": {"dim": 96, "n_heads": 3, "n_kv_heads": 3, "norm_eps": 0.1, "multiple_of": 10},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_logits_equal_hugging_face(changes):
    model = tiny_model(**changes)
    tokens = random_tokens(model)
    expected = hugging_face_twin(model)(tokens).logits
    assert expected.std() > 1  # with small logits, any network would be within the tolerance
    for logits in (model(tokens), model(tokens, 0)):
        assert logits.dtype == torch.float32
        assert (logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize("part", ["rotation", "scaling", "groups", "eps"])
@torch.no_grad()
def test_a_changed_part_of_the_network_changes_the_logits(part):
    """By much more than the tolerance of the test above, which therefore can fail."""
    args = tiny_args(use_scaled_rope=True, rope_original_max_seq_len=64)
    model = strong(Transformer(args))
    tokens = random_tokens(model)
    logits = model(tokens)
    if part == "rotation":
        model.freqs_cis = torch.ones_like(model.freqs_cis)
    elif part == "scaling":
        model.freqs_cis = Transformer(replace(args, rope_scaling_factor=32.0)).freqs_cis
    elif part == "groups":
        for layer in model.layers:
            layer.attention.wk.weight.copy_(layer.attention.wk.weight.roll(args.head_size, 0))
    else:
        model.norm.eps = 0.1
    assert (model(tokens) - logits).abs().max() > 20 * 1e-4


@torch.no_grad()
def test_any_chunks_at_any_position():
    model = tiny_model()
    tokens = random_tokens(model)
    logits = model(tokens)
    for cuts in ([0, 1, 2, 3, SEQ], [0, 40, SEQ], [0, 7, 30, 31, 64, SEQ], list(range(SEQ + 1))):
        chunks = [model(tokens[:, start:end], start) for start, end in pairwise(cuts)]
        assert torch.allclose(torch.cat(chunks, 1), logits, atol=1e-4), cuts
    # At an earlier position again, only what comes before it is attended to.
    assert torch.allclose(model(tokens[:, 20:40], 20), logits[:, 20:40], atol=1e-4)


@torch.no_grad()
def test_fewer_rows_than_before_attend_to_their_own_cache():
    model = tiny_model()
    tokens = random_tokens(model, batch=4)
    logits = model(tokens)
    model(tokens[:, :50], 0)
    assert torch.allclose(model(tokens[:2, 50:], 50), logits[:2, 50:], atol=1e-4)


@pytest.mark.parametrize("seq", [1, 5])
@torch.no_grad()
def test_a_position_for_each_row(seq):
    model = tiny_model()
    tokens = random_tokens(model, batch=3)
    logits = model(tokens)
    start_pos = torch.tensor([4, 70, 33])
    model(tokens[:, :70], 0)
    model.cache.keys[:, 0, :, 4:] = 1e4  # row 0 doesn't attend to positions after its own
    model.cache.values[:, 0, :, 4:] = 1e4
    rows = torch.arange(3)[:, None]
    positions = start_pos[:, None] + torch.arange(seq)
    assert torch.allclose(model(tokens[rows, positions], start_pos), logits[rows, positions], atol=1e-4)


def test_gradients_flow_without_a_cache_and_match_hugging_face():
    model = tiny_model()
    twin = hugging_face_twin(model)
    tokens = random_tokens(model)
    for network in (model, twin):
        logits = network(tokens) if network is model else network(tokens).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    assert model.cache is None
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters())
    for ours, theirs in (
        (model.tok_embeddings.weight, twin.model.embed_tokens.weight),
        (model.layers[0].feed_forward.w2.weight, twin.model.layers[0].mlp.down_proj.weight),
        (model.layers[1].attention.wv.weight, twin.model.layers[1].self_attn.v_proj.weight),
        (model.layers[0].attention_norm.weight, twin.model.layers[0].input_layernorm.weight),
    ):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)


def test_with_a_cache_no_gradients_and_training_after_generating():
    model = tiny_model()
    tokens = random_tokens(model)
    with torch.inference_mode():
        model(tokens[:, :10], 0)  # the cache that is made here can be written to outside of inference mode, too
    assert not model(tokens[:, 10:], 10).requires_grad
    assert not model.hidden_states(tokens[:, 10:], 10).requires_grad
    model(tokens).sum().backward()
    assert model.norm.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_dtype_follows_the_model(dtype):
    model = tiny_model()
    tokens = random_tokens(model)
    expected = model(tokens, 0)
    freqs_cis = model.freqs_cis.clone()
    model.to(dtype)
    logits = model(tokens, 0)
    assert logits.dtype == torch.float32
    assert model.cache.keys.dtype == model.cache.values.dtype == dtype
    assert model.freqs_cis.dtype == torch.complex64
    assert torch.equal(model.freqs_cis, freqs_cis)
    error = (logits - expected).abs().mean()
    assert error < (1e-5 if dtype == torch.float64 else 0.05 * expected.std())  # 16-bit weights are rounded


def test_state_dict_has_the_checkpoint_names_and_nothing_else():
    model = tiny_model(n_layers=1)
    model(random_tokens(model), 0)
    assert set(model.state_dict()) == {
        "tok_embeddings.weight",
        *(f"layers.0.attention.{w}.weight" for w in ("wq", "wk", "wv", "wo")),
        *(f"layers.0.feed_forward.{w}.weight" for w in ("w1", "w2", "w3")),
        "layers.0.attention_norm.weight",
        "layers.0.ffn_norm.weight",
        "norm.weight",
        "output.weight",
    }


@pytest.mark.parametrize(
    ("sizes", "width"),
    [
        ({"dim": 4096, "multiple_of": 256}, 11008),  # Llama 2 7B
        ({"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3}, 28672),  # Llama 2 70B, Llama 3 70B
        ({"dim": 4096, "multiple_of": 1024, "ffn_dim_multiplier": 1.3}, 14336),  # Llama 3 8B
        ({"dim": 2048, "multiple_of": 256, "ffn_dim_multiplier": 1.5}, 8192),  # Llama 3.2 1B
        ({"dim": 576, "ffn_dim": 1536}, 1536),  # SmolLM2
    ],
)
def test_feed_forward_width(sizes, width):
    assert ModelArgs(**sizes).ffn_size == width


def test_model_args_order_and_defaults():
    """They are the reference's, so that positional arguments mean the same."""
    args = ModelArgs(64, 1, 4, 2, 300, 32, 1.5, 1e-6, 10000.0, 3, 17)
    assert (args.dim, args.n_layers, args.n_heads, args.n_kv_heads, args.vocab_size) == (64, 1, 4, 2, 300)
    assert (args.multiple_of, args.ffn_dim_multiplier, args.norm_eps) == (32, 1.5, 1e-6)
    assert (args.rope_theta, args.max_batch_size, args.max_seq_len) == (10000.0, 3, 17)
    plain = ModelArgs()
    assert (plain.dim, plain.n_layers, plain.n_heads, plain.n_kv_heads, plain.vocab_size) == (4096, 32, 32, None, -1)
    assert (plain.rope_theta, plain.max_batch_size, plain.max_seq_len) == (500000, 32, 2048)
    with pytest.raises(TypeError):
        ModelArgs(64, 1, 4, 2, 300, 32, 1.5, 1e-6, 10000.0, 3, 17, True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_of_16_bits_is_computed_in_float32(dtype):
    norm = RMSNorm(64, eps=1e-5).to(dtype)
    for size in (0.01, 1, 100):
        x = (size * torch.randn(40, 64)).to(dtype)
        expected = (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)).to(dtype)
        assert torch.equal(norm(x), expected)


def test_rms_norm():
    norm = RMSNorm(8, eps=0.1)
    torch.nn.init.uniform_(norm.weight)
    x = torch.randn(3, 5, 8, dtype=torch.bfloat16)
    normed = x.double() / (x.double().square().mean(-1, keepdim=True) + 0.1).sqrt()
    assert torch.allclose(norm(x).double(), normed * norm.weight.double(), atol=0.02)
    assert torch.equal(norm.to(torch.bfloat16)(x), normed.bfloat16() * norm.weight)


def test_freqs_cis():
    freqs_cis = precompute_freqs_cis(64, 100, 10000.0)
    assert freqs_cis.shape == (100, 32)
    assert freqs_cis.dtype == torch.complex64
    for position, j in ((0, 0), (1, 0), (99, 31), (57, 11)):
        angle = position * 10000.0 ** (-2 * j / 64)
        assert abs(freqs_cis[position, j].item() - complex(math.cos(angle), math.sin(angle))) < 1e-5


def test_scaled_freqs_cis():
    """Each frequency is kept, divided or interpolated, depending on its wavelength."""
    freqs_cis = precompute_freqs_cis(128, 2, 500000.0, True, scaling_factor=8.0)
    kinds = set()
    for j in range(64):
        freq = 500000.0 ** (-2 * j / 128)
        wavelength = 2 * math.pi / freq
        if wavelength > 8192 / 1:
            expected, kind = freq / 8, "divided"
        elif wavelength < 8192 / 4:
            expected, kind = freq, "kept"
        else:
            keep = (8192 / wavelength - 1) / (4 - 1)
            expected, kind = (1 - keep) * freq / 8 + keep * freq, "interpolated"
        kinds.add(kind)
        assert math.isclose(freqs_cis[1, j].angle().item(), expected, rel_tol=1e-5), (j, kind)
    assert kinds == {"kept", "divided", "interpolated"}
    assert torch.equal(precompute_freqs_cis(128, 2, 500000.0, True), freqs_cis)  # the defaults are Llama 3.1's


def test_divisors_of_the_frequencies():
    plain = precompute_freqs_cis(8, 2).angle()[1]
    assert torch.allclose(precompute_freqs_cis(8, 2, divisors=[4.0]).angle()[1], plain / 4)
    divisors = [1.0, 2.0, 3.0, 4.0]
    assert torch.allclose(precompute_freqs_cis(8, 2, divisors=divisors).angle()[1], plain / torch.tensor(divisors))


def test_apply_rotary_emb_rotates_neighbouring_features():
    x = torch.zeros(1, 3, 1, 4)
    x[0, :, 0, 2] = 1.0  # feature 2 pairs with feature 3
    freqs_cis = precompute_freqs_cis(4, 3)
    rotated, _ = apply_rotary_emb(x, x, freqs_cis)
    angle = torch.arange(3) * 10000.0 ** (-2 / 4)
    assert torch.allclose(rotated[0, :, 0], torch.stack([0 * angle, 0 * angle, angle.cos(), angle.sin()], 1))
    assert reshape_for_broadcast(freqs_cis, torch.zeros(5, 3, 7, 2)).shape == (1, 3, 1, 2)
    assert reshape_for_broadcast(freqs_cis.expand(5, 3, 2), torch.zeros(5, 3, 7, 2)).shape == (5, 3, 1, 2)
    with pytest.raises(ValueError, match=r"\(3, 2\).*\(1, 5, 1, 2\)"):
        reshape_for_broadcast(freqs_cis, torch.zeros(1, 5, 1, 2))


def test_repeat_kv():
    x = torch.randn(2, 3, 2, 4)
    y = repeat_kv(x, 3)
    assert y.shape == (2, 3, 6, 4)
    assert all(torch.equal(y[:, :, i], x[:, :, i // 3]) for i in range(6))


def test_parts_can_be_made_alone():
    args = tiny_args()
    assert Attention(args).wk.weight.shape == (64, 128)
    assert FeedForward(64, 4 * 64, 32, None).w1.weight.shape == (192, 64)
    assert TransformerBlock(0, args).feed_forward.w2.weight.shape == (128, args.ffn_size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 3}, "dim=128 must be a multiple of n_heads=3"),
        ({"n_heads": 4, "n_kv_heads": 3}, "n_heads=4 must be a multiple of n_kv_heads=3"),
        ({"vocab_size": -1}, "vocab_size=-1 must be at least 1"),
        ({"n_kv_heads": 0}, "kv_heads=0 must be at least 1"),
        ({"head_dim": 33}, "33, must be even"),
        ({"max_seq_len": 0}, "max_seq_len=0 must be at least 1"),
        ({"max_batch_size": -3}, "max_batch_size=-3 must be at least 1"),
    ],
)
def test_sizes_that_make_no_network(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        Transformer(tiny_args(**changes))
    assert isinstance(error.value, AssertionError)


def test_more_positions_or_rows_than_the_cache_has():
    model = tiny_model()
    with pytest.raises(ValueError, match="position 96 is past the end: max_seq_len=96"):
        model(random_tokens(model, seq=1), 96)
    with pytest.raises(ValueError, match="position 97 is past the end"):
        model(random_tokens(model, seq=1), torch.tensor([3, 97]))
    with pytest.raises(ValueError, match="5 rows are more than max_batch_size=4"):
        model(random_tokens(model, batch=5), 0)
    assert model(random_tokens(model, batch=5)).shape[0] == 5  # without a cache, any batch


@pytest.mark.parametrize(
    ("shape", "start_pos", "message"),
    [
        ((2, 3), -1, "start_pos=-1 must be at least 0"),
        ((2, 3), torch.tensor([4, -2]), "start_pos=-2 must be at least 0"),
        ((2, 3), torch.tensor([4]), r"start_pos must have shape \(2,\), not \(1,\)"),
        ((2, 3), torch.tensor(4), r"start_pos must have shape \(2,\), not \(\)"),
        ((3,), 0, r"tokens must be \(batch, seq\), not of shape \(3,\)"),
    ],
)
def test_wrong_shapes_and_positions(shape, start_pos, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(torch.zeros(shape, dtype=torch.long), start_pos)


def test_meta_device_uses_no_memory():
    with torch.device("meta"):
        model = Transformer(ModelArgs(n_kv_heads=8, vocab_size=128256, multiple_of=1024, ffn_dim_multiplier=1.3))
    assert all(weight.is_meta for weight in model.parameters())
    assert sum(weight.numel() for weight in model.parameters()) == 8030261248  # Llama 3 8B
    assert model.freqs_cis.device.type == "cpu"
    assert model.cache is None
