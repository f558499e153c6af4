"""Speculative decoding: greedily the tokens of plain decoding, sampled its distribution, and in fewer passes."""

import itertools
import math
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import (
    IN_CI,
    CachelessBeams,
    ScriptedModel,
    ScriptedTokenizer,
    strong,
    tiny_model,
    write_llama3_tokenizer,
    write_meta_checkpoint,
)
from gpt2 import GPT2, GPT2Params

from llama import Llama
from llama.errors import CheckpointError
from llama.model_lock import Call, CallQueue, ModelLock, join
from llama.sampling import sampling_probs
from llama.speculative import MAX_NGRAM, DraftModel, PromptLookup, accept_or_resample, continuation

VOCAB_SIZE = 24  # small, so that tokens repeat, and that 20,000 samples tell their distribution
LOOKUP = {"prompt_lookup_num_tokens": 4}


def build(seed=0, noise=0.0, **changes) -> Llama:
    """A `Llama` over a tiny network; with noise, one that often says the same as that without."""
    model = tiny_model(seed, **{"vocab_size": VOCAB_SIZE, "max_batch_size": 6} | changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters() if noise else ():
            parameter.mul_(1 + noise * torch.randn(parameter.shape, generator=generator))
    return Llama(model, ScriptedTokenizer())


@pytest.fixture(scope="module")
def llama():
    return build()


SIMILAR_DRAFT = {"draft_model": build(noise=0.05)}
DRAFTS = {"lookup": LOOKUP, "similar draft": SIMILAR_DRAFT, "other draft": {"draft_model": build(5)}}


def count_passes(monkeypatch, llama: Llama) -> list[tuple[int, ...]]:
    """Record the shape of the tokens of each pass of a network."""
    shapes, forward = [], llama.model.run_layers

    def run_layers(tokens, *arguments):
        shapes.append(tuple(tokens.shape))
        return forward(tokens, *arguments)

    monkeypatch.setattr(llama.model, "run_layers", run_layers)
    return shapes


# Greedily


def random_call(number: int) -> tuple[list[list[int]], dict]:
    """Prompts and options: of one length or several, that repeat themselves or don't, up to the end of the context."""
    chance = random.Random(number)
    n_rows = chance.choice([1, 1, 2, 3, 4])
    length = chance.randint(1, 30)
    lengths = [length if chance.random() < 0.3 else chance.randint(1, 30) for _ in range(n_rows)]
    prompts = [[chance.randrange(3, VOCAB_SIZE) for _ in range(n)] for n in lengths]
    prompts = [prompt * chance.choice([1, 3]) for prompt in prompts]
    options = {"max_gen_len": chance.choice([0, 1, 2, 7, 20, 96]), "temperature": 0, "logprobs": True}
    if chance.random() < 0.3:
        options["stop"] = [str(chance.randrange(3, VOCAB_SIZE)), "7 8"]
    if chance.random() < 0.3:
        options["echo"] = True
    if chance.random() < 0.3:
        options["logits_processor"] = PenalizeLast()
    if chance.random() < 0.3:
        options |= {"temperature": 0.8, "top_k": 1}
    return prompts, options


class PenalizeLast:
    """A logits processor that makes each row's last two tokens less likely; it looks at all that it is given."""

    def __call__(self, input_ids, scores):
        assert input_ids.shape[0] == scores.shape[0]
        assert input_ids.min() >= 0
        return scores.scatter_add(1, input_ids[:, -2:], torch.full_like(scores[:, :2], -3.0))


@pytest.mark.parametrize("part", range(4))
def test_greedy_tokens_and_logprobs_are_those_of_plain_decoding(llama, part):
    """400 random calls in all; fewer at a desk."""
    for number in range(part * 100, part * 100 + (100 if IN_CI else 15)):
        prompts, options = random_call(number)
        plain_tokens, plain_logprobs = llama.generate(prompts, **options)
        tokens, logprobs = llama.generate(prompts, **options, **list(DRAFTS.values())[number % 3])
        assert tokens == plain_tokens, (number, prompts, options)
        for row, plain_row in zip(logprobs, plain_logprobs, strict=True):
            assert row == pytest.approx(plain_row, abs=1e-4)


@pytest.mark.parametrize("kind", DRAFTS)
def test_streams_and_texts_and_top_logprobs_are_those_of_plain_decoding(llama, kind):
    texts = ["5 6 7 5 6 7", "8 9 10"]
    options = {"max_gen_len": 30, "logprobs": True, "top_logprobs": 2, "stop": ["9 4"]}
    pieces = list(llama.text_completion_stream(texts, 0, **options, **DRAFTS[kind]))
    plain = list(llama.text_completion_stream(texts, 0, **options))
    for row in range(2):
        assert [p.token for p in pieces if p.row == row] == [p.token for p in plain if p.row == row]
        assert "".join(p.text for p in pieces if p.row == row) == "".join(p.text for p in plain if p.row == row)
        assert [p.ended for p in pieces if p.row == row] == [p.ended for p in plain if p.row == row]
    (answer, other) = llama.text_completion(texts, 0, **options, **DRAFTS[kind])
    assert [len(likeliest) for likeliest in answer["top_logprobs"]] == [2] * len(answer["tokens"])
    assert other["top_logprobs"][0][0]["id"] == int(other["tokens"][0])


# Sampled


def chi_square_deviation(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """By how many standard deviations chi-square lies above its mean; rare outcomes are taken together."""
    expected = probs.flatten().double() * counts.sum()
    observed = counts.flatten().double()
    assert observed[expected < 1e-6].sum() == 0  # what can't be sampled isn't
    often = expected >= 5
    observed = torch.cat((observed[often], observed[~often].sum()[None]))
    expected = torch.cat((expected[often], expected[~often].sum().clamp(min=1)[None]))
    chi_square = ((observed - expected) ** 2 / expected).sum().item()
    freedom = len(expected) - 1
    return (chi_square - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(1.0, 1.0, None), (1.5, 0.8, None), (0.7, 0.95, 6)],
    ids=["all", "top_p", "top_k"],
)
@pytest.mark.parametrize("proposer", ["draft", "lookup"])
def test_sampled_tokens_have_exactly_their_distribution(proposer, temperature, top_p, top_k):
    """20,000 samples of three tokens; the second and third are those that have been proposed."""
    rows, prompt = 200, [3, 4, 3, 4, 5, 3, 4]
    changes = {"max_batch_size": rows, "max_seq_len": 16}
    llama, draft = build(**changes), build(5, **changes)
    options = {"draft_model": draft} if proposer == "draft" else {"prompt_lookup_num_tokens": 3}
    llama.tokenizer = draft.tokenizer = ScriptedTokenizer(stop_tokens=())
    probs = []  # of each next token, given those before it: (vocab_size), (vocab_size, vocab_size), ...
    for length in range(3):
        beginnings = torch.tensor(list(itertools.product(range(VOCAB_SIZE), repeat=length)), dtype=torch.long)
        sequences = torch.cat((torch.tensor([prompt]).expand(len(beginnings), -1), beginnings), dim=1)
        with torch.inference_mode():
            next_probs = sampling_probs(llama.model(sequences)[:, -1], temperature, top_p, top_k)
        probs.append(next_probs.view([VOCAB_SIZE] * (length + 1)))
    first_two = probs[0][:, None] * probs[1]
    last_two = (first_two[:, :, None] * probs[2]).sum(dim=0)

    torch.manual_seed(1)
    answers = []
    for _ in range(100):
        answers += llama.generate([prompt], 3, temperature, top_p, top_k=top_k, num_return_sequences=rows, **options)[0]
    tokens = torch.tensor(answers)  # (20000, 3)
    for first, expected in ((0, first_two), (1, last_two)):
        pairs = tokens[:, first] * VOCAB_SIZE + tokens[:, first + 1]
        counts = torch.bincount(pairs, minlength=VOCAB_SIZE**2)
        assert chi_square_deviation(counts, expected) < 4


def test_acceptance_by_hand():
    """Where the draft says half as often what the model says, it is always accepted, and otherwise by the ratio."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.25, 0.75, 0.0])
    n = 30_000
    generator = torch.Generator().manual_seed(3)
    for proposed, expected in ((0, [1, 0, 0]), (1, [0.6 * 0.25 / 0.45, 0.4, 0.6 * 0.2 / 0.45]), (-1, [0.5, 0.3, 0.2])):
        proposals = torch.full((n,), proposed)
        tokens = accept_or_resample(p.expand(n, 3), proposals, q.expand(n, 3), generator)
        assert (torch.bincount(tokens, minlength=3) / n).tolist() == pytest.approx(expected, abs=0.015)
    certain = accept_or_resample(p.expand(n, 3), torch.full((n,), 1), None, generator)  # proposed in any case
    assert (torch.bincount(certain, minlength=3) / n).tolist() == pytest.approx([0.5, 0.3, 0.2], abs=0.015)


def test_a_seed_gives_the_same_answers_again(llama):
    for options in DRAFTS.values():
        answers = [llama.generate([[5, 6], [7, 8, 9]], 20, 1.0, 1.0, seed=3, **options)[0] for _ in range(2)]
        assert answers[0] == answers[1]


def test_several_answers_to_a_prompt(llama):
    options = {"num_return_sequences": 3, "seed": 1}
    answers = llama.text_completion(["5 6 5 6 5", "7 8"], 1.0, 1.0, 12, details=True, **options, **SIMILAR_DRAFT)
    assert len(answers) == 6
    assert len({answer["generation"] for answer in answers[:3]}) == 3


# In fewer passes


def test_a_text_that_repeats_takes_fewer_passes(monkeypatch):
    """Token n is followed by n + 1, and each prompt holds what follows it."""
    llama = build()
    llama.model.logits = lambda hidden: 0 * hidden[..., :VOCAB_SIZE]
    shapes = count_passes(monkeypatch, llama)
    cycle = list(range(4, 10))
    monkeypatch.setattr(llama.model, "forward", follow_cycle(llama, cycle))
    prompt = cycle * 3
    (tokens,), _ = llama.generate([prompt], 36, 0, prompt_lookup_num_tokens=5)
    assert tokens == cycle * 6
    # The first token comes from the prompt; then all proposals are accepted, and one more token each time.
    assert [shape[1] for shape in shapes[1:]] == [6, 6, 6, 6, 6, 5]
    del shapes[:]
    (answer,) = llama.text_completion([" ".join(map(str, prompt[:-1]))], 0, max_gen_len=13, details=True, **LOOKUP)
    assert answer["completion_tokens"] == 13
    assert answer["accepted_tokens"] == answer["proposed_tokens"]


def follow_cycle(llama: Llama, cycle: list[int]):
    """A `forward` whose likeliest token is the one that follows in a cycle, whatever the network says."""
    forward = type(llama.model).forward

    def step(tokens, start_pos=None):
        forward(llama.model, tokens, start_pos)
        following = torch.full((VOCAB_SIZE,), cycle[0])
        following[torch.tensor(cycle)] = torch.tensor([*cycle[1:], cycle[0]])
        return 20.0 * torch.nn.functional.one_hot(following[tokens], VOCAB_SIZE).float()

    return step


def test_a_draft_that_is_always_right_and_one_that_never_is(monkeypatch):
    llama, same, other = build(), build(), build(9)
    llama.tokenizer = same.tokenizer = other.tokenizer = ScriptedTokenizer(stop_tokens=())
    shapes = count_passes(monkeypatch, llama)
    (answer,) = llama.text_completion(["5 6 7"], 0, max_gen_len=40, details=True, draft_model=same)
    assert answer["accepted_tokens"] == answer["proposed_tokens"]
    # The number of proposals grows from 4 by 2.
    assert [shape[1] for shape in shapes[1:]] == [5, 7, 9, 11, 7]
    del shapes[:]
    (answer,) = llama.text_completion(["5 6 7"], 0, max_gen_len=20, details=True, draft_model=other)
    assert answer["accepted_tokens"] < answer["proposed_tokens"]
    assert 2 in [shape[1] for shape in shapes[1:]]  # it shrinks to one proposal


@pytest.mark.parametrize(
    ("tokens", "count", "expected"),
    [
        ([1, 2, 3, 4, 1, 2], 3, [3, 4, 1]),
        ([1, 2, 3, 9, 2, 3, 4, 5, 1, 2, 3], 2, [9, 2]),  # the longest match, not the last
        ([2, 3, 7, 2, 3, 8, 2, 3], 1, [8]),  # of equally long ones the last
        ([1, 2, 1, 2], 5, [1, 2]),  # no more than there is
        ([3, 3, 3], 4, [3]),  # a match may overlap with what it is compared with
        ([1, 5, 2, 5], 3, []),  # one token says too little
        ([1, 2, 3], 3, []),
        ([1], 3, []),
        ([1, 2, 3, 1, 2], 0, []),
    ],
)
def test_what_a_lookup_finds(tokens, count, expected):
    assert continuation(tokens, count) == expected


def test_a_lookup_in_a_long_text_is_quick_and_exact():
    """A long match is taken where it begins to be one; the oracle compares everything with everything."""
    chance = random.Random(0)
    for _ in range(200):
        tokens = [chance.randrange(3) for _ in range(chance.randint(1, 40))]
        best, expected = 1, []
        for end in range(1, len(tokens)):
            length = 0
            while length < min(end, MAX_NGRAM) and tokens[end - 1 - length] == tokens[-1 - length]:
                length += 1
            if length >= 2 and length >= best:
                best, expected = length, tokens[end : end + 4]
        assert continuation(tokens, 4) == expected


# With the rest


def test_rows_advance_by_themselves_and_in_step_with_processors(monkeypatch, llama):
    """A processor sees the very tokens that it sees without proposals, though it may keep a state."""
    seen = []

    def record(input_ids, scores):
        seen.append(input_ids.tolist())
        return scores

    prompts = [[5, 6, 5, 6, 5], [7, 8, 9]]
    calls = {}
    for name, options in {"plain": {}, **DRAFTS}.items():
        seen.clear()
        llama.generate(prompts, 12, 0, logits_processor=record, **options)
        calls[name] = list(seen)
    assert calls["plain"] == calls["lookup"] == calls["similar draft"] == calls["other draft"]


def test_the_cache_is_reused_after_it(llama):
    prompt = [5, 6, 7, 5, 6, 7, 5]
    for options in DRAFTS.values():
        (answer,), _ = llama.generate([prompt], 30, 0, reuse_cache=True, **options)
        longer = prompt + answer + [9, 10]
        cached = llama.model.cache.tokens[0]
        assert cached == (prompt + answer)[: len(cached)]
        assert len(cached) >= len(prompt + answer) - 1
        if "draft_model" in options:
            cached = options["draft_model"].model.cache.tokens[0]
            assert len(cached) > len(prompt)
            assert cached == (prompt + answer)[: len(cached)]
        expected = build().generate([longer], 10, 0)[0]
        assert llama.generate([longer], 10, 0, reuse_cache=True, **options)[0] == expected


@pytest.mark.parametrize("kind", DRAFTS)
def test_a_row_that_fills_the_context_leaves_the_others_to_go_on(llama, kind):
    prompts = [[5, 6, 7] * 31, [5, 6, 5, 6, 5]]  # the first has 96 - 93 tokens left
    assert llama.generate(prompts, 60, 0, **DRAFTS[kind]) == llama.generate(prompts, 60, 0)


def test_junk_of_earlier_calls_does_not_spread(llama):
    llama.model.setup_cache().keys.fill_(math.nan)
    llama.model.cache.values.fill_(math.nan)
    prompts = [[5, 6, 5, 6, 5], [7, 8, 9, 7, 8]]
    assert llama.generate(prompts, 20, 0, **LOOKUP)[0] == build().generate(prompts, 20, 0)[0]


def test_a_network_that_computes_nan_is_told(llama):
    def infinite_in_the_end(input_ids, scores):
        """It alternates between 5 and 6, so that there are proposals."""
        following = 11 - input_ids[:, -1:]
        return scores.scatter(1, following, math.inf if input_ids.shape[1] > 20 else 1000.0)

    damaged, endless = build(noise=0.05), Llama(llama.model, ScriptedTokenizer(stop_tokens=()))
    with torch.no_grad():
        damaged.model.output.weight[7] = math.nan
    for temperature in (0, 0.8):
        with pytest.raises(ArithmeticError, match="NaN or infinity"):
            damaged.generate([[5, 6]], 10, temperature, draft_model=llama)
        with pytest.raises(ArithmeticError, match="after the logits_processor"):
            endless.generate([[5, 6] * 4], 30, temperature, logits_processor=infinite_in_the_end, **LOOKUP)
        # A damaged draft proposes nonsense, which is not accepted.
        llama.generate([[5, 6]], 10, temperature, draft_model=damaged, seed=1)
    assert llama.generate([[5, 6]], 10, 0, draft_model=damaged) == llama.generate([[5, 6]], 10, 0)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantized_weights(tmp_path, quantize):
    """In float32, where products of one row and of several round alike enough."""
    tokenizer_path = write_llama3_tokenizer(tmp_path / "tokenizer.model")
    folder = write_meta_checkpoint(tmp_path / "model", tiny_model(vocab_size=524), tokenizer_path)
    options = {"max_seq_len": 96, "max_batch_size": 2, "dtype": torch.float32}
    llama, draft = (Llama.build(folder, quantize=kind, **options) for kind in (quantize, None))
    prompts = [[5, 6, 7, 5, 6, 7, 5], [8, 9, 10]]
    plain, _ = llama.generate(prompts, 40, 0)
    assert llama.generate(prompts, 40, 0, **LOOKUP)[0] == plain
    assert llama.generate(prompts, 40, 0, draft_model=draft)[0] == plain


def test_a_second_network_takes_proposals():
    """GPT-2, which has a cache of its own kind of network."""
    torch.manual_seed(0)
    sizes = {"dim": 64, "n_layers": 2, "n_heads": 2, "vocab_size": VOCAB_SIZE, "max_batch_size": 4, "max_seq_len": 64}
    models = [Llama(strong(GPT2(GPT2Params(**sizes)), seed), ScriptedTokenizer()) for seed in (0, 1)]
    prompts = [[5, 6, 5, 6, 5], [7, 8, 9]]
    plain = models[0].generate(prompts, 30, 0)
    assert models[0].generate(prompts, 30, 0, **LOOKUP) == plain
    assert models[0].generate(prompts, 30, 0, draft_model=models[1]) == plain


def test_a_call_on_the_draft_waits_until_it_is_no_longer_needed(llama):
    draft = DRAFTS["other draft"]["draft_model"]
    expected = draft.generate([[7, 8]], 5, 0), llama.generate([[5, 6]], 30, 0)
    results, threads = [], []

    def call_draft(input_ids, scores):
        if not threads:
            threads.append(threading.Thread(target=lambda: results.append(draft.generate([[7, 8]], 5, 0))))
            threads[0].start()
            threads[0].join(0.3)
            assert threads[0].is_alive()
        return scores

    assert llama.generate([[5, 6]], 30, 0, draft_model=draft, logits_processor=call_draft) == expected[1]
    threads[0].join()
    assert results == [expected[0]]


def test_models_that_are_each_others_draft(llama):
    """Two threads, of which each holds what the other one waits for, if they don't take turns at both at once."""
    other = build(5)
    expected = [llama.generate([[5, 6]], 12, 0), other.generate([[5, 6]], 12, 0)]

    def call(number: int) -> object:
        if number % 3 == 0:
            return [piece.token for piece in other.generate_stream([[5, 6]], 12, 0, draft_model=llama) if piece.token]
        model, draft = (llama, other) if number % 2 else (other, llama)
        return model.generate([[5, 6]], 12, 0, draft_model=draft) == expected[0 if model is llama else 1]

    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(call, range(40), timeout=60))
    for number, result in enumerate(results):
        assert result == expected[1][0][0] if number % 3 == 0 else result is True


def test_calls_stand_in_the_same_order_in_the_queues_of_both_models(monkeypatch):
    """Even if the first is held up between them."""
    locks, calls, queue_join = [ModelLock(), ModelLock()], [Call(), Call()], CallQueue.join

    def slow_join(queue, call):
        queue_join(queue, call)
        time.sleep(0.3 if call is calls[0] else 0.0)

    monkeypatch.setattr(CallQueue, "join", slow_join)
    first = threading.Thread(target=join, args=(calls[0], locks))
    first.start()
    time.sleep(0.1)
    join(calls[1], locks)
    first.join()
    assert locks[0].queue.calls == locks[1].queue.calls == calls


def test_a_processor_cannot_call_the_draft_that_proposes_for_it(llama):
    draft = DRAFTS["other draft"]["draft_model"]

    def call_draft(input_ids, scores):
        draft.generate([[7]], 1, 0)

    with pytest.raises(RuntimeError, match="a logits_processor can't use the Llama that it is called by"):
        llama.generate([[5, 6]], 3, draft_model=draft, logits_processor=call_draft)
    assert draft.generate([[7]], 1, 0)[0]  # it is free again


def test_the_files_of_a_draft_are_checked(llama, monkeypatch):
    """A cut file that its weights are mapped from would end the process."""

    class CutFiles:
        def check(self):
            raise CheckpointError("a file has been cut")

    draft = build(5)
    draft.model.mapped_files = CutFiles()
    with pytest.raises(CheckpointError, match="has been cut"):
        llama.generate([[5]], 3, draft_model=draft)


def test_a_row_without_tokens_left_is_told_as_the_others(llama):
    full = " ".join(["5"] * 95)  # with BOS, 96 tokens
    answers = llama.text_completion([full, "5 6"], 0, max_gen_len=3, details=True, **LOOKUP)
    assert [answer["proposed_tokens"] >= 0 for answer in answers] == [True, True]


# What is refused


def test_what_is_refused_with_a_reason(llama):
    class OtherTokenizer(ScriptedTokenizer):
        def decode(self, t):
            return " ".join(str(token + 1) for token in t)

    draft = build(5)
    short, narrow = build(max_seq_len=16), build(max_batch_size=1)
    other_words = Llama(draft.model, OtherTokenizer())
    refused = [
        ({"draft_model": Llama(llama.model, llama.tokenizer)}, "the same network, and so the same cache"),
        ({"draft_model": "a model"}, "must be a Llama"),
        ({"draft_model": Llama(ScriptedModel(), llama.tokenizer)}, "must be a Llama, whose model has `setup_cache`"),
        ({"draft_model": short}, r"max_seq_len=16, but this call has 2 row\(s\) of up to 41 tokens"),
        ({"draft_model": narrow}, "draft_model has max_batch_size=1"),
        ({"draft_model": other_words}, "draft_model has another tokenizer"),
        ({"draft_model": draft, **LOOKUP}, "give one of them"),
        ({"draft_model": Llama(draft.model, None)}, "must be a Llama"),
        ({"draft_model": build(vocab_size=40)}, "draft_model has vocab_size=40, but the model has 24"),
        ({"prompt_lookup_num_tokens": 0}, "prompt_lookup_num_tokens=0 must be a whole number between 1 and 100"),
        ({"prompt_lookup_num_tokens": 10**9}, "must be a whole number between 1 and 100"),
        ({"num_beams": 2, **LOOKUP}, "num_beams=2 leaves nothing to propose"),
    ]
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            llama.generate([[5], [6]], 40, **options)
    with pytest.raises(ValueError, match="need a model that takes several tokens at any position"):
        Llama(ScriptedModel(), ScriptedTokenizer()).generate([[5]], 3, **LOOKUP)
    assert Llama(CachelessBeams(), ScriptedTokenizer()).generate([[5]], 3, 0, **LOOKUP)[0] == [[6, 7, 8]]


def test_a_draft_may_have_other_special_tokens_but_no_others():
    class Tokens(ScriptedTokenizer):
        n_words, special_tokens = 30, {"<a>": 3}

        def __init__(self, names):
            super().__init__()
            self.names = names

        def __eq__(self, other):  # and so it has no hash
            return self is other

        def decode(self, t):
            return " ".join(self.names.get(token, str(token)) for token in t)

    one, other = build(), build(5)
    for names, same in (({3: "<b>"}, True), ({4: "four"}, False)):
        one.tokenizer, other.tokenizer = Tokens({}), Tokens(names)
        if same:
            assert one.generate([[5]], 5, 0, draft_model=other)[0] == build().generate([[5]], 5, 0)[0]
        else:
            with pytest.raises(ValueError, match="draft_model has another tokenizer"):
                one.generate([[5]], 5, 0, draft_model=other)


def test_rows_that_have_ended_do_not_count_as_accepted(llama):
    """Otherwise the number of proposals would grow, although none are accepted."""
    draft = DraftModel(llama.model, [[5, 6], [7, 8]], None, None)
    tokens = [[5, 6, 7], [7, 8, 9]]
    numbers = []
    for _ in range(5):
        proposals = draft.propose(tokens, [20, -1])
        numbers.append(len(proposals.tokens[0]))
        assert proposals.tokens[1] == []
        tokens[0].append(3)  # another token than any that was proposed, or only one of them
    assert numbers == [4, 3, 2, 1, 1]


def test_proposers_give_no_more_than_can_be_used(llama):
    lookup = PromptLookup(5)
    assert lookup.propose([[1, 2, 3, 1, 2], [1, 2, 3, 1, 2]], [0, 2]).tokens == [[], [3, 1]]
    draft = DraftModel(llama.model, [[5], [6]], None, None)
    assert [len(row) for row in draft.propose([[5, 6], [6, 7]], [2, 0]).tokens] == [2, 0]
