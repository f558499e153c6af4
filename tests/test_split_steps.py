"""Splitting a text in several steps: the ids are those of Hugging Face's tokenizers; and hostile patterns."""

import json
import random
import time
from pathlib import Path

import pytest
import tokenizers
from conftest import examples, write_tokenizer_json
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from llama import Tokenizer
from llama.errors import CheckpointError
from llama.vocab import split_steps, text_splitter
from llama.vocab.pre_tokenizer import read_pre_tokenizer, write_pre_tokenizer
from llama.vocab.split_steps import SplitStep
from llama.vocab.text_splitter import TextSplitter


def split(pattern: str, behavior: str = "isolated", invert: bool = False) -> pre_tokenizers.Split:
    return pre_tokenizers.Split(Regex(pattern), behavior, invert)


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)

# The first ones as in the models' files.
PRE_TOKENIZERS = {
    "deepseek-llm": [
        split(r"[\r\n]"),
        split(rf"\s?[{split_steps.DEEPSEEK_LETTERS}]+"),
        split(rf"\s?[{split_steps.DEEPSEEK_PUNCTUATION}]+"),
        split(r"\s+$"),
        split(f"[{split_steps.DEEPSEEK_CHINESE}]+"),
        pre_tokenizers.Digits(individual_digits=True),
        BYTES,
    ],
    "deepseek-coder": [
        split(r"[\r\n]"),
        split(r"\s?\p{L}+"),
        split(r"\s?\p{P}+"),
        split(f"[{split_steps.DEEPSEEK_CHINESE}]+"),
        pre_tokenizers.Digits(individual_digits=True),
        BYTES,
    ],
    "falcon": [
        pre_tokenizers.Punctuation("contiguous"),
        GPT2,
        pre_tokenizers.Digits(individual_digits=False),
        split("[0-9][0-9][0-9]"),
    ],
    "groups of three digits, then GPT-2's": [split(r"\p{N}{1,3}"), GPT2],
    "GPT-2's": [GPT2],
    "digits, then GPT-2's": [pre_tokenizers.Digits(individual_digits=True), GPT2],
    "Llama 3's": [split(split_steps.LLAMA3_PATTERN), BYTES],
    "nothing": [BYTES],
    "a string": [pre_tokenizers.Split(" t", "merged_with_next"), pre_tokenizers.Split(".*", "removed"), BYTES],
    "merged with the last": [
        split(r"\s", "merged_with_previous"),
        split("e", "merged_with_previous", True),
        BYTES,
    ],
    "merged with the next": [split(r"\s", "merged_with_next"), split("e", "merged_with_next", True), BYTES],
    "neighbours together": [split("th|e", "contiguous"), split(r"\d", "contiguous", True), BYTES],
    "removed": [split(r"\n|\p{Han}", "removed"), split("[a-z]", "removed", True), BYTES],
    "lines": [split(r"[^\n]$"), split(r"(?<=t)h(?!e)|(?i:E)\p{^L}++"), pre_tokenizers.Punctuation(), BYTES],
}


@pytest.fixture(scope="module", params=PRE_TOKENIZERS.values(), ids=PRE_TOKENIZERS)
def pair(request, tmp_path_factory):
    """Our tokenizer and Hugging Face's."""
    folder = tmp_path_factory.mktemp("steps")
    write_tokenizer_json(folder)
    path = folder / "tokenizer.json"
    engine = tokenizers.Tokenizer.from_file(str(path))
    engine.pre_tokenizer = pre_tokenizers.Sequence(request.param)
    engine.save(str(path))
    return Tokenizer(path), engine


POOLS = ["the user in there", "abc XYZ", "0123456789٣½²", " \n\t\r\u00a0\u2028", ".,!?'\"<|>{}-$"]
POOLS += ["éß中文一가ǅ\u038f\u212a🙂ि。～м"]


def random_text(generator: random.Random, length: int) -> str:
    pool = "".join(generator.sample(POOLS, generator.randint(1, 4)))
    return "".join(generator.choice(pool) for _ in range(length))


def test_ids_are_those_of_hugging_face(pair):
    ours, engine = pair
    generator = random.Random(0)
    for _ in range(1500):
        text = random_text(generator, generator.randint(1, 24))
        assert ours.encode(text, bos=False, eos=False) == engine.encode(text, add_special_tokens=False).ids, repr(text)


@examples(300)
@given(st.text(st.characters(max_codepoint=0x3FF), max_size=30) | st.text("the 'll\n12 中!", max_size=30))
def test_ids_of_any_text_are_those_of_hugging_face(pair, text):
    ours, engine = pair
    assume("<|" not in text)  # Hypothesis tries strings of the code too, and theirs recognises special tokens
    assert ours.encode(text, bos=False, eos=False) == engine.encode(text, add_special_tokens=False).ids


def test_steps_are_written_as_they_were_read(pair, tmp_path):
    ours, engine = pair
    steps = ours.vocabulary.split_steps
    written = write_pre_tokenizer(steps)
    assert read_pre_tokenizer(written, tmp_path) == steps
    values = json.loads(engine.to_str()) | {"pre_tokenizer": written}
    theirs = tokenizers.Tokenizer.from_str(json.dumps(values))
    generator = random.Random(1)
    for _ in range(300):
        text = random_text(generator, generator.randint(1, 24))
        assert theirs.encode(text).ids == engine.encode(text).ids


FALCON_STEPS = (
    SplitStep(split_steps.PUNCTUATION_PATTERN, "Contiguous"),
    SplitStep(split_steps.GPT2_PATTERN),
    SplitStep(r"\p{N}", "Contiguous", on_bytes=True),
    SplitStep(r"[0-9][0-9][0-9]", on_bytes=True),
)

KNOWN = {
    "deepseek-llm": split_steps.DEEPSEEK_LLM_STEPS,
    "deepseek-coder": split_steps.DEEPSEEK_CODER_STEPS,
    "falcon": FALCON_STEPS,
    "digits, then GPT-2's": split_steps.SMOLLM_STEPS,
    "GPT-2's": split_steps.GPT2_STEPS,
    "Llama 3's": split_steps.LLAMA3_STEPS,
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_steps(name, tmp_path):
    engine = tokenizers.Tokenizer(tokenizers.models.BPE())
    engine.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[name])
    assert read_pre_tokenizer(json.loads(engine.to_str())["pre_tokenizer"], tmp_path) == KNOWN[name]


UNSUPPORTED_PATTERNS = {
    r"\w+": r"the part '\\\\w\+' at 0",
    r"[\w-]": r"the part '\[\\\\w-\]' at 0",
    r"a\b": "the part",
    r"\h": "the part",
    r"\1(a)": "the part",
    r"(?<name>a)": "the part",
    r"(?R)": "the part",
    r"(?P>name)": "the part",
    r"(?m:a.)": "the part",
    r"(?i)a": "the part",
    r"[a&&b]": "the part",
    r"[a[b]]": "the part",
    r"[[:punct:]]": "the part",
    r"\p{Alphabetic}": "the part",
    r"a{2}+": "the part",
    r"a{2}?": "the part",
    r"a{": "the part",
    r"{": "the part",
    r"[a": "the part",
    r"a\\"[:-1]: "the part",
    r"a)": "unbalanced parenthesis",
    r"(a": r"missing \)",
    r"*a": "nothing to repeat",
    r"a**": "multiple repeat",
    "a|^b": "the part",
    "(?<=a{1,2})b": "the part",
    r"(?i:\p{L})": "the part",
    r"(?i:a)|\p{Lu}": "the part",
    "(" * 6 + "a" + ")" * 6: "groups within more than 5 groups",
    "(" * 9000: "groups within more than 5 groups",
    "b" + "a" * 500: "it has more than 500 parts",
    "[a]" * 501: "it has more than 500 parts",
    "a" * 10_001: "it has 10001 characters, more than 10000",
    "(?:a{1000}){1000}": "longer than 20000 characters",
    "(?:(?:(?:a|b){99}){99}){99}": "longer than 20000 characters",
    "(?:(?:ab){99999}){,99999}": "longer than 20000 characters",
    "(?:a|b){99999}": "longer than 20000 characters",
    "(?:a|b){999999}": "the part",
    "[z-a]": "bad character range",
    r"\p{Xx}": "unknown property",
    "[" * 9000: "the part",
    "(?=" * 3000: "groups within more than 5 groups",
}


@pytest.mark.parametrize(("pattern", "message"), UNSUPPORTED_PATTERNS.items(), ids=range(len(UNSUPPORTED_PATTERNS)))
def test_patterns_that_are_refused(tmp_path, pattern, message):
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=rf"(?s){tmp_path}: its split pattern .* is not supported: .*{message}"):
        TextSplitter([SplitStep(pattern)], tmp_path)
    assert time.monotonic() - start < 1


ENDLESS = {
    "alternatives": (r"(a|aa)+b", "a" * 5000),
    "nested repetitions": ("((((a{1,9}){1,9}){1,9}){1,3})+b", "a" * 5000),
    "nested groups": ("(?:" * 5 + "a+" + ")+" * 5 + "b", "aa" * 200 + "c"),
    "lookaheads": ("(?=.*" * 5 + "x" + ")" * 5, "a" * 5000),
}


@pytest.mark.parametrize(("pattern", "text"), ENDLESS.values(), ids=ENDLESS)
def test_patterns_that_would_run_for_ever(tmp_path, monkeypatch, pattern, text):
    monkeypatch.setattr(text_splitter, "TIME_LIMIT", 0.5)
    start = time.monotonic()
    splitter = TextSplitter([SplitStep(pattern), SplitStep("b")], tmp_path)
    with pytest.raises(CheckpointError, match=rf"{tmp_path}: its split pattern .* takes too long"):
        list(splitter.split(text))
    assert time.monotonic() - start < 2


LONG = {
    "a literal": "b" + "a" * 499,
    "cases": "(?i:b" + "a" * 497 + ")",
    "cases that are two letters": "(?i:ſßK" + "ß" * 495 + ")",
    "classes of one": "b" + "[a]" * 499,
    "alternatives": "|".join(["ba", *(f"b{'a' * i}" for i in range(20, 29))]),
    "groups": "b" + "(?:aa)" * 120,
    "repetitions": "b(?:" + "a" * 200 + "){90}",
}


@pytest.mark.parametrize("pattern", LONG.values(), ids=LONG)
def test_long_patterns_are_searched_for_in_little_time(tmp_path, pattern):
    """What `regex` prepares for a long literal, it prepares without a time limit."""
    splitter = TextSplitter([SplitStep(pattern)], tmp_path)
    start = time.process_time()
    for text in ("a" * 100_000, "sS" * 50_000, "kßſ" * 30_000):
        assert len(list(splitter.split(text))) == 1
    assert time.process_time() - start < 3


def test_the_time_limit_is_one_for_all_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(text_splitter, "TIME_LIMIT", 0.5)
    start = time.monotonic()
    splitter = TextSplitter([SplitStep("c"), SplitStep("(a|aa)+b")], tmp_path)
    with pytest.raises(CheckpointError, match="takes too long"):
        list(splitter.split("c".join("a" * (20 + i % 8) + str(i) for i in range(1000))))
    assert time.monotonic() - start < 2


ATOMS = [
    "a",
    "b",
    "L",
    " ",
    ".",
    "^",
    "$",
    r"\s",
    r"\p{L}",
    r"\P{Lu}",
    "[ab]",
    "[^a]",
    r"[^\s\p{L}]",
    r"\n",
    r"\d",
    ":",
]
QUANTIFIERS = ["*", "+", "?", "*?", "+?", "??", "++", "*+", "?+", "{2}", "{1,2}", "{,2}", "{1,}", "{1,2}?"]
OPENINGS = ["(", "(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>", "(?i:"]
patterns = st.recursive(
    st.sampled_from(ATOMS),
    lambda parts: (
        st.lists(parts, min_size=1, max_size=3).map("".join)
        | st.lists(parts, min_size=1, max_size=3).map("|".join)
        | st.builds("{}{})".format, st.sampled_from(OPENINGS), parts)
        | st.builds("{}{}".format, st.sampled_from(ATOMS), st.sampled_from(QUANTIFIERS))
        | st.builds("({}){}".format, parts, st.sampled_from(QUANTIFIERS))
    ),
    max_leaves=8,
)


@examples(500)
@given(patterns | st.text(r"ab\p{L}[]()*+?|^$.{1,2}:=!<>&-is ", max_size=30))
def test_any_pattern_is_refused_or_splits(pattern):
    """And what is accepted is read by Hugging Face as well, with the same pieces."""
    try:
        splitter = TextSplitter([SplitStep(pattern)], Path())
    except CheckpointError:
        return
    try:
        theirs = split(pattern)
    except Exception:  # no file that Hugging Face can read has such a pattern
        return
    for text in ("ab is L{1,2} a\nb", "aabba", "pL:=&$^i s"):
        try:
            pieces = [piece.decode() for piece in splitter.split(text)]
        except CheckpointError:
            continue
        assert "".join(pieces) == text
        assert pieces == [piece for piece, _ in theirs.pre_tokenize_str(text)], (pattern, text)


def test_patterns_that_match_an_empty_text(tmp_path):
    for pattern in (r"\d*", "x??", "(?=b)", "a|$"):
        with pytest.raises(CheckpointError, match=r"its split pattern .* matches an empty text"):
            TextSplitter([SplitStep(pattern)], tmp_path)
    splitter = TextSplitter([SplitStep("(?=x)")], tmp_path)
    with pytest.raises(CheckpointError, match=r"its split pattern .* matches an empty text"):
        list(splitter.split("axb"))


def test_a_file_with_a_hostile_pattern(tmp_path, monkeypatch):
    """An endless one is told when a text is encoded; its file by name."""
    write_tokenizer_json(tmp_path)
    path = tmp_path / "tokenizer.json"
    values = json.loads(path.read_text())
    step = {"type": "Split", "pattern": {"Regex": "(a|aa)+b"}, "behavior": "Isolated", "invert": False}
    values["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [step, {"type": "ByteLevel", "use_regex": False}]}
    path.write_text(json.dumps(values))
    monkeypatch.setattr(text_splitter, "TIME_LIMIT", 0.5)
    tokenizer = Tokenizer(path)
    start = time.monotonic()
    with pytest.raises(
        CheckpointError, match=rf"{path}: its split pattern '\(a\|aa\)\+b' takes too long for a text of 50"
    ):
        tokenizer.encode("a" * 50, bos=False, eos=False)
    assert time.monotonic() - start < 2
