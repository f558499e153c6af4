"""The chat template that a model's files carry: a Jinja program that writes a dialog as the text it was trained on.

    dialog -> text, in which control tokens are spelled out -> token ids

It is rendered as Hugging Face's transformers renders it, and gives the same ids, but for one thing: whatever a message
says is plain text, even if it spells a control token. Before rendering, such a text is replaced by a character of
Unicode's private-use area, which no control token contains; it is put back after the rendered text has been cut at its
control tokens.
"""

import functools
import itertools
import json
import re
from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence
from typing import Literal, NamedTuple, Protocol

from llama.dialog import Dialog
from llama.errors import CheckpointError, InputError
from llama.segments import Segment
from llama.template_process import HostileTemplateError, render
from llama.vocab.added_tokens import AddedToken
from llama.vocab.vocabulary import without_surrogates

Messages = list[dict[str, str]]

PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))

QUOTED = r"""['"]([^'"]*)['"]"""  # a text in a template

# Dialogs that show what a template writes around messages; "{}" is where the marker of an answer stands. A template
# that insists on another order of roles raises for some of them.
ENDING_WITH_AN_ANSWER = ((("user", "1"), ("assistant", "{}")), (("system", "1"), ("user", "2"), ("assistant", "{}")))
ENDING_WITH_A_QUESTION = tuple((*probe, ("user", "3")) for probe in ENDING_WITH_AN_ANSWER)


class TemplateEngine(Protocol):
    """What a chat template needs of a tokenizer's engine: see `llama.vocab.BytePairTokenizer`."""

    added_tokens: tuple[AddedToken, ...]
    template_tokens: dict[str, str]
    chat_template_source: str | None

    def split(self, text: str, names: Literal["all"] | Collection[str]) -> list[str | int]: ...

    def encode_parts(self, parts: Sequence[str | int], continued: bool = False) -> list[int]: ...


class TemplateTokenizer(Protocol):
    """A tokenizer with a chat template, as `llama.Tokenizer` is."""

    chat_template: str | None
    stop_tokens: set[int]
    eos_id: int

    @property
    def engine(self) -> TemplateEngine: ...


class ChatTemplate:
    """A model's chat template.

    Args:
        tokenizer: its `chat_template` is the template.

    Attributes:
        control_tokens: what no message can spell; see the function of this name.
        end_of_turn: the token that the template writes after an answer, or None.

    Raises:
        InputError: the tokenizer has a template, but not what is needed to encode what that writes.
        CheckpointError: the template is not valid Jinja, or hostile.
    """

    def __init__(self, tokenizer: TemplateTokenizer) -> None:
        if not hasattr(tokenizer, "engine"):
            raise InputError(
                f"{type(tokenizer).__name__} has a chat_template, but is no llama.Tokenizer: pass a formatter to "
                f"Llama(model, tokenizer, formatter=…)"
            )
        if not isinstance(tokenizer.chat_template, str):
            raise InputError(f"chat_template is {tokenizer.chat_template!r:.80}, not a text")
        self.tokenizer, self.engine = tokenizer, tokenizer.engine
        self.source = tokenizer.chat_template
        self.origin = self.engine.chat_template_source or "the program"
        self._reserved = self.source + "".join(token.content for token in self.engine.added_tokens)
        self._render([])  # raises if it isn't valid Jinja
        written = "".join(self._around_an_answer(ENDING_WITH_A_QUESTION))
        self.control_tokens = control_tokens(self.engine, self.source, written)
        afters = self._around_an_answer(ENDING_WITH_AN_ANSWER)[1::2]
        ends = filter(None, (leading_token(after, self.engine.added_tokens) for after in afters))
        self.end_of_turn = next((token.id for token in ends), None)

    def _around_an_answer(self, probes: Iterable[tuple[tuple[str, str], ...]]) -> list[str]:
        """What the template writes before an answer's content, and after it, for each probe that it doesn't refuse."""
        marker = HiddenTexts(self._reserved, []).next_character()
        texts = []
        for probe in probes:
            messages = [{"role": role, "content": content.format(marker)} for role, content in probe]
            try:
                (text,) = self._render([(messages, False)])
            except HostileTemplateError:
                raise
            except InputError:  # it will say so again when a dialog is encoded
                continue
            before, _, after = text.partition(marker)
            texts += [before, after]
        return texts

    def _render(self, dialogs: Sequence[tuple[Messages, bool]]) -> list[str]:
        """The text of each dialog, in which control tokens are spelled out.

        Args:
            dialogs: the messages, and whether the beginning of the assistant's next message follows them.

        Raises:
            InputError, CheckpointError: see `llama.template_process.render`.
        """
        variables = {"tools": None, "documents": None, **self.engine.template_tokens}
        renderings = [
            variables | {"messages": messages, "add_generation_prompt": add_generation_prompt}
            for messages, add_generation_prompt in dialogs
        ]
        return [without_surrogates(text) for text in render(self.source, self.origin, renderings)]

    def encode_prompt(self, dialog: Dialog) -> list[int]:
        """The tokens of a dialog, up to where the assistant's next message begins.

        Raises:
            InputError: the template refuses the dialog; the message has its words.
            CheckpointError: the template fails, or is hostile.
        """
        hidden = HiddenTexts(self._reserved, dialog)
        (text,) = self._render([(self._hide(dialog, hidden, True), True)])
        return self._encode([text], hidden)[0]

    def encode_turns(self, dialog: Dialog) -> list[Segment]:
        """The tokens of a whole dialog, to learn from: see `ChatFormat.encode_turns`.

        An answer begins where the prompt for it ends, and goes on to the token that ends the turn. Some templates
        shorten the answers of earlier turns, which are then learned as they stand there, while the last one is kept
        whole. An earlier answer is not learned where the template writes something else before it than the prompt.

        Raises:
            InputError, CheckpointError: see `encode_prompt`; or the template doesn't write the last answer.
        """
        hidden = HiddenTexts(self._reserved, dialog)
        messages = self._hide(dialog, hidden, add_generation_prompt=False)
        marker = hidden.next_character()
        (text,) = self._render([(messages, False)])
        learned: list[tuple[int, int]] = []  # where in the text each answer to be learned begins and ends
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = self._around_message(messages, number, marker)
            # No prompt asks for the first message of a dialog.
            (prompt,) = self._render([(messages[:number], True)]) if number else [before]
            if number == len(messages) - 1:
                whole_text = self._with_whole_answer(text, before, after, message["content"], prompt)
                learned = [(begin, end) for begin, end in learned if whole_text[:end] == text[:end]]
                text = whole_text
            end = len(text) - len(after)
            is_preceded_by_prompt = text.startswith(prompt) and len(prompt) <= end
            is_where_marker_is = text.startswith(before) and text.endswith(after) and len(before) <= end
            begins_later = not learned or len(prompt) >= learned[-1][1]
            if number == len(messages) - 1 or (is_preceded_by_prompt and is_where_marker_is and begins_later):
                learned.append((len(prompt), end + self._end_length(after)))
        cuts = [0, *itertools.chain(*learned), len(text)]
        encoded = self._encode([text[begin:end] for begin, end in itertools.pairwise(cuts)], hidden)
        segments = [Segment(tokens, i % 2 == 1) for i, tokens in enumerate(encoded)]
        if messages[-1]["role"] == "assistant":
            last = segments[-2].tokens
            if not self.tokenizer.stop_tokens.intersection(last[-1:]):
                last.append(self.tokenizer.eos_id)  # the template writes nothing that ends an answer
        return segments

    def _around_message(self, messages: Messages, number: int, marker: str) -> tuple[str, str]:
        """What the template writes before and after the content of a message, for which the marker stands here."""
        marked = [*messages[:number], {**messages[number], "content": marker}, *messages[number + 1 :]]
        (text,) = self._render([(marked, False)])
        before, written, after = text.partition(marker)
        if not written and number == len(messages) - 1:
            raise InputError(f"{self.origin}: the chat template doesn't write the assistant's last message")
        return before, after

    def _with_whole_answer(self, text: str, before: str, after: str, content: str, prompt: str) -> str:
        """The text of a dialog, with the whole content of its last answer, right after the prompt for that.

        Args:
            text: the text as the template writes it; it may shorten the answer.
            before, after: what it writes around that, if the marker stands for its content.
            content: the content.
            prompt: what asks for the answer; it may already begin it, such as with `<think>`.
        """
        written = text[len(before) : len(text) - len(after)]
        if before + written + after != text:  # the template writes something else around this content
            return prompt + content + after
        if written.strip() == content.strip():  # it has trimmed it, as it does with all
            content = written
        return (before + content if (before + content).startswith(prompt) else prompt + content) + after

    def _end_length(self, after: str) -> int:
        """How much of what follows an answer ends it: up to a stop token, if that comes first, white space aside."""
        token = leading_token(after, self.engine.added_tokens)
        if token is None or token.id not in self.tokenizer.stop_tokens:
            return 0
        end = after.index(token.content) + len(token.content)
        rest = after[end:]
        return end + (len(rest) - len(rest.lstrip()) if token.rstrip else 0)

    def _hide(self, dialog: Dialog, hidden: "HiddenTexts", add_generation_prompt: bool) -> Messages:
        """The messages of a dialog, with private-use characters in place of control tokens.

        A template may still make control tokens of what is left of a message, for instance by removing a part of it.
        Then other control tokens come out than if more of the messages is hidden, and so it is.

        Args:
            dialog: the dialog.
            hidden: remembers what the characters stand for.
            add_generation_prompt: how the template is rendered to find that out.
        """
        contents = [without_surrogates(message["content"]) for message in dialog]
        contents = [hidden.hide(content, self.control_tokens) for content in contents]
        strictly = [hidden.hide_strictly(content, self.control_tokens) for content in contents]
        roles = [message["role"] for message in dialog]
        messages, stricter = (
            [{"role": role, "content": content} for role, content in zip(roles, texts, strict=True)]
            for texts in (contents, strictly)
        )
        if contents == strictly:
            return messages
        texts = self._render([(messages, add_generation_prompt), (stricter, add_generation_prompt)])
        ids, safe_ids = (
            [part for part in self.engine.split(text, self.control_tokens) if isinstance(part, int)] for text in texts
        )
        return messages if ids == safe_ids else stricter

    def _encode(self, texts: list[str], hidden: "HiddenTexts") -> list[list[int]]:
        """The tokens of each of the successive parts of a rendered text."""
        encoded: list[list[int]] = []
        # The token that the text so far ends with, if it ends with one: sentencepiece may put a space after it.
        context: list[int] = []
        continued = False
        for text in texts:
            parts = [hidden.restore(part) if isinstance(part, str) else part for part in self.engine.split(text, "all")]
            encoded.append(self.engine.encode_parts([*context, *parts], continued)[len(context) :])
            if parts:
                context = [part for part in parts[-1:] if isinstance(part, int)]
                continued = True
        return encoded


def end_of_turn(tokenizer: TemplateTokenizer) -> set[int]:
    """The token that a tokenizer's chat template writes after an answer, if there is a template, and it does so.

    An invalid template, or a process that can't be started, is an error where a dialog is encoded, not here: texts can
    still be completed.
    """
    if tokenizer.chat_template is None:
        return set()
    try:
        end = ChatTemplate(tokenizer).end_of_turn
    except (CheckpointError, OSError):
        return set()
    return set() if end is None else {end}


def control_tokens(engine: TemplateEngine, source: str, written: str) -> frozenset[str]:
    """The tokens that no message can spell: all special ones, and others that the template writes by itself.

    Not those that the template searches messages for, such as the end of thoughts, which begin no turn.

    Args:
        engine: has the added tokens.
        source: the template.
        written: what it writes around messages.
    """
    ids = {part for part in engine.split(written, "all") if isinstance(part, int)}
    calls, comparisons = re.findall(rf"\.\w+\(\s*{QUOTED}", source), re.findall(rf"{QUOTED}\s+(?:not\s+)?in\b", source)
    searched_for = "\n".join(calls + comparisons)

    def is_control_token(token: AddedToken) -> bool:
        if token.special or not (token.id in ids or token.content in source):
            return token.special
        closing = token.content.replace("<", "</", 1)  # `<think>` is searched for where `</think>` is
        return token.content not in searched_for and closing not in searched_for

    return frozenset(
        token.content for token in engine.added_tokens if token.content.strip() and is_control_token(token)
    )


def leading_token(text: str, added_tokens: Iterable[AddedToken]) -> AddedToken | None:
    """The added token that a text begins with, white space aside, or None."""
    start = text.lstrip()
    tokens = [token for token in added_tokens if start.startswith(token.content)]
    return max(tokens, key=lambda token: len(token.content), default=None)


class HiddenTexts:
    """Texts that are replaced by private-use characters, each different text by one of its own, and put back later.

    Args:
        reserved: characters that are not used, besides those in the dialog.
        dialog: the dialog.
    """

    def __init__(self, reserved: str, dialog: Dialog) -> None:
        self._used = "".join([reserved, *(message["content"] for message in dialog)])
        used = set(self._used)
        self._free = (c for c in map(chr, itertools.chain(*PRIVATE_USE)) if c not in used)
        self._characters: dict[str, str] = {"": ""}

    def next_character(self) -> str:
        """A character that stands for nothing yet."""
        for character in self._free:
            if json_escape(character) not in self._used:
                return character
        raise InputError("the dialog uses every private-use character of Unicode; leave some of them out")

    def hide(self, text: str, control_tokens: frozenset[str]) -> str:
        """Replace the control tokens in a message, and the parts of them that it begins and ends with.

        Such a part could become a whole token with what the template, or the next message, puts beside it.
        """
        tokens = sorted_tokens(control_tokens)
        text = tokens.pattern.sub(lambda match: self._character(match[0]), text)
        content = text.strip()  # which is what many templates take of it
        start = text.index(content)
        lengths = range(min(len(content), tokens.max_length), 0, -1)
        head = next((content[:n] for n in lengths if begins_another(content[:n][::-1], tokens.reversed)), "")
        middle = content[len(head) :]
        tail = next((middle[-n:] for n in lengths if begins_another(middle[-n:], tokens.names)), "")
        middle = middle[: len(middle) - len(tail)]
        content_length = len(content)
        content = self._character(head) + middle + self._character(tail)
        return text[:start] + content + text[start + content_length :]

    def hide_strictly(self, text: str, control_tokens: frozenset[str]) -> str:
        """Replace every character that a control token begins with, and a whole message that stands within one."""
        if text.strip() and any(text.strip() in name for name in control_tokens):
            return self._character(text)
        first_characters = {name[0] for name in control_tokens}
        return text.translate({ord(character): self._character(character) for character in first_characters})

    def _character(self, text: str) -> str:
        """The character that stands for a text; nothing stands for none."""
        if text not in self._characters:
            self._characters[text] = self.next_character()
        return self._characters[text]

    def restore(self, text: str) -> str:
        """Put the replaced texts back, also where a template has written their characters as JSON."""
        texts = {character: text for text, character in self._characters.items() if character}
        texts |= {json_escape(character): text for character, text in texts.items()}
        return re.sub("|".join(map(re.escape, texts)), lambda match: texts[match[0]], text) if texts else text


def json_escape(character: str) -> str:
    """How a character is written in JSON that is ASCII."""
    return json.dumps(character)[1:-1]


class SortedTokens(NamedTuple):
    """Control tokens as they are searched for.

    Attributes:
        pattern: matches each of them, the longest first.
        names: themselves, sorted.
        reversed: each from its last character to its first, sorted.
        max_length: of the longest, in characters.
    """

    pattern: re.Pattern[str]
    names: list[str]
    reversed: list[str]
    max_length: int


@functools.lru_cache(maxsize=8)
def sorted_tokens(names: frozenset[str]) -> SortedTokens:
    """Control tokens as they are searched for."""
    longest_first = sorted(names, key=len, reverse=True)
    return SortedTokens(
        re.compile("|".join(map(re.escape, longest_first)) or "(?!)"),
        sorted(names),
        sorted(name[::-1] for name in names),
        len(longest_first[0]) if longest_first else 0,
    )


def begins_another(part: str, names: list[str]) -> bool:
    """Whether one of the sorted names begins with `part`, and goes on."""
    position = bisect_right(names, part)
    return position < len(names) and names[position].startswith(part)
