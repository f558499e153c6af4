"""The tokens and the loss mask of each kind of line; invalid lines; batches, the validation split, the order."""

import json

import pytest
from chat_templates import STYLES, write_folder

from llama import ChatFormat, Tokenizer
from llama.errors import InputError
from llama.finetune.data import (
    IGNORED_KEYS,
    Example,
    find_data,
    leave_out,
    make_batch,
    read_examples,
    shuffled,
    split_validation,
)
from llama.segments import Segment

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


def test_alpacas_data(tmp_path, llama3):
    line = {"instruction": "hi", "output": "the in"}
    (expected,) = read(tmp_path, llama3, {"messages": [user("hi"), assistant("the in")]})
    for extra in ({}, {"input": ""}, {"input": None}, {"system": None}):
        assert read(tmp_path, llama3, line | extra) == [expected]
    dialog = [system("be"), user("hi\n\nus"), assistant("the in")]
    assert read(tmp_path, llama3, line | {"input": "us", "system": "be"}) == read(
        tmp_path, llama3, {"messages": dialog}
    )


def test_share_gpts_data(tmp_path, llama3):
    dialog = [system("be"), user("hi"), assistant("the in"), user("us"), assistant("ou")]
    expected = read(tmp_path, llama3, {"messages": dialog})
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": names[message["role"]], "value": message["content"]} for message in dialog]
    assert read(tmp_path, llama3, {"conversations": turns}) == expected
    assert read(tmp_path, llama3, {"conversations": turns[1:], "system": "be", "id": "x_1"}) == expected
    assert read(tmp_path, llama3, {"conversations": dialog}) == expected
    turns[1]["from"], turns[2]["from"] = "user", "assistant"
    assert read(tmp_path, llama3, {"messages": turns}) == expected


def test_keys_that_say_where_data_are_from_are_ignored(tmp_path, llama3):
    dialog = [user("hi"), assistant("the in")]
    noise = dict.fromkeys(IGNORED_KEYS, 5) | {"tools": None, "system_prompt": None}
    expected = read(tmp_path, llama3, {"prompt": "hi", "completion": "the in"}, {"messages": dialog})
    noisy = {"messages": [message | noise for message in dialog]}
    assert read(tmp_path, llama3, {"prompt": "hi", "completion": "the in"} | noise, noisy | noise) == expected
    assert {"id", "source"} <= IGNORED_KEYS


def test_messages_of_weight_0_are_not_learned(tmp_path, llama2, llama3):
    def dialog(*weights):
        messages = [user("hi"), assistant("the in"), user("us"), assistant("ou")]
        for message, weight in zip(messages[1::2], weights, strict=True):
            message["weight"] = weight
        return {"messages": messages}

    for tokenizer in (llama2, llama3):
        (both,), (first,), (last,) = (read(tmp_path, tokenizer, dialog(*pair)) for pair in ((1, 1), (1, 0), (0, 1.0)))
        begin = both.loss_mask.index(True)
        n_first = both.loss_mask.index(False, begin) - begin
        assert first.tokens == both.tokens[: begin + n_first]  # what follows would change nothing
        assert first.loss_mask == both.loss_mask[: begin + n_first]
        assert last.tokens == both.tokens
        assert last.loss_mask == [counts and i >= begin + n_first for i, counts in enumerate(both.loss_mask)]
        assert read(tmp_path, tokenizer, dialog(None, True)) == [both]
    with pytest.raises(InputError, match=r"line 1: every message of the assistant's has weight 0"):
        read(tmp_path, llama3, dialog(0, 0))
    turns = [
        {"from": "human", "value": "hi"},
        {"from": "gpt", "value": "the in", "weight": 0},
        *dialog(0, 1)["messages"],
    ]
    (example,) = read(tmp_path, llama3, {"conversations": turns})
    assert split(example)[1] == [263, 277]


def test_weights_where_a_template_leaves_answers_out():
    segments = [Segment([1], False), Segment([2], True), Segment([3], False), Segment([4], True)]
    assert leave_out(segments, [True, True, True]) == segments
    assert leave_out(segments, [False, False, True]) == [segments[0], Segment([2], False), *segments[2:]]
    with pytest.raises(InputError, match="leaves some earlier answers out, so weights can't be told apart"):
        leave_out(segments, [True, False, True])


def test_where_the_data_are(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"data='~/folder' is a folder; give the file of examples\. It holds nothing"):
        find_data("~/folder")
    (tmp_path / "folder" / "README.md").touch()
    (tmp_path / "folder" / "pairs.jsonl").touch()
    assert find_data("~/folder/pairs.jsonl") == find_data("~/folder") == tmp_path / "folder" / "pairs.jsonl"
    (tmp_path / "folder" / "more.jsonl").touch()
    with pytest.raises(InputError, match=r"It holds README\.md, more\.jsonl, pairs\.jsonl"):
        find_data(tmp_path / "folder")


@pytest.mark.parametrize("array", [json.dumps([PAIR, PAIR]), json.dumps([PAIR, PAIR], indent=2), "\ufeff[\n" + "]"])
def test_a_json_array_is_refused_with_the_way_to_split_it(tmp_path, llama3, array):
    (tmp_path / "pairs.json").write_text(array, encoding="utf-8")
    message = r"pairs\.json is one JSON array, .* for example with `jq -c '\.\[\]' pairs\.json > pairs\.jsonl`"
    with pytest.raises(InputError, match=message):
        read_examples(tmp_path / "pairs.json", llama3, None, 96)


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
        ({"instruction": "a"}, r"it must be an object .* with instruction and output, .* keys \['instruction'\]"),
        ({"instruction": "a", "output": 5}, "line 2: the output must be a text that isn't empty, but it is 5"),
        ({"instruction": " ", "output": "b"}, "line 2: the instruction must be a text that isn't empty"),
        ({"instruction": "a", "input": [1], "output": "b"}, r"line 2: the input must be a text, but it is \[1\]"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, r"the keys \['history', 'instruction'"),
        ({"conversations": [user("a")], "tools": "x"}, r"the keys \['conversations', 'tools'\]"),
        (
            {"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]},
            "must be the assistant's",
        ),
        ({"conversations": [{"from": ["gpt"], "value": "a"}]}, r"message 0: unknown role \"\['gpt'\]\""),
        ({"conversations": [{"from": "function_call", "value": "a"}]}, "unknown role 'function_call'"),
        ({"messages": [user("a"), assistant("b") | {"weight": 0.5}]}, r"message 1: weight=0\.5 must be 0, .* or 1"),
        ({"messages": [user("a"), assistant("b") | {"weight": "0"}]}, "message 1: weight='0' must be 0"),
        ({"messages": [user("a") | {"weight": 1}, assistant("b")]}, "message 0: weight=1, but only the assistant's"),
        ({"messages": [user("a"), assistant("b") | {"train": False}]}, r"message 1: unknown keys \['train'\]"),
        ({"messages": [user("a"), assistant("b") | {"tool_calls": [1]}]}, r"unknown keys \['tool_calls'\]"),
        ({"messages": [{"from": "gpt", "role": "user", "content": "b"}]}, r"unknown keys \['from'\]"),
        ("[" * 100_000, "line 2: not JSON"),
        ("[" * 900 + "]" * 900, "line 2: not JSON"),
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
    with pytest.raises(InputError, match="line 1: a dialog needs a chat format"):
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
