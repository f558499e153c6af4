"""Beam search: the sequences and scores of Hugging Face's, on the same weights."""

import itertools
import math

import pytest
import torch
from conftest import CachelessBeams, ScriptedModel, ScriptedTokenizer, hugging_face_twin, tiny_model

from llama import Llama
from llama.beam_search import Candidate, PromptSearch
from llama.sampling_params import SamplingParams
from llama.streaming import StopCriteria

STOP_TOKENS = (7, 11, 30)
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9], [2]]
NEW_TOKENS = 12


class Tokenizer(ScriptedTokenizer):
    add_bos = False

    def __init__(self):
        super().__init__(STOP_TOKENS)


def to_text(tokens):
    return " ".join(map(str, tokens))


def to_tokens(text):
    return [int(token) for token in text.split()]


def model_of(seed):
    """A network with a small vocabulary, so that many answers reach a stop token."""
    return tiny_model(seed=seed, vocab_size=40, max_batch_size=20)


@pytest.fixture(scope="module", params=[0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def seed(request):
    return request.param


@pytest.fixture(scope="module")
def llama(seed):
    return Llama(model_of(seed), Tokenizer())


@pytest.fixture(scope="module")
def twin(seed):
    return hugging_face_twin(model_of(seed))


def until_stop(tokens):
    return list(itertools.takewhile(lambda token: token not in STOP_TOKENS, tokens))


def hugging_face_answers(twin, prompt, **options) -> tuple[list[list[int]], list[float]]:
    """The answers of transformers' `generate` to a prompt, without their stop tokens, and their scores."""
    output = twin.generate(
        torch.tensor([prompt]),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=list(STOP_TOKENS),
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    answers = [until_stop(tokens[len(prompt) :]) for tokens in output.sequences.tolist()]
    return answers, output.sequences_scores.tolist()


FAST = [(2, 1.0, False), (4, 1.3, "never"), (5, 0.8, True)]
SLOW = [
    *itertools.product((2, 4, 5), (0.8, 1.0, 1.3), (False, True)),
    *((3, 0.0, False), (3, -0.5, True), (4, -0.5, False), (5, 0.0, "never"), (10, 1.0, False)),
]
SLOW = [pytest.param(*options, marks=pytest.mark.slow) for options in SLOW if options not in FAST]


@pytest.mark.parametrize(("num_beams", "length_penalty", "early_stopping"), FAST + SLOW)
def test_the_same_as_hugging_faces(llama, twin, num_beams, length_penalty, early_stopping):
    """Prompts of several lengths in one batch, each as if alone; all beams returned."""
    prompts = PROMPTS if num_beams <= 5 else PROMPTS[:2]
    options = {"num_beams": num_beams, "length_penalty": length_penalty, "early_stopping": early_stopping}
    options["num_return_sequences"] = num_beams
    predictions = llama.text_completion(list(map(to_text, prompts)), max_gen_len=NEW_TOKENS, logprobs=True, **options)
    assert len(predictions) == len(prompts) * num_beams
    for i, prompt in enumerate(prompts):
        answers, scores = hugging_face_answers(twin, prompt, **options)
        ours = predictions[i * num_beams : (i + 1) * num_beams]
        assert [to_tokens(prediction["generation"]) for prediction in ours] == answers
        assert [prediction["score"] for prediction in ours] == pytest.approx(scores, abs=1e-4, rel=1e-5)


@pytest.mark.slow
def test_greedy_answers_are_hugging_faces(llama, twin):
    options = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": list(STOP_TOKENS), "pad_token_id": 0}
    for prompt, tokens in zip(PROMPTS, llama.generate(PROMPTS, 60, 0)[0], strict=True):
        (expected,) = twin.generate(torch.tensor([prompt]), **options).tolist()
        assert tokens == until_stop(expected[len(prompt) :])


def test_answers_end_in_both_ways_and_differ_from_the_greedy_one(llama):
    """Otherwise the comparisons with Hugging Face would show little."""
    tokens, _ = llama.generate(PROMPTS, NEW_TOKENS, num_beams=5, num_return_sequences=5)
    assert min(map(len, tokens)) < NEW_TOKENS
    assert max(map(len, tokens)) == NEW_TOKENS
    best, _ = llama.generate(PROMPTS, NEW_TOKENS, num_beams=5)
    assert best == tokens[::5]
    assert best != llama.generate(PROMPTS, NEW_TOKENS, 0)[0]


def test_logprobs_and_scores_are_of_the_same_network(llama):
    texts = list(map(to_text, PROMPTS))
    predictions = llama.text_completion(texts, max_gen_len=NEW_TOKENS, logprobs=True, num_beams=4)
    for prompt, prediction in zip(PROMPTS, predictions, strict=True):
        answer = to_tokens(prediction["generation"])
        logprobs = llama.generate([prompt + answer], 0, logprobs=True, echo=True)[1][0][len(prompt) :]
        assert prediction["logprobs"] == pytest.approx(logprobs, abs=1e-4)
        if len(answer) == NEW_TOKENS:
            assert prediction["score"] == pytest.approx(sum(logprobs) / NEW_TOKENS, abs=1e-4)
        else:  # the stop token counts, too
            assert prediction["score"] < sum(logprobs) / (len(answer) + 1)


def test_one_beam_is_greedy(llama):
    assert llama.generate(PROMPTS, NEW_TOKENS, 0, num_beams=1) == llama.generate(PROMPTS, NEW_TOKENS, 0)


def test_prompts_with_few_or_no_tokens_left(llama):
    tokens, _ = llama.generate([[1] * 96, [1, 2], [3] * 94], 5, num_beams=3)
    assert tokens[0] == []
    assert len(tokens[2]) <= 2
    assert tokens[1] == llama.generate([[1, 2]], 5, num_beams=3)[0][0]
    assert llama.generate(PROMPTS, 0, num_beams=3)[0] == [[], [], [], []]


def test_a_stop_string_ends_a_beam(llama):
    options = {"max_gen_len": NEW_TOKENS, "num_beams": 4, "num_return_sequences": 4, "length_penalty": 0.0}
    best = llama.text_completion(["3 1 4"], **options)[0]["generation"]
    tokens = best.split()
    stop = " ".join(tokens[1:3]) if len(tokens) > 2 else tokens[-1]
    predictions = llama.text_completion(["3 1 4"], **options, stop=stop, logprobs=True)
    texts = [prediction["generation"] for prediction in predictions]
    assert all(stop not in text for text in texts)
    assert texts.count(best[: best.index(stop)]) == 1
    assert all(len(prediction["tokens"]) == len(prediction["logprobs"]) for prediction in predictions)


def only_even(input_ids, scores):
    """A logits_processor."""
    scores[:, 1::2] = -math.inf
    return scores


def test_a_logits_processor_changes_the_search(llama):
    seen = []

    def processor(input_ids, scores):
        seen.append(input_ids.tolist())
        return only_even(input_ids, scores)

    tokens, _ = llama.generate(PROMPTS[:2], NEW_TOKENS, num_beams=3, num_return_sequences=3, logits_processor=processor)
    assert all(token % 2 == 0 for answer in tokens for token in answer)
    assert seen[0] == [PROMPTS[0]] * 3 + [PROMPTS[1][:1] * 2 + PROMPTS[1]] * 3
    assert all(len(row) == len(PROMPTS[0]) + 3 for row in seen[3][:3])
    (prediction,) = llama.text_completion(
        ["3 1 4"], max_gen_len=NEW_TOKENS, num_beams=3, logits_processor=only_even, logprobs=True
    )
    answer = to_tokens(prediction["generation"])
    logprobs = llama.generate([[3, 1, 4, *answer]], 0, logprobs=True, echo=True)[1][0][3:]
    assert prediction["logprobs"] == pytest.approx(logprobs, abs=1e-4)  # those of the network


@pytest.mark.slow
def test_a_logits_processor_of_hugging_face_gives_the_same(llama, twin):
    import transformers

    class OnlyEven(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            return only_even(input_ids, scores)

    options = {"num_beams": 3, "num_return_sequences": 3}
    predictions = llama.text_completion(["3 1 4"], max_gen_len=NEW_TOKENS, **options, logits_processor=only_even)
    answers, scores = hugging_face_answers(twin, [3, 1, 4], **options, logits_processor=[OnlyEven()])
    assert [to_tokens(prediction["generation"]) for prediction in predictions] == answers
    assert [prediction["score"] for prediction in predictions] == pytest.approx(scores, abs=1e-4)


def test_a_beam_without_a_possible_token_leaves_the_others(llama):
    def no_token_after_an_odd_one(input_ids, scores):
        for row, ids in enumerate(input_ids):
            if len(ids) > 3 and ids[3] % 2:
                scores[row] = -math.inf
        return scores

    tokens, _ = llama.generate([[3, 1, 4]], NEW_TOKENS, num_beams=6, logits_processor=no_token_after_an_odd_one)
    assert tokens[0][0] % 2 == 0


def test_beams_change_nothing_for_later_calls(llama):
    before = llama.generate(PROMPTS, NEW_TOKENS, 0, logprobs=True)
    llama.generate(PROMPTS, NEW_TOKENS, num_beams=4)
    assert llama.generate(PROMPTS, NEW_TOKENS, 0, logprobs=True) == before
    llama.generate(PROMPTS, NEW_TOKENS, num_beams=4)
    assert llama.generate(PROMPTS, NEW_TOKENS, 0, logprobs=True, reuse_cache=True)[0] == before[0]


def test_beams_need_a_cache_that_can_be_reordered():
    tokens, _ = Llama(CachelessBeams(), ScriptedTokenizer([9])).generate([[3], [5]], 6, num_beams=2)
    assert tokens == [[4, 5, 6, 7, 8], [6, 7, 8]]
    with pytest.raises(
        ValueError, match=r"num_beams=2 needs a model whose KV cache can be reordered, with `setup_cache`"
    ):
        Llama(ScriptedModel(), ScriptedTokenizer([9])).generate([[3], [5]], 6, num_beams=2)


# The search for the answers to one prompt, by hand: 3 is the stop token


def search_for(**options) -> PromptSearch:
    return PromptSearch(SamplingParams(10, num_beams=2, **options), StopCriteria(10, {3}))


def candidates(*tuples) -> list[Candidate]:
    """From tuples of the beam, the token, its logprob, and the total of the longer beam."""
    return [Candidate(*values) for values in tuples]


@pytest.mark.parametrize(("early_stopping", "done"), [(False, True), ("never", False), (True, True)])
def test_when_a_search_is_done(early_stopping, done):
    """Two answers at -0.5 each; the best beam's score is lower at its present length, and higher at its greatest."""
    search = search_for(early_stopping=early_stopping)
    search.advance(candidates((0, 1, -1.0, -1.0), (0, 2, -1.1, -1.1)))
    search.advance(candidates((0, 3, 0.0, -1.0), (1, 3, 0.1, -1.0), (0, 1, -1.0, -2.0), (1, 1, -1.0, -2.1)))
    assert [score for score, _ in search.answers] == [-0.5, -0.5]
    assert search.done == done


def test_a_search_keeps_what_can_still_win():
    search = search_for()
    assert search.advance(candidates((0, 1, -0.1, -0.1), (0, 3, -0.5, -0.5), (0, 2, -2.0, -2.0))) == [0, 0]
    assert [beam.tokens for beam in search.beams] == [[1], [2]]
    assert search.answers[0][0] == -0.5
    # The third best ends, but only the best two may become answers.
    assert search.advance(candidates((0, 1, -0.1, -0.2), (1, 1, -0.1, -2.1), (0, 3, -3.0, -3.1))) == [0, 1]
    assert len(search.answers) == 1
    search.advance(candidates((0, 3, -0.1, -0.3), (0, 1, -0.9, -1.1), (1, 1, -0.1, -2.2)))
    assert [score for score, _ in search.answers] == [pytest.approx(-0.1), -0.5]
    assert not search.done  # -1.1 / 3 is better than -0.5
    search.advance(candidates((0, 1, -2.0, -3.1), (0, 2, -2.0, -3.1), (1, 1, -2.0, -4.2)))
    assert search.done  # -3.1 / 4 is not
    assert search.advance([]) == [0, 1]  # it stays as it is
