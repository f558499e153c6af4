"""Sampling: the nucleus, the frequencies of its tokens, and the limits of temperature and top_p."""

import pytest
import torch
from conftest import examples
from hypothesis import given
from hypothesis import strategies as st

from llama import positions
from llama.sampling import keep_top_k, sample, sample_top_p, sampling_probs, token_logprobs


def nucleus_by_definition(probs: list[float], p: float) -> dict[int, float]:
    """The tokens of a nucleus, added one at a time, with their probabilities within it."""
    ordered = sorted(range(len(probs)), key=lambda i: -probs[i])
    nucleus, likelier = {}, 0.0
    for i in ordered:
        if likelier > p:
            break
        nucleus[i] = probs[i]
        likelier += probs[i]
    return {i: prob / sum(nucleus.values()) for i, prob in nucleus.items()}


@pytest.mark.parametrize(
    ("probs", "p", "expected"),
    [
        ([0.4, 0.3, 0.2, 0.05, 0.03, 0.02], 0.8, [0.4444, 0.3333, 0.2222, 0, 0, 0]),
        ([0.1, 0.4, 0.2, 0.3], 0.6, [0, 0.5714, 0, 0.4286]),
        ([0.1, 0.4, 0.2, 0.3], 0.0, [0.0, 1.0, 0.0, 0.0]),
        ([0.1, 0.4, 0.2, 0.3], 1.0, [0.1, 0.4, 0.2, 0.3]),
    ],
)
def test_frequencies_of_the_nucleus(probs, p, expected):
    count = 20_000
    torch.manual_seed(0)
    ids = sample_top_p(torch.tensor(probs).expand(count, -1), p)
    assert ids.shape == (count, 1)
    frequencies = torch.bincount(ids.flatten(), minlength=len(probs)) / count
    assert torch.equal(frequencies == 0, torch.tensor(expected) == 0)
    assert torch.allclose(frequencies, torch.tensor(expected), atol=0.015)  # over four standard deviations
    nucleus = nucleus_by_definition(probs, p)
    assert nucleus == pytest.approx({i: prob for i, prob in enumerate(expected) if prob}, abs=1e-4)


@given(st.lists(st.floats(1e-4, 1), min_size=1, max_size=30), st.floats(0, 1), st.integers(0, 2**32))
def test_samples_are_tokens_of_the_nucleus(weights, p, seed):
    probs = torch.tensor(weights, dtype=torch.float64)
    probs /= probs.sum()
    torch.manual_seed(seed)
    ids = sample_top_p(probs.expand(50, -1), p).flatten().tolist()
    # Rounding decides about a token if the likelier ones sum to p within 1e-9; of equally likely tokens any may be in.
    least = min(probs[i] for i in nucleus_by_definition(probs.tolist(), p + 1e-9))
    assert all(probs[i] >= least for i in ids)


def test_the_probabilities_are_not_changed():
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    before = probs.clone()
    sample_top_p(probs, 0.3)
    assert torch.equal(probs, before)


def test_same_tokens_as_the_reference_at_the_same_seed():
    """Which sorts, sets what is outside the nucleus to 0, and calls torch.multinomial once for all rows."""
    probs = torch.softmax(torch.randn(5, 1000, generator=torch.Generator().manual_seed(0)) * 3, -1)
    torch.manual_seed(7)
    tokens = sample_top_p(probs, 0.9)
    ordered, ids = torch.sort(probs, dim=-1, descending=True)
    for row in ordered:
        likelier = 0.0
        for i, prob in enumerate(row.clone()):
            if likelier > 0.9:
                row[i] = 0
            likelier += prob
        row /= row.sum()
    torch.manual_seed(7)
    assert torch.equal(tokens, ids.gather(1, torch.multinomial(ordered, 1)))


def test_sample_top_p_with_a_generator():
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).expand(50, 4)
    state = torch.get_rng_state()
    tokens = sample_top_p(probs, 0.6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(tokens, sample_top_p(probs, 0.6, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(torch.get_rng_state(), state)
    assert set(tokens.flatten().tolist()) <= {1, 3}


def test_temperature_0_is_argmax_and_needs_no_random_numbers():
    logits = torch.randn(4, 50)
    state = torch.get_rng_state()
    assert torch.equal(sample(logits, 0, 0.9), logits.argmax(-1))
    assert torch.equal(sample(logits, 0.7, 0.9, top_k=1), logits.argmax(-1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(sample(logits, 0.7, 0.0), logits.argmax(-1))  # a nucleus of one token


@pytest.mark.parametrize("temperature", [0, 0.6])
def test_rows_that_are_no_distribution_get_minus_1(temperature):
    logits = torch.randn(5, 50)
    logits[1, 3] = float("nan")
    logits[2, 3] = float("inf")
    logits[3] = float("-inf")
    logits[4, :49] = float("-inf")  # this one is a distribution: all of it on the last token
    tokens = sample(logits, temperature, 0.9)
    assert tokens[1:].tolist() == [-1, -1, -1, 49]
    assert tokens[0] >= 0


def test_token_logprobs():
    logits = torch.randn(2, 3, 10, dtype=torch.float64)
    tokens = torch.randint(10, (2, 3))
    logprobs = token_logprobs(logits, tokens)
    for row in range(2):
        for i in range(3):
            probability = logits[row, i, tokens[row, i]].exp() / logits[row, i].exp().sum()
            assert logprobs[row, i].exp().item() == pytest.approx(probability.item())


def test_top_k_keeps_k_of_equally_likely_tokens():
    kept = keep_top_k(torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]]), 2)
    assert kept.isfinite().sum() == 2
    assert keep_top_k(torch.tensor([[1.0, 2.0]]), 5).tolist() == [[1.0, 2.0]]


def test_frequencies_are_those_of_sampling_probs():
    count = 20_000
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)) * 2
    probs = sampling_probs(logits, 1.2, 0.8, 20)[0]
    tokens = sample(logits.expand(count, -1), 1.2, 0.8, 20, torch.Generator().manual_seed(0))
    frequencies = torch.bincount(tokens, minlength=50) / count
    assert torch.equal(frequencies > 0, probs > 0)
    assert torch.allclose(frequencies, probs, atol=0.015)
    assert 1 < int((probs > 0).sum()) < 20


# Sampling from a large vocabulary without sorting it


def sample_top_p_by_sorting(probs: torch.Tensor, p: float) -> torch.Tensor:
    values, ids = torch.sort(probs, dim=-1, descending=True)
    likelier = torch.cumsum(values, dim=-1) - values
    values[likelier > p] = 0
    values /= values.sum(dim=-1, keepdim=True)
    return torch.gather(ids, -1, torch.multinomial(values, 1))


@pytest.mark.parametrize("p", [0.0, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("spread", [pytest.param(0.5, marks=pytest.mark.slow), 3.0, 8.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # in bfloat16, many are equally likely
def test_same_tokens_as_with_the_whole_vocabulary_sorted(p, spread, dtype):
    torch.manual_seed(0)
    logits = (spread * torch.randn(3, 20000)).to(dtype).float()
    probs = torch.softmax(logits, dim=-1)
    for seed in range(10 if spread == 0.5 else 4):
        torch.manual_seed(seed)
        expected, state = sample_top_p_by_sorting(probs, p), torch.get_rng_state()
        torch.manual_seed(seed)
        assert torch.equal(sample_top_p(probs, p), expected)
        assert torch.equal(torch.get_rng_state(), state)


@examples(200)
@given(st.data(), st.integers(0, 2**32), st.floats(0, 1), st.floats(0, 10), st.booleans())
def test_same_tokens_as_with_any_vocabulary_sorted(data, seed, p, spread, ties):
    rows, vocab_size = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 3000))
    logits = spread * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed))
    probs = torch.softmax(logits.bfloat16().float() if ties else logits, dim=-1)
    torch.manual_seed(seed)
    expected = sample_top_p_by_sorting(probs, p)
    torch.manual_seed(seed)
    assert torch.equal(sample_top_p(probs, p), expected)


def test_same_tokens_where_all_likely_ones_are_equally_likely():
    probs = torch.zeros(1, 20000)
    probs[0, 100:164] = 1 / 64
    for seed in range(20):
        torch.manual_seed(seed)
        expected = sample_top_p_by_sorting(probs, 0.9)
        torch.manual_seed(seed)
        assert torch.equal(sample_top_p(probs, 0.9), expected)


@given(
    rows=st.integers(1, 4),
    vocab_size=st.sampled_from([5, 320, 32_000]),
    p=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
@examples(100)
def test_a_gpu_samples_the_same_without_a_wait_for_the_device(rows, vocab_size, p, seed):
    """There it isn't by torch.multinomial; the generator is left in the same state."""
    probs = torch.softmax(3 * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)), dim=-1)
    generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
    expected = sample_top_p(probs, p, generator=generators[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(positions, "FIXED_STEPS_ON", ("cpu",))
        patch.setattr(torch, "multinomial", None)
        assert torch.equal(sample_top_p(probs, p, generator=generators[1]), expected)
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


def test_logits_that_divided_by_the_temperature_exceed_float32():
    logits = torch.tensor([[1.0, 2e38, 3e38], [3e38, -3e38, 3e38], [1.0, 1.1, 1.2], [torch.nan, 0.0, 0.0]])
    samples = torch.stack([sample(logits, 0.5, 1.0, generator=torch.Generator().manual_seed(i)) for i in range(60)])
    assert set(samples[:, 0].tolist()) == {2}
    assert set(samples[:, 1].tolist()) == {0, 2}
    assert set(samples[:, 2].tolist()) == {0, 1, 2}
    assert set(samples[:, 3].tolist()) == {-1}
    assert torch.allclose(sampling_probs(logits[:2], 0.5, 1.0), torch.tensor([[0, 0, 1], [0.5, 0, 0.5]]))
