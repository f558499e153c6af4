"""Hidden states and embeddings of texts."""

import threading

import pytest
import torch
from conftest import ScriptedModel, ScriptedTokenizer, examples, hugging_face_twin, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from test_documents import blocks, run_programs

from llama import Llama
from llama.embeddings import batches_by_length, embed, hidden_states
from llama.errors import InputError
from llama.model_lock import lock_of

TEXTS = ["the user is in the house", "a", "", "another text, which is by far the longest of all of them", "é", "the"]


@pytest.fixture(scope="module")
def llama(llama3):
    return Llama(tiny_model(vocab_size=llama3.n_words, max_batch_size=4), llama3)


@pytest.fixture(scope="module")
def expected(llama):
    """What transformers computes of each text on its own."""
    twin = hugging_face_twin(llama.model)
    states = []
    for text in TEXTS:
        tokens = torch.tensor([llama.tokenizer.encode(text, bos=True, eos=False)])
        with torch.no_grad():
            states.append(twin(tokens, output_hidden_states=True).hidden_states[-1][0])
    return states


def test_hidden_states_are_those_of_transformers(llama, expected):
    """More texts than `max_batch_size`, of unequal lengths; the cache is never made."""
    states = hidden_states(llama, TEXTS)
    for ours, theirs in zip(states, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert llama.model.cache is None


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_are_pooled_hidden_states(llama, expected, pooling):
    vectors = embed(llama, TEXTS, pooling=pooling, normalize=False)
    pooled = torch.stack([states.mean(dim=0) if pooling == "mean" else states[-1] for states in expected])
    torch.testing.assert_close(vectors, pooled, atol=1e-4, rtol=0)
    normalized = embed(llama, TEXTS, pooling)
    torch.testing.assert_close(normalized, pooled / pooled.norm(dim=1, keepdim=True), atol=1e-4, rtol=0)


@examples(30)
@given(texts=st.lists(st.text(max_size=20), min_size=1, max_size=9))
def test_a_text_has_the_same_hidden_states_in_any_company(llama, texts):
    for text, together in zip(texts, hidden_states(llama, iter(texts)), strict=True):
        torch.testing.assert_close(together, hidden_states(llama, [text])[0], atol=1e-4, rtol=0)


@examples(100)
@given(lengths=st.lists(st.integers(1, 50), max_size=40), size=st.integers(1, 9))
def test_batches_by_length(lengths, size):
    batches = batches_by_length([[0] * length for length in lengths], size)
    order = [i for batch in batches for i in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[i] for i in order] == sorted(lengths, reverse=True)
    assert all(len(batch) == size for batch in batches[:-1])


def test_the_cache_keeps_what_it_holds(llama3):
    llama = Llama(tiny_model(vocab_size=llama3.n_words), llama3)
    llama.text_completion(["the user"], temperature=0, max_gen_len=4)
    cache, tokens = llama.model.cache, list(llama.model.cache.tokens)
    before = cache.keys.clone(), cache.values.clone()
    embed(llama, TEXTS)
    assert cache.tokens == tokens
    assert torch.equal(cache.keys, before[0])
    assert torch.equal(cache.values, before[1])


def test_gradients_can_be_computed_with_the_results(llama):
    """As a classifier of texts needs it. The network itself gets none."""
    classifier = torch.nn.Linear(llama.model.params.dim, 2)
    classifier(embed(llama, TEXTS[:2])).sum().backward()
    classifier(hidden_states(llama, TEXTS[:1])[0]).sum().backward()
    assert classifier.weight.grad is not None
    assert all(parameter.grad is None for parameter in llama.model.parameters())


def test_half_precision_gives_float32(llama3):
    llama = Llama(tiny_model(vocab_size=llama3.n_words).to(torch.bfloat16), llama3)
    assert hidden_states(llama, ["the user"])[0].dtype == torch.float32
    vectors = embed(llama, TEXTS)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(TEXTS)))


def test_calls_wait_for_their_turn(llama):
    results: list[torch.Tensor] = []
    with lock_of(llama.model).turn():
        thread = threading.Thread(target=lambda: results.append(embed(llama, ["a"])))
        thread.start()
        thread.join(0.3)
        assert not results
    thread.join(30)
    assert len(results) == 1


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("a text", "must be a list of texts, not 'a text'"),
        (7, "must be a list of texts, not 7"),
        ([], "at least one text is needed"),
        (["a", 7], "encode takes a str"),
        (["a", "the user " * 60], r"text 1 has \d+ tokens, but max_seq_len=96: shorten it"),
    ],
)
def test_what_is_refused(llama, texts, message):
    with pytest.raises(InputError, match=message):
        hidden_states(llama, texts)


def test_a_text_without_tokens_is_refused():
    """As with a vocabulary that has no BOS."""
    tokenizer = ScriptedTokenizer()
    tokenizer.add_bos = False
    with pytest.raises(InputError, match="text 1 is empty"):
        embed(Llama(tiny_model(), tokenizer), ["5 6", ""])


def test_an_unknown_pooling_is_refused(llama):
    with pytest.raises(InputError, match="pooling='max' must be 'mean' or 'last'"):
        embed(llama, TEXTS, pooling="max")


def test_another_network_is_refused():
    with pytest.raises(InputError, match="this model is a ScriptedModel"):
        embed(Llama(ScriptedModel(), ScriptedTokenizer()), ["5 6"])


def test_nan_is_an_error(llama3):
    llama = Llama(tiny_model(vocab_size=llama3.n_words), llama3)
    with torch.no_grad():
        llama.model.layers[1].feed_forward.w2.weight[0, 0] = torch.nan
    with pytest.raises(ArithmeticError, match="first in layer 1 of 2"):
        embed(llama, ["a"])


@pytest.mark.real
def test_the_program_of_the_page(capsys):
    assert run_programs("docs/evaluation.md", capsys) == blocks("text", "docs/evaluation.md")
