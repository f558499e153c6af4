"""What a call can ask for besides temperature and top_p."""

import math
import random

import pytest
import torch
from conftest import ScriptedModel, ScriptedTokenizer, tiny_model

from llama import Llama, Transformer
from llama.model import KVCache
from llama.sampling import keep_top_k, sample, sample_top_p
from llama.sampling_params import SamplingParams

PROMPTS = [[7, 8, 9], [100] * 20, [5, 6, 5, 6, 5]]


@pytest.fixture(scope="module")
def llama():
    return Llama(tiny_model(max_batch_size=12, max_seq_len=128), ScriptedTokenizer([1]))


# top_k


def test_one_is_greedy(llama):
    for temperature in (0.3, 1.0, 2.0):
        assert llama.generate(PROMPTS, 20, temperature, 1.0, top_k=1) == llama.generate(PROMPTS, 20, 0)


@pytest.mark.parametrize(("top_k", "top_p"), [(2, 1.0), (5, 1.0), (5, 0.6), (50, 0.9), (320, 0.9), (1000, 1.0)])
def test_drawn_tokens_are_among_the_top_k_and_in_their_nucleus(llama, top_k, top_p):
    tokens, logprobs = llama.generate(PROMPTS, 25, 1.5, top_p, top_k=top_k, logprobs=True)
    for prompt, row in zip(PROMPTS, tokens, strict=True):
        with torch.no_grad():
            logits = llama.model(torch.tensor([prompt + row]))[0, len(prompt) - 1 : -1]
        for token, step in zip(row, logits, strict=True):
            kept = step.topk(min(top_k, 320)).indices
            assert token in kept
            probs = torch.softmax(step[kept] / 1.5, dim=-1)
            before = probs[: kept.tolist().index(token)].sum()
            assert before <= top_p + 1e-4
    assert all(logprob <= 0 for row in logprobs for logprob in row)


def test_ties_at_the_edge_leave_k():
    kept = keep_top_k(torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]]), 2)
    assert kept.isfinite().sum() == 2
    assert keep_top_k(torch.tensor([[1.0, 2.0]]), 5).tolist() == [[1.0, 2.0]]


# The least chi-square that 20,000 draws from the right distribution exceed once in 100,000 times, by degrees of freedom
CRITICAL = {2: 23.0, 3: 25.9, 4: 28.5, 5: 30.9, 9: 39.3}


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"), [(None, 0.8, 1.0), (4, 1.0, 0.7), (6, 0.9, 2.0), (10, 1.0, 1.0)]
)
def test_frequencies_of_20000_draws(top_k, top_p, temperature):
    """Against a distribution worked out in plain Python."""
    logits = [2.0, -1.0, 0.5, 1.9, 0.0, 1.0, -0.5, 0.7, -2.0, 1.3]
    kept = sorted(range(10), key=lambda i: -logits[i])[: top_k or 10]
    weights = {i: math.exp(logits[i] / temperature) for i in kept}
    total, before, probs = sum(weights.values()), 0.0, {}
    for i in kept:
        if before <= top_p:
            probs[i] = weights[i] / total
        before += weights[i] / total
    share = sum(probs.values())
    draws = 20_000
    generator = torch.Generator().manual_seed(5)
    ids = sample(torch.tensor([logits]).expand(draws, -1), temperature, top_p, top_k, generator)
    counts = torch.bincount(ids, minlength=10).tolist()
    assert {i for i, count in enumerate(counts) if count} <= set(probs)
    chi_square = sum((counts[i] - draws * p / share) ** 2 / (draws * p / share) for i, p in probs.items())
    assert chi_square < CRITICAL[len(probs) - 1]


# seed


def test_a_seed_gives_the_same_whatever_was_drawn_before(llama):
    want = llama.generate(PROMPTS, 20, 1.5, 1.0, seed=4)
    torch.manual_seed(99)
    llama.generate(PROMPTS, 7, 1.5, 1.0)
    torch.rand(123)
    before = torch.get_rng_state()
    assert llama.generate(PROMPTS, 20, 1.5, 1.0, seed=4) == want
    assert torch.equal(torch.get_rng_state(), before)
    assert llama.generate(PROMPTS, 20, 1.5, 1.0, seed=5) != want


def test_a_seed_draws_what_torch_seeded_with_it_draws(llama):
    torch.manual_seed(4)
    assert llama.generate(PROMPTS, 20, 1.5, 1.0) == llama.generate(PROMPTS, 20, 1.5, 1.0, seed=4)


def test_sample_top_p_with_a_generator():
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).expand(50, 4)
    state = torch.get_rng_state()
    a = sample_top_p(probs, 0.6, generator=torch.Generator().manual_seed(1))
    b = sample_top_p(probs, 0.6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(a.flatten().tolist()) <= {1, 3}


# num_return_sequences


def test_several_answers_to_each_prompt(llama):
    tokens, logprobs = llama.generate(PROMPTS, 15, 1.5, 1.0, num_return_sequences=4, logprobs=True, echo=True, seed=1)
    assert len(tokens) == len(logprobs) == 12
    for row, (ids, scores) in enumerate(zip(tokens, logprobs, strict=True)):
        prompt = PROMPTS[row // 4]
        assert ids[: len(prompt)] == prompt
        scored = llama.generate([ids], 0, logprobs=True, echo=True)[1][0]
        assert scores == pytest.approx(scored, abs=2e-4)
    assert len({tuple(ids) for ids in tokens}) == 12


def test_several_answers_are_drawn_as_from_repeated_prompts(llama):
    repeated = [prompt for prompt in PROMPTS for _ in range(3)]
    want = llama.generate(repeated, 15, 1.3, 0.95, seed=2)
    assert llama.generate(PROMPTS, 15, 1.3, 0.95, seed=2, num_return_sequences=3) == want


def test_each_prompt_is_read_once():
    model = ScriptedModel(max_batch_size=6)
    tokens, _ = Llama(model, ScriptedTokenizer()).generate([[5], [7]], 3, 0.5, num_return_sequences=3)
    assert model.calls[0] == ((2, 1), 0)
    assert model.calls[1] == ((6, 1), 1)
    assert tokens == [[6, 7, 8]] * 3 + [[8, 9, 10]] * 3


def test_order_in_predictions(llama):
    tokenizer_order = llama.text_completion(["7 8", "100 9"], 1.5, 1.0, 8, num_return_sequences=3, seed=3, echo=True)
    assert [one["generation"].startswith("1 7 8") for one in tokenizer_order] == [True] * 3 + [False] * 3


# logits_processor


def test_a_logits_processor_may_use_gradients(llama):
    """And keep what it was given."""
    kept = []

    def climb(tokens, logits):
        kept.append(logits)
        with torch.enable_grad():
            x = logits.clone().requires_grad_()
            (x[:, 300] * 1e6 - x.logsumexp(dim=-1)).sum().backward()
        return logits + x.grad

    assert llama.generate([[5, 6]], 4, 0, logits_processor=climb)[0] == [[300] * 4]
    assert (kept[0].requires_grad_() * 2).requires_grad


def test_a_logits_processor_sees_and_changes_everything(llama):
    seen = []

    def only_multiples_of_ten(tokens, logits):
        seen.append([list(row) for row in tokens])
        assert logits.shape == (3, 320)
        assert logits.dtype == torch.float32
        mask = torch.ones(320, dtype=torch.bool)
        mask[::10] = False
        return logits.masked_fill(mask, -torch.inf)

    tokens, logprobs = llama.generate(PROMPTS, 6, 1.0, 1.0, logits_processor=only_multiples_of_ten, logprobs=True)
    assert all(token % 10 == 0 for row in tokens for token in row)
    assert seen[0] == PROMPTS
    assert seen[3] == [prompt + row[:3] for prompt, row in zip(PROMPTS, tokens, strict=True)]
    # logprobs stay those of the model
    for prompt, row, scores in zip(PROMPTS, tokens, logprobs, strict=True):
        scored = llama.generate([prompt + row], 0, logprobs=True, echo=True)[1][0][len(prompt) :]
        assert scores == pytest.approx(scored, abs=2e-4)


def test_it_comes_before_temperature_and_top_k(llama):
    def favour(tokens, logits):
        logits[:, 300] = 1000.0
        return logits

    assert llama.generate([[5]], 4, 5.0, 1.0, top_k=3, logits_processor=favour)[0] == [[300] * 4]
    assert llama.generate([[5]], 4, 0, logits_processor=favour)[0] == [[300] * 4]


def test_in_place_changes_do_not_change_the_logprobs(llama):
    want = llama.generate([[5, 6]], 1, 0, logprobs=True)

    def in_place(tokens, logits):
        logits.mul_(3.0)
        return logits

    assert llama.generate([[5, 6]], 1, 0, logprobs=True, logits_processor=in_place) == want


def test_a_processor_that_calls_its_llama(llama):
    with pytest.raises(RuntimeError, match="a logits_processor can't use the Llama that it is called by"):
        llama.generate([[5]], 3, logits_processor=lambda tokens, logits: llama.generate([[5]], 1))
    assert llama.generate([[5]], 3, 0)


def test_stop_texts_from_a_generator(llama):
    whole = llama.text_completion(["5"], 0, max_gen_len=9)[0]["generation"]
    found = llama.text_completion(["5"], 0, max_gen_len=9, stop=(text for text in [" "]))[0]["generation"]
    assert found == whole.split()[0]


@pytest.mark.parametrize(
    ("processor", "error", "message"),
    [
        (lambda tokens, logits: None, ValueError, r"must return logits of shape \(1, 320\), not None"),
        (lambda tokens, logits: logits[0], ValueError, r"must return logits of shape \(1, 320\), not \(320,\)"),
        (lambda tokens, logits: logits * math.nan, ArithmeticError, "after the logits_processor"),
        (lambda tokens, logits: torch.full_like(logits, -torch.inf), ArithmeticError, "leave no token to choose"),
    ],
)
def test_processors_that_go_wrong(llama, processor, error, message):
    with pytest.raises(error, match=message):
        llama.generate([[5, 6]], 3, logits_processor=processor)
    assert llama.generate([[5, 6]], 3, 0)


# reuse_cache


@pytest.fixture
def chatty(llama3):
    return Llama(tiny_model(vocab_size=llama3.n_words, max_batch_size=3, max_seq_len=256), llama3)


def counting(llama, monkeypatch):
    """The numbers of tokens a row that pass through the network, call by call."""
    forward, read = llama.model.layers[0].forward, []

    def counted(x, *more):
        read.append(x.shape[1])
        return forward(x, *more)

    monkeypatch.setattr(llama.model.layers[0], "forward", counted)
    return read


def test_the_next_turn_reads_only_what_is_new(chatty, llama3, monkeypatch):
    dialog = [{"role": "user", "content": "the user in there"}]
    chatty.model.output.weight.data[200:] = 0.0  # it says letters, which read the same as they were drawn
    chatty.model.output.weight.data[:97] = 0.0
    chatty.model.output.weight.data[123:200] = 0.0
    first = chatty.chat_completion([dialog], 0, max_gen_len=15)[0]["generation"]
    longer = [*dialog, first, {"role": "user", "content": "and then?"}]
    fresh = chatty.chat_completion([longer], 0, max_gen_len=15, logprobs=True)[0]

    chatty.chat_completion([dialog], 0, max_gen_len=15)
    read = counting(chatty, monkeypatch)
    again = chatty.chat_completion([longer], 0, max_gen_len=15, logprobs=True, reuse_cache=True)[0]
    assert again["generation"] == fresh["generation"]
    assert again["logprobs"] == pytest.approx(fresh["logprobs"], abs=1e-4)
    old = chatty.formatter.encode_dialog_prompt(dialog)
    new = chatty.formatter.encode_dialog_prompt(longer)
    answer = llama3.encode(first["content"].strip(), bos=False, eos=False)
    assert new[: len(old) + len(answer)] == old + answer
    # all but the answer's last token have been read: the loop ended there
    assert read[0] <= len(new) - len(old) - len(answer) + 1
    assert sum(read) == read[0] + 14


@pytest.mark.parametrize("max_seq_len", [256, 24])
@pytest.mark.parametrize("seed", range(8))
def test_a_random_talk_is_what_it_would_be_without(llama3, seed, max_seq_len):
    """Longer, changed and shortened prompts, of one and several rows, in any order, and up to the context's end."""
    chatty = Llama(tiny_model(vocab_size=llama3.n_words, max_batch_size=3, max_seq_len=max_seq_len), llama3)
    draw = random.Random(seed)
    prompts = [[draw.randrange(524) for _ in range(draw.randint(1, 20))] for _ in range(draw.randint(1, 3))]
    for _ in range(12):
        options = {"max_gen_len": draw.randint(0, 12), "temperature": draw.choice([0, 1.0]), "seed": draw.randint(0, 5)}
        found = chatty.generate(prompts, **options, logprobs=True, reuse_cache=True)
        other = Llama(chatty.model, chatty.tokenizer)
        chatty.model.cache = None  # a new cache, of which the old decoder must not count on anything
        want = other.generate(prompts, **options, logprobs=True)
        assert found[0] == want[0]
        for ours, theirs in zip(found[1], want[1], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)
        chatty._decoder, kept = other._decoder, [p + t for p, t in zip(prompts, want[0], strict=True)]
        kept = [row[: draw.randint(1, len(row))] for row in kept[: draw.randint(1, 3)]]
        prompts = [(row + [draw.randrange(524) for _ in range(draw.randint(0, 6))])[:max_seq_len] for row in kept]


def test_the_same_prompt_again_costs_one_token(chatty, monkeypatch):
    prompt = list(range(60))
    want = chatty.generate([prompt], 5, 0)
    read = counting(chatty, monkeypatch)
    assert chatty.generate([prompt], 5, 0, reuse_cache=True) == want
    assert read == [1, 1, 1, 1, 1]
    read.clear()
    assert chatty.generate([prompt], 5, 0) == want  # unless asked for, everything is read
    assert read[0] == 60


def test_another_llama_on_the_same_model(chatty):
    other = Llama(chatty.model, chatty.tokenizer)
    want = chatty.generate([list(range(40))], 8, 0)
    other.generate([list(range(100, 140))], 8, 0)
    assert chatty.generate([list(range(40))], 8, 0, reuse_cache=True) == want
    with torch.no_grad():
        chatty.model.forward(torch.zeros(3, 60, dtype=torch.long), 0)
    assert chatty.generate([list(range(40))], 8, 0, reuse_cache=True) == want


class Wrapped(Transformer):
    """A network of one's own, on ours."""

    def forward(self, tokens, start_pos=None):
        return super().forward(tokens, start_pos)


def test_a_subclass_with_its_own_forward(chatty):
    wrapped = Wrapped(chatty.model.params)
    wrapped.load_state_dict(chatty.model.state_dict())
    llama = Llama(wrapped, chatty.tokenizer)
    for options in ({"temperature": 0}, {"num_beams": 2}, {"num_return_sequences": 2, "seed": 1}):
        want = chatty.generate([[5, 6, 7, 8]], 5, **options)
        assert llama.generate([[5, 6, 7, 8]], 5, **options) == want
        assert llama.generate([[5, 6, 7, 8]], 5, **options, reuse_cache=True) == want


def test_another_model(chatty):
    other = tiny_model(seed=5, vocab_size=524, max_seq_len=64)
    want = Llama(other, chatty.tokenizer).generate([[5, 6]], 9, 0)
    assert chatty.generate([[5, 6]], 9, 0) != want
    chatty.model = other
    assert chatty.generate([[5, 6]], 9, 0) == want


def test_an_exception_while_rows_are_copied(chatty, monkeypatch):
    prompts = [[5, 6, 7, 8], [9, 10, 11, 12]]
    want = chatty.generate(prompts, 6, 0)
    reorder = KVCache.reorder

    def failing(self, rows, end):
        reorder(self, torch.tensor([0, 0]), end)
        raise KeyboardInterrupt

    monkeypatch.setattr(KVCache, "reorder", failing)
    with pytest.raises(KeyboardInterrupt):
        chatty.generate(prompts[:1], 6, num_return_sequences=2)
    assert chatty.generate(prompts, 6, 0, reuse_cache=True) == want


def test_a_cache_that_is_gone_is_not_counted_on(chatty):
    want = chatty.generate([[5, 6, 7, 8]], 5, 0)
    chatty.model.cache = None
    assert chatty.generate([[5, 6, 7, 8]], 5, 0, reuse_cache=True) == want
    chatty.model.double()
    chatty.generate([[5, 6, 7, 8]], 5, 0, reuse_cache=True)
    chatty.model.float()
    assert chatty.generate([[5, 6, 7, 8]], 5, 0, reuse_cache=True) == want


# What makes no sense

REFUSED = [
    ({"top_k": 0}, "top_k=0 must be a whole number of at least 1"),
    ({"top_k": 2.5}, r"top_k=2\.5 must be"),
    ({"num_return_sequences": 0}, "num_return_sequences=0 must be"),
    ({"num_beams": True}, "num_beams=True must be"),
    ({"num_beams": 2, "length_penalty": math.nan}, "length_penalty=nan must be a number"),
    ({"num_beams": 2, "early_stopping": "always"}, "early_stopping='always' must be True, False or 'never'"),
    ({"stop": ""}, r"stop=\(''\,\) must be a text or a list of texts, none of them empty"),
    ({"stop": ["a", 5]}, "stop=.* must be a text"),
    ({"stop": 5}, "stop=5 must be a text or a list of texts"),
    ({"num_beams": 2, "early_stopping": 1}, "early_stopping=1 must be True, False or 'never'"),
    ({"num_beams": 2, "length_penalty": 5000.0}, r"length_penalty=5000\.0 must be a number between -20 and 20"),
    ({"seed": 2**64}, "seed=18446744073709551616 must be below"),
    ({"num_return_sequences": 2, "top_p": 0}, "answers would all be the same"),
    ({"logits_processor": 3}, "logits_processor=3 must be a function"),
    ({"seed": "one"}, "seed='one' must be a whole number"),
    ({"num_beams": 2, "temperature": 1.0}, "num_beams=2 searches for the likeliest answer and draws nothing"),
    ({"num_beams": 2, "top_k": 5}, "top_k=5 means nothing: leave it out"),
    ({"num_beams": 2, "seed": 5}, "seed=5 means nothing: leave it out"),
    ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences=3 is more than the num_beams=2"),
    ({"length_penalty": 0.5}, "length_penalty and early_stopping are for beams"),
    ({"early_stopping": True}, "length_penalty and early_stopping are for beams"),
    ({"num_return_sequences": 2, "temperature": 0}, "answers would all be the same"),
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


def test_an_option_there_is_not(llama):
    with pytest.raises(TypeError, match="unexpected keyword argument 'topk'"):
        llama.generate([[5]], 5, topk=3)


def test_decoding_without_options_is_the_references():
    how = SamplingParams(5)
    assert (how.temperature, how.top_p, how.num_beams, how.num_return_sequences) == (0.6, 0.9, 1, 1)
    assert how.generator(torch.device("cpu")) is None
