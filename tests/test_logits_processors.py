"""Logits processors in Hugging Face's convention: those of transformers give the tokens of its `generate`.

A grammar engine, which is one too, is in the example of docs/structured-output.md, which `test_documents.py` runs.
"""

import itertools
import math

import pytest
import torch
from conftest import CachelessBeams, ScriptedModel, ScriptedTokenizer, hugging_face_twin, tiny_model

from llama import Llama
from llama.errors import InputError

STOP_TOKENS = (2, 25)
EQUAL_PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3], [5, 8, 9, 7, 9]]
UNEQUAL_PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 2]]
NEW_TOKENS = 20


class Halve:
    """A processor of one's own, as a class."""

    def __call__(self, input_ids, scores):
        return torch.where(torch.arange(scores.shape[-1]) % 2 == 0, scores / 2, scores)


def without_the_last_token(input_ids, scores):
    """A processor of one's own, as a function that changes the scores in place."""
    scores[torch.arange(len(scores)), input_ids[:, -1]] = -math.inf
    return scores


NAMES = ["repetition penalty", "no n-gram twice", "min new tokens", "bad words", "suppressed", "bias", "own", "three"]


def processors(name: str, length: int) -> list:
    """New ones, for a batch whose longest prompt has this length."""
    import transformers as hf

    stop_tokens = list(STOP_TOKENS)
    return {
        "repetition penalty": lambda: [hf.RepetitionPenaltyLogitsProcessor(1.8)],
        "no n-gram twice": lambda: [hf.NoRepeatNGramLogitsProcessor(2)],
        "min new tokens": lambda: [hf.MinNewTokensLengthLogitsProcessor(length, 18, stop_tokens, device="cpu")],
        "bad words": lambda: [hf.NoBadWordsLogitsProcessor([[17], [33, 4], [21, 4], [11, 11], [3]], stop_tokens)],
        "suppressed": lambda: [hf.SuppressTokensLogitsProcessor(list(range(0, 40, 3)), device="cpu")],
        "bias": lambda: [hf.SequenceBiasLogitsProcessor([[[5], 9.0], [[5, 6], 30.0]])],
        "own": lambda: [Halve(), without_the_last_token],
        "three": lambda: [
            hf.RepetitionPenaltyLogitsProcessor(1.3),
            hf.NoRepeatNGramLogitsProcessor(2),
            hf.MinNewTokensLengthLogitsProcessor(length, 15, stop_tokens, device="cpu"),
        ],
    }[name]()


class Tokenizer(ScriptedTokenizer):
    add_bos = False


@pytest.fixture(scope="module")
def model():
    """A network with a small vocabulary, so that many answers reach a stop token or repeat themselves."""
    return tiny_model(seed=0, vocab_size=40, max_batch_size=12)


@pytest.fixture(scope="module")
def llama(model):
    return Llama(model, Tokenizer(STOP_TOKENS))


@pytest.fixture(scope="module")
def twin(model):
    return hugging_face_twin(model)


def hugging_face_answers(twin, prompts, logits_processors, **options) -> tuple[list[list[int]], list[float] | None]:
    """The answers of transformers' `generate` to prompts of one length, without stop tokens; and the beams' scores."""
    import transformers

    output = twin.generate(
        torch.tensor(prompts),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=list(STOP_TOKENS),
        pad_token_id=0,
        logits_processor=transformers.LogitsProcessorList(logits_processors),
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    answers = output.sequences[:, len(prompts[0]) :].tolist()
    until_stop = [list(itertools.takewhile(lambda token: token not in STOP_TOKENS, answer)) for answer in answers]
    return until_stop, output.sequences_scores.tolist() if "num_beams" in options else None


# The same tokens as transformers


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_hugging_faces(llama, twin, name):
    """Of one prompt, of a batch of one length beside Hugging Face's batch, and of several beside each prompt alone."""
    expected, _ = hugging_face_answers(twin, EQUAL_PROMPTS, processors(name, 5))
    assert llama.generate(EQUAL_PROMPTS, NEW_TOKENS, 0, logits_processor=processors(name, 5))[0] == expected
    assert llama.generate(EQUAL_PROMPTS[:1], NEW_TOKENS, 0, logits_processor=processors(name, 5))[0] == expected[:1]
    assert expected != llama.generate(EQUAL_PROMPTS, NEW_TOKENS, 0)[0]  # otherwise this would show little
    tokens, _ = llama.generate(UNEQUAL_PROMPTS, NEW_TOKENS, 0, logits_processor=processors(name, 7))
    for prompt, answer in zip(UNEQUAL_PROMPTS, tokens, strict=True):
        assert [answer] == hugging_face_answers(twin, [prompt], processors(name, len(prompt)))[0], prompt


@pytest.mark.parametrize("name", ["repetition penalty", "own", "three"])
def test_beams_are_hugging_faces(llama, twin, name):
    """There, scores are log-probabilities, of which a penalty makes something else than of logits."""
    options = {"num_beams": 4, "num_return_sequences": 4}
    texts = [" ".join(map(str, prompt)) for prompt in UNEQUAL_PROMPTS]
    ours = llama.text_completion(texts, max_gen_len=NEW_TOKENS, logits_processor=processors(name, 7), **options)
    for i, prompt in enumerate(UNEQUAL_PROMPTS):
        answers, scores = hugging_face_answers(twin, [prompt], processors(name, len(prompt)), **options)
        assert [list(map(int, prediction["generation"].split())) for prediction in ours[4 * i : 4 * i + 4]] == answers
        assert [prediction["score"] for prediction in ours[4 * i : 4 * i + 4]] == pytest.approx(scores, abs=1e-4)


@pytest.mark.parametrize("name", ["repetition penalty", "three"])
def test_streams_are_the_calls(llama, name):
    expected, _ = llama.generate(UNEQUAL_PROMPTS, NEW_TOKENS, 0, logits_processor=processors(name, 7))
    streamed = [[], [], []]
    for piece in llama.generate_stream(UNEQUAL_PROMPTS, NEW_TOKENS, 0, logits_processor=processors(name, 7)):
        streamed[piece.row] += [] if piece.token is None else [piece.token]
    assert streamed == expected


def test_sampled_tokens_are_of_the_processed_scores(model, twin):
    """MinP, a warper: it makes the same of our logits as of Hugging Face's, and only what it keeps is sampled."""
    import transformers

    min_p, seen = transformers.MinPLogitsWarper(0.2), []

    def record(input_ids, scores):
        seen.append(scores.clone())
        return scores

    llama = Llama(model, Tokenizer(stop_tokens=()))
    tokens, _ = llama.generate(EQUAL_PROMPTS, 6, 1.5, 1.0, seed=3, logits_processor=[min_p, record])
    for step in range(6):
        input_ids = torch.tensor([prompt + row[:step] for prompt, row in zip(EQUAL_PROMPTS, tokens, strict=True)])
        with torch.no_grad():
            expected = min_p(input_ids, twin(input_ids).logits[:, -1])
        assert torch.equal(seen[step].isinf(), expected.isinf())
        torch.testing.assert_close(seen[step], expected, atol=2e-4, rtol=0)
        assert all(seen[step][row, tokens[row][step]].isfinite() for row in range(3))
        assert 3 < seen[step].isfinite().sum() < seen[step].numel()


# What a processor is given, and gives


def test_what_a_processor_sees():
    """Rows padded on the left with their own first token; those that have ended go on with what is sampled for them."""
    seen = []

    def record(input_ids, scores):
        assert (input_ids.dtype, scores.dtype) == (torch.int64, torch.float32)
        assert scores.shape == (len(input_ids), 50)
        assert scores.is_contiguous()
        assert not scores.is_inference()
        seen.append(input_ids.tolist())
        return scores

    llama = Llama(ScriptedModel(), ScriptedTokenizer([9]))  # which continues n with n + 1
    assert llama.generate([[3, 7], [20, 21, 22, 23]], 4, 0, logits_processor=record)[0] == [[8], [24, 25, 26, 27]]
    padded = [[3, 3, 3, 7, 8, 9, 10, 11], [20, 21, 22, 23, 24, 25, 26, 27]]
    assert seen == [[row[: 4 + step] for row in padded] for step in range(4)]


def test_what_a_processor_sees_of_beams(llama):
    seen = []

    def record(input_ids, scores):
        torch.testing.assert_close(scores.logsumexp(dim=-1), torch.zeros(len(scores)))  # log-probabilities
        seen.append(input_ids)
        return scores

    llama.generate(UNEQUAL_PROMPTS, 3, num_beams=2, logits_processor=record)
    padded = [[3, 3, 3, 1, 4, 1, 5], [9, 9, 9, 9, 9, 2, 6], UNEQUAL_PROMPTS[2]]
    assert seen[0].tolist() == [prompt for prompt in padded for _ in range(2)]
    assert [input_ids.shape for input_ids in seen] == [(6, 7), (6, 8), (6, 9)]


def test_beams_go_on_when_those_of_the_longest_prompt_are_found():
    """Each row keeps its padding, since processors know a row by the ids that it had, or count them."""
    seen = []

    def record(input_ids, scores):
        seen.append(input_ids)
        return scores

    llama = Llama(CachelessBeams(), ScriptedTokenizer([9]))  # it has 32 positions, of which a prompt leaves two
    tokens, _ = llama.generate([[3] * 30, [20, 21]], 6, num_beams=2, logits_processor=record)
    assert list(map(len, tokens)) == [2, 6]
    assert [input_ids.shape for input_ids in seen] == [(4, 30 + step) for step in range(6)]
    assert all(row == [20] * 29 + [21] for input_ids in seen for row in input_ids[2:, :30].tolist())


def test_several_processors_in_order(llama):
    """In a list, a tuple or transformers' own list; one or none in a list are as without it."""
    import transformers

    def only(token):
        def processor(input_ids, scores):
            return torch.full_like(scores, -1.0).index_fill(-1, torch.tensor([token]), 0.0)

        return processor

    def answer(processor):
        return llama.generate([[3, 4]], 3, 0, logits_processor=processor)[0]

    assert answer([only(5), only(6)]) == answer((only(5), only(6))) == answer(only(6)) == [[6] * 3]
    assert answer(transformers.LogitsProcessorList([only(6), only(5)])) == answer([only(5)]) == [[5] * 3]
    assert answer([]) == answer(transformers.LogitsProcessorList()) == answer(None)


def test_a_row_that_has_ended_may_be_left_without_a_token():
    """Its grammar is complete: it must not stop the other rows, nor show a processor an id that isn't one."""
    import transformers

    def nothing_after_nine(input_ids, scores):
        assert (input_ids >= 0).all()
        scores[(input_ids == 9).any(dim=-1)] = -math.inf
        return transformers.RepetitionPenaltyLogitsProcessor(1.1)(input_ids, scores)

    llama = Llama(ScriptedModel(), ScriptedTokenizer([9]))
    assert llama.generate([[7], [20]], 5, 0, logits_processor=nothing_after_nine)[0] == [[8], [21, 22, 23, 24, 25]]


@pytest.mark.parametrize(
    "wrong",
    [lambda input_ids, scores: scores[:1], lambda input_ids, scores: scores[:, :-1], lambda input_ids, scores: None],
    ids=["row", "column", "None"],
)
@pytest.mark.parametrize("options", [{"temperature": 0}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_scores_of_a_wrong_shape(llama, wrong, options):
    with pytest.raises(InputError, match=r"logits_processor must return scores of shape \([36], 40\), not "):
        llama.generate(EQUAL_PROMPTS[:3], 3, logits_processor=[Halve(), wrong], **options)


@pytest.mark.parametrize("wrong", [3, "penalty", [Halve(), 3], [None], [[Halve()]]])
def test_what_is_no_processor(llama, wrong):
    with pytest.raises(InputError, match=r"logits_processor=.* must be a function \(input_ids, scores\) -> scores"):
        llama.generate([[3]], 3, logits_processor=wrong)
