"""The KV cache: its parts, and calls that reuse what the last call left in it."""

import random

import pytest
import torch
from conftest import tiny_model

from llama import Llama, Transformer
from llama.kv_cache import KVCache

SHAPE = N_LAYERS, ROWS, HEADS, LENGTH, HEAD_DIM = 2, 3, 2, 5, 4


@pytest.fixture
def cache():
    """Each value is the number of its row."""
    cache = KVCache(SHAPE, device=torch.device("cpu"), dtype=torch.float32)
    for tensor in (cache.keys, cache.values):
        tensor += torch.arange(1, ROWS + 1)[:, None, None, None]
    return cache


def test_a_new_cache_is_zeros_and_holds_no_tokens():
    with torch.inference_mode():
        cache = KVCache((1, 2, 3, 4, 6), device=torch.device("cpu"), dtype=torch.bfloat16)
    assert cache.keys.shape == cache.values.shape == (1, 2, 3, 4, 6)
    assert cache.keys.dtype == cache.values.dtype == torch.bfloat16
    assert not cache.keys.any()
    assert not cache.values.any()
    assert cache.tokens == []
    cache.keys += 1  # allowed outside of inference mode, too


def test_layers_are_views_of_the_rows_and_positions_of_a_call(cache):
    cache.tokens = [[5], [6]]
    layers = cache.layers(2, seq=1, start_pos=2)
    assert cache.tokens == []  # since the call will change what the cache holds
    assert len(layers) == N_LAYERS
    for layer, keys, values in zip(layers, cache.keys, cache.values, strict=True):
        assert layer.keys.shape == layer.values.shape == (2, HEADS, 3, HEAD_DIM)
        assert layer.keys.data_ptr() == keys.data_ptr()
        assert layer.values.data_ptr() == values.data_ptr()


def test_update_stores_a_call_s_keys_and_values_and_returns_all_of_them(cache):
    new_keys, new_values = torch.full((2, HEADS, 2, HEAD_DIM), 7.0), torch.full((2, HEADS, 2, HEAD_DIM), 8.0)
    keys, values = cache.layers(2, seq=2, start_pos=1)[1].update(new_keys, new_values)
    assert keys.shape == values.shape == (2, HEADS, 3, HEAD_DIM)
    for tensor, whole, new in ((keys, cache.keys, 7), (values, cache.values, 8)):
        assert tensor[:, 0, :, 0].tolist() == [[1, new, new], [2, new, new]]
        assert whole[1, :, 0, :, 0].tolist() == [[1, new, new, 1, 1], [2, new, new, 2, 2], [3, 3, 3, 3, 3]]
        assert whole[0, :, 0, :, 0].tolist() == [[1] * 5, [2] * 5, [3] * 5]  # the other layer


def test_update_at_a_position_for_each_row(cache):
    new_keys, new_values = torch.full((2, HEADS, 2, HEAD_DIM), 7.0), torch.full((2, HEADS, 2, HEAD_DIM), 8.0)
    keys, values = cache.layers(2, seq=2, start_pos=torch.tensor([0, 2]))[0].update(new_keys, new_values)
    for tensor, new in ((keys, 7), (values, 8)):
        assert all(head.tolist() == [[new, new, 1, 1], [2, 2, new, new]] for head in tensor[..., 0].transpose(0, 1))


@pytest.mark.parametrize("rows", [[1, 1, 0], [0, 0], [2]])
def test_reorder(cache, rows):
    cache.tokens = [[5], [6], [7]]
    cache.reorder(torch.tensor(rows), 4)
    expected = [row + 1 for row in rows] + list(range(len(rows) + 1, ROWS + 1))
    for tensor in (cache.keys, cache.values):
        for layer in tensor:
            assert layer[:, 1, :4, 2].tolist() == [[number] * 4 for number in expected]
            assert layer[:, 1, 4, 2].tolist() == [1, 2, 3]  # behind `end`
    assert cache.tokens == []


def test_clear_sets_positions_of_all_rows_to_zeros(cache):
    cache.keys[1, 1, :, 2] = float("nan")
    cache.clear(2, 4)
    for tensor in (cache.keys, cache.values):
        for layer in tensor:
            assert layer[:, 0, :, 0].tolist() == [[1, 1, 0, 0, 1], [2, 2, 0, 0, 2], [3, 3, 0, 0, 3]]
        assert tensor.isfinite().all()


# The model's cache


def test_the_model_s_cache_has_the_promised_size_and_stays():
    model = tiny_model()
    cache, args = model.setup_cache(), model.params
    positions = args.max_batch_size * args.max_seq_len
    assert cache.keys.numel() == args.n_layers * positions * args.n_kv_heads * args.head_size
    assert model.setup_cache() is cache


@torch.no_grad()
def test_a_model_that_changes_its_dtype_or_device_gets_a_new_cache():
    model = tiny_model()
    model(torch.zeros(1, 4, dtype=torch.long), 0)
    old = model.cache
    model.to(torch.float64)
    assert model.setup_cache() is not old
    model.to("meta")
    assert model.setup_cache().keys.is_meta


@torch.no_grad()
def test_forward_empties_tokens_unless_it_works_without_the_cache():
    model = tiny_model()
    model.setup_cache().tokens = [[5, 6]]
    model(torch.tensor([[7]]))
    assert model.cache.tokens == [[5, 6]]
    model(torch.tensor([[7]]), 2)
    assert model.cache.tokens == []
    model.cache.tokens = [[5, 6]]
    model.hidden_states(torch.tensor([[7]]), torch.tensor([2]))
    assert model.cache.tokens == []


# Calls that reuse it


@pytest.fixture
def llama(llama3):
    return Llama(tiny_model(vocab_size=llama3.n_words, max_batch_size=3, max_seq_len=256), llama3)


@pytest.fixture
def prefilled(llama, monkeypatch):
    """The numbers of tokens a row that pass through the network, call by call of `forward`."""
    forward, lengths = llama.model.layers[0].forward, []

    def counting(x, *more):
        lengths.append(x.shape[1])
        return forward(x, *more)

    monkeypatch.setattr(llama.model.layers[0], "forward", counting)
    return lengths


def test_a_call_records_the_tokens_whose_keys_and_values_it_leaves(llama):
    """All but the last new token of a row, which was not forwarded; after beam search, none."""
    prompts = [[5, 6, 7], [8, 9]]
    tokens, _ = llama.generate(prompts, 4, 0)
    recorded = [prompt + answer[:3] for prompt, answer in zip(prompts, tokens, strict=True)]
    assert llama.model.cache.tokens == recorded
    stream = llama.generate_stream(prompts, 4, 0)
    assert sum(1 for _ in stream) == 8
    assert llama.model.cache.tokens == recorded
    llama.generate(prompts[:1], 4, seed=1, num_return_sequences=3)
    assert [row[:3] for row in llama.model.cache.tokens] == prompts[:1] * 3
    llama.generate(prompts[:1], 4, num_beams=3)
    assert llama.model.cache.tokens == []
    llama.generate(prompts, 4, 0)
    with pytest.raises(ZeroDivisionError):
        llama.generate(prompts, 4, 0, logits_processor=lambda input_ids, scores: 1 / 0)
    assert llama.model.cache.tokens == prompts


def test_the_next_turn_prefills_only_what_is_new(llama, llama3, prefilled):
    dialog = [{"role": "user", "content": "the user in there"}]
    llama.model.output.weight.data[200:] = 0.0  # it answers with lower-case letters, whose text encodes to the same ids
    llama.model.output.weight.data[:97] = 0.0
    llama.model.output.weight.data[123:200] = 0.0
    first = llama.chat_completion([dialog], 0, max_gen_len=15)[0]["generation"]
    longer = [*dialog, first, {"role": "user", "content": "and then?"}]
    fresh = llama.chat_completion([longer], 0, max_gen_len=15, logprobs=True)[0]

    llama.chat_completion([dialog], 0, max_gen_len=15)
    prefilled.clear()
    reusing = llama.chat_completion([longer], 0, max_gen_len=15, logprobs=True, reuse_cache=True)[0]
    assert reusing["generation"] == fresh["generation"]
    assert reusing["logprobs"] == pytest.approx(fresh["logprobs"], abs=1e-4)
    old = llama.formatter.encode_dialog_prompt(dialog)
    new = llama.formatter.encode_dialog_prompt(longer)
    answer = llama3.encode(first["content"].strip(), bos=False, eos=False)
    assert new[: len(old) + len(answer)] == old + answer
    # The answer's last token is not in the cache: no forward pass followed it.
    assert prefilled[0] <= len(new) - len(old) - len(answer) + 1
    assert sum(prefilled) == prefilled[0] + 14


@pytest.mark.parametrize("max_seq_len", [256, 24])
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))])
def test_a_random_conversation_gives_the_answers_of_an_empty_cache(llama3, seed, max_seq_len):
    """Longer, changed and shortened prompts, of one and several rows, in any order, and up to the context's end."""
    model = tiny_model(vocab_size=llama3.n_words, max_batch_size=3, max_seq_len=max_seq_len)
    llama = Llama(model, llama3)
    rng = random.Random(seed)
    prompts = [[rng.randrange(524) for _ in range(rng.randint(1, 20))] for _ in range(rng.randint(1, 3))]
    for _ in range(12):
        options = {"max_gen_len": rng.randint(0, 12), "temperature": rng.choice([0, 1.0]), "seed": rng.randint(0, 5)}
        reusing = llama.generate(prompts, **options, logprobs=True, reuse_cache=True)
        cache, model.cache = model.cache, None
        fresh = llama.generate(prompts, **options, logprobs=True)
        model.cache = cache
        assert reusing[0] == fresh[0]
        for ours, expected in zip(reusing[1], fresh[1], strict=True):
            assert ours == pytest.approx(expected, abs=1e-4)
        rows = [prompt + answer for prompt, answer in zip(prompts, fresh[0], strict=True)]
        rows = [row[: rng.randint(1, len(row))] for row in rows[: rng.randint(1, 3)]]
        prompts = [(row + [rng.randrange(524) for _ in range(rng.randint(0, 6))])[:max_seq_len] for row in rows]


def test_the_same_prompt_again_costs_one_token(llama, prefilled):
    prompt = list(range(60))
    expected = llama.generate([prompt], 5, 0)
    prefilled.clear()
    assert llama.generate([prompt], 5, 0, reuse_cache=True) == expected
    assert prefilled == [1, 1, 1, 1, 1]
    prefilled.clear()
    assert llama.generate([prompt], 5, 0) == expected  # unless asked for, the whole prompt passes through
    assert prefilled[0] == 60


def test_another_user_of_the_same_model(llama):
    other = Llama(llama.model, llama.tokenizer)
    expected = llama.generate([list(range(40))], 8, 0)
    other.generate([list(range(100, 140))], 8, 0)
    assert llama.generate([list(range(40))], 8, 0, reuse_cache=True) == expected
    with torch.no_grad():
        llama.model.forward(torch.zeros(3, 60, dtype=torch.long), 0)
    assert llama.generate([list(range(40))], 8, 0, reuse_cache=True) == expected


class Overriding(Transformer):
    def forward(self, tokens, start_pos=None):
        return super().forward(tokens, start_pos)


def test_a_subclass_with_a_forward_of_its_own(llama):
    model = Overriding(llama.model.params)
    model.load_state_dict(llama.model.state_dict())
    other = Llama(model, llama.tokenizer)
    for options in ({"temperature": 0}, {"num_beams": 2}, {"num_return_sequences": 2, "seed": 1}):
        expected = llama.generate([[5, 6, 7, 8]], 5, **options)
        assert other.generate([[5, 6, 7, 8]], 5, **options) == expected
        assert other.generate([[5, 6, 7, 8]], 5, **options, reuse_cache=True) == expected


def test_a_llama_whose_model_is_replaced(llama):
    model = tiny_model(seed=5, vocab_size=524, max_seq_len=64)
    expected = Llama(model, llama.tokenizer).generate([[5, 6]], 9, 0)
    assert llama.generate([[5, 6]], 9, 0) != expected
    llama.model = model
    assert llama.generate([[5, 6]], 9, 0) == expected


def test_an_exception_while_rows_are_copied(llama, monkeypatch):
    prompts = [[5, 6, 7, 8], [9, 10, 11, 12]]
    expected = llama.generate(prompts, 6, 0)
    reorder = KVCache.reorder

    def failing(self, rows, end):
        reorder(self, torch.tensor([0, 0]), end)
        raise KeyboardInterrupt

    monkeypatch.setattr(KVCache, "reorder", failing)
    with pytest.raises(KeyboardInterrupt):
        llama.generate(prompts[:1], 6, num_return_sequences=2)
    assert llama.generate(prompts, 6, 0, reuse_cache=True) == expected


def test_a_cache_that_was_replaced(llama):
    expected = llama.generate([[5, 6, 7, 8]], 5, 0)
    llama.model.cache = None
    assert llama.generate([[5, 6, 7, 8]], 5, 0, reuse_cache=True) == expected
    llama.model.double()
    llama.generate([[5, 6, 7, 8]], 5, 0, reuse_cache=True)
    llama.model.float()
    assert llama.generate([[5, 6, 7, 8]], 5, 0, reuse_cache=True) == expected
