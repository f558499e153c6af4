"""The decode loop and its two faces, against a plain loop written from its definition."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, ScriptedModel, ScriptedTokenizer, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from llama import Llama, Transformer


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def llama(model):
    return Llama(model, ScriptedTokenizer())


def prompts_of(*lengths: int, seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 320, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def plain_loop(model, prompts, max_gen_len, temperature, top_p, stop_tokens):
    """The definition, with neither cache nor padding: prompts of one length, the whole text anew at each step.

    Returns the rows' new tokens and logprobs, and the logprobs of their prompts.
    """
    texts = torch.tensor(prompts)
    begin = texts.shape[1]
    for _ in range(min(max_gen_len, model.params.max_seq_len - begin)):
        logits = model(texts)[:, -1]
        if temperature == 0:
            new = logits.argmax(-1, keepdim=True)
        else:
            probs, ids = torch.softmax(logits / temperature, -1).sort(-1, descending=True)
            probs[probs.cumsum(-1) - probs > top_p] = 0
            new = ids.gather(1, torch.multinomial(probs / probs.sum(-1, keepdim=True), 1))
        texts = torch.cat([texts, new], 1)
    every = torch.log_softmax(model(texts).double(), -1)
    tokens, logprobs, prompt_logprobs = [], [], []
    for row, text in enumerate(texts.tolist()):
        scores = [0.0] + [every[row, i - 1, text[i]].item() for i in range(1, len(text))]
        end = next((i for i in range(begin, len(text)) if text[i] in stop_tokens), len(text))
        tokens.append(text[begin:end])
        logprobs.append(scores[begin:end])
        prompt_logprobs.append(scores[:begin])
    return tokens, logprobs, prompt_logprobs


def close(rows, others):
    return all(a == pytest.approx(b, abs=2e-4) for a, b in zip(rows, others, strict=True))


@pytest.mark.parametrize("lengths", [(1,), (40,), (96,), (7, 7), (33, 33, 33, 33)])
@pytest.mark.parametrize(("temperature", "top_p"), [(0, 0.9), (0.6, 0.9), (1.3, 1.0), (5.0, 0.5)])
def test_same_tokens_as_the_plain_loop(model, lengths, temperature, top_p):
    prompts = prompts_of(*lengths)
    stop_tokens = set(range(200, 230))  # some rows end early
    llama = Llama(model, ScriptedTokenizer(stop_tokens))
    torch.manual_seed(5)
    tokens, logprobs, prompt_logprobs = plain_loop(model, prompts, 30, temperature, top_p, stop_tokens)
    torch.manual_seed(5)
    assert llama.generate(prompts, 30, temperature, top_p) == (tokens, None)
    torch.manual_seed(5)
    found, scores = llama.generate(prompts, 30, temperature, top_p, logprobs=True)
    assert found == tokens
    assert close(scores, logprobs)
    torch.manual_seed(5)
    found, scores = llama.generate(prompts, 30, temperature, top_p, logprobs=True, echo=True)
    assert found == [prompt + new for prompt, new in zip(prompts, tokens, strict=True)]
    assert close(scores, [a + b for a, b in zip(prompt_logprobs, logprobs, strict=True)])
    assert all(score <= 0 for row in scores for score in row)


def count_passes(model):
    """A model like this one, and the list of the start positions of its forward passes."""
    passes = []

    class Counting:
        params = model.params

        def forward(self, tokens, start_pos):
            passes.append(start_pos)
            return model(tokens, start_pos)

    return Counting(), passes


@pytest.mark.parametrize("lengths", [(5, 60), (60, 5), (1, 2, 3, 4), (96, 3, 50), (95, 96)])
def test_unequal_prompts_each_as_if_alone(model, llama, lengths):
    prompts = prompts_of(*lengths)
    alone = [llama.generate([prompt], 25, 0, logprobs=True, echo=True) for prompt in prompts]
    tokens, scores = llama.generate(prompts, 25, 0, logprobs=True, echo=True)
    assert tokens == [rows[0] for rows, _ in alone]
    assert close(scores, [rows[0] for _, rows in alone])
    counting, passes = count_passes(model)
    again, _ = Llama(counting, ScriptedTokenizer()).generate(prompts, 25, 0)
    new = max(len(text) - len(prompt) for text, prompt in zip(tokens, prompts, strict=True))
    assert [len(text) for text in again] == [len(a) - len(b) for a, b in zip(tokens, prompts, strict=True)]
    assert len(passes) <= 1 + new


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 96), min_size=1, max_size=4), st.integers(0, 40), st.integers(0, 100))
def test_any_batch_each_row_as_if_alone(llama, lengths, max_gen_len, seed):
    prompts = prompts_of(*lengths, seed=seed)
    tokens, _ = llama.generate(prompts, max_gen_len, 0)
    assert tokens == [llama.generate([prompt], max_gen_len, 0)[0][0] for prompt in prompts]
    for prompt, new in zip(prompts, tokens, strict=True):
        assert len(new) <= min(max_gen_len, 96 - len(prompt))


def test_one_prompt_needs_one_pass_and_one_for_each_token_but_the_last(model):
    counting, passes = count_passes(model)
    tokens, _ = Llama(counting, ScriptedTokenizer(())).generate(prompts_of(20), 10, 0)
    assert len(tokens[0]) == 10
    assert passes == [0, *range(20, 29)]
    assert all(type(start_pos) is int for start_pos in passes)


def test_five_lines():
    torch.manual_seed(0)
    model = Transformer(tiny_model().params)
    llama = Llama(model, ScriptedTokenizer())
    answer = llama.text_completion(["5 6 7"], temperature=0, max_gen_len=4)
    assert len(answer[0]["generation"].split()) == 4
    assert not torch.distributed.is_initialized()


def test_a_scripted_model_needs_only_params_and_forward():
    model = ScriptedModel()
    llama = Llama(model, ScriptedTokenizer([12]))
    assert llama.generate([[3, 4], [8, 9]], 6, 0) == ([[5, 6, 7, 8, 9, 10], [10, 11]], None)
    assert model.calls == [((2, 2), 0), *(((2, 1), position) for position in range(2, 7))]
    tokens, scores = llama.generate([[3], [4, 5, 6]], 2, 0.1, logprobs=True)
    assert tokens == [[4, 5], [7, 8]]
    assert close(scores, [[0.0, 0.0], [0.0, 0.0]])  # the script is nearly certain
    assert llama.text_completion(["3 4"], 0, 0.9, 3)[0] == {"generation": "5 6 7"}


def test_a_tokenizer_with_only_an_eos_id():
    tokenizer = SimpleNamespace(pad_id=-1, eos_id=7, encode=ScriptedTokenizer().encode, decode=str)
    assert Llama(ScriptedModel(), tokenizer).generate([[3, 4]], 6, 0) == ([[5, 6]], None)


def test_a_network_with_its_own_forward_is_asked(model):
    """A subclass that changes `forward`, or a patched model, is not bypassed for the sake of fewer logits."""

    class Backwards(Transformer):
        def forward(self, tokens, start_pos=None):
            return -super().forward(tokens, start_pos)

    other = Backwards(model.params)
    other.load_state_dict(model.state_dict())
    prompt = prompts_of(9)
    want = (-model(torch.tensor(prompt))[:, -1]).argmax(-1).tolist()
    assert Llama(other, ScriptedTokenizer()).generate(prompt, 1, 0)[0] == [want]


def test_stop_token_and_what_follows_is_not_returned():
    llama = Llama(ScriptedModel(), ScriptedTokenizer([9]))
    tokens, scores = llama.generate([[3, 4], [7, 8], [8, 9], [20, 21]], 6, 0, logprobs=True, echo=True)
    assert tokens == [[3, 4, 5, 6, 7, 8], [7, 8], [8, 9, 10, 11, 12, 13, 14, 15], [20, 21, 22, 23, 24, 25, 26, 27]]
    assert [len(row) for row in scores] == [len(row) for row in tokens]


def test_the_loop_ends_when_all_rows_have_ended():
    model = ScriptedModel()
    Llama(model, ScriptedTokenizer([9])).generate([[5, 6], [6, 7]], 20, 0)
    assert len(model.calls) == 3  # the prompts, then 7 8, 8 9; the second row's end is drawn with the first's 8


def test_scoring_generates_nothing(model, llama):
    prompts = prompts_of(50, 96, 1)
    tokens, scores = llama.generate(prompts, 0, logprobs=True, echo=True)
    assert tokens == prompts
    for prompt, row in zip(prompts, scores, strict=True):
        every = torch.log_softmax(model(torch.tensor([prompt])).double(), -1)[0]
        assert row == pytest.approx([0.0] + [every[i, b].item() for i, (a, b) in enumerate(pairwise(prompt))], abs=2e-4)
    counting, passes = count_passes(model)
    Llama(counting, ScriptedTokenizer()).generate(prompts, 0, logprobs=True, echo=True)
    assert passes == [0]
    assert llama.generate(prompts, 0) == ([[], [], []], None)
    assert llama.generate(prompts, 0, logprobs=True) == ([[], [], []], [[], [], []])


def test_scores_don_t_depend_on_the_block_size(llama, monkeypatch):
    prompts = prompts_of(50, 81)
    _, whole = llama.generate(prompts, 0, logprobs=True, echo=True)
    for positions in (1, 7, 80):
        monkeypatch.setattr("llama.decoding.LOGITS_AT_ONCE", positions * 320)
        assert close(llama.generate(prompts, 0, logprobs=True, echo=True)[1], whole)


def test_a_prompt_that_fills_the_context(llama):
    (prompt,) = prompts_of(96)
    tokens, scores = llama.generate([prompt], 10, 0, logprobs=True, echo=True)
    assert tokens == [prompt]
    assert len(scores[0]) == 96
    # the reference is off by one here: its scores are those of the next token
    assert scores[0][:95] == pytest.approx(
        llama.generate([prompt[:95]], 0, 0, logprobs=True, echo=True)[1][0], abs=2e-4
    )


def test_the_predictions_keys(llama):
    plain = llama.text_completion(["5 6", "7 8"], temperature=0, max_gen_len=3)
    assert [list(prediction) for prediction in plain] == [["generation"]] * 2
    full = llama.text_completion(["5 6", "7 8"], temperature=0, max_gen_len=3, logprobs=True)
    for prediction, other in zip(full, plain, strict=True):
        assert set(prediction) == {"generation", "tokens", "logprobs"}
        assert prediction["generation"] == other["generation"] == " ".join(prediction["tokens"])
        assert len(prediction["tokens"]) == len(prediction["logprobs"]) == 3
    echoed = llama.text_completion(["5 6"], temperature=0, max_gen_len=3, logprobs=True, echo=True)[0]
    assert echoed["generation"] == "1 5 6 " + plain[0]["generation"]  # with BOS
    assert len(echoed["logprobs"]) == 6


def test_max_gen_len_none_fills_the_context():
    llama = Llama(ScriptedModel(vocab_size=1000), ScriptedTokenizer([999]))
    assert len(llama.text_completion(["5 6"], 0)[0]["generation"].split()) == 32 - 3


def test_whether_a_text_starts_with_bos_is_the_tokenizers_word():
    tokenizer = ScriptedTokenizer()
    tokenizer.add_bos = False
    model = ScriptedModel()
    Llama(model, tokenizer).text_completion(["5 6"], 0, max_gen_len=1)
    assert model.calls[0][0] == (1, 2)


def test_chat_is_generate_on_the_formatters_prompt():
    formatter = SimpleNamespace(encode_dialog_prompt=lambda dialog: [int(message["content"]) for message in dialog])
    llama = Llama(ScriptedModel(), ScriptedTokenizer([12]), formatter=formatter)
    dialogs = [[{"role": "user", "content": "5"}], [{"role": "user", "content": "9"}]]
    assert llama.chat_completion(dialogs, temperature=0, max_gen_len=4) == [
        {"generation": {"role": "assistant", "content": "6 7 8 9"}},
        {"generation": {"role": "assistant", "content": "10 11"}},
    ]
    assert len(llama.chat_completion((dialog for dialog in dialogs), temperature=0, max_gen_len=4)) == 2
    full = llama.chat_completion(dialogs, temperature=0, max_gen_len=4, logprobs=True)[1]
    assert full["tokens"] == ["10", "11"]
    assert full["logprobs"] == pytest.approx([0.0, 0.0], abs=1e-4)


@pytest.mark.parametrize("temperature", [0, 0.6])
def test_draws_leave_other_state_alone(llama, temperature):
    """Greedy decoding takes nothing from the random generator; drawing takes one multinomial a step."""
    torch.manual_seed(1)
    llama.generate(prompts_of(5), 6, temperature)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    if temperature:
        for _ in range(6):
            torch.multinomial(torch.ones(1, 320), 1)
    assert torch.equal(state, torch.get_rng_state())


def test_no_gradients_are_kept_and_grad_mode_is_as_before(llama):
    llama.generate(prompts_of(5), 2)
    assert torch.is_grad_enabled()
    assert not llama.model.cache.keys.requires_grad


def test_nan_names_the_layer_and_the_dtype():
    model = tiny_model()
    with torch.no_grad():
        model.layers[1].feed_forward.w1.weight[3, 5] = float("nan")
    llama = Llama(model, ScriptedTokenizer())
    for temperature in (0, 0.6):
        with pytest.raises(ArithmeticError, match=r"layer 1 of 2, in float32: a weight is damaged"):
            llama.generate([[5, 6]], 3, temperature)
    with pytest.raises(ArithmeticError, match=r"layer 1 of 2, in float32"):  # and no NaN among the scores
        llama.generate([[5, 6]], 0, logprobs=True, echo=True)
    with torch.no_grad():
        model.layers[1].feed_forward.w1.weight[3, 5] = 0
    assert len(llama.generate([[5, 6]], 3)[0][0]) <= 3  # and it can go on
    assert not model.layers[0]._forward_hooks


def test_too_large_for_float16():
    model = tiny_model()
    with torch.no_grad():
        model.layers[0].feed_forward.w2.weight.mul_(1e5)
    llama = Llama(model.half(), ScriptedTokenizer())
    with pytest.raises(ArithmeticError, match=r"layer 0 of 2, in float16.*dtype=torch.bfloat16 or torch.float32"):
        llama.generate([[5, 6]], 3, 0)


def test_nan_of_a_generated_token_is_found_where_it_is():
    model = tiny_model()
    llama = Llama(model, ScriptedTokenizer(()))
    (text,), _ = llama.generate([[5, 6]], 4, 0)
    with torch.no_grad():
        model.tok_embeddings.weight[text[2]] = float("nan")
    with pytest.raises(ArithmeticError, match="first in layer 0 of 2"):
        llama.generate([[5, 6]], 8, 0)


def test_a_failed_call_does_not_spoil_later_ones():
    """NaNs that a failed call left in the cache lie where shorter rows look past them."""
    model = tiny_model()
    with torch.no_grad():
        model.tok_embeddings.weight[300] = float("nan")
    llama = Llama(model, ScriptedTokenizer())
    prompts = prompts_of(2, 4, seed=1)
    want = llama.generate(prompts, 12, 0)
    with pytest.raises(ArithmeticError):
        llama.generate([[300] * 60] * 4, 5, 0)
    assert llama.generate(prompts, 12, 0) == want


def test_threads_wait_for_each_other(llama):
    prompts = [prompts_of(n, seed=n)[0] for n in (3, 20, 40, 61)]
    want = [llama.generate([prompt], 15, 0) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda prompt: llama.generate([prompt], 15, 0), prompts * 3))
    assert found == want * 3


def test_fused_attention_may_lay_its_result_out_by_tokens(llama, monkeypatch):
    """As CUDA's memory-efficient kernel does."""
    prompts = prompts_of(5, 40)
    want = llama.generate(prompts, 10, 0)
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **options: attention(*args, **options).transpose(1, 2).contiguous().transpose(1, 2),
    )
    assert llama.generate(prompts, 10, 0) == want


INVALID = [
    (dict(prompt_tokens=[]), "empty batch"),
    (dict(prompt_tokens=[[1], []]), "prompt 1 is empty"),
    (dict(prompt_tokens=[[1]] * 5), "5 prompts given, but max_batch_size=4"),
    (dict(prompt_tokens=[[1], [1] * 97]), "prompt 1 has 97 tokens, but max_seq_len=96"),
    (dict(prompt_tokens=[[1, 320]]), "prompt 0 holds 320, which is outside the vocabulary of 320"),
    (dict(prompt_tokens=[[1, -1]]), "prompt 0 holds -1"),
    (dict(prompt_tokens=[[1.5]]), "list of lists of token ids"),
    (dict(prompt_tokens=[1, 2]), "list of lists of token ids"),
    (dict(temperature=-0.1), r"temperature=-0\.1 must be"),
    (dict(temperature=float("nan")), "temperature=nan must be"),
    (dict(temperature=float("inf")), "temperature=inf must be"),
    (dict(temperature="hot"), "temperature='hot' must be"),
    (dict(temperature=1e-40), "temperature=1e-40 is too small"),
    (dict(temperature=True), "temperature=True must be"),
    (dict(top_p=-0.01), r"top_p=-0\.01 must be between 0 and 1"),
    (dict(top_p=1.01), r"top_p=1\.01 must be between 0 and 1"),
    (dict(top_p=float("nan")), "top_p=nan must be"),
    (dict(max_gen_len=-1), "max_gen_len=-1 must be"),
    (dict(max_gen_len=2.5), r"max_gen_len=2\.5 must be"),
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
    want = llama.generate([[5, 6, 7]], 4, 0)
    assert llama.generate(torch.tensor([[5, 6, 7]]), 4, 0) == want
    assert llama.generate([(5, 6, 7)], 4, 0) == want
    numbers = np.array([[5, 6, 7]])
    assert llama.generate(numbers, np.int64(4), np.float32(0), np.float64(0.9)) == want


MEMORY_SCRIPT = """
import resource, sys
import torch
sys.path.insert(0, "tests")
from conftest import ScriptedTokenizer
from llama import Llama, ModelArgs, Transformer
logprobs = sys.argv[1] == "logprobs"
args = ModelArgs(dim=64, n_layers=2, n_heads=2, vocab_size=128256, multiple_of=32, max_batch_size=4, max_seq_len=2112)
llama = Llama(Transformer(args), ScriptedTokenizer())
llama.model.setup_cache()
llama.generate([[5, 6, 7]], 2)  # what torch sets up at its first steps
prompts = torch.randint(3, 128256, (4, 2048)).tolist()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
llama.generate(prompts, 8, logprobs=logprobs, echo=logprobs)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the resource module is not on Windows")
@pytest.mark.parametrize(("mode", "limit"), [("plain", 600), ("logprobs", 1500)])
def test_memory_of_a_long_prompt_with_a_large_vocabulary(mode, limit):
    """The logits of all 4 x 2048 positions would take 4.2 GB."""
    run = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, mode], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert int(run.stdout) < limit
