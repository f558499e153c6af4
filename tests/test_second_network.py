"""`Llama` over GPT-2: a network of another architecture gets everything that this library's own network gets.

What is right is computed by Hugging Face's GPT2LMHeadModel with the same weights: its logits, its `generate`, or a
plain loop over its logits, without a cache.
"""

from itertools import takewhile

import pytest
import torch
from conftest import ScriptedTokenizer
from gpt2 import GPT2, GPT2Params, from_hugging_face

from llama import Llama
from llama.errors import InputError
from llama.protocols import Cache, CachedModel, LanguageModel, ModelLimits

SIZES = GPT2Params(dim=128, n_layers=2, n_heads=4, vocab_size=524, max_seq_len=96, max_batch_size=12)
STOP_TOKENS = range(0, 524, 20)  # so many that some answers end early
TEXTS = ["the user is in", "an", "in the house, the other user and the river"]


@pytest.fixture(scope="module")
def twin():
    """Hugging Face's network, with random weights so large that every part of it matters to the logits."""
    import transformers

    config = transformers.GPT2Config(
        n_embd=SIZES.dim,
        n_layer=SIZES.n_layers,
        n_head=SIZES.n_heads,
        vocab_size=SIZES.vocab_size,
        n_positions=SIZES.max_seq_len,
        layer_norm_epsilon=SIZES.norm_eps,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )
    twin = transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, weight in twin.named_parameters():
        if "ln_" in name and name.endswith("weight"):
            weight.uniform_(0.5, 1.5, generator=generator)
        else:
            weight.normal_(0, 0.2, generator=generator)
    return twin


@pytest.fixture(scope="module")
def model(twin):
    model = GPT2(SIZES)
    model.load_state_dict(from_hugging_face(twin.state_dict()))
    return model


class IdTokenizer(ScriptedTokenizer):
    """A text is its ids and nothing else."""

    add_bos = False


@pytest.fixture(scope="module")
def llama(model):
    return Llama(model, IdTokenizer(STOP_TOKENS))


@pytest.fixture(scope="module")
def text_llama(model, llama3):
    assert llama3.n_words == SIZES.vocab_size
    return Llama(model, llama3)


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randint(1, SIZES.vocab_size, (length,), generator=generator).tolist() for length in lengths]


def until_stop(tokens, stop_tokens=STOP_TOKENS) -> list[int]:
    return list(takewhile(lambda token: token not in stop_tokens, tokens))


def expected_answers(twin, prompt, max_new_tokens, stop_tokens=STOP_TOKENS, **options):
    """What Hugging Face's `generate` returns for one prompt: the answers' tokens and, for beam search, their scores."""
    output = twin.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=list(stop_tokens),
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    tokens = [until_stop(row[len(prompt) :], stop_tokens) for row in output.sequences.tolist()]
    return tokens, output.sequences_scores.tolist() if "sequences_scores" in output else None


def expected_samples(twin, prompts, max_new_tokens, temperature, top_p, top_k=None):
    """Sampling by its definition, for prompts of one length: the network runs on the whole sequence at each step."""
    sequences = torch.tensor(prompts)  # (batch, seq)
    for _ in range(max_new_tokens):
        logits = twin(sequences).logits[:, -1] / temperature  # (batch, vocab_size)
        if top_k is not None:
            logits[logits < logits.topk(top_k).values[:, -1:]] = -torch.inf
        probs, ids = torch.softmax(logits, dim=-1).sort(dim=-1, descending=True)
        probs[probs.cumsum(dim=-1) - probs > top_p] = 0
        choice = torch.multinomial(probs / probs.sum(dim=-1, keepdim=True), num_samples=1)
        sequences = torch.cat([sequences, ids.gather(-1, choice)], dim=-1)
    return [until_stop(row) for row in sequences[:, len(prompts[0]) :].tolist()]


def expected_logprobs(twin, tokens) -> list[float]:
    """Of each token, given those before it; 0 for the first."""
    logprobs = twin(torch.tensor([tokens])).logits[0].log_softmax(dim=-1)  # (seq, vocab_size)
    return [0.0, *(logprobs[i, token].item() for i, token in enumerate(tokens[1:]))]


def close(values):
    return pytest.approx(values, abs=1e-4)


def test_it_satisfies_the_protocols() -> None:
    """The annotations are for a type checker."""
    model: CachedModel = GPT2(SIZES)
    limits: ModelLimits = model.params
    cache: Cache = model.setup_cache()
    assert isinstance(model, CachedModel)
    assert (limits.max_batch_size, limits.max_seq_len) == (12, 96)
    assert cache.tokens == []
    assert model.setup_cache() is cache


def test_logits_of_whole_sequences_and_of_parts(twin, model):
    tokens = torch.tensor(prompts_of(96, 96, 96))
    expected = twin(tokens).logits
    torch.testing.assert_close(model.forward(tokens, 0), expected, atol=1e-4, rtol=0)
    parts = [model.forward(tokens[:, begin:end], begin) for begin, end in [(0, 40), (40, 41), (41, 70), (70, 96)]]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("seq", [1, 3])
def test_logits_of_rows_at_different_positions(twin, model, seq):
    """The shorter prompts are padded on the right; then the padding is overwritten."""
    lengths = (5, 33, 64)
    sequences = torch.tensor(prompts_of(96, 96, 96))
    expected = twin(sequences).logits
    prompts = sequences[:, :64].clone()
    for row, length in enumerate(lengths):
        prompts[row, length:] = 7
    logits = model.forward(prompts, 0)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(logits[row, :length], expected[row, :length], atol=1e-4, rtol=0)
    start_pos = torch.tensor(lengths)
    for _ in range(6):
        places = torch.arange(3)[:, None], start_pos[:, None] + torch.arange(seq)  # (3, seq)
        logits = model.forward(sequences[places], start_pos)
        torch.testing.assert_close(logits, expected[places], atol=1e-4, rtol=0)
        start_pos = start_pos + seq


@pytest.mark.parametrize("lengths", [(1,), (64,), (33, 33, 33), (5, 64, 1, 33), (90, 2)])
def test_greedy_answers(twin, llama, lengths):
    prompts = prompts_of(*lengths)
    tokens, _ = llama.generate(prompts, 30, temperature=0)
    for prompt, answer in zip(prompts, tokens, strict=True):
        [expected], _ = expected_answers(twin, prompt, min(30, 96 - len(prompt)))
        assert answer == expected


def test_answers_end_in_both_ways(llama):
    """Otherwise the other tests would show little."""
    tokens, _ = llama.generate(prompts_of(5, 64, 1, 33), 30, temperature=0)
    assert min(map(len, tokens)) < 30
    assert max(map(len, tokens)) == 30
    assert max(len(set(answer)) for answer in tokens) > 10


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), [(0.7, 0.9, None), (2, 1, None), (3, 0.95, 20), (2, 1, 5)])
def test_samples(twin, llama, temperature, top_p, top_k):
    prompts = prompts_of(33, 33, 33)
    torch.manual_seed(1)
    expected = expected_samples(twin, prompts, 20, temperature, top_p, top_k)
    torch.manual_seed(1)
    assert llama.generate(prompts, 20, temperature, top_p, top_k=top_k)[0] == expected
    assert llama.generate(prompts, 20, temperature, top_p, top_k=top_k, seed=1)[0] == expected


def test_several_answers_to_each_prompt(twin, llama):
    first, second = prompts_of(40, 40)
    torch.manual_seed(2)
    expected = expected_samples(twin, [first] * 3 + [second] * 3, 20, 1.5, 1)
    assert llama.generate([first, second], 20, 1.5, 1, num_return_sequences=3, seed=2)[0] == expected


def test_several_answers_to_prompts_of_different_lengths(twin, llama):
    prompts = prompts_of(5, 64, 33)
    tokens, logprobs = llama.generate(prompts, 20, 1.5, 1, logprobs=True, num_return_sequences=4, seed=0)
    assert len(set(map(tuple, tokens))) == 12
    for row, answer in enumerate(tokens):
        prompt = prompts[row // 4]
        assert logprobs[row] == close(expected_logprobs(twin, prompt + answer)[len(prompt) :])


@pytest.mark.parametrize(
    ("num_beams", "length_penalty", "early_stopping"),
    [(2, 1.0, False), (4, 0.8, True), (3, 1.3, "never"), (4, -0.5, False)],
)
def test_beam_search(twin, llama, num_beams, length_penalty, early_stopping):
    """All beams of several prompts of different lengths in one batch: each as if alone."""
    prompts = prompts_of(5, 64, 33)
    options = {"num_beams": num_beams, "length_penalty": length_penalty, "early_stopping": early_stopping}
    options["num_return_sequences"] = num_beams
    texts = [" ".join(map(str, prompt)) for prompt in prompts]
    predictions = llama.text_completion(texts, max_gen_len=15, **options)
    for i, prompt in enumerate(prompts):
        expected, expected_scores = expected_answers(twin, prompt, 15, **options)
        answers = predictions[i * num_beams : (i + 1) * num_beams]
        assert [answer["generation"] for answer in answers] == [" ".join(map(str, tokens)) for tokens in expected]
        assert [answer["score"] for answer in answers] == close(expected_scores)


def test_text_completion(twin, text_llama, llama3):
    predictions = text_llama.text_completion(TEXTS, temperature=0, max_gen_len=25, logprobs=True)
    echoed = text_llama.text_completion(TEXTS, temperature=0, max_gen_len=25, logprobs=True, echo=True)
    for text, prediction, with_prompt in zip(TEXTS, predictions, echoed, strict=True):
        prompt = llama3.encode(text, bos=True, eos=False)
        [answer], _ = expected_answers(twin, prompt, 25, llama3.stop_tokens)
        logprobs = expected_logprobs(twin, prompt + answer)
        assert prediction["generation"] == llama3.decode(answer)
        assert prediction["tokens"] == [llama3.decode([token]) for token in answer]
        assert prediction["logprobs"] == close(logprobs[len(prompt) :])
        assert with_prompt["generation"] == llama3.decode(prompt + answer)
        assert with_prompt["logprobs"] == close(logprobs)


def test_scores_of_texts(twin, text_llama, llama3):
    predictions = text_llama.text_completion(TEXTS, max_gen_len=0, logprobs=True, echo=True)
    for text, prediction in zip(TEXTS, predictions, strict=True):
        prompt = llama3.encode(text, bos=True, eos=False)
        assert prediction["generation"] == llama3.decode(prompt)
        assert prediction["logprobs"] == close(expected_logprobs(twin, prompt))
        assert prediction["logprobs"][0] == 0


@pytest.mark.parametrize("temperature", [0, 1.5])
@pytest.mark.parametrize("has_stop", [False, True])
def test_streams_and_stop_strings(text_llama, temperature, has_stop):
    options = {"temperature": temperature, "max_gen_len": 25, "seed": 3}
    expected = [prediction["generation"] for prediction in text_llama.text_completion(TEXTS, **options)]
    if has_stop:
        first, second = options["stop"] = [expected[0][8:10], expected[2][11:14]]
        expected = [text.split(first)[0].split(second)[0] for text in expected]
    assert [prediction["generation"] for prediction in text_llama.text_completion(TEXTS, **options)] == expected
    texts = ["", "", ""]
    for piece in text_llama.text_completion_stream(TEXTS, **options):
        texts[piece.row] += piece.text
    assert texts == expected


@pytest.fixture
def forwarded(monkeypatch):
    """How many tokens each call of the network's `forward` is given."""
    counts = []
    forward = GPT2.forward

    def counting_forward(self, tokens, start_pos):
        counts.append(tokens.numel())
        return forward(self, tokens, start_pos)

    monkeypatch.setattr(GPT2, "forward", counting_forward)
    return counts


@pytest.mark.parametrize("lengths", [(30,), (30, 30), (20, 41)])
def test_reuse_of_the_cache(model, forwarded, lengths):
    """A call that continues the last one's prompts and answers forwards only the tokens that are new."""
    llama = Llama(model, ScriptedTokenizer(()))
    prompts = prompts_of(*lengths)
    answers, _ = llama.generate(prompts, 10, temperature=0)
    prompts = [prompt + answer + [5, 6, 7, 8] for prompt, answer in zip(prompts, answers, strict=True)]
    forwarded.clear()
    reused = llama.generate(prompts, 10, temperature=0, reuse_cache=True)
    start_pos = min(lengths) + 9  # one for all rows; the last token of an answer has not been forwarded yet
    longest = max(lengths) + 14
    assert forwarded == [(longest - start_pos) * len(prompts)] + [len(prompts)] * 9
    forwarded.clear()
    assert llama.generate(prompts, 10, temperature=0) == reused
    assert forwarded == [longest * len(prompts)] + [len(prompts)] * 9


def test_nothing_is_reused_once_the_network_was_called_directly(model, forwarded):
    llama = Llama(model, ScriptedTokenizer(()))
    [prompt] = prompts_of(30)
    expected = llama.generate([prompt], 10, temperature=0)
    model.forward(torch.tensor([[1, 2, 3]]), 0)
    forwarded.clear()
    assert llama.generate([prompt], 10, temperature=0, reuse_cache=True) == expected
    assert forwarded[0] == 30


class WithoutSetupCache(torch.nn.Module):
    """A network that has a cache but no `setup_cache`."""

    def __init__(self, model: GPT2) -> None:
        super().__init__()
        self.model = model
        self.params = model.params

    def forward(self, tokens: torch.Tensor, start_pos: int | torch.Tensor) -> torch.Tensor:
        return self.model.forward(tokens, start_pos)


@pytest.mark.parametrize("lengths", [(33, 33), (5, 64, 33)])
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_network_without_setup_cache_generates(
    model: GPT2, llama: Llama, lengths: tuple[int, ...], temperature: float
) -> None:
    network: LanguageModel = WithoutSetupCache(model)
    assert not isinstance(network, CachedModel)
    answers = Llama(network, llama.tokenizer).generate(prompts_of(*lengths), 20, temperature, seed=4)
    assert answers == llama.generate(prompts_of(*lengths), 20, temperature, seed=4)


def test_several_answers_without_setup_cache(model, llama):
    """Each prompt is then prefilled as often as it has answers."""
    prompts, options = prompts_of(5, 64), {"num_return_sequences": 2, "seed": 4, "logprobs": True, "echo": True}
    tokens, logprobs = Llama(WithoutSetupCache(model), llama.tokenizer).generate(prompts, 20, **options)
    expected_tokens, expected_logprobs = llama.generate(prompts, 20, **options)
    assert tokens == expected_tokens
    for row, expected in zip(logprobs, expected_logprobs, strict=True):
        assert row == pytest.approx(expected, abs=1e-4)


def test_beam_search_without_setup_cache_is_refused(model, llama):
    """Beams are copies of each other's rows in the cache."""
    with pytest.raises(InputError, match="num_beams=2 needs a model whose KV cache can be reordered"):
        Llama(WithoutSetupCache(model), llama.tokenizer).generate([[3, 1, 4]], 5, num_beams=2)
