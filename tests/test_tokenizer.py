"""Text to ids and back, against tiktoken, sentencepiece and Hugging Face's tokenizers used directly."""

import base64
import random

import pytest
import tiktoken
from conftest import examples, write_llama3_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from llama import Tokenizer
from llama.vocab.byte_pair_tokenizer import merge_byte_pairs, split_long
from llama.vocab.tiktoken_file import read_tiktoken_file
from llama.vocab.vocabulary import byte_level_ranks, gpt2_characters

HARD_TEXTS = [
    "",
    " ",
    "\n",
    " \n \t\r\n  x",
    "This is a test sentence.",
    "it's I'LL we've  don't 'tis",
    "0 12 123 1234 12345 3.14159 ٣٤٥ ½ ²",
    "héllo naïve café Ångström e\u0301",
    "你好，世界。こんにちは 안녕하세요",
    "🙂 👩‍👩‍👧‍👦 🏳️‍🌈 \U0001f9d1\U0001f3fd‍🚀",
    "مرحبا بالعالم שלום עולם नमस्ते",
    "<|begin_of_text|><|eot_id|> <|im_start|>user <s> </s> [INST] <unk> <0x0A>",
    "def f(x):\n\treturn x**2  # comment\n\n\n    pass",
    "\u200b\ufeff\u2028\u00a0\u3000zero width",
    "a" * 1000 + " " * 1000 + "\n" * 1000,
    "\ud800 lone surrogates \udc00",
    "\x00\x01\x7f",
]

# Any text, including lone surrogates.
any_text = st.text(st.characters(codec=None), max_size=60) | st.text("ab 1\n\t'<|>é🙂\x04\U00040000", max_size=40)


def repaired(text: str) -> str:
    """The text with lone surrogates replaced by U+FFFD: the other libraries don't accept them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def test_llama3_interface(llama3):
    n = 256 + 12
    assert llama3.n_words == n + 256
    assert llama3.pad_id == -1
    assert (llama3.bos_id, llama3.eos_id) == (n, n + 1)
    assert list(llama3.special_tokens.values()) == list(range(n, n + 256))
    names = list(llama3.special_tokens)
    assert names[:11] == [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|reserved_special_token_0|>",
        "<|reserved_special_token_1|>",
        "<|reserved_special_token_2|>",
        "<|reserved_special_token_3|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|reserved_special_token_4|>",
        "<|eot_id|>",
        "<|reserved_special_token_5|>",
    ]
    assert names[-1] == "<|reserved_special_token_250|>"
    assert llama3.stop_tokens == {n + 1, n + 9}
    assert llama3.encode("the", bos=True, eos=True)[:: len(llama3.encode("the", True, True)) - 1] == [n, n + 1]


def test_special_tokens_are_plain_text_unless_allowed(llama3):
    eot = llama3.special_tokens["<|eot_id|>"]
    text = "a<|eot_id|>b<|begin_of_text|>"
    plain = llama3.encode(text, bos=False, eos=False)
    assert max(plain) < 268
    assert llama3.decode(plain) == text
    one_allowed = llama3.encode(text, bos=False, eos=False, allowed_special={"<|eot_id|>"})
    assert [i for i in one_allowed if i >= 268] == [eot]
    assert [i for i in llama3.encode(text, bos=False, eos=False, allowed_special="all") if i >= 268] == [eot, 268]
    with pytest.raises(ValueError, match="eot_id"):
        llama3.encode(text, bos=False, eos=False, disallowed_special={"<|eot_id|>"})
    with pytest.raises(ValueError, match="begin_of_text"):
        llama3.encode(text, bos=False, eos=False, disallowed_special="all", allowed_special={"<|eot_id|>"})
    assert llama3.encode(text, bos=False, eos=False, allowed_special={"<|no_such|>"}) == plain


@pytest.mark.real
def test_real_llama3(real_llama3):
    assert real_llama3.n_words == 128256
    expected = [128000, 2028, 374, 264, 1296, 11914, 13, 128001]
    assert real_llama3.encode("This is a test sentence.", bos=True, eos=True) == expected
    assert real_llama3.decode(expected) == "<|begin_of_text|>This is a test sentence.<|end_of_text|>"
    assert (real_llama3.bos_id, real_llama3.eos_id) == (128000, 128001)
    assert real_llama3.stop_tokens == {128001, 128009}
    assert (real_llama3.special_tokens["<|start_header_id|>"], real_llama3.special_tokens["<|end_header_id|>"]) == (
        128006,
        128007,
    )


@pytest.mark.real
@pytest.mark.parametrize("text", HARD_TEXTS, ids=range(len(HARD_TEXTS)))
def test_real_llama3_equals_tiktoken(real_llama3, real_llama3_path, text):
    ranks = dict(line.split() for line in real_llama3_path.read_bytes().splitlines())
    engine = tiktoken.Encoding(
        "plain",
        pat_str=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        mergeable_ranks={base64.b64decode(token): int(rank) for token, rank in ranks.items()},
        special_tokens={},
    )
    ids = real_llama3.encode(text, bos=False, eos=False)
    assert ids == engine.encode(text)
    assert real_llama3.decode(ids) == repaired(text)


@examples(300)
@given(any_text)
def test_llama3_round_trip(llama3, text):
    assert llama3.decode(llama3.encode(text, bos=False, eos=False)) == repaired(text)


@examples(300)
@given(any_text)
def test_llama2_equals_sentencepiece(llama2, llama2_path, text):
    engine = SentencePieceProcessor(model_file=str(llama2_path))
    ids = llama2.encode(text, bos=False, eos=False)
    assert ids == engine.encode(repaired(text))
    assert llama2.decode(ids) == engine.decode(ids)


def test_llama2_interface(llama2):
    assert llama2.n_words == 320
    assert (llama2.bos_id, llama2.eos_id, llama2.pad_id) == (1, 2, -1)
    assert llama2.stop_tokens == {2}
    assert llama2.special_tokens == {}
    ids = llama2.encode("the house </s><s>", bos=True, eos=True)
    assert ids[0] == 1
    assert ids[-1] == 2
    assert not {1, 2} & set(ids[1:-1])  # what looks like a special token is text
    assert llama2.decode(ids) == "the house </s><s>"
    assert llama2.encode("the house", True, False) == ids[: len(llama2.encode("the house", True, False))]
    with pytest.raises(ValueError, match="don't apply to a sentencepiece vocabulary"):
        llama2.encode("x", bos=False, eos=False, allowed_special={"</s>"})


@pytest.mark.real
def test_smollm_interface(smollm):
    assert smollm.n_words == 49152
    assert (smollm.bos_id, smollm.eos_id) == (1, 2)
    assert smollm.stop_tokens == {2}
    assert not smollm.add_bos
    assert smollm.special_tokens["<|im_end|>"] == 2


@pytest.mark.real
@pytest.mark.parametrize("text", HARD_TEXTS, ids=range(len(HARD_TEXTS)))
def test_smollm_equals_hugging_face(smollm, hugging_face_smollm, text):
    assert smollm.encode(text, bos=False, eos=False) == hugging_face_smollm.encode(repaired(text)).ids


@pytest.mark.real
def test_smollm_equals_hugging_face_on_random_texts(smollm, hugging_face_smollm):
    """Mixtures of all kinds of characters and of bytes that the vocabulary has no token for."""
    generator = random.Random(0)
    pools = ["abc XYZ", "0123456789٣½", " \n\t\r\u00a0\u2028", ".,!?'\"<|>{}", "éß中文🙂ि", "\x04\x06\x13\x14\x16\x1d"]
    pools += ["\U00040000\U0007ffff\U000bffff", "'s'll've'T"]
    texts = []
    for _ in range(5000):
        pool = "".join(generator.sample(pools, generator.randint(1, 4)))
        texts.append("".join(generator.choice(pool) for _ in range(generator.randint(1, 24))))
    assert any("\x04" in text for text in texts)
    for text in texts:
        assert smollm.encode(text, bos=False, eos=False) == hugging_face_smollm.encode(text).ids, repr(text)


@pytest.mark.real
def test_bytes_without_a_token_are_dropped(smollm):
    assert smollm.decode(smollm.encode("a\x04b", bos=False, eos=False)) == "ab"
    assert smollm.encode(".\x04.", bos=False, eos=False) == smollm.encode("..", bos=False, eos=False)
    assert smollm.encode("\x04", bos=False, eos=False) == []
    ids = smollm.encode("x\x04<|im_end|>y", bos=False, eos=False, allowed_special={"<|im_end|>"})
    assert ids == [*smollm.encode("x", False, False), 2, *smollm.encode("y", False, False)]
    assert 2 not in smollm.encode("x\x04<|im_end|>y", bos=False, eos=False)
    assert 2 not in smollm.encode("x\x04<|im_end|>y", bos=False, eos=False, allowed_special={"<|foo|>"})
    with pytest.raises(ValueError, match="im_end"):
        smollm.encode("x\x04<|im_end|>y", bos=False, eos=False, disallowed_special="all")


@examples(300)
@given(
    st.binary(max_size=60) | st.lists(st.sampled_from([b"the", b" in", b"user", b"\xff"]), max_size=30).map(b"".join)
)
def test_merging_byte_pairs_equals_tiktoken(llama3, piece):
    assert merge_byte_pairs(piece, llama3.vocabulary.ranks) == (
        llama3.model._encode_single_piece(piece) if piece else []
    )


def split_by_character(text: str) -> list[str]:
    """Blocks of 400,000 characters, each cut before the 25,001st space or non-space in a row."""
    pieces = []
    for begin in range(0, len(text), 400_000):
        block, start, run = text[begin : begin + 400_000], 0, 0
        for i, character in enumerate(block):
            same = i > 0 and character.isspace() == block[i - 1].isspace()
            run = run + 1 if same else 1
            if run > 25_000:
                pieces.append(block[start:i])
                start, run = i, 1
        pieces.append(block[start:])
    return pieces


@pytest.mark.parametrize(
    "text",
    [
        "a" * 1_000_000,
        " " * 70_001,
        "a" * 25_000 + " " * 25_000 + "b" * 25_001,
        "word " * 100_001,
        "x" * 24_999 + "\u3000" * 50_000 + "y" * 75_000,
        "",
        "short",
    ],
    ids=range(7),
)
def test_long_texts_are_split_like_in_the_reference(text):
    assert list(split_long(text)) == split_by_character(text)
    assert "".join(split_long(text)) == text


@pytest.mark.parametrize("family", ["llama3", "llama2", pytest.param("smollm", marks=pytest.mark.real)])
@pytest.mark.parametrize("letter", ["a", *(pytest.param(letter, marks=pytest.mark.slow) for letter in " 🙂.")])
def test_a_million_characters(request, family, letter):
    tokenizer = request.getfixturevalue(family)
    text = letter * 1_000_000
    assert tokenizer.decode(tokenizer.encode(text, bos=False, eos=False)) == text


@pytest.mark.real
def test_a_million_letters_are_encoded_in_pieces(real_llama3):
    ids = real_llama3.encode("a" * 1_000_000, bos=False, eos=False)
    assert ids == 40 * real_llama3.encode("a" * 25_000, bos=False, eos=False)


@pytest.mark.parametrize("family", ["llama3", "llama2"])
def test_invalid_arguments_are_refused(request, family):
    tokenizer = request.getfixturevalue(family)
    with pytest.raises(ValueError, match="encode takes a str, not list") as error:
        tokenizer.encode(["x"], bos=False, eos=False)
    assert isinstance(error.value, AssertionError)
    for i in (-1, tokenizer.n_words):
        with pytest.raises(ValueError, match=f"token id {i} is outside the vocabulary of {tokenizer.n_words}"):
            tokenizer.decode([i])


BAD_FILES = {
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2183982\n", "Git LFS pointer"),
    "web page": (b"<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
    "empty": (b"", "is empty"),
    "json": (b'{"model": {}}', "lacks 'vocab'"),
    "noise": (bytes(range(255, 0, -1)) * 9, "neither a sentencepiece model"),
    "a bad line": (b"IQ== 0\nIg== one\n", "line 2: expected a base64 token and a rank"),
    "a missing rank": (b"IQ== 0\nIg== 2\n", "ranks are not 0 to 1"),
    "missing bytes": (b"IQ== 0\nIg== 1\n", "no token for the byte"),
    "a truncated GGUF file": (b"GGUF\x03\x00\x00\x00\x10\x01", "damaged or cut short"),
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_files_without_a_tokenizer_are_refused(tmp_path, content, message):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer(path)
    assert isinstance(error.value, AssertionError)
    assert str(path) in str(error.value)


def test_a_missing_tokenizer(tmp_path):
    (tmp_path / "params.json").touch()
    with pytest.raises(FileNotFoundError, match=r"does not exist; .* holds params\.json") as error:
        Tokenizer(tmp_path / "tokenizer.model")
    assert isinstance(error.value, AssertionError)
    with pytest.raises(ValueError, match=r"is a folder, not a file; it holds params\.json"):
        Tokenizer(tmp_path)
    with pytest.raises(ValueError, match="tokenizer_path='--max_seq_len' is not a path"):
        Tokenizer("--max_seq_len")


def test_a_truncated_tokenizer(tmp_path):
    whole = write_llama3_tokenizer(tmp_path / "tokenizer.model").read_bytes()
    for end in (1, 40, 999):
        (tmp_path / "truncated.model").write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"truncated\.model"):
            Tokenizer(tmp_path / "truncated.model")


@pytest.mark.real
def test_llama3s_merges_in_gguf_files(real_llama3_path, tmp_path):
    """Published files list every way to make each token from two others, 280,147 in all."""
    vocabulary = read_tiktoken_file(real_llama3_path)
    characters = gpt2_characters()
    tokens = {"".join(characters[byte] for byte in token): i for token, i in vocabulary.ranks.items()}
    names = {i: token for token, i in tokens.items()}
    merges = []
    for token in tokens:
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        ids = sorted((tokens[left], tokens[right]) for left, right in pairs if left in tokens and right in tokens)
        merges += [f"{names[left]} {names[right]}" for left, right in ids]
    assert len(merges) == 280147
    assert byte_level_ranks(tokens, merges, tmp_path) == vocabulary.ranks


def test_merges_must_be_in_the_order_of_their_ids(tmp_path):
    tokens = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4}
    assert byte_level_ranks(tokens, ["a b", "b c"], tmp_path)[b"bc"] == 4
    with pytest.raises(ValueError, match="'a b' is out of order"):
        byte_level_ranks(tokens, ["b c", "a b"], tmp_path)
    with pytest.raises(ValueError, match="'c c' is out of order"):
        byte_level_ranks(tokens, ["c c"], tmp_path)
    with pytest.raises(ValueError, match="stands for no byte"):
        byte_level_ranks({"あ": 0}, [], tmp_path)


def test_the_text_of_single_tokens(llama3, llama2):
    """Incomplete characters appear as escaped bytes, special tokens by name."""

    def token_texts(tokenizer, text: str) -> str:
        return " ".join(map(repr, map(tokenizer.token_text, tokenizer.encode(text, bos=True, eos=True))))

    smile = r"'\\xf0' '\\x9f' '\\x99' '\\x82'"
    assert token_texts(llama3, "the 🙂\n") == rf"'<|begin_of_text|>' 'th' 'e' ' ' {smile} '\n' '<|end_of_text|>'"
    assert token_texts(llama2, "the house") == "'<s>' ' the' ' house' '</s>'"
    assert token_texts(llama2, "🙂") == f"'<s>' ' ' {smile} '</s>'"
    for tokenizer in (llama3, llama2):
        assert all(tokenizer.token_text(i) for i in range(tokenizer.n_words))
        with pytest.raises(ValueError, match="outside the vocabulary"):
            tokenizer.token_text(tokenizer.n_words)


def test_the_text_of_ids_without_a_token(llama3_path):
    tokenizer = Tokenizer(llama3_path)
    tokenizer.n_words += 4  # as for padded embeddings
    assert tokenizer.token_text(524) == "<|unused_524|>"
