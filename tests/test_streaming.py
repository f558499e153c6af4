"""Streams, stop texts, and what is certain of a text that comes token by token."""

import itertools
import threading

import pytest
import torch
from conftest import ScriptedModel, ScriptedTokenizer, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from llama import Llama
from llama.default_model import default_checkpoint
from llama.streaming import RowOutput, StopCriteria, TextStream

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


def streamed(tokenizer, ids):
    stream = TextStream(tokenizer.decode)
    return [*(stream.push(token) for token in ids), stream.end()]


@pytest.mark.parametrize("text", [*TEXTS, " ".join(TEXTS) * 5], ids=range(len(TEXTS) + 1))
def test_pieces_join_to_the_whole(tokenizer, text):
    ids = tokenizer.encode(text, bos=False, eos=False)
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)  # no half characters
    assert sum(map(bool, pieces)) > len(ids) / 8  # it does come in pieces


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_ids_at_all(tokenizer, data):
    """Bytes that are no UTF-8, control tokens, spaces first or alone."""
    ids = data.draw(st.lists(st.integers(0, min(tokenizer.n_words, 320) - 1), max_size=90))
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_tokens_without_text_in_a_row(llama2):
    """Control tokens, and then a word whose space must not get lost for being the first of what is decoded anew."""
    words = llama2.encode("the house in the world and the other", bos=False, eos=False)
    for length in range(25, 45):
        ids = (words * 6)[:length] + [1] * 6 + words + [2] * 40 + words
        assert "".join(streamed(llama2, ids)) == llama2.decode(ids)


def test_the_time_of_a_step_does_not_grow(llama3):
    """What is decoded at once stays short, however long the text is."""
    longest = 0

    def decode(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return llama3.decode(ids)

    stream = TextStream(decode)
    for token in llama3.encode("a long text of many words, " * 300, bos=False, eos=False):
        stream.push(token)
    assert longest < 50


# Stop texts


def answer(tokens, stops, ends=(0,), room=100, decode=None):
    one = RowOutput(
        0, StopCriteria(room, set(ends), decode or (lambda ids: "".join(chr(96 + i) for i in ids)), tuple(stops))
    )
    pieces = []
    for token in tokens:
        if one.ended:
            break
        pieces += one.take(token, -float(token))
    return (
        [piece.token for piece in pieces if piece.token is not None],
        "".join(p.text for p in pieces),
        one.ended,
        pieces,
    )


def letters(text):
    return [ord(letter) - 96 for letter in text]


def test_a_stop_text_is_cut_and_never_shown():
    tokens, text, ended, pieces = answer(letters("abcxyzdef"), ["xyz"])
    assert (tokens, text, ended) == (letters("abc"), "abc", "stop")
    assert [piece.text for piece in pieces if piece.text] == ["a", "b", "c"]
    assert pieces[-1].ended == "stop"


def test_what_might_become_a_stop_text_waits():
    tokens, text, _, pieces = answer(letters("axyaxyzb"), ["xyz"])
    assert (tokens, text) == (letters("axya"), "axya")
    assert [piece.text for piece in pieces if piece.text] == ["a", "xya"]
    tokens, text, ended, _ = answer([*letters("axy"), 0], ["xyz"])  # an end token: it can't become one any more
    assert (tokens, text, ended) == (letters("axy"), "axy", "stop")
    tokens, text, ended, _ = answer(letters("axy"), ["xyz"], room=3)
    assert (tokens, text, ended) == (letters("axy"), "axy", "length")


BYTES = {1: b"a", 2: b" \xf0\x9f", 3: b"\x99\x82", 4: b"bD\xf0", 5: b"\xff", 6: b"!", 7: b"\xc3", 8: b"\xa9", 9: b"c"}


def of_bytes(ids):
    return b"".join(BYTES[i] for i in ids).decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("tokens", "stop", "kept", "text"),
    [
        ([1, 2, 3, 9], "🙂", [1, 2], "a "),  # the smile's second half is all part of it
        ([1, 5, 6, 9], "!", [1, 5], "a\ufffd"),
        ([1, 4, 9, 9], "D", [1, 4], "ab"),
        ([1, 7, 8, 6, 9], "!", [1, 7, 8], "aé"),
        ([7, 8, 9], "é", [], ""),
        ([5, 5, 5, 5, 5, 9, 9], "c", [5] * 5, "\ufffd" * 5),
    ],
)
def test_stop_texts_beside_half_characters(tokens, stop, kept, text):
    found, shown, ended, _ = answer(tokens, [stop], decode=of_bytes)
    assert (found, shown, ended) == (kept, text, "stop")


def test_beams_stop_beside_half_characters():
    class Bytes(ScriptedTokenizer):
        def encode(self, s, bos, eos):
            return [1]

        def decode(self, t):
            return of_bytes(t)

    class Model(ScriptedModel):
        def forward(self, tokens, start_pos):
            logits = torch.zeros(*tokens.shape, 10)
            logits[..., [1, 4][start_pos > 0]] = 9.0
            return logits

    llama = Llama(Model(), Bytes([0]))
    for options in ({"temperature": 0}, {"num_beams": 2}):
        one = llama.text_completion(["x"], max_gen_len=4, stop="D", logprobs=True, **options)[0]
        assert (one["generation"], one["tokens"], len(one["logprobs"])) == ("ab", ["a", "b"], 2)
        assert ("score" in one) == ("num_beams" in options)


def test_bytes_that_never_become_a_character():
    longest = 0

    def decode(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return of_bytes(ids)

    stream = TextStream(decode)
    pieces = [stream.push(5) for _ in range(500)]
    assert "".join(pieces) + stream.end() == "\ufffd" * 500
    assert longest < 50


def test_the_first_of_several_stop_texts_wins():
    tokens, text, _, _ = answer(letters("abcdefg"), ["fg", "de", "cdx"])
    assert (tokens, text) == (letters("abc"), "abc")
    assert answer(letters("aab"), ["ab", "b"])[1] == "a"
    assert answer(letters("ab"), ["a"])[:3] == ([], "", "stop")


@settings(max_examples=400, deadline=None)
@given(
    st.text("abc", max_size=20),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(1, 3), min_size=1, max_size=20),
)
def test_stop_texts_across_tokens_of_any_length(text, stops, widths):
    """Against the plain definition: the text up to the earliest stop text that was complete first."""
    words, at = [], 0
    for width in itertools.cycle(widths):
        if at >= len(text):
            break
        words.append(text[at : at + width])
        at += width
    want, kept = text, len(words)
    for i in range(len(words)):
        sofar = "".join(words[: i + 1])
        found = [sofar.find(stop) for stop in stops if stop in sofar]
        if found:
            want = sofar[: min(found)]
            kept = next((j for j in range(len(words) + 1) if len("".join(words[:j])) >= len(want)), 0)
            break
    tokens, got, ended, pieces = answer(
        range(1, len(words) + 1), stops, decode=lambda ids: "".join(words[i - 1] for i in ids), room=len(words)
    )
    assert got == want
    assert tokens == list(range(1, kept + 1))
    shown = ""
    for piece in pieces:
        shown += piece.text
        assert want.startswith(shown)
    if words:
        assert ended == ("length" if want == text and not any(stop in text for stop in stops) else "stop")


# Streams of a whole model


def model_for(tokenizer, seed=0, **changes):
    sizes = {"vocab_size": tokenizer.n_words, "max_batch_size": 8, "max_seq_len": 160} | changes
    return tiny_model(seed=seed, dim=64, n_heads=2, n_kv_heads=1, **sizes)


def build(tokenizer, seed=0, **changes) -> Llama:
    return Llama(model_for(tokenizer, seed, **changes), tokenizer)


def joined(pieces, rows):
    pieces = list(pieces)
    texts = ["".join(piece.text for piece in pieces if piece.row == row) for row in range(rows)]
    tokens = [[p.token for p in pieces if p.row == row and p.token is not None] for row in range(rows)]
    logprobs = [[p.logprob for p in pieces if p.row == row and p.token is not None] for row in range(rows)]
    ends = [[p.ended for p in pieces if p.row == row and p.ended] for row in range(rows)]
    assert all(len(end) == 1 for end in ends)
    return texts, tokens, logprobs, [end[0] for end in ends]


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"temperature": 1.5, "top_p": 1.0}, {"temperature": 1.2, "top_k": 50}]
)
def test_streams_are_what_the_calls_return(tokenizer, options):
    """Random weights say bytes in any order: half characters, wrong ones, spaces, control tokens."""
    llama = build(tokenizer)
    prompts = ["the user", "你好 🙂", "é"]
    options = options | {"max_gen_len": 100, "logprobs": True, "seed": 3}
    want = llama.text_completion(prompts, **options)
    texts, tokens, logprobs, ends = joined(llama.text_completion_stream(prompts, **options), 3)
    assert texts == [one["generation"] for one in want]
    assert logprobs == [one["logprobs"] for one in want]
    assert [len(row) for row in tokens] == [len(one["tokens"]) for one in want]
    ids = [tokenizer.encode(prompt, bos=tokenizer.add_bos, eos=False) for prompt in prompts]
    generated = llama.generate(ids, **options)
    streamed_ids = joined(llama.generate_stream(ids, **options), 3)
    assert (streamed_ids[1], streamed_ids[2]) == generated == (tokens, logprobs)
    assert streamed_ids[3] == ends
    assert all(piece.text == "" for piece in llama.generate_stream(ids, **options))


def test_a_stop_text_in_streams_and_calls(tokenizer):
    llama = build(tokenizer)
    options = {"temperature": 1.5, "top_p": 1.0, "max_gen_len": 60, "seed": 5}
    whole = llama.text_completion(["the user"], **options)[0]["generation"]
    for begin, length in ((len(whole) // 2, 3), (len(whole) // 3, 1), (len(whole) // 4, 7), (0, 1)):
        stop = whole[begin : begin + length]
        want = whole[: whole.index(stop)]
        found = llama.text_completion(["the user"], **options, stop=[stop, "no such text"], logprobs=True)[0]
        assert found["generation"] == want
        assert len(found["tokens"]) == len(found["logprobs"])
        echoed = llama.text_completion(["the user"], **options, stop=stop, echo=True)[0]["generation"]
        assert echoed.endswith(want)
        shown = ""
        for piece in llama.text_completion_stream(["the user"], **options, stop=stop):
            shown += piece.text
            assert want.startswith(shown)
        assert shown == want
        assert piece.ended == "stop"
        ids = [tokenizer.encode("the user", bos=tokenizer.add_bos, eos=False)]
        tokens, logprobs = llama.generate(ids, **options, stop=stop, logprobs=True)
        assert logprobs[0] == found["logprobs"]
        assert tokenizer.decode(tokens[0]).startswith(want)
        assert not tokens[0] or not tokenizer.decode(tokens[0][:-1]).startswith(want)  # and none too many
        assert joined(llama.generate_stream(ids, **options, stop=stop), 1)[1] == tokens


class Words(ScriptedTokenizer):
    """Each token is three letters, so that stop texts begin within tokens."""

    def decode(self, t):
        return "".join(f"{token:03d}" for token in t)


def test_a_stop_text_that_begins_within_a_token():
    llama = Llama(ScriptedModel(), Words([40]))
    found = llama.text_completion(["10"], 0, max_gen_len=9, stop="30", logprobs=True)[0]
    assert found["generation"] == "01101201"
    assert found["tokens"] == ["011", "012", "01"]
    assert "".join(found["tokens"]) == found["generation"]
    assert len(found["logprobs"]) == 3
    assert llama.generate([[10]], 9, 0, stop="30")[0] == [[11, 12, 13]]
    assert llama.text_completion(["10"], 0, max_gen_len=9, stop="012", logprobs=True)[0]["tokens"] == ["011"]


def test_the_first_piece_comes_after_one_pass():
    model = ScriptedModel()
    stream = Llama(model, ScriptedTokenizer()).text_completion_stream(["5 6 7"], 0, max_gen_len=10)
    assert model.calls == []  # nothing before it is asked for
    assert next(stream).text == "8"
    assert model.calls == [((1, 4), 0)]
    assert next(stream).text == " 9"
    assert model.calls == [((1, 4), 0), ((1, 1), 4)]


def test_what_is_wrong_is_said_at_once():
    llama = Llama(ScriptedModel(), ScriptedTokenizer())
    for call in (
        lambda: llama.generate_stream([[]], 5),
        lambda: llama.generate_stream([[1]], -5),
        lambda: llama.text_completion_stream("one text"),
        lambda: llama.text_completion_stream(["1"], num_beams=2),
        lambda: llama.chat_completion_stream([[]]),
    ):
        with pytest.raises(ValueError, match=r".") as error:
            call()
        assert isinstance(error.value, AssertionError)


def test_leaving_a_stream_leaves_the_llama_usable(llama3):
    llama = build(llama3)
    want = llama.text_completion(["the user"], 0, max_gen_len=30)
    for _ in llama.text_completion_stream(["in there"], 0):
        break
    assert llama.text_completion(["the user"], 0, max_gen_len=30) == want

    def fail():
        for piece in llama.text_completion_stream(["in there"], 0):
            len(piece.text) / 0

    with pytest.raises(ZeroDivisionError):
        fail()
    assert llama.text_completion(["the user"], 0, max_gen_len=30) == want

    forward, calls = llama.model.layers[0].forward, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return forward(*arguments)

    llama.model.layers[0].forward = interrupted
    with pytest.raises(KeyboardInterrupt):
        list(llama.text_completion_stream(["in there"], 0))
    assert llama.text_completion(["the user"], 0, max_gen_len=30) == want
    assert llama.text_completion(["the user"], 0, max_gen_len=30, reuse_cache=True) == want

    llama.model.layers[0].forward = forward
    llama.model.layers[1].forward = lambda *arguments: 1 / 0  # in the middle of reading
    with pytest.raises(ZeroDivisionError):
        llama.text_completion(["in there, in there"], 0)
    del llama.model.layers[1].forward
    assert llama.text_completion(["the user"], 0, max_gen_len=30, reuse_cache=True) == want


def test_a_stream_that_another_call_has_overtaken_says_so(llama3):
    llama = build(llama3)
    want = llama.text_completion(["the user"], 0, max_gen_len=20)
    stream = llama.text_completion_stream(["in there"], 0)
    next(stream)
    assert llama.text_completion(["the user"], 0, max_gen_len=20) == want  # no deadlock
    with pytest.raises(RuntimeError, match="this stream can't go on"):
        next(stream)
    assert llama.text_completion(["the user"], 0, max_gen_len=20) == want


def test_other_threads_wait_for_a_stream(llama3):
    llama = build(llama3)
    want = llama.text_completion(["the user"], 0, max_gen_len=20)
    alone = [piece.text for piece in llama.text_completion_stream(["in there"], 0, max_gen_len=30)]
    stream = llama.text_completion_stream(["in there"], 0, max_gen_len=30)
    first, found = next(stream), []
    thread = threading.Thread(target=lambda: found.append(llama.text_completion(["the user"], 0, max_gen_len=20)))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    assert [first.text, *(piece.text for piece in stream)] == alone
    thread.join(30)
    assert found == [want]


def test_a_stream_that_changes_threads(llama3):
    """As a thread pool does it: whoever asked first may call again only when the stream isn't at work."""
    llama = build(llama3)
    want = llama.text_completion(["the user"], 0, max_gen_len=20, logprobs=True)
    alone = [piece.text for piece in llama.text_completion_stream(["in there"], 0, max_gen_len=40)]
    stream = llama.text_completion_stream(["in there"], 0, max_gen_len=40)
    go_on, found, texts = threading.Event(), [], []

    def pool():
        texts.append(next(stream).text)
        go_on.set()
        found.append(llama.text_completion(["the user"], 0, max_gen_len=20, logprobs=True))

    thread = threading.Thread(target=pool)
    thread.start()
    go_on.wait()
    try:
        texts += [piece.text for piece in stream]
    except RuntimeError:  # the other call came first
        texts = alone
    assert texts == alone
    thread.join(30)
    assert found == [want]
    assert llama.text_completion(["the user"], 0, max_gen_len=20, logprobs=True) == want


def test_gradients_are_on_between_pieces(llama3):
    for _ in build(llama3).text_completion_stream(["x"], 0, max_gen_len=3):
        assert torch.is_grad_enabled()


def test_chat_streams(llama3):
    llama = build(llama3)
    dialogs = [[{"role": "user", "content": text}] for text in ("the user", "in there 🙂")]
    options = {"temperature": 1.4, "top_p": 1.0, "max_gen_len": 60, "seed": 1}
    want = [one["generation"]["content"] for one in llama.chat_completion(dialogs, **options)]
    assert joined(llama.chat_completion_stream(dialogs, **options), 2)[0] == want


def test_a_refused_dialog_in_a_stream(llama2):
    llama = build(llama2)
    dialogs = [[{"role": "user", "content": text}] for text in ("[INST] you", "the house")]
    options = {"temperature": 0, "max_gen_len": 20}
    want = [one["generation"]["content"] for one in llama.chat_completion(dialogs, **options)]
    assert want[0].startswith("Error: special tags")
    assert joined(llama.chat_completion_stream(dialogs, **options), 2)[0] == want


@pytest.mark.real
def test_the_default_model_streams_what_it_says():
    llama = Llama.build(default_checkpoint(), None, 256, 2, dtype=torch.float32)
    dialog = [{"role": "user", "content": "Write one line with emoji and one in Chinese."}]
    want = llama.chat_completion([dialog], 0, max_gen_len=60)[0]["generation"]["content"]
    pieces = [piece.text for piece in llama.chat_completion_stream([dialog], 0, max_gen_len=60)]
    assert "".join(pieces) == want
    assert len(pieces) > 10
