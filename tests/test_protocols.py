"""What `Llama` needs of a network: which networks are cached models, and how their cache is used.

That a network of another architecture gets the right answers is shown in test_second_network.py.
"""

import pytest
import torch
from conftest import ScriptedModel, ScriptedTokenizer, tiny_model

from llama import Llama
from llama.protocols import CachedModel


class RecordingCache:
    """A cache that holds nothing, and records the calls of its methods."""

    def __init__(self):
        self.tokens = []
        self.calls = []

    def reorder(self, rows, end):
        self.tokens = []
        self.calls.append(("reorder", rows.tolist(), end))

    def clear(self, start, end):
        self.calls.append(("clear", start, end))


class ScriptedCachedModel(ScriptedModel):
    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.cache = RecordingCache()

    def setup_cache(self):
        return self.cache

    def forward(self, tokens, start_pos):
        self.cache.tokens = []
        return super().forward(tokens, start_pos)


@pytest.fixture
def model():
    return ScriptedCachedModel()


@pytest.fixture
def llama(model):
    return Llama(model, ScriptedTokenizer([]))


def test_a_cached_model_has_setup_cache(model):
    assert not isinstance(ScriptedModel(), CachedModel)
    assert isinstance(model, CachedModel)
    assert isinstance(tiny_model(), CachedModel)


def test_several_answers_copy_the_rows_of_the_prompts(model, llama):
    assert llama.generate([[3], [5]], 2, num_return_sequences=2)[0] == [[4, 5]] * 2 + [[6, 7]] * 2
    assert model.cache.calls == [("reorder", [0, 0, 1, 1], 1)]


def test_padding_is_followed_by_zeros(model, llama):
    """Where a shorter row is masked, nothing may be NaN: up to the last position that a new token of any row takes."""
    llama.generate([[3], [5, 6, 7]], 4, 0)
    assert model.cache.calls == [("clear", 3, 7)]
    model.cache.calls.clear()
    llama.generate([[3, 4], [5, 6]], 4, 0)
    assert model.cache.calls == []


def test_beam_search_reorders_the_rows_of_the_beams(model, llama):
    (tokens,), _ = llama.generate([[3]], 3, num_beams=2)
    assert tokens == [4, 5, 6]
    (name, rows, end), *steps = model.cache.calls
    assert (name, rows, end) == ("reorder", [0, 0], 1)
    assert [(name, end) for name, _, end in steps] == [("reorder", 1), ("reorder", 2)]


def test_reuse_of_the_cache_begins_after_the_recorded_tokens(model, llama):
    llama.generate([[3, 4], [5, 6]], 3, 0)
    assert model.cache.tokens == [[3, 4, 5, 6], [5, 6, 7, 8]]
    for prompts, start_pos in (
        ([[3, 4, 5, 9, 9], [5, 6, 7, 8, 9]], 3),
        ([[3, 4, 5, 6], [5, 6, 7, 8]], 3),  # the last token of each prompt passes through the network
        ([[3, 4, 5, 6, 7]], 4),
        ([[1, 4, 5, 6, 7]], 0),
        ([[3, 4], [5, 6], [7, 8]], 0),  # more rows than are recorded
    ):
        model.cache.tokens = [[3, 4, 5, 6], [5, 6, 7, 8]]
        model.calls.clear()
        llama.generate(prompts, 1, 0, reuse_cache=True)
        assert model.calls[0] == ((len(prompts), len(prompts[0]) - start_pos), start_pos)


def test_without_setup_cache_each_answer_prefills_its_prompt():
    model = ScriptedModel()
    llama = Llama(model, ScriptedTokenizer([]))
    tokens, logprobs = llama.generate([[3], [5]], 2, num_return_sequences=2, logprobs=True, echo=True)
    assert tokens == [[3, 4, 5]] * 2 + [[5, 6, 7]] * 2
    assert all(row == pytest.approx([0, 0, 0], abs=1e-4) for row in logprobs)
    assert model.calls == [((4, 1), 0), ((4, 1), 1)]


def test_without_setup_cache_the_whole_prompt_passes_through():
    model = ScriptedModel()
    llama = Llama(model, ScriptedTokenizer([]))
    for _ in range(2):
        assert llama.generate([[3, 4]], 2, 0, reuse_cache=True)[0] == [[5, 6]]
    assert [start_pos for _, start_pos in model.calls] == [0, 2, 0, 2]


def test_logits_of_any_dtype():
    class HalfPrecision(ScriptedModel):
        def forward(self, tokens, start_pos):
            return super().forward(tokens, start_pos).half()

    seen = []

    def record_dtype(input_ids, scores):
        seen.append(scores.dtype)
        return scores

    llama = Llama(HalfPrecision(), ScriptedTokenizer([]))
    assert llama.generate([[3, 4]], 2, 0, logits_processor=record_dtype)[0] == [[5, 6]]
    assert seen == [torch.float32] * 2
