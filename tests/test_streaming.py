"""Streams: text that comes token by token, stop strings, and that the pieces join to what the calls return.

Streams on several threads, and calls while a stream is open, are in test_several_callers.py.
"""

import itertools
import random

import pytest
import torch
from chat_templates import STYLES, write_folder
from conftest import CachelessBeams, ScriptedModel, ScriptedTokenizer, examples, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from llama import Llama, Tokenizer
from llama.batch import generate_pieces
from llama.default_model import default_checkpoint
from llama.sampling_params import SamplingParams
from llama.streaming import WINDOW, Piece, RowOutput, StopCriteria, TextStream

TEXTS = [
    "The quick brown fox — naïve café, Ångström; it's 12345.",
    "你好，世界。こんにちは 안녕하세요",
    "🙂 👩‍👩‍👧‍👦 🏳️‍🌈 🧑🏽‍🚀 x🙂",
    "  leading and   many spaces\n\n\tand lines\n",
    "مرحبا שלום नमस्ते",
    "\ufffd a real replacement \ufffd\ufffd",
]


@pytest.fixture(scope="module", params=["llama3", "llama2", pytest.param("smollm", marks=pytest.mark.real)])
def tokenizer(request):
    return request.getfixturevalue(request.param)


# Text of ids that come one by one


def streamed_text(tokenizer, ids) -> list[str]:
    stream = TextStream(tokenizer.decode)
    return [*(stream.push(token) for token in ids), stream.end()]


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["Alpaca", "DeepSeek-R1-Distill"])
def test_added_tokens_between_the_text(tmp_path, name, legacy):
    """Of both kinds of tokenizers: any ids, and long texts with tokens that are special and some that aren't."""
    style = STYLES[name]
    tokenizer = Tokenizer(write_folder(tmp_path, style._replace(config=style.config | {"legacy": legacy})))
    generator = random.Random(4)
    added = [token.id for token in tokenizer.engine.added_tokens if token.content in style.special + style.ordinary]
    ordinary = tokenizer.encode(" ".join(TEXTS), bos=False, eos=False)
    for _ in range(30):
        ids = [generator.choice(added if generator.random() < 0.2 else ordinary) for _ in range(3 * WINDOW)]
        assert "".join(streamed_text(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("text", [*TEXTS, " ".join(TEXTS) * 5], ids=range(len(TEXTS) + 1))
def test_the_parts_join_to_the_whole_text(tokenizer, text):
    ids = tokenizer.encode(text, bos=False, eos=False)
    parts = streamed_text(tokenizer, ids)
    assert "".join(parts) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)  # no half characters
    assert sum(map(bool, parts)) > len(ids) / 8  # it does come in parts


@examples(150)
@given(st.data())
def test_any_ids_at_all(tokenizer, data):
    """Bytes that are no UTF-8, control tokens, spaces first or alone."""
    ids = data.draw(st.lists(st.integers(0, min(tokenizer.n_words, 320) - 1), max_size=90))
    assert "".join(streamed_text(tokenizer, ids)) == tokenizer.decode(ids)


def test_many_tokens_without_text(llama2):
    """After control tokens, a word whose space must not be lost when it is the first of those that are decoded again.

    Sentencepiece drops the space that a text begins with.
    """
    ids = llama2.encode("the house in the world and the other", bos=False, eos=False)
    for length in range(25, 45):
        tokens = (ids * 6)[:length] + [1] * 6 + ids + [2] * 40 + ids
        assert "".join(streamed_text(llama2, tokens)) == llama2.decode(tokens)


class CountingDecoder:
    """`decode`, and the greatest number of ids that it was called with."""

    def __init__(self, decode):
        self._decode, self.longest = decode, 0

    def __call__(self, ids):
        self.longest = max(self.longest, len(ids))
        return self._decode(ids)


def test_the_time_of_a_step_does_not_grow(llama3):
    """Only so many ids are decoded together, however long the text is."""
    decode = CountingDecoder(llama3.decode)
    stream = TextStream(decode)
    for token in llama3.encode("a long text of many words, " * 300, bos=False, eos=False):
        stream.push(token)
    assert decode.longest <= WINDOW + 1


BYTES = {1: b"a", 2: b" \xf0\x9f", 3: b"\x99\x82", 4: b"bD\xf0", 5: b"\xff", 6: b"!", 7: b"\xc3", 8: b"\xa9", 9: b"c"}


def decode_bytes(ids):
    return b"".join(BYTES[i] for i in ids).decode("utf-8", "replace")


def test_bytes_that_never_become_a_character():
    decode = CountingDecoder(decode_bytes)
    stream = TextStream(decode)
    parts = [stream.push(5) for _ in range(500)]
    assert "".join(parts) + stream.end() == "\ufffd" * 500
    assert decode.longest < 50


# Stop strings


def decode_letters(ids):
    """1 is a, 2 is b, and so on."""
    return "".join(chr(96 + i) for i in ids)


def letters(text):
    return [ord(letter) - 96 for letter in text]


def collect(tokens, stop_strings, max_new_tokens=100, decode=decode_letters):
    """The answer of a row that these tokens are sampled for; 0 is a stop token.

    Returns:
        Its tokens, its text, why it ended, and the pieces that it came in.
    """
    output = RowOutput(0, StopCriteria(max_new_tokens, {0}, decode, tuple(stop_strings)))
    pieces = []
    for token in tokens:
        if output.ended:
            break
        pieces += output.append(token, -float(token))
    ids = [piece.token for piece in pieces if piece.token is not None]
    return ids, "".join(piece.text for piece in pieces), output.ended, pieces


def test_a_stop_string_is_cut_off_and_never_released():
    tokens, text, ended, pieces = collect(letters("abcxyzdef"), ["xyz"])
    assert (tokens, text, ended) == (letters("abc"), "abc", "stop")
    assert [piece.text for piece in pieces if piece.text] == ["a", "b", "c"]
    assert pieces[-1].ended == "stop"


def test_what_might_become_a_stop_string_is_held_back():
    tokens, text, _, pieces = collect(letters("axyaxyzb"), ["xyz"])
    assert (tokens, text) == (letters("axya"), "axya")
    assert [piece.text for piece in pieces if piece.text] == ["a", "xya"]
    tokens, text, ended, _ = collect([*letters("axy"), 0], ["xyz"])  # after a stop token it can't become one
    assert (tokens, text, ended) == (letters("axy"), "axy", "stop")
    tokens, text, ended, _ = collect(letters("axy"), ["xyz"], max_new_tokens=3)
    assert (tokens, text, ended) == (letters("axy"), "axy", "length")


def test_the_logprobs_stay_with_their_tokens():
    *_, pieces = collect(letters("axyaxyzb"), ["xyz"])
    assert all(piece.logprob == -piece.token for piece in pieces if piece.token is not None)


def test_without_text_every_token_is_released_at_once():
    output = RowOutput(3, StopCriteria(3, {0}))
    assert list(output.append(5, -0.5)) == [Piece(3, 5, -0.5, "")]
    assert list(output.append(0, -0.5)) == [Piece(3, None, None, "", "stop")]


def test_finish_releases_what_was_held_back():
    output = RowOutput(0, StopCriteria(9, {0}, decode_letters, ("xyz",)))
    assert not [piece for token in letters("xy") for piece in output.append(token, None)]
    pieces = list(output.finish())
    assert ([piece.token for piece in pieces], "".join(piece.text for piece in pieces)) == (letters("xy"), "xy")
    assert (output.ended, pieces[-1].ended) == ("stop", "stop")
    assert list(output.finish()) == []


@pytest.mark.parametrize(
    ("tokens", "stop", "kept", "text"),
    [
        ([1, 2, 3, 9], "🙂", [1, 2], "a "),  # the whole token of the smile's second half is part of it
        ([1, 5, 6, 9], "!", [1, 5], "a\ufffd"),
        ([1, 4, 9, 9], "D", [1, 4], "ab"),
        ([1, 7, 8, 6, 9], "!", [1, 7, 8], "aé"),
        ([7, 8, 9], "é", [], ""),
        ([5, 5, 5, 5, 5, 9, 9], "c", [5] * 5, "\ufffd" * 5),
    ],
)
def test_stop_strings_beside_half_characters(tokens, stop, kept, text):
    assert collect(tokens, [stop], decode=decode_bytes)[:3] == (kept, text, "stop")


def test_beams_and_samples_end_alike_beside_half_characters():
    class Tokenizer(ScriptedTokenizer):
        def encode(self, s, bos, eos):
            return [1]

        def decode(self, t):
            return decode_bytes(t)

    class Model(CachelessBeams):
        def forward(self, tokens, start_pos):
            logits = torch.zeros(*tokens.shape, 10)
            logits[..., [1, 4][start_pos > 0]] = 9.0
            return logits

    llama = Llama(Model(), Tokenizer([0]))
    for options in ({"temperature": 0}, {"num_beams": 2}):
        (prediction,) = llama.text_completion(["x"], max_gen_len=4, stop="D", logprobs=True, **options)
        assert (prediction["generation"], prediction["tokens"]) == ("ab", ["a", "b"])
        assert len(prediction["logprobs"]) == 2
        assert ("score" in prediction) == ("num_beams" in options)


def test_the_first_of_several_stop_strings_ends_the_answer():
    assert collect(letters("abcdefg"), ["fg", "de", "cdx"])[:2] == (letters("abc"), "abc")
    assert collect(letters("aab"), ["ab", "b"])[1] == "a"
    assert collect(letters("ab"), ["a"])[:3] == ([], "", "stop")


@examples(400)
@given(
    st.text("abc", max_size=20),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(1, 3), min_size=1, max_size=20),
)
def test_stop_strings_across_tokens_of_any_length(text, stop_strings, widths):
    """Against the definition: the text up to where the stop string that is complete first begins."""
    token_texts, begin = [], 0
    for width in itertools.cycle(widths):
        if begin >= len(text):
            break
        token_texts.append(text[begin : begin + width])
        begin += width
    expected, kept = text, len(token_texts)
    for i in range(len(token_texts)):
        so_far = "".join(token_texts[: i + 1])
        begins = [so_far.find(string) for string in stop_strings if string in so_far]
        if begins:
            expected = so_far[: min(begins)]
            kept = next(n for n in range(len(token_texts) + 1) if len("".join(token_texts[:n])) >= len(expected))
            break
    tokens, released, ended, pieces = collect(
        range(1, len(token_texts) + 1),
        stop_strings,
        max_new_tokens=len(token_texts),
        decode=lambda ids: "".join(token_texts[i - 1] for i in ids),
    )
    assert released == expected
    assert tokens == list(range(1, kept + 1))
    for i in range(len(pieces)):
        assert expected.startswith("".join(piece.text for piece in pieces[: i + 1]))
    if token_texts:
        assert ended == ("stop" if any(string in text for string in stop_strings) else "length")


# Streams of a whole model


def build(tokenizer, **changes) -> Llama:
    sizes = {"vocab_size": tokenizer.n_words, "max_batch_size": 8, "max_seq_len": 160} | changes
    return Llama(tiny_model(dim=64, n_heads=2, n_kv_heads=1, **sizes), tokenizer)


def join(pieces, rows):
    """Of each row, the text, the tokens, their logprobs, and why it ended."""
    pieces = list(pieces)
    texts = ["".join(piece.text for piece in pieces if piece.row == row) for row in range(rows)]
    with_token = [[piece for piece in pieces if piece.row == row and piece.token is not None] for row in range(rows)]
    tokens = [[piece.token for piece in row] for row in with_token]
    logprobs = [[piece.logprob for piece in row] for row in with_token]
    ends = [[piece.ended for piece in pieces if piece.row == row and piece.ended] for row in range(rows)]
    assert all(len(reasons) == 1 for reasons in ends)
    return texts, tokens, logprobs, [reasons[0] for reasons in ends]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"temperature": 0}, marks=pytest.mark.slow),
        {"temperature": 1.5, "top_p": 1.0},
        pytest.param({"temperature": 1.2, "top_k": 50}, marks=pytest.mark.slow),
    ],
)
def test_streams_are_what_the_calls_return(tokenizer, options):
    """A network with random weights gives bytes in any order: half characters, wrong ones, spaces, control tokens."""
    llama = build(tokenizer)
    prompts = ["the user", "你好 🙂", "é"]
    options = options | {"max_gen_len": 100, "logprobs": True, "seed": 3}
    predictions = llama.text_completion(prompts, **options)
    texts, tokens, logprobs, ends = join(llama.text_completion_stream(prompts, **options), 3)
    assert texts == [prediction["generation"] for prediction in predictions]
    assert logprobs == [prediction["logprobs"] for prediction in predictions]
    assert [len(row) for row in tokens] == [len(prediction["tokens"]) for prediction in predictions]
    ids = [tokenizer.encode(prompt, bos=tokenizer.add_bos, eos=False) for prompt in prompts]
    pieces = list(llama.generate_stream(ids, **options))
    assert llama.generate(ids, **options) == (tokens, logprobs)
    assert join(pieces, 3) == (["", "", ""], tokens, logprobs, ends)


def test_a_stop_string_in_streams_and_calls(tokenizer):
    llama = build(tokenizer)
    options = {"temperature": 1.5, "top_p": 1.0, "max_gen_len": 60, "seed": 5}
    whole = llama.text_completion(["the user"], **options)[0]["generation"]
    for begin, length in ((len(whole) // 2, 3), (len(whole) // 3, 1), (len(whole) // 4, 7), (0, 1)):
        stop = whole[begin : begin + length]
        expected = whole[: whole.index(stop)]
        (prediction,) = llama.text_completion(["the user"], **options, stop=[stop, "no such text"], logprobs=True)
        assert prediction["generation"] == expected
        assert len(prediction["tokens"]) == len(prediction["logprobs"])
        (echoed,) = llama.text_completion(["the user"], **options, stop=stop, echo=True)
        assert echoed["generation"].endswith(expected)
        released = ""
        for piece in llama.text_completion_stream(["the user"], **options, stop=stop):
            released += piece.text
            assert expected.startswith(released)
        assert released == expected
        assert piece.ended == "stop"
        ids = [tokenizer.encode("the user", bos=tokenizer.add_bos, eos=False)]
        tokens, logprobs = llama.generate(ids, **options, stop=stop, logprobs=True)
        assert logprobs[0] == prediction["logprobs"]
        assert tokenizer.decode(tokens[0]).startswith(expected)
        assert not tokens[0] or not tokenizer.decode(tokens[0][:-1]).startswith(expected)  # no token too many
        assert join(llama.generate_stream(ids, **options, stop=stop), 1)[1] == tokens


class ThreeDigits(ScriptedTokenizer):
    """The text of each token has three characters, so that stop strings begin within tokens."""

    def decode(self, t):
        return "".join(f"{token:03d}" for token in t)


def test_a_stop_string_that_begins_within_a_token():
    llama = Llama(ScriptedModel(), ThreeDigits([40]))
    (prediction,) = llama.text_completion(["10"], 0, max_gen_len=9, stop="30", logprobs=True)
    assert prediction["generation"] == "01101201"
    assert prediction["tokens"] == ["011", "012", "01"]
    assert len(prediction["logprobs"]) == 3
    assert llama.generate([[10]], 9, 0, stop="30")[0] == [[11, 12, 13]]
    assert llama.text_completion(["10"], 0, max_gen_len=9, stop="012", logprobs=True)[0]["tokens"] == ["011"]


def test_nothing_is_computed_before_the_first_piece_is_asked_for():
    model = ScriptedModel()
    stream = Llama(model, ScriptedTokenizer()).text_completion_stream(["5 6 7"], 0, max_gen_len=10)
    assert model.calls == []
    assert next(stream).text == "8"
    assert model.calls[0] == ((1, 4), 0)  # the prompt
    assert next(stream).text == " 9"


def test_the_end_of_a_row_that_has_no_tokens_left():
    llama = Llama(ScriptedModel(vocab_size=1000), ScriptedTokenizer([]))
    pieces = list(llama.generate_stream([[5] * 32, [7] * 30], 9, 0))
    assert [(piece.row, piece.token, piece.ended) for piece in pieces] == [
        (0, None, "length"),
        (1, 8, None),
        (1, 9, "length"),
    ]
    assert [piece.ended for piece in llama.generate_stream([[5], [7]], 0)] == ["length", "length"]


def test_wrong_arguments_are_refused_before_the_first_piece():
    llama = Llama(ScriptedModel(), ScriptedTokenizer())
    for call, message in (
        (lambda: llama.generate_stream([[]], 5), "prompt 0 is empty"),
        (lambda: llama.generate_stream([[1]], -5), "max_gen_len=-5"),
        (lambda: llama.text_completion_stream("one text"), "prompts must be a list of texts"),
        (lambda: llama.text_completion_stream(["1"], num_beams=2), "num_beams=2: beam search has no answer"),
        (lambda: llama.chat_completion_stream([[]]), "an empty dialog"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert isinstance(error.value, AssertionError)


def test_leaving_a_stream_leaves_the_llama_usable(llama3):
    llama = build(llama3)
    expected = llama.text_completion(["the user"], 0, max_gen_len=30)
    for _ in llama.text_completion_stream(["in there"], 0):
        break
    assert llama.text_completion(["the user"], 0, max_gen_len=30) == expected

    def fail():
        for piece in llama.text_completion_stream(["in there"], 0):
            len(piece.text) / 0

    with pytest.raises(ZeroDivisionError):
        fail()
    assert llama.text_completion(["the user"], 0, max_gen_len=30) == expected


def test_exceptions_of_the_network_leave_the_llama_usable(llama3, monkeypatch):
    """Also those in the middle of a pass, which leave the cache half written."""
    llama = build(llama3)
    expected = llama.text_completion(["the user"], 0, max_gen_len=30)
    forward, calls = llama.model.layers[0].forward, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return forward(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(llama.model.layers[0], "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(llama.text_completion_stream(["in there"], 0))
    assert llama.text_completion(["the user"], 0, max_gen_len=30, reuse_cache=True) == expected

    with monkeypatch.context() as patch:
        patch.setattr(llama.model.layers[1], "forward", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llama.text_completion(["in there, in there"], 0)
        with pytest.raises(ZeroDivisionError):
            list(llama.text_completion_stream(["in there, in there"], 0))
    assert llama.text_completion(["the user"], 0, max_gen_len=30, reuse_cache=True) == expected


def test_chat_streams(llama3):
    llama = build(llama3)
    dialogs = [[{"role": "user", "content": text}] for text in ("the user", "in there 🙂")]
    options = {"temperature": 1.4, "top_p": 1.0, "max_gen_len": 60, "seed": 1}
    expected = [prediction["generation"]["content"] for prediction in llama.chat_completion(dialogs, **options)]
    assert join(llama.chat_completion_stream(dialogs, **options), 2)[0] == expected


def test_a_refused_dialog_in_a_stream(llama2):
    llama = build(llama2)
    dialogs = [[{"role": "user", "content": text}] for text in ("[INST] you", "the house")]
    options = {"temperature": 0, "max_gen_len": 20}
    expected = [prediction["generation"]["content"] for prediction in llama.chat_completion(dialogs, **options)]
    assert expected[0].startswith("Error: special tags")
    assert join(llama.chat_completion_stream(dialogs, **options), 2)[0] == expected


@pytest.mark.real
def test_the_default_model_s_stream():
    llama = Llama.build(default_checkpoint(), None, 256, 2, dtype=torch.float32)
    dialog = [{"role": "user", "content": "Write one line with emoji and one in Chinese."}]
    expected = llama.chat_completion([dialog], 0, max_gen_len=60)[0]["generation"]["content"]
    texts = [piece.text for piece in llama.chat_completion_stream([dialog], 0, max_gen_len=60)]
    assert "".join(texts) == expected
    assert len(texts) > 10


def test_a_stream_may_be_left_before_the_prompt_is_prefilled():
    """Which takes many seconds where it is long."""
    model = tiny_model(n_layers=6)
    layers_run = []
    hooks = [layer.register_forward_hook(lambda *_: layers_run.append(1)) for layer in model.layers]
    params = SamplingParams(10, 0)
    pieces = generate_pieces(
        model, ScriptedTokenizer(()), [[5, 6, 7]], params, text=False, should_stop=lambda: len(layers_run) >= 2
    )
    assert list(pieces) == []
    assert len(layers_run) == 2
    for hook in hooks:
        hook.remove()
    tokens = Llama(model, ScriptedTokenizer(())).generate([[5, 6, 7]], 10, 0)
    assert tokens == Llama(tiny_model(n_layers=6), ScriptedTokenizer(())).generate([[5, 6, 7]], 10, 0)
