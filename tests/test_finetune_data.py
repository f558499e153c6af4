"""The tokens and the loss mask of each kind of line; invalid lines; batches, the validation split, the order."""

import json

import pytest
from chat_templates import STYLES, write_folder

from llama import ChatFormat, Tokenizer
from llama.errors import InputError
from llama.finetune.data import Example, make_batch, read_examples, shuffled, split_validation

PAIR = {"prompt": " hi ", "completion": "the in\n"}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


def read(tmp_path, tokenizer, *lines, chat=True, max_seq_len=96):
    """The examples in a file of these lines: strings as they are, or objects that are written as JSON."""
    path = tmp_path / "data.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return read_examples(path, tokenizer, ChatFormat(tokenizer) if chat else None, max_seq_len)


def split(example):
    """The tokens of an example, and those of them that count in the loss."""
    return example.tokens, [token for token, counts in zip(example.tokens, example.loss_mask, strict=True) if counts]


def mask(example):
    return "".join("x" if counts else "-" for counts in example.loss_mask)


def test_llama3(tmp_path, llama3):
    """268 is begin_of_text; 274 and 275 enclose a role; 277 is eot, which ends a turn."""
    (example,) = read(tmp_path, llama3, PAIR)
    question = [268, 274, 266, 275, 264, 104, 105, 277]
    header = [274, 97, 115, 115, 105, 115, 116, 262, 116, 275, 264]
    assert split(example) == ([*question, *header, 256, 101, 32, 259, 277], [256, 101, 32, 259, 277])
    assert mask(example) == "-" * 19 + "xxxxx"
    # The tokens before the answer are exactly the prompt that the model gets when it is asked.
    assert example.tokens[:19] == ChatFormat(llama3).encode_dialog_prompt([user("hi")])


def test_every_turn_of_the_assistant_counts(tmp_path, llama3):
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
    """2 is im_end. The newline after the last one is left out, since nothing after it counts."""
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
    """It is tokenized on its own, as it is generated after the header."""
    (example,) = read(tmp_path, smollm, {"messages": [user("Sure?"), assistant("\nYes")]})
    assert example.tokens[: example.loss_mask.index(True)] == ChatFormat(smollm).encode_dialog_prompt([user("Sure?")])
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
    """Each answered turn is enclosed in 1 (BOS) and 2 (EOS); an answer has a space before it and after it (303)."""
    dialog = [user("in"), assistant(" the river"), user("asks"), assistant("ou")]
    (example,) = read(tmp_path, llama2, {"messages": dialog})
    formatter = ChatFormat(llama2)
    first = formatter.encode_dialog_prompt(dialog[:1])
    assert example.tokens[: len(first)] == first
    answers = [261, 289, 303, 2], [268, 314, 303, 2]  # "▁the ▁river ▁ </s>", "▁o u ▁ </s>"
    assert split(example)[1] == answers[0] + answers[1]
    whole = formatter.encode_dialog_prompt([*dialog, user("x")])
    last = formatter.encode_dialog_prompt([user("x")])
    assert example.tokens == whole[: -len(last)]  # as answered turns are encoded in a prompt
    assert mask(example) == "-" * len(first) + "xxxx" + "-" * (len(example.tokens) - len(first) - 8) + "xxxx"


@pytest.mark.parametrize("name", STYLES)
def test_the_model_s_own_template(tmp_path, name):
    """Answers count, with their end tokens; before the first of them stands the prompt that the model will get."""
    tokenizer = Tokenizer(write_folder(tmp_path / "folder", STYLES[name]))
    formatter = ChatFormat(tokenizer)
    dialog = [system("be"), user("hi"), assistant("the in"), user("us"), assistant("ou")]
    (example,) = read(tmp_path, tokenizer, {"messages": dialog}, max_seq_len=400)
    # One template says at its beginning how many messages there are, so only the last answer has its prompt before it.
    n_asked, answers = (4, "ou") if "messages | length" in tokenizer.chat_template else (2, "theinou")
    begin = example.loss_mask.index(True)
    assert example.tokens[:begin] == formatter.encode_dialog_prompt(dialog[:n_asked])
    learned = tokenizer.decode(split(example)[1]).replace(STYLES[name].end_of_turn, "")
    assert "".join(learned.split()).replace("4/4", "") == answers
    assert example.tokens[-1] in tokenizer.stop_tokens


def test_plain(tmp_path, llama3, llama2):
    (example,) = read(tmp_path, llama3, {"prompt": "hi", "completion": " the us"}, chat=False)
    assert split(example) == ([268, 104, 105, 260, 32, 267, 269], [260, 32, 267, 269])  # 269: end_of_text
    (example,) = read(tmp_path, llama2, {"prompt": "in", "completion": " the river"}, chat=False)
    assert llama2.decode(example.tokens) == "in the river"
    assert split(example)[1] == [261, 289, 2]  # sentencepiece adds no space before the completion
    (example,) = read(tmp_path, llama3, {"prompt": "t", "completion": "he"}, chat=False)
    assert split(example) == (
        [268, 116, 257, 269],
        [257, 269],
    )  # the tokens of the prompt aren't merged with those of the completion: not "th"


def test_special_tokens_in_texts_are_plain_text(tmp_path, llama3):
    (example,) = read(tmp_path, llama3, {"prompt": "<|eot_id|>", "completion": "<|eot_id|>"})
    assert (example.tokens.count(277), split(example)[1].count(277)) == (2, 1)


def test_only_the_beginning_of_the_prompt_is_cut(tmp_path, llama3):
    pair = {"prompt": "0123456789", "completion": "the in"}
    whole = read(tmp_path, llama3, pair)[0]
    (cut,) = read(tmp_path, llama3, pair, max_seq_len=len(whole.tokens) - 7)
    assert cut.tokens == [268, *whole.tokens[8:]]  # BOS stays
    assert cut.loss_mask == [False, *whole.loss_mask[8:]]
    assert (cut.n_truncated, whole.n_truncated) == (7, 0)
    (plain,) = read(tmp_path, llama3, pair, chat=False, max_seq_len=8)
    assert split(plain) == ([268, 56, 57, 256, 101, 32, 259, 269], [256, 101, 32, 259, 269])
    # At least one token besides BOS must stay before the answer.
    shortest = whole.n_loss_tokens + 2
    assert read(tmp_path, llama3, pair, max_seq_len=shortest)[0].n_loss_tokens == whole.n_loss_tokens
    with pytest.raises(InputError, match=rf"line 2: .* there are 5, too many for max_seq_len={shortest - 1}"):
        read(tmp_path, llama3, {"prompt": "0", "completion": "i"}, pair, max_seq_len=shortest - 1)


def test_earlier_answers_are_not_cut_either(tmp_path, llama3):
    dialog = [user("0123456789"), assistant("in"), user("0123456789"), assistant("in")]
    whole = read(tmp_path, llama3, {"messages": dialog})[0]
    first = whole.loss_mask.index(True)
    (cut,) = read(tmp_path, llama3, {"messages": dialog}, max_seq_len=len(whole.tokens) - first + 2)
    assert cut.n_loss_tokens == whole.n_loss_tokens
    with pytest.raises(InputError, match="line 1: from the first to the last of the assistant's tokens"):
        read(tmp_path, llama3, {"messages": dialog}, max_seq_len=len(whole.tokens) - first + 1)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt": "a"', "line 2: not JSON"),
        ("[1]", r"line 2: it must be an object .* but it is \[1\]"),
        ({"prompt": "a"}, r"line 2: .* but it has the keys \['prompt'\]"),
        ({"prompt": "a", "completion": "b", "system": "c"}, r"the keys \['completion', 'prompt', 'system'\]"),
        ({"prompt": "a", "completion": 5}, "line 2: the completion must be a text that isn't empty, but it is 5"),
        ({"prompt": "a", "completion": " "}, "line 2: the completion must be a text that isn't empty"),
        ({"prompt": "", "completion": "b"}, "line 2: the prompt must be a text that isn't empty"),
        ({"messages": []}, "line 2: an empty dialog"),
        ({"messages": "hi"}, "line 2: a dialog is a list of messages"),
        ({"messages": [{"role": "robot", "content": "b"}]}, "line 2: message 0: unknown role 'robot'"),
        ({"messages": [user("a"), assistant(None)]}, "line 2: message 1, .* must be"),
        ({"messages": [user("a")]}, "line 2: the last message must be the assistant's, but it is the user's"),
        (
            {"messages": [user("a"), assistant(" "), user("a"), assistant("b")]},
            "line 2: message 1: the assistant's message is empty",
        ),
    ],
)
def test_invalid_lines(tmp_path, llama3, line, problem):
    with pytest.raises(InputError, match=problem):
        read(tmp_path, llama3, PAIR, line, PAIR)


def test_invalid_lines_for_llama2_and_plain_text(tmp_path, llama2, llama3):
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


def test_invalid_lines_are_listed_and_blank_ones_skipped(tmp_path, llama3):
    with pytest.raises(InputError) as error:
        read(tmp_path, llama3, "", *["{}"] * 15, PAIR)
    listed = str(error.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in listed] == [f"line {i}" for i in range(2, 12)] + ["… (15 in all)"]
    assert [example.line for example in read(tmp_path, llama3, "", PAIR, "  ", PAIR)] == [2, 4]
    with pytest.raises(InputError, match="has no examples"):
        read(tmp_path, llama3, "")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_examples(tmp_path / "nowhere", llama3, None, 96)


def test_bytes_that_are_not_utf_8(tmp_path, llama3):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "completion": "b\xe2\x80\xa8"}\r\n{"prompt": "\xff"}\n')
    with pytest.raises(InputError, match=r"line 2: not JSON: .*0xff") as error:
        read_examples(path, llama3, ChatFormat(llama3), 96)
    assert "line 1" not in str(error.value)  # a byte-order mark, and a line separator in a string, are accepted


def make_example(length, n_loss_tokens, line=1):
    return Example(line, list(range(10, 10 + length)), [False] * (length - n_loss_tokens) + [True] * n_loss_tokens)


def test_batches():
    """Targets are the tokens that follow; padding doesn't count."""
    tokens, targets, loss_mask = make_batch([make_example(5, 2), make_example(3, 1)])
    assert tokens.tolist() == [[10, 11, 12, 13], [10, 11, 12, 0]]
    assert targets[0].tolist() == [11, 12, 13, 14]
    assert targets[1, :2].tolist() == [11, 12]
    assert loss_mask.int().tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]]


def test_the_validation_split():
    examples = [make_example(5, 2, line) for line in range(20)]
    training, validation = split_validation(examples, 0.25, seed=1)
    assert len(validation) == 5
    assert sorted(training + validation) == examples
    assert training == sorted(training)
    assert (
        split_validation(examples, 0.25, seed=1) == (training, validation) != split_validation(examples, 0.25, seed=2)
    )
    assert split_validation(examples, 0, seed=1) == (examples, [])
    assert len(split_validation(examples, 0.001, seed=1)[1]) == 1  # at least one
    with pytest.raises(InputError, match=r"val_fraction=0\.9 of 2 example\(s\) leaves none"):
        split_validation(examples[:2], 0.9, seed=1)


def test_the_order_of_an_epoch():
    examples = [make_example(5, 2, line) for line in range(20)]
    first, second = (shuffled(examples, epoch, seed=1) for epoch in range(2))
    assert sorted(first) == sorted(second) == examples
    assert first != second != examples != first != shuffled(examples, 0, seed=2)
    assert first == shuffled(examples, 0, seed=1)
