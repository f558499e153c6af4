"""What is learned of each line, token by token; and lines that nothing can be learned from."""

import json

import pytest

from llama import ChatFormat
from llama.errors import InputError
from llama.finetune.data import Example, make_batch, read_examples, shuffled, split_off

PAIR = {"prompt": " hi ", "completion": "the in\n"}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


def read(tmp_path, tokenizer, *lines, chat=True, max_seq_len=96):
    """The examples in a file of these lines, which are JSON already or become it."""
    path = tmp_path / "data.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return read_examples(path, tokenizer, ChatFormat(tokenizer) if chat else None, max_seq_len)


def split(example):
    """The tokens of an example, and those of them that are learned."""
    assert len(example.tokens) == len(example.learned)
    return example.tokens, [token for token, learned in zip(*example[1:3], strict=True) if learned]


def mask(example):
    return "".join("x" if learned else "-" for learned in example.learned)


def test_llama3(tmp_path, llama3):
    """268 is begin_of_text; 274 and 275 stand around a role; 277 is eot, which ends a turn."""
    (example,) = read(tmp_path, llama3, PAIR)
    question = [268, 274, 266, 275, 264, 104, 105, 277]
    header = [274, 97, 115, 115, 105, 115, 116, 262, 116, 275, 264]
    assert split(example) == ([*question, *header, 256, 101, 32, 259, 277], [256, 101, 32, 259, 277])
    assert mask(example) == "-" * 19 + "xxxxx"
    # just what stands before the answer when the model is asked
    assert example.tokens[:19] == ChatFormat(llama3).encode_dialog_prompt([user("hi")])


def test_every_turn_of_the_assistant_s(tmp_path, llama3):
    dialog = [system("be"), user("hi"), assistant("the in"), user("us"), assistant("ou")]
    (example,) = read(tmp_path, llama3, {"messages": dialog})
    header = [274, 97, 115, 115, 105, 115, 116, 262, 116, 275, 264]
    before = [268, 274, 115, 121, 115, 116, 101, 109, 275, 264, 98, 101, 277, 274, 266, 275, 264, 104, 105, 277]
    answers = [256, 101, 32, 259, 277], [263, 277]
    between = [274, 266, 275, 264, 267, 277]
    whole = [*before, *header, *answers[0], *between, *header, *answers[1]]
    assert split(example) == (whole, answers[0] + answers[1])
    assert mask(example) == "-" * 31 + "xxxxx" + "-" * 17 + "xx"
    assert whole[:-2] == ChatFormat(llama3).encode_dialog_prompt(dialog[:-1])


@pytest.mark.real
def test_chatml(tmp_path, smollm):
    """2 is im_end. The new line after the last one is not there: nothing would be learned from it."""
    dialog = [user("Who is Ada?"), assistant("A cat."), user("Sure?"), assistant("Yes")]
    (example,) = read(tmp_path, smollm, {"messages": dialog})
    # fmt: off
    assert example.tokens == [
        1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182, 2,
        198, 1, 4093, 198, 10576, 314, 34099, 47, 2, 198, 1, 520, 9531, 198, 49, 2644, 30, 2, 198,
        1, 4093, 198, 34355, 47, 2, 198, 1, 520, 9531, 198, 10539, 2,
    ]
    # fmt: on
    assert split(example)[1] == [49, 2644, 30, 2, 10539, 2]
    assert mask(example) == "-" * 34 + "xxxx" + "-" * 12 + "xx"
    assert example.tokens[:-2] == ChatFormat(smollm).encode_dialog_prompt(dialog[:-1])


@pytest.mark.real
def test_chatml_content_that_begins_with_a_space(tmp_path, smollm):
    """It is learned as it is generated: after the header."""
    (example,) = read(tmp_path, smollm, {"messages": [user("Sure?"), assistant("\nYes")]})
    assert example.tokens[: example.learned.index(True)] == ChatFormat(smollm).encode_dialog_prompt([user("Sure?")])
    assert smollm.decode(split(example)[1]) == "\nYes<|im_end|>"


@pytest.mark.real
def test_real_llama3(tmp_path, real_llama3):
    dialog = [system("This is a test sentence."), user("This is a response."), assistant("This is a test sentence.")]
    (example,) = read(tmp_path, real_llama3, {"messages": dialog})
    # fmt: off
    assert example.tokens == [
        128000, 128006, 9125, 128007, 271, 2028, 374, 264, 1296, 11914, 13, 128009,
        128006, 882, 128007, 271, 2028, 374, 264, 2077, 13, 128009, 128006, 78191, 128007, 271,
        2028, 374, 264, 1296, 11914, 13, 128009,
    ]
    # fmt: on
    assert split(example)[1] == [2028, 374, 264, 1296, 11914, 13, 128009]


def test_llama2(tmp_path, llama2):
    """Each answered turn stands between 1 (BOS) and 2 (EOS); an answer has a space before it and after it (303)."""
    dialog = [user("in"), assistant(" the river"), user("asks"), assistant("ou")]
    (example,) = read(tmp_path, llama2, {"messages": dialog})
    formatter = ChatFormat(llama2)
    first = formatter.encode_dialog_prompt(dialog[:1])
    assert example.tokens[: len(first)] == first
    learned = [261, 289, 303, 2], [268, 314, 303, 2]  # "▁the ▁river ▁ </s>", "▁o u ▁ </s>"
    assert split(example)[1] == learned[0] + learned[1]
    whole = formatter.encode_dialog_prompt([*dialog, user("x")])
    last = formatter.encode_dialog_prompt([user("x")])
    assert example.tokens == whole[: -len(last)]  # as an answered turn has always been encoded
    assert mask(example) == "-" * len(first) + "xxxx" + "-" * (len(example.tokens) - len(first) - 8) + "xxxx"


def test_plain(tmp_path, llama3, llama2):
    (example,) = read(tmp_path, llama3, {"prompt": "hi", "completion": " the us"}, chat=False)
    assert split(example) == ([268, 104, 105, 260, 32, 267, 269], [260, 32, 267, 269])  # 269: end_of_text
    (example,) = read(tmp_path, llama2, {"prompt": "in", "completion": " the river"}, chat=False)
    assert llama2.decode(example.tokens) == "in the river"
    assert split(example)[1] == [261, 289, 2]  # no space of its own before the completion
    (example,) = read(tmp_path, llama3, {"prompt": "t", "completion": "he"}, chat=False)
    assert split(example) == ([268, 116, 257, 269], [257, 269])  # a prompt's tokens are its own: never "th"


def test_special_tokens_in_texts_are_text(tmp_path, llama3):
    (example,) = read(tmp_path, llama3, {"prompt": "<|eot_id|>", "completion": "<|eot_id|>"})
    assert (example.tokens.count(277), split(example)[1].count(277)) == (2, 1)


def test_the_prompt_is_cut_from_its_left_and_nothing_else(tmp_path, llama3):
    pair = {"prompt": "0123456789", "completion": "the in"}
    whole = read(tmp_path, llama3, pair)[0]
    (cut,) = read(tmp_path, llama3, pair, max_seq_len=len(whole.tokens) - 7)
    assert cut.tokens == [268, *whole.tokens[8:]]  # BOS stays
    assert cut.learned == [False, *whole.learned[8:]]
    assert (cut.cut, whole.cut) == (7, 0)
    (plain,) = read(tmp_path, llama3, pair, chat=False, max_seq_len=8)
    assert split(plain) == ([268, 56, 57, 256, 101, 32, 259, 269], [256, 101, 32, 259, 269])
    # One token besides BOS is the least that the answer can follow.
    shortest = whole.n_learned + 2
    assert read(tmp_path, llama3, pair, max_seq_len=shortest)[0].n_learned == whole.n_learned
    with pytest.raises(InputError, match=rf"line 2: .* there are 5 tokens, too many for max_seq_len={shortest - 1}"):
        read(tmp_path, llama3, {"prompt": "0", "completion": "i"}, pair, max_seq_len=shortest - 1)


def test_an_earlier_answer_is_not_cut_either(tmp_path, llama3):
    dialog = [user("0123456789"), assistant("in"), user("0123456789"), assistant("in")]
    whole = read(tmp_path, llama3, {"messages": dialog})[0]
    first = whole.learned.index(True)
    (cut,) = read(tmp_path, llama3, {"messages": dialog}, max_seq_len=len(whole.tokens) - first + 2)
    assert cut.n_learned == whole.n_learned
    with pytest.raises(InputError, match="line 1: from the first to the last word of the assistant"):
        read(tmp_path, llama3, {"messages": dialog}, max_seq_len=len(whole.tokens) - first + 1)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt": "a"', "line 2: not JSON"),
        ("[1]", r"line 2: it must be an object .* and is \[1\]"),
        ({"prompt": "a"}, r"line 2: .* and is the keys \['prompt'\]"),
        ({"prompt": "a", "completion": "b", "system": "c"}, r"the keys \['completion', 'prompt', 'system'\]"),
        ({"prompt": "a", "completion": 5}, "line 2: the completion must be a text that isn't empty, and is 5"),
        ({"prompt": "a", "completion": " "}, "line 2: the completion must be a text that isn't empty"),
        ({"prompt": "", "completion": "b"}, "line 2: the prompt must be a text that isn't empty"),
        ({"messages": []}, "line 2: an empty dialog"),
        ({"messages": "hi"}, "line 2: a dialog is a list of messages"),
        ({"messages": [{"role": "robot", "content": "b"}]}, "line 2: message 0: unknown role 'robot'"),
        ({"messages": [user("a"), assistant(None)]}, "line 2: message 1, .* must be"),
        ({"messages": [user("a")]}, "line 2: the last message must be the assistant's, and is the user's"),
        ({"messages": [user("a"), assistant(" "), user("a"), assistant("b")]}, "line 2: message 1: the assistant says"),
    ],
)
def test_bad_lines(tmp_path, llama3, line, problem):
    with pytest.raises(InputError, match=problem):
        read(tmp_path, llama3, PAIR, line, PAIR)


def test_bad_lines_for_llama2_and_plain(tmp_path, llama2, llama3):
    for dialog, problem in (
        ([assistant("a")], "line 1: an empty dialog"),
        ([user("a"), user("b"), assistant("c")], r"line 1: roles \['user', 'user'\]"),
        ([user("a [INST]"), assistant("c")], "line 1: Error: special tags"),
        ([user("a")], "line 1: .* must end with what the assistant says"),
        ([], "line 1: an empty dialog"),
        (5, "line 1: a dialog is a list of messages"),
    ):
        with pytest.raises(InputError, match=problem):
            read(tmp_path, llama2, {"messages": dialog})
    with pytest.raises(InputError, match="line 1: messages need a chat format"):
        read(tmp_path, llama3, {"messages": [user("a"), assistant("b")]}, chat=False)


def test_all_bad_lines_are_told_and_empty_ones_skipped(tmp_path, llama3):
    with pytest.raises(InputError) as error:
        read(tmp_path, llama3, "", *["{}"] * 15, PAIR)
    told = str(error.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in told] == [f"line {i}" for i in range(2, 12)] + ["… (15 in all)"]
    assert [example.line for example in read(tmp_path, llama3, "", PAIR, "  ", PAIR)] == [2, 4]
    with pytest.raises(InputError, match="holds no examples"):
        read(tmp_path, llama3, "")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_examples(tmp_path / "nowhere", llama3, None, 96)


def test_bytes_that_are_no_text(tmp_path, llama3):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "completion": "b\xe2\x80\xa8"}\r\n{"prompt": "\xff"}\n')
    with pytest.raises(InputError, match=r"line 2: not JSON: .*0xff") as error:
        read_examples(path, llama3, ChatFormat(llama3), 96)
    assert "line 1" not in str(error.value)  # a byte-order mark and a line separator within a text are fine


def example(length, n_learned, line=1):
    return Example(line, list(range(10, 10 + length)), [False] * (length - n_learned) + [True] * n_learned)


def test_batches():
    """Targets are the tokens that follow; what is filled up counts for nothing."""
    tokens, targets, learned = make_batch([example(5, 2), example(3, 1)])
    assert tokens.tolist() == [[10, 11, 12, 13], [10, 11, 12, 0]]
    assert targets[0].tolist() == [11, 12, 13, 14]
    assert targets[1, :2].tolist() == [11, 12]
    assert learned.int().tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]]


def test_what_is_kept_apart():
    examples = [example(5, 2, line) for line in range(20)]
    training, validation = split_off(examples, 0.25, seed=1)
    assert len(validation) == 5
    assert sorted(training + validation) == examples
    assert training == sorted(training)
    assert split_off(examples, 0.25, seed=1) == (training, validation) != split_off(examples, 0.25, seed=2)
    assert split_off(examples, 0, seed=1) == (examples, [])
    assert len(split_off(examples, 0.001, seed=1)[1]) == 1  # asked for some, there is one
    with pytest.raises(InputError, match=r"val_fraction=0\.9 of 2 example\(s\) leaves none"):
        split_off(examples[:2], 0.9, seed=1)


def test_the_order_of_epochs():
    examples = [example(5, 2, line) for line in range(20)]
    first, second = (shuffled(examples, epoch, seed=1) for epoch in range(2))
    assert sorted(first) == sorted(second) == examples
    assert first != second != examples != first != shuffled(examples, 0, seed=2)
    assert first == shuffled(examples, 0, seed=1)
