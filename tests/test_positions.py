"""Decoding steps of a fixed shape, as on a GPU, are the ordinary steps: here on a CPU, where both can run."""

import pytest
import torch
from conftest import ScriptedTokenizer, examples, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from llama import Llama, Transformer, positions
from llama.positions import fixed_end, lay_out_positions, rotations_on


@pytest.fixture
def fixed_steps(monkeypatch):
    """Steps have a fixed shape."""
    monkeypatch.setattr(positions, "FIXED_STEPS_ON", ("cpu",))


@given(end=st.integers(1, 200_000), limit=st.integers(1, 200_000))
def test_fixed_end(end, limit):
    if end > limit:
        return
    covered = fixed_end(end, limit)
    assert end <= covered <= limit
    assert covered < max(end + 256, 1.25 * end + 1)
    assert covered == limit or covered % 256 == 0
    assert fixed_end(covered, limit) == covered


def test_few_lengths_serve_a_long_context():
    assert len({fixed_end(end, 131_072) for end in range(1, 131_072)}) < 40


def call(model: Transformer, prompts: list[list[int]], n_new: int, **options):
    return Llama(model, ScriptedTokenizer()).generate(prompts, n_new, **options)


prompt_lists = st.integers(1, 3).flatmap(
    lambda rows: st.lists(st.lists(st.integers(3, 319), min_size=1, max_size=40), min_size=rows, max_size=rows)
)


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 1}], ids=["2 kv heads", "1 kv head"])
def test_the_same_tokens_as_ordinary_steps(changes):
    model = tiny_model(**changes)

    @given(prompts=prompt_lists, equal=st.booleans(), n_new=st.integers(1, 50), temperature=st.sampled_from([0, 0.8]))
    @examples(40)
    def compare(prompts, equal, n_new, temperature):
        if equal:
            prompts = [(prompt * 40)[: len(prompts[0])] for prompt in prompts]
        options = {"temperature": temperature, "seed": 4, "logprobs": True}
        expected, expected_logprobs = call(model, prompts, n_new, **options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(positions, "FIXED_STEPS_ON", ("cpu",))
            patch.setattr(positions, "SHORTEST_END", 16)
            tokens, logprobs = call(model, prompts, n_new, **options)
        assert tokens == expected
        for ours, theirs in zip(logprobs, expected_logprobs, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)

    compare()


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_return_sequences": 3, "temperature": 0.8, "seed": 1},
        {"reuse_cache": True},
        {"stop": ["7 "]},
        {"logits_processor": lambda input_ids, scores: scores.roll(1, -1)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_the_same_with_every_option(options, fixed_steps):
    model = tiny_model()
    plain = tiny_model()
    for prompt in ([5, 6, 7], [5, 6, 7, 8, 9]):
        options = {"temperature": 0, **options}
        tokens = call(model, [prompt], 60, **options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(positions, "FIXED_STEPS_ON", ())
            assert tokens == call(plain, [prompt], 60, **options)


def test_a_step_does_the_same_at_every_position(fixed_steps):
    """No value of a tensor reaches the host, and the operations and their shapes are always the same."""

    class Operations(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.calls = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls.append((function, [x.shape for x in args if isinstance(x, torch.Tensor)]))
            return function(*args, **(kwargs or {}))

    model = tiny_model(max_seq_len=600)
    model.setup_cache()
    seen = {}
    for end, start_pos in ((256, 3), (256, 200), (256, 255), (512, 256), (512, 300), (600, 550)):
        with Operations() as operations, torch.no_grad():
            model.forward(torch.tensor([[5]]), start_pos)
        assert torch.ops.aten._local_scalar_dense.default not in [function for function, _ in operations.calls]
        assert seen.setdefault(end, operations.calls) == operations.calls


def test_what_a_mask_hides_does_not_count(fixed_steps):
    """Positions after a row's own, which attention covers, hold what earlier calls have left there."""
    model, fresh = tiny_model(), tiny_model()
    call(model, [list(range(3, 90))], 5, temperature=0)
    prompts = [[5, 6, 7], [9, 8, 7]]
    assert call(model, prompts, 20, temperature=0) == call(fresh, prompts, 20, temperature=0)


@pytest.mark.parametrize("options", [{}, {"logits_processor": lambda input_ids, scores: scores}], ids=["", "processed"])
def test_nothing_is_left_in_the_cache_of_numbers_that_are_not_finite(options, fixed_steps):
    model, fresh = tiny_model(), tiny_model()
    weight = model.layers[0].attention.wv.weight
    with torch.no_grad():
        sound = weight.clone()
        weight.fill_(torch.inf)
    with pytest.raises(ArithmeticError):
        call(model, [list(range(3, 90))], 5, temperature=0, **options)
    with torch.no_grad():
        weight.copy_(sound)
    assert call(model, [[5, 6, 7]], 20, temperature=0) == call(fresh, [[5, 6, 7]], 20, temperature=0)


@pytest.mark.parametrize("version", [13, 14])
def test_rotations_are_real_where_there_are_no_complex_numbers(monkeypatch, version):
    """On macOS before 14. There is no such device here: what is asked for is looked at, and computed on the CPU."""
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: version >= major)
    moved = []
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", lambda tensor, device: moved.append(tensor) or tensor)
        freqs_cis = rotations_on(torch.device("mps"), torch.polar(torch.ones(8, 16), torch.randn(8, 16)))
    assert freqs_cis.is_complex() == (version == 14)
    model, plain = tiny_model(), tiny_model()
    model.freqs_cis = torch.view_as_real(plain.freqs_cis)
    prompts = [[5, 6, 7], [9, 8, 7, 6]]
    assert call(model, prompts, 20, temperature=0) == call(plain, prompts, 20, temperature=0)


def test_lay_out_positions():
    freqs_cis = torch.arange(10.0)[:, None]
    rows, mask = lay_out_positions(freqs_cis, torch.tensor([1, 3]), 2, 6, 1, torch.bfloat16)
    assert rows[..., 0].tolist() == [[1, 2], [3, 4]]
    assert (mask.dtype, mask.shape) == (torch.bfloat16, (2, 1, 2, 6))
    assert (mask == 0).sum(-1)[:, 0].tolist() == [[2, 3], [4, 5]]
    assert mask.isneginf().sum() + (mask == 0).sum() == mask.numel()
    rows, mask = lay_out_positions(freqs_cis, 3, 2, 5, 3, torch.float32)
    assert (rows[:, 0].tolist(), (mask == 0).sum(-1).tolist()) == ([3, 4], [[[4, 5] * 3]])
    assert mask.stride(-2) == 8  # else torch would lay it out anew in every layer on a GPU
    for start_pos in (None, 0, 4):
        rows, mask = lay_out_positions(freqs_cis, start_pos, 1, 5, 3, torch.float32)
        assert (rows[:, 0].tolist(), mask) == ([start_pos or 0], None)
