"""`Llama`: its calls on ids, texts and dialogs, against a loop that is written from the definition."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ScriptedModel, ScriptedTokenizer, examples, tiny_model
from forked import fork_python
from hypothesis import given
from hypothesis import strategies as st

from llama import Llama, Transformer


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def llama(model):
    return Llama(model, ScriptedTokenizer())


def random_prompts(*lengths: int, seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 320, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def generate_by_definition(model, prompts, max_gen_len, temperature, top_p, stop_tokens):
    """Generate without cache or padding: for prompts of one length, the whole sequences pass through at each step.

    Returns:
        Each row's new tokens, their logprobs, and the logprobs of its prompt.
    """
    tokens = torch.tensor(prompts)
    begin = tokens.shape[1]
    for _ in range(min(max_gen_len, model.params.max_seq_len - begin)):
        logits = model(tokens)[:, -1]
        if temperature == 0:
            next_token = logits.argmax(-1, keepdim=True)
        else:
            probs, ids = torch.softmax(logits / temperature, -1).sort(-1, descending=True)
            probs[probs.cumsum(-1) - probs > top_p] = 0
            next_token = ids.gather(1, torch.multinomial(probs / probs.sum(-1, keepdim=True), 1))
        tokens = torch.cat([tokens, next_token], 1)
    logprobs = torch.log_softmax(model(tokens).double(), -1)
    answers, answer_logprobs, prompt_logprobs = [], [], []
    for row, ids in enumerate(tokens.tolist()):
        scores = [0.0] + [logprobs[row, i - 1, ids[i]].item() for i in range(1, len(ids))]
        end = next((i for i in range(begin, len(ids)) if ids[i] in stop_tokens), len(ids))
        answers.append(ids[begin:end])
        answer_logprobs.append(scores[begin:end])
        prompt_logprobs.append(scores[:begin])
    return answers, answer_logprobs, prompt_logprobs


def close(rows, others):
    return all(row == pytest.approx(other, abs=2e-4) for row, other in zip(rows, others, strict=True))


FAST = [((1,), 0, 0.9), ((96,), 0.6, 0.9), ((33, 33, 33, 33), 0.6, 0.9), ((7, 7), 5.0, 0.5)]
SLOW = [
    pytest.param(lengths, temperature, top_p, marks=pytest.mark.slow)
    for lengths in ((1,), (40,), (96,), (7, 7), (33, 33, 33, 33))
    for temperature, top_p in ((0, 0.9), (0.6, 0.9), (1.3, 1.0), (5.0, 0.5))
    if (lengths, temperature, top_p) not in FAST
]


@pytest.mark.parametrize(("lengths", "temperature", "top_p"), FAST + SLOW)
def test_same_tokens_and_logprobs_as_the_definition(model, lengths, temperature, top_p):
    prompts = random_prompts(*lengths)
    stop_tokens = set(range(200, 230))  # some rows end early
    llama = Llama(model, ScriptedTokenizer(stop_tokens))
    torch.manual_seed(5)
    expected, logprobs, prompt_logprobs = generate_by_definition(model, prompts, 30, temperature, top_p, stop_tokens)
    torch.manual_seed(5)
    assert llama.generate(prompts, 30, temperature, top_p) == (expected, None)
    torch.manual_seed(5)
    tokens, scores = llama.generate(prompts, 30, temperature, top_p, logprobs=True)
    assert tokens == expected
    assert close(scores, logprobs)
    torch.manual_seed(5)
    tokens, scores = llama.generate(prompts, 30, temperature, top_p, logprobs=True, echo=True)
    assert tokens == [prompt + answer for prompt, answer in zip(prompts, expected, strict=True)]
    assert close(scores, [prompt + answer for prompt, answer in zip(prompt_logprobs, logprobs, strict=True)])
    assert all(score <= 0 for row in scores for score in row)


def count_calls(model):
    """A model like this one, and the list of the start positions of the calls of its `forward`."""
    start_positions = []

    class Counting:
        params = model.params

        def forward(self, tokens, start_pos):
            start_positions.append(start_pos)
            return model(tokens, start_pos)

    return Counting(), start_positions


@pytest.mark.parametrize("lengths", [(5, 60), (60, 5), (1, 2, 3, 4), (96, 3, 50), (95, 96)])
def test_unequal_prompts_each_as_if_alone(model, llama, lengths):
    prompts = random_prompts(*lengths)
    alone = [llama.generate([prompt], 25, 0, logprobs=True, echo=True) for prompt in prompts]
    tokens, scores = llama.generate(prompts, 25, 0, logprobs=True, echo=True)
    assert tokens == [rows[0] for rows, _ in alone]
    assert close(scores, [rows[0] for _, rows in alone])
    counting, calls = count_calls(model)
    answers, _ = Llama(counting, ScriptedTokenizer()).generate(prompts, 25, 0)
    assert answers == [row[len(prompt) :] for row, prompt in zip(tokens, prompts, strict=True)]
    assert len(calls) <= 1 + max(map(len, answers))


@examples(25)
@given(st.lists(st.integers(1, 96), min_size=1, max_size=4), st.integers(0, 40), st.integers(0, 100))
def test_any_batch_each_row_as_if_alone(llama, lengths, max_gen_len, seed):
    prompts = random_prompts(*lengths, seed=seed)
    tokens, _ = llama.generate(prompts, max_gen_len, 0)
    assert tokens == [llama.generate([prompt], max_gen_len, 0)[0][0] for prompt in prompts]
    for prompt, answer in zip(prompts, tokens, strict=True):
        assert len(answer) <= min(max_gen_len, 96 - len(prompt))


def test_one_call_of_forward_for_the_prompt_and_one_for_each_new_token_but_the_last(model):
    counting, calls = count_calls(model)
    tokens, _ = Llama(counting, ScriptedTokenizer(())).generate(random_prompts(20), 10, 0)
    assert len(tokens[0]) == 10
    assert calls == [0, *range(20, 29)]
    assert all(type(start_pos) is int for start_pos in calls)


def test_a_model_and_a_tokenizer_are_enough():
    """Nothing has to be set up before: no process group, no cache, no state of torch."""
    torch.manual_seed(0)
    model = Transformer(tiny_model().params)
    prediction = Llama(model, ScriptedTokenizer()).text_completion(["5 6 7"], temperature=0, max_gen_len=4)
    assert len(prediction[0]["generation"].split()) == 4
    assert not torch.distributed.is_initialized()


def test_a_scripted_model_needs_only_params_and_forward():
    model = ScriptedModel()
    llama = Llama(model, ScriptedTokenizer([12]))
    assert llama.generate([[3, 4], [8, 9]], 6, 0) == ([[5, 6, 7, 8, 9, 10], [10, 11]], None)
    assert model.calls == [((2, 2), 0), *(((2, 1), position) for position in range(2, 7))]
    tokens, scores = llama.generate([[3], [4, 5, 6]], 2, 0.1, logprobs=True)
    assert tokens == [[4, 5], [7, 8]]
    assert close(scores, [[0.0, 0.0], [0.0, 0.0]])  # the model is nearly certain
    assert llama.text_completion(["3 4"], 0, 0.9, 3)[0] == {"generation": "5 6 7"}


def test_rows_of_unequal_length_have_their_own_positions():
    """On the CPU, whatever the model's device. A row that has filled the context stays at its last position."""
    model = ScriptedModel(vocab_size=1000)
    Llama(model, ScriptedTokenizer([])).generate([[5] * 31, [7, 8]], 4, 0)
    (_, prefill), *steps = model.calls
    assert prefill == 0
    assert [start_pos.tolist() for _, start_pos in steps] == [[31, 2], [31, 3], [31, 4]]
    assert all(start_pos.dtype == torch.long and start_pos.is_cpu for _, start_pos in steps)


def test_a_tokenizer_with_only_an_eos_id():
    tokenizer = SimpleNamespace(pad_id=-1, eos_id=7, encode=ScriptedTokenizer().encode, decode=str)
    assert Llama(ScriptedModel(), tokenizer).generate([[3, 4]], 6, 0) == ([[5, 6]], None)


def test_a_forward_that_a_subclass_overrides_is_called(model):
    """It is not bypassed in order to compute fewer logits."""

    class Negated(Transformer):
        def forward(self, tokens, start_pos=None):
            return -super().forward(tokens, start_pos)

    negated = Negated(model.params)
    negated.load_state_dict(model.state_dict())
    prompt = random_prompts(9)
    expected = (-model(torch.tensor(prompt))[:, -1]).argmax(-1).tolist()
    assert Llama(negated, ScriptedTokenizer()).generate(prompt, 1, 0)[0] == [expected]


def test_stop_token_and_what_follows_is_not_returned():
    llama = Llama(ScriptedModel(), ScriptedTokenizer([9]))
    tokens, scores = llama.generate([[3, 4], [7, 8], [8, 9], [20, 21]], 6, 0, logprobs=True, echo=True)
    assert tokens == [[3, 4, 5, 6, 7, 8], [7, 8], [8, 9, 10, 11, 12, 13, 14, 15], [20, 21, 22, 23, 24, 25, 26, 27]]
    assert [len(row) for row in scores] == [len(row) for row in tokens]


def test_generation_ends_when_all_rows_have_ended():
    model = ScriptedModel()
    Llama(model, ScriptedTokenizer([9])).generate([[5, 6], [6, 7]], 20, 0)
    # The prompts; 7 and 8; 8 and 9, at which the second row ends. The last call gives the first row its 9.
    assert len(model.calls) == 3


def test_scoring_generates_nothing(model, llama):
    prompts = random_prompts(50, 96, 1)
    tokens, scores = llama.generate(prompts, 0, logprobs=True, echo=True)
    assert tokens == prompts
    for prompt, row in zip(prompts, scores, strict=True):
        logprobs = torch.log_softmax(model(torch.tensor([prompt])).double(), -1)[0]
        expected = [logprobs[i, token].item() for i, (_, token) in enumerate(pairwise(prompt))]
        assert row == pytest.approx([0.0, *expected], abs=2e-4)
    counting, calls = count_calls(model)
    Llama(counting, ScriptedTokenizer()).generate(prompts, 0, logprobs=True, echo=True)
    assert calls == [0]
    assert llama.generate(prompts, 0) == ([[], [], []], None)
    assert llama.generate(prompts, 0, logprobs=True) == ([[], [], []], [[], [], []])


def test_scores_don_t_depend_on_the_block_size(llama, monkeypatch):
    prompts = random_prompts(50, 81)
    _, scores = llama.generate(prompts, 0, logprobs=True, echo=True)
    for positions in (1, 7, 80):
        monkeypatch.setattr("llama.decoding.MAX_LOGITS", positions * 320)
        assert close(llama.generate(prompts, 0, logprobs=True, echo=True)[1], scores)


def test_a_prompt_that_fills_the_context(llama):
    (prompt,) = random_prompts(96)
    tokens, scores = llama.generate([prompt], 10, 0, logprobs=True, echo=True)
    assert tokens == [prompt]
    assert len(scores[0]) == 96
    # The reference is off by one here: its scores are those of the next token.
    shorter = llama.generate([prompt[:95]], 0, 0, logprobs=True, echo=True)[1][0]
    assert scores[0][:95] == pytest.approx(shorter, abs=2e-4)


def test_the_keys_of_predictions(llama):
    plain = llama.text_completion(["5 6", "7 8"], temperature=0, max_gen_len=3)
    assert [list(prediction) for prediction in plain] == [["generation"]] * 2
    detailed = llama.text_completion(["5 6", "7 8"], temperature=0, max_gen_len=3, logprobs=True)
    for prediction, other in zip(detailed, plain, strict=True):
        assert set(prediction) == {"generation", "tokens", "logprobs"}
        assert prediction["generation"] == other["generation"] == " ".join(prediction["tokens"])
        assert len(prediction["tokens"]) == len(prediction["logprobs"]) == 3
    echoed = llama.text_completion(["5 6"], temperature=0, max_gen_len=3, logprobs=True, echo=True)[0]
    assert echoed["generation"] == "1 5 6 " + plain[0]["generation"]  # with BOS
    assert len(echoed["logprobs"]) == 6


def test_max_gen_len_none_fills_the_context():
    llama = Llama(ScriptedModel(vocab_size=1000), ScriptedTokenizer([999]))
    assert len(llama.text_completion(["5 6"], 0)[0]["generation"].split()) == 32 - 3


def test_the_tokenizer_decides_whether_a_text_begins_with_bos():
    tokenizer = ScriptedTokenizer()
    tokenizer.add_bos = False
    model = ScriptedModel()
    Llama(model, tokenizer).text_completion(["5 6"], 0, max_gen_len=1)
    assert model.calls[0][0] == (1, 2)


def test_chat_completion_is_generate_on_the_formatters_prompt():
    formatter = SimpleNamespace(encode_dialog_prompt=lambda dialog: [int(message["content"]) for message in dialog])
    llama = Llama(ScriptedModel(), ScriptedTokenizer([12]), formatter=formatter)
    dialogs = [[{"role": "user", "content": "5"}], [{"role": "user", "content": "9"}]]
    assert llama.chat_completion(dialogs, temperature=0, max_gen_len=4) == [
        {"generation": {"role": "assistant", "content": "6 7 8 9"}},
        {"generation": {"role": "assistant", "content": "10 11"}},
    ]
    assert len(llama.chat_completion((dialog for dialog in dialogs), temperature=0, max_gen_len=4)) == 2
    detailed = llama.chat_completion(dialogs, temperature=0, max_gen_len=4, logprobs=True)[1]
    assert detailed["tokens"] == ["10", "11"]
    assert detailed["logprobs"] == pytest.approx([0.0, 0.0], abs=1e-4)


@pytest.mark.parametrize("temperature", [0, 0.6])
def test_what_is_taken_from_the_random_generator(llama, temperature):
    """Nothing with temperature 0; else what one torch.multinomial a step takes."""
    torch.manual_seed(1)
    llama.generate(random_prompts(5), 6, temperature)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    if temperature:
        for _ in range(6):
            torch.multinomial(torch.ones(1, 320), 1)
    assert torch.equal(state, torch.get_rng_state())


def test_no_gradients_are_kept_and_grad_mode_is_as_before(llama):
    llama.generate(random_prompts(5), 2)
    assert torch.is_grad_enabled()
    assert not llama.model.cache.keys.requires_grad


def test_a_failed_call_does_not_spoil_later_ones():
    """The NaNs that a failed call leaves in the cache stand where shorter rows of a later call are masked."""
    model = tiny_model()
    with torch.no_grad():
        model.tok_embeddings.weight[300] = float("nan")
    llama = Llama(model, ScriptedTokenizer())
    prompts = random_prompts(2, 4, seed=1)
    expected = llama.generate(prompts, 12, 0)
    with pytest.raises(ArithmeticError):
        llama.generate([[300] * 60] * 4, 5, 0)
    assert llama.generate(prompts, 12, 0) == expected


def test_attention_may_return_its_result_with_any_strides(llama, monkeypatch):
    """CUDA's memory-efficient kernel returns a result that is contiguous only after transposing it."""
    prompts = random_prompts(5, 40)
    expected = llama.generate(prompts, 10, 0)
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **options: attention(*args, **options).transpose(1, 2).contiguous().transpose(1, 2),
    )
    assert llama.generate(prompts, 10, 0) == expected


INVALID = [
    (dict(prompt_tokens=[]), "empty batch"),
    (dict(prompt_tokens=[[1], []]), "prompt 1 is empty"),
    (dict(prompt_tokens=[[1]] * 5), "5 prompts given, but max_batch_size=4"),
    (dict(prompt_tokens=[[1], [1] * 97]), "prompt 1 has 97 tokens, but max_seq_len=96"),
    (dict(prompt_tokens=[[1, 320]]), "prompt 0 holds 320, which is outside the vocabulary of 320"),
    (dict(prompt_tokens=[[1, -1]]), "prompt 0 holds -1"),
    (dict(prompt_tokens=[[1.5]]), "list of lists of token ids"),
    (dict(prompt_tokens=[1, 2]), "list of lists of token ids"),
    (dict(temperature=-0.1), r"temperature=-0\.1 must be a number of at least 0"),
    (dict(temperature=float("nan")), "temperature=nan must be"),
    (dict(temperature=float("inf")), "temperature=inf must be"),
    (dict(temperature="hot"), "temperature='hot' must be"),
    (dict(temperature=1e-40), "temperature=1e-40 is too small"),
    (dict(temperature=True), "temperature=True must be"),
    (dict(top_p=-0.01), r"top_p=-0\.01 must be a number between 0 and 1"),
    (dict(top_p=1.01), r"top_p=1\.01 must be a number between 0 and 1"),
    (dict(top_p=float("nan")), "top_p=nan must be"),
    (dict(max_gen_len=-1), "max_gen_len=-1 must be a whole number of at least 0"),
    (dict(max_gen_len=2.5), r"max_gen_len=2\.5 must be a whole number"),
]


@pytest.mark.parametrize(("arguments", "message"), INVALID, ids=[repr(a)[5:40] for a, _ in INVALID])
def test_what_generate_refuses(llama, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        llama.generate(**({"prompt_tokens": [[1, 2]], "max_gen_len": 4} | arguments))
    assert isinstance(error.value, AssertionError)  # as the reference's checks are


def test_what_the_text_methods_refuse(llama):
    with pytest.raises(ValueError, match="prompts must be a list of texts, not '5 6'"):
        llama.text_completion("5 6")
    with pytest.raises(ValueError, match="prompts must be a list of texts, not None"):
        llama.text_completion(None)
    with pytest.raises(ValueError, match="dialogs must be a list of dialogs, not None"):
        llama.chat_completion(None)
    with pytest.raises(ValueError, match=r"a dialog is a list of messages.*chat_completion takes a list of dialogs"):
        llama.chat_completion([{"role": "user", "content": "hi"}])


def test_ids_of_any_integer_type(llama):
    expected = llama.generate([[5, 6, 7]], 4, 0)
    assert llama.generate(torch.tensor([[5, 6, 7]]), 4, 0) == expected
    assert llama.generate([(5, 6, 7)], 4, 0) == expected
    array = np.array([[5, 6, 7]])
    assert llama.generate(array, np.int64(4), np.float32(0), np.float64(0.9)) == expected


MEMORY_SCRIPT = """
import resource
import torch
from conftest import ScriptedTokenizer
from llama import Llama, ModelArgs, Transformer
args = ModelArgs(dim=64, n_layers=2, n_heads=2, vocab_size=128256, multiple_of=32, max_batch_size=4, max_seq_len=1056)
llama = Llama(Transformer(args), ScriptedTokenizer())
llama.model.setup_cache()
llama.generate([[5, 6, 7]], 2)  # torch allocates some memory at its first steps
prompts = torch.randint(3, 128256, (4, 1024)).tolist()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for logprobs in (False, True):
    llama.generate(prompts, 4, logprobs=logprobs, echo=logprobs)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif("sys.platform == 'win32'", reason="the resource module is not on Windows")
def test_memory_of_a_long_prompt_with_a_large_vocabulary(tmp_path):
    """In MB, without and with logprobs. The logits of all 4 x 1024 positions would take 2100."""
    (tmp_path / "script.py").write_text(MEMORY_SCRIPT)
    result = fork_python(tmp_path / "script.py")
    assert result.returncode == 0, result.stderr
    plain, with_logprobs = map(int, result.stdout.split())
    assert plain < 300
    assert with_logprobs < 1500


def test_a_model_that_leaves_its_vocabulary_to_the_tokenizer():
    model = ScriptedModel()
    model.params.vocab_size = -1  # the default of ModelArgs
    tokenizer = ScriptedTokenizer(())
    tokenizer.n_words = 9
    assert Llama(model, tokenizer).generate([[3, 4]], 2, 0)[0] == [[5, 6]]
    with pytest.raises(ValueError, match="prompt 0 holds 9, which is outside the vocabulary of 9 tokens"):
        Llama(model, tokenizer).generate([[9]], 2, 0)
