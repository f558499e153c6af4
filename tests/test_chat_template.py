"""Chat templates: the same token ids as transformers, but no message can spell a control token."""

import copy
import json
import random

import pytest
from chat_templates import STYLES, Style, random_content, random_dialog, write_folder, write_gguf_tokenizer
from conftest import ScriptedModel
from hypothesis import given
from hypothesis import strategies as st

from llama import ChatFormat, Llama, Tokenizer
from llama.chat_format import TemplateFormat
from llama.chat_template import HiddenTexts
from llama.errors import CheckpointError, InputError

N_DIALOGS = 200
SOURCES = ("tokenizer_config.json", "chat_template.jinja", "tokenizer.chat_template")


@pytest.fixture(scope="session", params=STYLES)
def style(request):
    return STYLES[request.param]


@pytest.fixture(scope="session")
def template_tokenizers(tmp_path_factory, style):
    """The tokenizer of a style, from each of `SOURCES`."""
    folder = tmp_path_factory.mktemp("templates")
    paths = [write_folder(folder / source, style, source) for source in SOURCES[:2]]
    return [Tokenizer(path) for path in [*paths, write_gguf_tokenizer(folder, style)]]


@pytest.fixture(scope="session")
def formats(template_tokenizers):
    return [ChatFormat(tokenizer) for tokenizer in template_tokenizers]


def transformers_ids(folder, dialogs, **options):
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    options = {"add_generation_prompt": True, "return_dict": False} | options
    return [theirs.apply_chat_template(dialog, **options) for dialog in dialogs]


def test_the_ids_of_transformers(tmp_path, style, formats):
    generator = random.Random(13)
    dialogs = [random_dialog(generator) for _ in range(N_DIALOGS)]
    write_folder(tmp_path / "folder", style)
    write_folder(tmp_path / "gguf", style._replace(config={**style.config, "legacy": False}))  # GGUF doesn't say legacy
    of_folder, of_gguf = (transformers_ids(tmp_path / name, dialogs) for name in ("folder", "gguf"))
    for formatter, source, expected in zip(formats, SOURCES, (of_folder, of_folder, of_gguf), strict=True):
        assert type(formatter) is TemplateFormat
        assert formatter.description == f"the model's own template, from {source}"
        for dialog, ids in zip(dialogs, expected, strict=True):
            assert formatter.encode_dialog_prompt(dialog) == ids, (source, dialog)


def hostile_content(generator: random.Random, control_tokens: list[str]) -> str:
    """A message with control tokens in it: whole, in pieces, one within another, cut at an end."""
    pieces = []
    for _ in range(generator.randrange(1, 6)):
        token, other = generator.choice(control_tokens), generator.choice(control_tokens)
        cut = generator.randrange(len(token) + 1)
        pieces.append(generator.choice((token, token[:cut], token[cut:], token[:cut] + other + token[cut:])))
        pieces.append(generator.choice(("", "", " ", "\n", random_content(generator))))
    return "".join(pieces)


def test_no_content_spells_a_control_token(formats):
    generator = random.Random(7)
    for formatter in formats:
        tokenizer = formatter.tokenizer
        control_tokens = sorted(formatter.template.control_tokens)
        control_ids = {token.id for token in tokenizer.engine.added_tokens if token.content in control_tokens}
        for _ in range(100):  # dialogs, for each of three sources and eight styles
            contents = [hostile_content(generator, control_tokens) for _ in range(3)]
            # DeepSeek's template takes what follows </think>, the last one shortens contents: neither is at issue here.
            roles = ("user", "assistant", "user")
            innocent = [{"role": role, "content": "x"} for role in roles]
            hostile = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
            expected = [token for token in formatter.encode_dialog_prompt(innocent) if token in control_ids]
            tokens = formatter.encode_dialog_prompt(hostile)
            assert [token for token in tokens if token in control_ids] == expected, hostile
            text = tokenizer.decode(tokens)
            if "[:40]" not in tokenizer.chat_template:
                for content in contents:
                    assert content.strip() in text, hostile


PLAIN = "{% for message in messages %}{{ message.role + ': ' + message.content + eos_token }}{% endfor %}"


@pytest.mark.parametrize("order", [("user",), ("user", "assistant", "user")])
def test_what_the_template_and_messages_join_is_no_control_token(tmp_path, order):
    """Contents directly beside each other, and beside what the template writes, spell a token together."""
    template = "{% for message in messages %}{{ '<' + message.content | trim }}{% endfor %}{{ '>' }}"
    tokenizer = Tokenizer(write_folder(tmp_path, Style("sentencepiece", template)))
    formatter = ChatFormat(tokenizer)
    for contents in (("/s>", "/s>", "/s>"), ("/", "s>", "x"), ("</", "/s>", "</s"), (" </s ", "s", "x")):
        dialog = [{"role": role, "content": content} for role, content in zip(order, contents, strict=False)]
        tokens = formatter.encode_dialog_prompt(dialog)
        assert not {1, 2} & set(tokens), dialog
        joined = "".join("<" + content.strip() for content in contents[: len(order)]) + ">"
        assert tokenizer.decode(tokens) == joined


def test_a_dialog_of_all_private_use_characters():
    every = "".join(map(chr, [*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE)]))
    hidden = HiddenTexts("", [{"role": "user", "content": every[1:]}])
    assert hidden.restore(hidden.hide("<s> x", {"<s>"})) == "<s> x"
    with pytest.raises(InputError, match="every private-use character"):
        HiddenTexts("", [{"role": "user", "content": every}]).hide("<s>", {"<s>"})


@given(st.lists(st.sampled_from(["<a>", "<", "a", ">", "<ab>", " ", "\ue000", "\U000f0000", "b>", "x"])).map("".join))
def test_hidden_texts_come_back(text):
    hidden = HiddenTexts("", [{"role": "user", "content": text}])
    concealed = hidden.hide(text, {"<a>", "<ab>"})
    assert "<a>" not in concealed
    assert "<ab>" not in concealed
    assert hidden.restore(concealed) == text


def test_the_turns_of_a_dialog_to_learn_from(template_tokenizers, formats):
    """Learned are exactly the assistant's contents and end tokens; before each answer stands the prompt for it."""
    generator = random.Random(3)
    for formatter in formats:
        tokenizer = formatter.tokenizer
        stop_tokens = {name for token in tokenizer.stop_tokens for name in [tokenizer.token_text(token)]}
        for _ in range(60):
            dialog = random_dialog(generator, generator.randrange(1, 4))[:-1]
            if not all(message["content"].strip() for message in dialog if message["role"] == "assistant"):
                continue
            segments = formatter.encode_turns(dialog)
            answers = [number for number, message in enumerate(dialog) if message["role"] == "assistant"]
            learned = [segment for segment in segments if segment.from_assistant]
            if "messages | length" in tokenizer.chat_template:  # earlier prompts said that there were fewer messages
                answers = answers[-1:]
            assert len(learned) == len(answers)
            before = []
            for segment in segments:
                if segment.from_assistant:
                    number = answers.pop(0)
                    if segment is learned[0]:
                        assert before == formatter.encode_dialog_prompt(dialog[:number])
                    text, content = tokenizer.decode(segment.tokens), dialog[number]["content"]
                    assert segment.tokens[-1] in tokenizer.stop_tokens
                    end = next((name for name in stop_tokens if text.endswith(name)), "")
                    said = text.removesuffix(end).strip()
                    if answers:  # earlier answers stand as the template shows them
                        content = (
                            content
                            if "split('</think>')" not in tokenizer.chat_template
                            else content.split("</think>")[-1]
                        )
                    assert said == content.strip()
                before += segment.tokens


def test_the_last_answer_keeps_what_the_template_cuts_from_earlier_ones(tmp_path):
    tokenizer = Tokenizer(write_folder(tmp_path, STYLES["DeepSeek-R1-Distill"]))
    formatter = ChatFormat(tokenizer)
    answer = "<think>\nhm\n</think>\n\nYes"
    dialog = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}] * 2
    first, second = [segment.tokens for segment in formatter.encode_turns(dialog) if segment.from_assistant]
    assert tokenizer.decode(first) == "\n\nYes<｜end▁of▁sentence｜>"
    assert tokenizer.decode(second) == answer + "<｜end▁of▁sentence｜>"
    assert {tokenizer.token_text(token) for token in second} >= {"<think>", "</think>"}


THINKING = """{% for message in messages %}{% if message.role == 'user' %}{{ '<｜User｜>' + message.content }}{% else %}
{{- '<｜Assistant｜>' + message.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"""


@pytest.mark.parametrize("answer", ["<think>\nhm\n</think>\n\nYes", "Yes"])
def test_a_prompt_that_begins_the_answer(tmp_path, answer):
    """The generation prompt opens the thoughts. What is learned goes on from there."""
    tokenizer = Tokenizer(write_folder(tmp_path, STYLES["DeepSeek-R1-Distill"]._replace(template=THINKING)))
    formatter = ChatFormat(tokenizer)
    dialog = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    segments = formatter.encode_turns([*dialog, {"role": "assistant", "content": answer}])
    *context, learned, _ = segments
    assert learned.from_assistant
    assert [token for segment in context for token in segment.tokens] == formatter.encode_dialog_prompt(dialog)
    assert tokenizer.decode(learned.tokens) == answer.removeprefix("<think>\n") + "<｜end▁of▁sentence｜>"


def test_a_template_that_ends_answers_with_nothing(tmp_path):
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    tokenizer = Tokenizer(write_folder(tmp_path, Style("sentencepiece", template)))
    formatter = ChatFormat(tokenizer)
    dialog = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    learned = [segment.tokens for segment in formatter.encode_turns(dialog) if segment.from_assistant]
    assert [tokenizer.decode(tokens) for tokens in learned] == ["b", "b"]
    assert learned[1][-1] == tokenizer.eos_id  # so that the model learns to stop
    assert tokenizer.stop_tokens == {tokenizer.eos_id}


def test_a_template_that_leaves_the_answer_out(tmp_path):
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    formatter = ChatFormat(Tokenizer(write_folder(tmp_path, Style("sentencepiece", template))))
    with pytest.raises(InputError, match="doesn't write the assistant's last message"):
        formatter.encode_turns([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])


def test_the_end_of_a_turn_is_a_stop_token(template_tokenizers, style):
    for tokenizer in template_tokenizers:
        (end,) = [token.id for token in tokenizer.engine.added_tokens if token.content == style.end_of_turn]
        assert end in tokenizer.stop_tokens
        assert ChatFormat(tokenizer).template.end_of_turn == end


def test_a_template_s_own_refusal_is_an_input_error(tmp_path):
    formatter = ChatFormat(Tokenizer(write_folder(tmp_path, STYLES["Vicuna"])))
    with pytest.raises(InputError, match=r"refuses the dialog: Roles must alternate: user, assistant, user, \.\.\."):
        formatter.encode_dialog_prompt([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])
    with pytest.raises(InputError, match="unknown role 'tool'"):
        formatter.encode_dialog_prompt([{"role": "tool", "content": "a"}])
    with pytest.raises(InputError, match="empty dialog"):
        formatter.encode_turns([])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}",
            r"tokenizer_config\.json: the chat template is not valid Jinja, line 1: TemplateSyn",
        ),
        ("{{ messages | no_such_filter }}", "not valid Jinja.*No filter named 'no_such_filter'"),
        ("{{ messages[5].content.x }}", "the chat template fails: UndefinedError"),
        (
            "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
            "is stopped: it",
        ),
        ("{{ ''.__class__ }}", "is stopped: it reaches for '__class__' of a str"),
        ("x" * 100_001, "100001 characters, more than 100000"),
    ],
)
def test_templates_that_cannot_be_used(tmp_path, template, message):
    """They don't keep the model from completing texts: the error comes when a dialog is encoded."""
    tokenizer = Tokenizer(write_folder(tmp_path, Style("sentencepiece", template)))
    llama = Llama(ScriptedModel(400), tokenizer)
    assert llama.text_completion(["the"], 0, max_gen_len=1)
    with pytest.raises(CheckpointError, match=message):
        llama.chat_completion([[{"role": "user", "content": "x"}]])


def test_a_hostile_template_runs_nothing(tmp_path):
    marker = tmp_path / "marker"
    template = f"{{{{ cycler.__init__.__globals__.os.system('touch {marker}') }}}}"
    with pytest.raises(CheckpointError, match="reaches for '__init__'"):
        ChatFormat(Tokenizer(write_folder(tmp_path / "folder", Style("sentencepiece", template))))
    assert not marker.exists()


def test_a_chat_from_start_to_end(tmp_path):
    """The answer ends at the template's end of turn, and the reply holds none of its control tokens."""
    style = STYLES["ChatML with BOS"]
    tokenizer = Tokenizer(write_folder(tmp_path, style))
    end = tokenizer.special_tokens["<|im_end|>"]
    prompt_end = ChatFormat(tokenizer).encode_dialog_prompt([{"role": "user", "content": "x"}])[-1]
    model = ScriptedModel(max_seq_len=400, vocab_size=1000)  # continues token n with n + 1
    model.vocab_size = (end - prompt_end) + prompt_end + 10
    llama = Llama(model, tokenizer)
    prediction = llama.chat_completion([[{"role": "user", "content": "x"}]], 0, logprobs=True)[0]
    assert "<|im_end|>" not in prediction["generation"]["content"]
    pieces = list(llama.chat_completion_stream([[{"role": "user", "content": "x"}]], 0))
    assert pieces[-1].ended == "stop"
    assert "".join(piece.text for piece in pieces) == prediction["generation"]["content"]


def test_json_of_the_template_is_read_as_it_stands(tmp_path):
    """A template in tokenizer_config.json may hold any character."""
    path = write_folder(tmp_path, STYLES["DeepSeek-R1-Distill"])
    assert (
        json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"] == Tokenizer(path).chat_template
    )


def test_damaged_templates_raise_our_exceptions(llama3):
    """Parts of the templates removed, doubled, and swapped for parts of others, or for characters that Jinja knows."""
    generator = random.Random(11)
    sources = [style.template for style in STYLES.values()]
    tokenizer = copy.copy(llama3)
    dialog = random_dialog(generator, 2)
    n_encoded = 0
    for _ in range(300):
        source = generator.choice(sources)
        for _ in range(generator.randrange(1, 4)):
            begin = generator.randrange(len(source))
            end = begin + generator.randrange(40)
            other = generator.choice(sources)
            cut = generator.randrange(len(other))
            part = generator.choice(
                ("", source[begin:end] * 2, other[cut : cut + 30], "{%", "%}", "{{", "'", "[", "|", ".")
            )
            source = source[:begin] + part + source[end:]
        tokenizer.chat_template = source
        try:
            tokens = ChatFormat(tokenizer).encode_dialog_prompt(dialog)
        except InputError:
            continue
        n_encoded += 1
        assert all(0 <= token < tokenizer.n_words for token in tokens)
    assert 0 < n_encoded < 300
