"""Sampling: the nucleus, its draws, and the edges of temperature and top_p."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama.sampling import sample, sample_top_p, sampling_probs, token_logprobs


def nucleus_of(probs: list[float], p: float) -> dict[int, float]:
    """Which tokens a nucleus holds and how likely each then is, one at a time."""
    order = sorted(range(len(probs)), key=lambda i: -probs[i])
    kept, before = {}, 0.0
    for i in order:
        if before > p:
            break
        kept[i] = probs[i]
        before += probs[i]
    return {i: prob / sum(kept.values()) for i, prob in kept.items()}


def frequencies(probs: list[float], p: float, draws: int = 20000) -> torch.Tensor:
    torch.manual_seed(0)
    ids = sample_top_p(torch.tensor(probs).expand(draws, -1), p)
    assert ids.shape == (draws, 1)
    return torch.bincount(ids.flatten(), minlength=len(probs)) / draws


@pytest.mark.parametrize(
    ("probs", "p", "want"),
    [
        ([0.4, 0.3, 0.2, 0.05, 0.03, 0.02], 0.8, [0.4444, 0.3333, 0.2222, 0, 0, 0]),
        ([0.1, 0.4, 0.2, 0.3], 0.6, [0, 0.5714, 0, 0.4286]),
        ([0.1, 0.4, 0.2, 0.3], 0.0, [0.0, 1.0, 0.0, 0.0]),
        ([0.1, 0.4, 0.2, 0.3], 1.0, [0.1, 0.4, 0.2, 0.3]),
    ],
)
def test_nucleus_frequencies(probs, p, want):
    found = frequencies(probs, p)
    assert torch.equal(found == 0, torch.tensor(want) == 0)
    assert torch.allclose(found, torch.tensor(want), atol=0.015)  # over four standard deviations
    assert nucleus_of(probs, p) == pytest.approx({i: w for i, w in enumerate(want) if w}, abs=1e-4)


@given(st.lists(st.floats(1e-4, 1), min_size=1, max_size=30), st.floats(0, 1), st.integers(0, 2**32))
def test_draws_stay_inside_the_nucleus(weights, p, seed):
    probs = torch.tensor(weights, dtype=torch.float64)
    probs /= probs.sum()
    torch.manual_seed(seed)
    ids = sample_top_p(probs.expand(50, -1), p).flatten().tolist()
    # rounding decides whether a token whose predecessors sum to p, within 1e-9, belongs to it; any of equals may
    least = min(probs[i] for i in nucleus_of(probs.tolist(), p + 1e-9))
    assert all(probs[i] >= least for i in ids)


def test_the_argument_is_left_as_it_is():
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    before = probs.clone()
    sample_top_p(probs, 0.3)
    assert torch.equal(probs, before)


def test_one_multinomial_of_the_cut_matrix():
    """The draws the reference makes at the same seed, also in half precision and for several rows."""
    probs = torch.softmax(torch.randn(5, 1000, generator=torch.Generator().manual_seed(0)) * 3, -1)
    torch.manual_seed(7)
    found = sample_top_p(probs, 0.9)
    ordered, ids = torch.sort(probs, dim=-1, descending=True)
    for row in ordered:
        before = 0.0
        for i, prob in enumerate(row.clone()):
            if before > 0.9:
                row[i] = 0
            before += prob
        row /= row.sum()
    torch.manual_seed(7)
    assert torch.equal(found, ids.gather(1, torch.multinomial(ordered, 1)))


def test_temperature_zero_is_argmax_and_draws_nothing():
    logits = torch.randn(4, 50)
    state = torch.get_rng_state()
    assert torch.equal(sample(logits, 0, 0.9), logits.argmax(-1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(sample(logits, 0.7, 0.0), logits.argmax(-1))  # a nucleus of one


@pytest.mark.parametrize("temperature", [0, 0.6])
def test_a_row_that_is_no_distribution_is_marked(temperature):
    logits = torch.randn(5, 50)
    logits[1, 3] = float("nan")
    logits[2, 3] = float("inf")
    logits[3] = float("-inf")
    logits[4, :49] = float("-inf")  # this one is a distribution: all on the last token
    ids = sample(logits, temperature, 0.9)
    assert ids[1:].tolist() == [-1, -1, -1, 49]
    assert ids[0] >= 0


def test_token_logprobs():
    logits = torch.randn(2, 3, 10, dtype=torch.float64)
    ids = torch.randint(10, (2, 3))
    found = token_logprobs(logits, ids)
    for b in range(2):
        for s in range(3):
            probability = logits[b, s, ids[b, s]].exp() / logits[b, s].exp().sum()
            assert found[b, s].exp().item() == pytest.approx(probability.item())


def plain_sample_top_p(probs: torch.Tensor, p: float) -> torch.Tensor:
    """The definition, on the whole vocabulary."""
    values, ids = torch.sort(probs, dim=-1, descending=True)
    likelier = torch.cumsum(values, dim=-1) - values
    values[likelier > p] = 0
    values /= values.sum(dim=-1, keepdim=True)
    return torch.gather(ids, -1, torch.multinomial(values, 1))


@pytest.mark.parametrize("p", [0.0, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("spread", [0.5, 3.0, 8.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # whose numbers have many twins
def test_same_draws_as_from_the_whole_vocabulary_sorted(p, spread, dtype):
    torch.manual_seed(0)
    logits = (spread * torch.randn(3, 20000)).to(dtype).float()
    probs = torch.softmax(logits, dim=-1)
    for seed in range(10):
        torch.manual_seed(seed)
        want, after = plain_sample_top_p(probs, p), torch.get_rng_state()
        torch.manual_seed(seed)
        assert torch.equal(sample_top_p(probs, p), want)
        assert torch.equal(torch.get_rng_state(), after)


def test_same_draws_where_all_likely_tokens_are_equally_likely():
    probs = torch.zeros(1, 20000)
    probs[0, 100:164] = 1 / 64
    for seed in range(20):
        torch.manual_seed(seed)
        want = plain_sample_top_p(probs, 0.9)
        torch.manual_seed(seed)
        assert torch.equal(sample_top_p(probs, 0.9), want)


def test_draws_have_the_probabilities_that_are_told():
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)) * 2
    told = sampling_probs(logits, 1.2, 0.8, 20)[0]
    drawn = sample(logits.expand(20000, -1), 1.2, 0.8, 20, torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=50) / 20000
    assert torch.equal(shares > 0, told > 0)
    assert torch.allclose(shares, told, atol=0.015)
    assert 1 < int((told > 0).sum()) < 20
