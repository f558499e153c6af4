"""The options of a call besides temperature and top_p: what each does, and which values are refused."""

import math
import re

import numpy as np
import pytest
import torch
from conftest import CachelessBeams, ScriptedModel, ScriptedTokenizer, tiny_model

from llama import Llama
from llama.errors import InputError
from llama.sampling import sample
from llama.sampling_params import SamplingParams

PROMPTS = [[7, 8, 9], [100] * 20, [5, 6, 5, 6, 5]]


@pytest.fixture(scope="module")
def llama():
    return Llama(tiny_model(max_batch_size=12, max_seq_len=128), ScriptedTokenizer([1]))


# top_k


def test_top_k_1_is_greedy(llama):
    for temperature in (0.3, 1.0, 2.0):
        assert llama.generate(PROMPTS, 20, temperature, 1.0, top_k=1) == llama.generate(PROMPTS, 20, 0)


@pytest.mark.parametrize(("top_k", "top_p"), [(2, 1.0), (5, 1.0), (5, 0.6), (50, 0.9), (320, 0.9), (1000, 1.0)])
def test_sampled_tokens_are_among_the_top_k_and_in_their_nucleus(llama, top_k, top_p):
    tokens, logprobs = llama.generate(PROMPTS, 25, 1.5, top_p, top_k=top_k, logprobs=True)
    for prompt, answer in zip(PROMPTS, tokens, strict=True):
        with torch.no_grad():
            logits = llama.model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1]
        for token, row in zip(answer, logits, strict=True):
            likeliest = row.topk(min(top_k, 320)).indices
            assert token in likeliest
            probs = torch.softmax(row[likeliest] / 1.5, dim=-1)
            assert probs[: likeliest.tolist().index(token)].sum() <= top_p + 1e-4
    assert all(logprob <= 0 for row in logprobs for logprob in row)


# By degrees of freedom, the chi-square that 20,000 samples of the right distribution exceed once in 100,000 times.
CRITICAL = {2: 23.0, 3: 25.9, 4: 28.5, 5: 30.9, 9: 39.3}


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"), [(None, 0.8, 1.0), (4, 1.0, 0.7), (6, 0.9, 2.0), (10, 1.0, 1.0)]
)
def test_frequencies_of_20000_samples(top_k, top_p, temperature):
    """Against a distribution that is computed in plain Python."""
    logits = [2.0, -1.0, 0.5, 1.9, 0.0, 1.0, -0.5, 0.7, -2.0, 1.3]
    likeliest = sorted(range(10), key=lambda i: -logits[i])[: top_k or 10]
    weights = {i: math.exp(logits[i] / temperature) for i in likeliest}
    total, likelier, probs = sum(weights.values()), 0.0, {}
    for i in likeliest:
        if likelier <= top_p:
            probs[i] = weights[i] / total
        likelier += weights[i] / total
    count = 20_000
    expected = {i: count * prob / sum(probs.values()) for i, prob in probs.items()}
    generator = torch.Generator().manual_seed(5)
    tokens = sample(torch.tensor([logits]).expand(count, -1), temperature, top_p, top_k, generator)
    counts = torch.bincount(tokens, minlength=10).tolist()
    assert {i for i in range(10) if counts[i]} <= set(probs)
    chi_square = sum((counts[i] - expected[i]) ** 2 / expected[i] for i in probs)
    assert chi_square < CRITICAL[len(probs) - 1]


# seed


def test_a_seed_gives_the_same_whatever_was_sampled_before(llama):
    expected = llama.generate(PROMPTS, 20, 1.5, 1.0, seed=4)
    torch.manual_seed(99)
    llama.generate(PROMPTS, 7, 1.5, 1.0)
    torch.rand(123)
    state = torch.get_rng_state()
    assert llama.generate(PROMPTS, 20, 1.5, 1.0, seed=4) == expected
    assert torch.equal(torch.get_rng_state(), state)
    assert llama.generate(PROMPTS, 20, 1.5, 1.0, seed=5) != expected


def test_a_seed_gives_what_torch_with_this_seed_gives(llama):
    torch.manual_seed(4)
    assert llama.generate(PROMPTS, 20, 1.5, 1.0) == llama.generate(PROMPTS, 20, 1.5, 1.0, seed=4)


# num_return_sequences


def test_several_answers_to_each_prompt(llama):
    tokens, logprobs = llama.generate(PROMPTS, 15, 1.5, 1.0, num_return_sequences=4, logprobs=True, echo=True, seed=1)
    assert len(tokens) == len(logprobs) == 12
    for row, (ids, scores) in enumerate(zip(tokens, logprobs, strict=True)):
        prompt = PROMPTS[row // 4]
        assert ids[: len(prompt)] == prompt
        expected = llama.generate([ids], 0, logprobs=True, echo=True)[1][0]
        assert scores == pytest.approx(expected, abs=2e-4)
    assert len({tuple(ids) for ids in tokens}) == 12


def test_several_answers_are_those_of_repeated_prompts(llama):
    repeated = [prompt for prompt in PROMPTS for _ in range(3)]
    expected = llama.generate(repeated, 15, 1.3, 0.95, seed=2)
    assert llama.generate(PROMPTS, 15, 1.3, 0.95, seed=2, num_return_sequences=3) == expected


@pytest.mark.parametrize(("kind", "prefilled_rows"), [(CachelessBeams, 2), (ScriptedModel, 6)])
def test_each_prompt_is_prefilled_once_if_rows_of_the_cache_can_be_copied(kind, prefilled_rows):
    model = kind(max_batch_size=6)
    tokens, _ = Llama(model, ScriptedTokenizer()).generate([[5], [7]], 3, 0.5, num_return_sequences=3)
    assert model.calls == [((prefilled_rows, 1), 0), ((6, 1), 1), ((6, 1), 2)]
    assert tokens == [[6, 7, 8]] * 3 + [[8, 9, 10]] * 3


def test_the_answers_to_the_first_prompt_come_first(llama):
    predictions = llama.text_completion(["7 8", "100 9"], 1.5, 1.0, 8, num_return_sequences=3, seed=3, echo=True)
    begins = [prediction["generation"].startswith("1 7 8") for prediction in predictions]
    assert begins == [True] * 3 + [False] * 3


# logits_processor


def test_a_logits_processor_may_compute_gradients_and_keep_its_logits(llama):
    kept = []

    def add_gradient(input_ids, scores):
        kept.append(scores)
        with torch.enable_grad():
            x = scores.clone().requires_grad_()
            (x[:, 300] * 1e6 - x.logsumexp(dim=-1)).sum().backward()
        return scores + x.grad

    assert llama.generate([[5, 6]], 4, 0, logits_processor=add_gradient)[0] == [[300] * 4]
    assert (kept[0].requires_grad_() * 2).requires_grad


def test_a_logits_processor_sees_all_tokens_and_decides_what_is_sampled(llama):
    seen = []

    def only_multiples_of_ten(input_ids, scores):
        seen.append(input_ids.tolist())
        assert scores.shape == (3, 320)
        assert scores.dtype == torch.float32
        mask = torch.ones(320, dtype=torch.bool)
        mask[::10] = False
        return scores.masked_fill(mask, -torch.inf)

    tokens, logprobs = llama.generate(PROMPTS, 6, 1.0, 1.0, logits_processor=only_multiples_of_ten, logprobs=True)
    assert all(token % 10 == 0 for answer in tokens for token in answer)
    longest = max(map(len, PROMPTS))
    padded = [prompt[:1] * (longest - len(prompt)) + prompt for prompt in PROMPTS]
    assert seen[0] == padded
    assert seen[3] == [prompt + answer[:3] for prompt, answer in zip(padded, tokens, strict=True)]
    for prompt, answer, scores in zip(PROMPTS, tokens, logprobs, strict=True):  # the logprobs stay those of the model
        expected = llama.generate([prompt + answer], 0, logprobs=True, echo=True)[1][0][len(prompt) :]
        assert scores == pytest.approx(expected, abs=2e-4)


def test_a_logits_processor_comes_before_temperature_and_top_k(llama):
    def favour(input_ids, scores):
        scores[:, 300] = 1000.0
        return scores

    assert llama.generate([[5]], 4, 5.0, 1.0, top_k=3, logits_processor=favour)[0] == [[300] * 4]
    assert llama.generate([[5]], 4, 0, logits_processor=favour)[0] == [[300] * 4]


def test_changes_in_place_don_t_change_the_logprobs(llama):
    expected = llama.generate([[5, 6]], 1, 0, logprobs=True)

    def in_place(input_ids, scores):
        scores.mul_(3.0)
        return scores

    assert llama.generate([[5, 6]], 1, 0, logprobs=True, logits_processor=in_place) == expected


@pytest.mark.parametrize(
    ("processor", "error", "message"),
    [
        (lambda input_ids, scores: None, ValueError, r"must return scores of shape \(1, 320\), not None"),
        (lambda input_ids, scores: scores[0], ValueError, r"must return scores of shape \(1, 320\), not \(320,\)"),
        (lambda input_ids, scores: scores * math.nan, ArithmeticError, "after the logits_processor"),
        (lambda input_ids, scores: torch.full_like(scores, -torch.inf), ArithmeticError, "leave no token to choose"),
    ],
)
def test_logits_processors_with_a_wrong_result(llama, processor, error, message):
    with pytest.raises(error, match=message):
        llama.generate([[5, 6]], 3, logits_processor=processor)
    assert llama.generate([[5, 6]], 3, 0)


# stop


def test_stop_strings_from_a_generator(llama):
    (whole,) = llama.text_completion(["5"], 0, max_gen_len=9)
    (stopped,) = llama.text_completion(["5"], 0, max_gen_len=9, stop=(string for string in [" "]))
    assert stopped["generation"] == whole["generation"].split()[0]


# What is refused

REFUSED = [
    ({"top_k": 0}, "top_k=0 must be a whole number of at least 1"),
    ({"top_k": 2.5}, r"top_k=2\.5 must be a whole number"),
    ({"num_return_sequences": 0}, "num_return_sequences=0 must be"),
    ({"num_beams": True}, "num_beams=True must be"),
    ({"num_beams": 2, "length_penalty": math.nan}, "length_penalty=nan must be a number between -20 and 20"),
    ({"num_beams": 2, "length_penalty": 5000.0}, r"length_penalty=5000\.0 must be a number between -20 and 20"),
    ({"num_beams": 2, "early_stopping": "always"}, "early_stopping='always' must be True, False or 'never'"),
    ({"num_beams": 2, "early_stopping": 1}, "early_stopping=1 must be True, False or 'never'"),
    ({"stop": ""}, r"stop=\(''\,\) must be a string or a list of strings, none of them empty"),
    ({"stop": ["a", 5]}, "stop=.* must be a string"),
    ({"stop": 5}, "stop=5 must be a string or list of strings"),
    ({"seed": 2**64}, "seed=18446744073709551616 must be a whole number between 0 and 18446744073709551615"),
    ({"seed": -1}, "seed=-1 must be a whole number between 0 and 18446744073709551615"),
    ({"seed": "one"}, "seed='one' must be a whole number"),
    ({"seed": 1.0}, r"seed=1\.0 must be a whole number"),
    ({"seed": True}, "seed=True must be a whole number"),
    ({"logits_processor": 3}, "logits_processor=3 must be a function"),
    ({"num_beams": 2, "temperature": 1.0}, "num_beams=2 searches for the likeliest answer and samples nothing"),
    ({"num_beams": 2, "top_k": 5}, "top_k=5 means nothing: leave it out"),
    ({"num_beams": 2, "seed": 5}, "seed=5 means nothing: leave it out"),
    ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences=3 is more than the num_beams=2"),
    ({"length_penalty": 0.5}, "length_penalty and early_stopping are for beams"),
    ({"early_stopping": True}, "length_penalty and early_stopping are for beams"),
    ({"num_return_sequences": 2, "temperature": 0}, "answers would all be the same"),
    ({"num_return_sequences": 2, "top_p": 0}, "answers would all be the same"),
    ({"num_return_sequences": 2, "top_k": 1}, "answers would all be the same"),
    ({"num_return_sequences": 7}, r"2 prompt\(s\) with 7 rows each .* are more than max_batch_size=12"),
    ({"num_beams": 7}, r"2 prompt\(s\) with 7 rows each .* are more than max_batch_size=12"),
    ({"reuse_cache": True, "echo": True, "logprobs": True}, "reuse_cache=True leaves out what echo and logprobs"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[str(options) for options, _ in REFUSED])
def test_what_is_refused_with_a_reason(llama, options, message):
    with pytest.raises(ValueError, match=message) as error:
        llama.generate([[5], [6]], 5, **options)
    assert isinstance(error.value, AssertionError)


def test_an_option_that_does_not_exist(llama):
    with pytest.raises(TypeError, match=r"generate\(\) has no option 'topk': did you mean top_k"):
        llama.generate([[5]], 5, topk=3)


def test_the_defaults_are_the_reference_s():
    params = SamplingParams(5)
    assert (params.temperature, params.top_p, params.logprobs, params.echo) == (0.6, 0.9, False, False)
    assert (params.num_beams, params.num_return_sequences, params.top_k, params.seed) == (1, 1, None, None)
    assert params.stop_strings == ()
    assert SamplingParams(5, 0, 0.5, True, True, stop="x").stop_strings == ("x",)


# The seed of a model


@pytest.mark.parametrize("seed", [None, "x", "1", 2**64, -(2**63) - 1, 1.0, True, math.nan])
def test_a_seed_is_checked_before_anything_is_loaded(monkeypatch, seed):
    monkeypatch.setattr("llama.generation.open_checkpoint", None)
    with pytest.raises(InputError, match=f"seed={re.escape(repr(seed))} must be a whole number between -9223372036854"):
        Llama.build("/nowhere", None, 8, 1, seed=seed)


@pytest.mark.parametrize("seed", [0, -1, -(2**63), 2**64 - 1, np.int64(7)])
def test_every_seed_that_torch_takes_is_taken(tiny_checkpoint, seed):
    llama = Llama.build(tiny_checkpoint, None, 64, 1, seed=seed, dtype=torch.float32)
    (first,) = llama.text_completion(["the user"], 1.0, 1.0, 8)
    torch.manual_seed(seed)
    assert llama.text_completion(["the user"], 1.0, 1.0, 8) == [first]
