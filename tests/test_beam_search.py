"""Beam search: the sequences and scores of Hugging Face's, on the same weights."""

import math

import pytest
import torch
import transformers
from conftest import ScriptedModel, ScriptedTokenizer, hugging_face_twin, tiny_model

from llama import Llama
from llama.beam_search import Search
from llama.sampling_params import SamplingParams
from llama.streaming import StopCriteria

ENDS = (7, 11, 30)
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9], [2]]
NEW = 12


class Ids(ScriptedTokenizer):
    add_bos = False

    def __init__(self):
        super().__init__(ENDS)


@pytest.fixture(scope="module", params=[0, 1, 2])
def pair(request):
    """Our network with a small vocabulary, so that its ends are in reach, and Hugging Face's twin."""
    model = tiny_model(seed=request.param, vocab_size=40, max_batch_size=20)
    return Llama(model, Ids()), hugging_face_twin(model)


def theirs(twin, prompt, **options):
    out = twin.generate(
        torch.tensor([prompt]),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=list(ENDS),
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    found = []
    for row, score in zip(out.sequences.tolist(), out.sequences_scores.tolist(), strict=True):
        new = row[len(prompt) :]
        end = next((i for i, token in enumerate(new) if token in ENDS), len(new))
        found.append((new[:end], score))
    return found


ASKED = [(beams, penalty, early) for beams in (2, 4, 5) for penalty in (0.8, 1.0, 1.3) for early in (False, True)]
MORE = [(3, 0.0, False), (3, -0.5, True), (4, -0.5, False), (4, 1.3, "never"), (5, 0.0, "never"), (10, 1.0, False)]


@pytest.mark.parametrize(("num_beams", "length_penalty", "early_stopping"), ASKED + MORE)
def test_the_same_as_hugging_faces(pair, num_beams, length_penalty, early_stopping):
    """Prompts of several lengths in one batch, each as if alone; all beams returned."""
    llama, twin = pair
    prompts = PROMPTS if num_beams <= 5 else PROMPTS[:2]
    options = {"num_beams": num_beams, "length_penalty": length_penalty, "early_stopping": early_stopping}
    options["num_return_sequences"] = num_beams
    texts = [" ".join(map(str, prompt)) for prompt in prompts]
    found = llama.text_completion(texts, max_gen_len=NEW, logprobs=True, **options)
    assert len(found) == len(prompts) * num_beams
    for i, prompt in enumerate(prompts):
        want = theirs(twin, prompt, **options)
        ours = found[i * num_beams : (i + 1) * num_beams]
        assert [one["generation"] for one in ours] == [" ".join(map(str, sequence)) for sequence, _ in want]
        assert [one["score"] for one in ours] == pytest.approx([score for _, score in want], abs=1e-4, rel=1e-5)


def test_greedy_answers_are_hugging_faces(pair):
    llama, twin = pair
    for prompt, tokens in zip(PROMPTS, llama.generate(PROMPTS, 60, 0)[0], strict=True):
        row = twin.generate(
            torch.tensor([prompt]), max_new_tokens=60, do_sample=False, eos_token_id=list(ENDS), pad_token_id=0
        )[0].tolist()[len(prompt) :]
        end = next((i for i, token in enumerate(row) if token in ENDS), len(row))
        assert tokens == row[:end]


def test_answers_end_in_both_ways_and_differ_from_the_greedy_one(pair):
    """Else the tests above would show little."""
    llama, _ = pair
    tokens, _ = llama.generate(PROMPTS, NEW, num_beams=5, num_return_sequences=5)
    assert min(map(len, tokens)) < NEW
    assert max(map(len, tokens)) == NEW
    best, _ = llama.generate(PROMPTS, NEW, num_beams=5)
    assert best == tokens[::5]
    assert best != llama.generate(PROMPTS, NEW, 0)[0]


def test_logprobs_and_scores_are_of_the_same_network(pair):
    llama, _ = pair
    texts = [" ".join(map(str, prompt)) for prompt in PROMPTS]
    for text, one in zip(texts, llama.text_completion(texts, max_gen_len=NEW, logprobs=True, num_beams=4), strict=True):
        prompt = [int(word) for word in text.split()]
        answer = [int(word) for word in one["generation"].split()]
        scored = llama.generate([prompt + answer], 0, logprobs=True, echo=True)[1][0][len(prompt) :]
        assert one["logprobs"] == pytest.approx(scored, abs=1e-4)
        if len(answer) == NEW:
            assert one["score"] == pytest.approx(sum(scored) / NEW, abs=1e-4)
        else:  # the end token counts, too
            assert one["score"] < sum(scored) / (len(answer) + 1)


def test_one_beam_is_greedy(pair):
    llama, _ = pair
    assert llama.generate(PROMPTS, NEW, 0, num_beams=1) == llama.generate(PROMPTS, NEW, 0)


def test_no_room_and_little_room(pair):
    llama, _ = pair
    full = [1] * 96
    tokens, _ = llama.generate([full, [1, 2], [3] * 94], 5, num_beams=3)
    assert tokens[0] == []
    assert len(tokens[2]) <= 2
    assert tokens[1] == llama.generate([[1, 2]], 5, num_beams=3)[0][0]
    assert llama.generate(PROMPTS, 0, num_beams=3)[0] == [[], [], [], []]


def test_a_stop_text_ends_a_beam(pair):
    llama, _ = pair
    options = {"max_gen_len": NEW, "num_beams": 4, "num_return_sequences": 4, "length_penalty": 0.0}
    best = llama.text_completion(["3 1 4"], **options)[0]["generation"].split()
    stop = " ".join(best[1:3]) if len(best) > 2 else best[-1]
    found = llama.text_completion(["3 1 4"], **options, stop=stop, logprobs=True)
    assert all(stop not in one["generation"] for one in found)
    cut = [one for one in found if one["generation"] == " ".join(best)[: " ".join(best).index(stop)]]
    assert len(cut) == 1
    assert all(len(one["tokens"]) == len(one["logprobs"]) for one in found)


def test_a_logits_processor_changes_the_search(pair):
    llama, _ = pair
    seen = []

    def even(tokens, logits):
        seen.append([list(row) for row in tokens])
        logits[:, 1::2] = -math.inf
        return logits

    tokens, _ = llama.generate(PROMPTS[:2], NEW, num_beams=3, num_return_sequences=3, logits_processor=even)
    assert all(token % 2 == 0 for row in tokens for token in row)
    assert seen[0] == [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3
    assert all(len(row) == len(PROMPTS[0]) + 3 for row in seen[3][:3])
    llama.tokenizer.add_bos = False
    one = llama.text_completion(["3 1 4"], max_gen_len=NEW, num_beams=3, logits_processor=even, logprobs=True)[0]
    answer = [int(word) for word in one["generation"].split()]
    scored = llama.generate([[3, 1, 4, *answer]], 0, logprobs=True, echo=True)[1][0][3:]
    assert one["logprobs"] == pytest.approx(scored, abs=1e-4)  # the model's own


def test_a_logits_processor_as_hugging_face_has_it(pair):
    llama, twin = pair

    class Even(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, 1::2] = -math.inf
            return scores

    def even(tokens, logits):
        logits[:, 1::2] = -math.inf
        return logits

    options = {"num_beams": 3, "num_return_sequences": 3}
    found = llama.text_completion(["3 1 4"], max_gen_len=NEW, **options, logits_processor=even)
    want = theirs(twin, [3, 1, 4], **options, logits_processor=[Even()])
    assert [one["generation"] for one in found] == [" ".join(map(str, sequence)) for sequence, _ in want]
    assert [one["score"] for one in found] == pytest.approx([score for _, score in want], abs=1e-4)


def test_a_beam_that_can_t_go_on_leaves_the_others(pair):
    llama, _ = pair

    def stuck(tokens, logits):
        for row, text in enumerate(tokens):
            if len(text) > 3 and text[3] % 2:
                logits[row] = -math.inf
        return logits

    found, _ = llama.generate([[3, 1, 4]], NEW, num_beams=6, num_return_sequences=1, logits_processor=stuck)
    assert found[0][0] % 2 == 0


def test_beams_change_nothing_for_later_calls(pair):
    llama, _ = pair
    before = llama.generate(PROMPTS, NEW, 0, logprobs=True)
    llama.generate(PROMPTS, NEW, num_beams=4)
    assert llama.generate(PROMPTS, NEW, 0, logprobs=True) == before
    llama.generate(PROMPTS, NEW, num_beams=4)
    assert llama.generate(PROMPTS, NEW, 0, logprobs=True, reuse_cache=True)[0] == before[0]


class Foreign(torch.nn.Module):
    """Someone else's network, with a cache that can't be reordered from outside."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.params = ScriptedModel().params

    def forward(self, tokens, start_pos):
        return ScriptedModel().forward(tokens, start_pos)


def test_models_of_others():
    assert Llama(ScriptedModel(), ScriptedTokenizer([9])).generate([[3], [5]], 6, num_beams=2)[0] == [
        [4, 5, 6, 7, 8],
        [6, 7, 8],
    ]
    with pytest.raises(ValueError, match="need the cache of this library's Transformer"):
        Llama(Foreign(), ScriptedTokenizer()).generate([[3]], 5, num_beams=2)


@pytest.mark.parametrize(("early_stopping", "done"), [(False, True), ("never", False), (True, True)])
def test_when_a_search_is_over(early_stopping, done):
    """Two answers at -0.5 each; the best beam is worse for its length now, and might be better at its longest."""
    search = Search(SamplingParams(10, num_beams=2, early_stopping=early_stopping), StopCriteria(10, {3}))
    search.advance([(0, 1, -1.0, -1.0), (0, 2, -1.1, -1.1)])
    search.advance([(0, 3, 0.0, -1.0), (1, 3, 0.1, -1.0), (0, 1, -1.0, -2.0), (1, 1, -1.0, -2.1)])
    assert [score for score, _ in search.found] == [-0.5, -0.5]
    assert search.done == done


def test_a_search_keeps_what_can_still_win():
    """By hand: two beams, words 0 to 3, 3 ends; early stopping off."""
    search = Search(SamplingParams(10, num_beams=2), StopCriteria(10, {3}))
    assert search.advance([(0, 1, -0.1, -0.1), (0, 3, -0.5, -0.5), (0, 2, -2.0, -2.0)]) == [0, 0]
    assert [beam.tokens for beam in search.beams] == [[1], [2]]
    assert search.found[0][0] == -0.5
    # the third best ends, but only the best two may become answers
    assert search.advance([(0, 1, -0.1, -0.2), (1, 1, -0.1, -2.1), (0, 3, -3.0, -3.1)]) == [0, 1]
    assert len(search.found) == 1
    search.advance([(0, 3, -0.1, -0.3), (0, 1, -0.9, -1.1), (1, 1, -0.1, -2.2)])
    assert [score for score, _ in search.found] == [pytest.approx(-0.1), -0.5]
    assert not search.done  # -1.1 / 3 is better than -0.5
    search.advance([(0, 1, -2.0, -3.1), (0, 2, -2.0, -3.1), (1, 1, -2.0, -4.2)])
    assert search.done  # -3.1 / 4 isn't
