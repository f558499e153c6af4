"""The chat template that a model's files carry: a Jinja program that writes a dialog as the text it was trained on.

    dialog -> text, in which control tokens are spelled out -> token ids

It is rendered as Hugging Face's transformers renders it, and gives the same ids, but for one thing: whatever a message
says is plain text, even if it spells a control token. Before rendering, such a text is replaced by a character of
Unicode's private-use area, which no control token contains; it is put back after the rendered text has been cut at its
control tokens.
"""

import functools
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, Protocol

import jinja2
from jinja2.exceptions import SecurityError

from llama.dialog import Dialog
from llama.errors import CheckpointError, InputError
from llama.segments import Segment
from llama.template_sandbox import BUDGET, MAX_SOURCE, Budget, LimitError, TemplateEnvironment
from llama.vocab.added_tokens import AddedToken
from llama.vocab.vocabulary import without_surrogates

PRIVATE_USE = (range(0xF0000, 0xFFFFE), range(0xE000, 0xF900), range(0x100000, 0x10FFFE))

# Dialogs that show how a template writes an answer, whose content is the marker that stands for it here. A template
# that insists on another order of roles raises for some of them.
PROBES: tuple[tuple[tuple[str, str], ...], ...] = (
    (("user", "1"), ("assistant", "{}")),
    (("system", "1"), ("user", "2"), ("assistant", "{}")),
    (("user", "1"), ("assistant", "{}"), ("user", "2")),
)


class TemplateEngine(Protocol):
    """What a chat template needs of a tokenizer's engine: see `llama.vocab.BytePairTokenizer`."""

    added_tokens: tuple[AddedToken, ...]
    template_tokens: dict[str, str]
    chat_template_source: str | None

    def split(self, text: str, names: Literal["all"]) -> list[str | int]: ...

    def encode_parts(self, parts: Sequence[str | int], continued: bool = False) -> list[int]: ...


class TemplateTokenizer(Protocol):
    """A tokenizer with a chat template, as `llama.Tokenizer` is."""

    chat_template: str | None
    stop_tokens: set[int]
    eos_id: int

    @property
    def engine(self) -> TemplateEngine: ...


class HostileTemplateError(CheckpointError):
    """A template reaches for what it must not, or runs for too long."""


class ChatTemplate:
    """A model's chat template.

    Args:
        tokenizer: its `chat_template` is the template.

    Attributes:
        control_tokens: what no message can spell: every special token, and each other added token that the template
            itself writes around messages.
        end_of_turn: the token that the template writes after an answer, or None.

    Raises:
        CheckpointError: the template is not valid Jinja, or hostile.
    """

    def __init__(self, tokenizer: TemplateTokenizer) -> None:
        self.tokenizer, self.engine = tokenizer, tokenizer.engine
        self.source = tokenizer.chat_template or ""
        self.origin = self.engine.chat_template_source or "the program"
        self.compiled = compile_template(self.source, self.origin)
        before, after = self._around_an_answer()
        added_tokens = self.engine.added_tokens
        written = {part for part in self.engine.split(before + after, "all") if isinstance(part, int)}
        self.control_tokens = {token.content for token in added_tokens if token.special or token.id in written}
        end = leading_token(after, added_tokens)
        self.end_of_turn = None if end is None else end.id

    def _around_an_answer(self) -> tuple[str, str]:
        """What the template writes before and after the content of an answer; nothing where it refuses every probe."""
        marker = chr(PRIVATE_USE[0][0])
        for probe in PROBES:
            messages = [{"role": role, "content": content.format(marker)} for role, content in probe]
            try:
                before, _, after = self.render(messages, add_generation_prompt=False).partition(marker)
            except HostileTemplateError:
                raise
            except InputError:  # it will say so again when a dialog is encoded
                continue
            return before, after
        return "", ""

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        """The text of a dialog, in which control tokens are spelled out.

        Args:
            messages: each with `role` and `content`.
            add_generation_prompt: whether the beginning of the assistant's next message follows.

        Raises:
            InputError: the template refuses the dialog; the message has its words.
            CheckpointError: the template fails, or is hostile.
        """
        budget = Budget(len(self.source), sum(len(message["content"]) for message in messages))
        variables = {
            **self.engine.template_tokens,
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            BUDGET: budget,
        }
        chunks = []
        try:
            for chunk in self.compiled.generate(variables):
                budget.check_values(chunk)
                chunks.append(chunk)
        except (SecurityError, LimitError, MemoryError, RecursionError) as error:
            raise HostileTemplateError(f"{self.origin}: the chat template is stopped: {error}") from error
        except Exception as error:  # a template can raise anything
            if type(error) is jinja2.TemplateError:  # by its own raise_exception
                raise InputError(f"the model's chat template refuses the dialog: {error}") from error
            raise CheckpointError(
                f"{self.origin}: the chat template fails: {type(error).__name__}: {error!s:.300}"
            ) from error
        return "".join(chunks)

    def encode_prompt(self, dialog: Dialog) -> list[int]:
        """The tokens of a dialog, up to where the assistant's next message begins.

        Raises:
            InputError, CheckpointError: see `render`.
        """
        hidden = HiddenTexts(self.source, dialog)
        text = self.render(self._hide(dialog, hidden), add_generation_prompt=True)
        return self._encode([text], hidden)[0]

    def encode_turns(self, dialog: Dialog) -> list[Segment]:
        """The tokens of a whole dialog, to learn from: see `ChatFormat.encode_turns`.

        An answer begins where the prompt for it ends, and goes on to the token that ends the turn. Some templates
        shorten the answers of earlier turns, which are then learned as they stand there; the last one is kept whole.

        Raises:
            InputError, CheckpointError: see `render`; or the template doesn't write the last answer.
        """
        hidden = HiddenTexts(self.source, dialog)
        messages = self._hide(dialog, hidden)
        marker = hidden.next_character()
        text = self.render(messages, add_generation_prompt=False)
        answers: list[tuple[int, int]] = []  # where in the text each learned part begins and ends
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.render(messages[:number], add_generation_prompt=True)
            marked = [*messages[:number], {**message, "content": marker}, *messages[number + 1 :]]
            before, found, after = self.render(marked, add_generation_prompt=False).partition(marker)
            content = text[len(before) : len(text) - len(after)]
            is_last = number == len(messages) - 1
            if not found or before + content + after != text:
                if is_last:
                    raise InputError(f"{self.origin}: the chat template doesn't write the assistant's last message")
                continue
            if is_last:
                if content.strip() != message["content"].strip():
                    content = message["content"]
                beginning = before + content if (before + content).startswith(prompt) else prompt + content
                answers = [(begin, end) for begin, end in answers if beginning[:end] == text[:end]]
                text = beginning + after
            begin = len(prompt) if text.startswith(prompt) else len(before)
            end = len(text) - len(after)
            end_token = leading_token(after, self.engine.added_tokens)
            if end_token is not None and end_token.id in self.tokenizer.stop_tokens:
                end += after.index(end_token.content) + len(end_token.content)
            answers.append((begin, end))
        cuts = [0, *itertools.chain(*answers), len(text)]
        encoded = self._encode([text[begin:end] for begin, end in itertools.pairwise(cuts)], hidden)
        segments = [Segment(tokens, i % 2 == 1) for i, tokens in enumerate(encoded)]
        if messages[-1]["role"] == "assistant" and segments[-2].tokens[-1] not in self.tokenizer.stop_tokens:
            segments[-2].tokens.append(self.tokenizer.eos_id)  # the template writes nothing that ends an answer
        return segments

    def _hide(self, dialog: Dialog, hidden: "HiddenTexts") -> list[dict[str, str]]:
        return [
            {
                "role": message["role"],
                "content": hidden.hide(without_surrogates(message["content"]), self.control_tokens),
            }
            for message in dialog
        ]

    def _encode(self, texts: list[str], hidden: "HiddenTexts") -> list[list[int]]:
        """The tokens of each of the successive parts of a rendered text."""
        encoded: list[list[int]] = []
        context: list[int] = []  # the token that the text so far ends with, if it doesn't end with ordinary text
        continued = False
        for text in texts:
            split = self.engine.split(text, "all")
            parts = [hidden.restore(part) if isinstance(part, str) else part for part in split if part != ""]
            encoded.append(self.engine.encode_parts([*context, *parts], continued)[len(context) :])
            if parts:
                context = [part for part in parts[-1:] if isinstance(part, int)]
                continued = True
        return encoded


def end_of_turn(tokenizer: TemplateTokenizer) -> set[int]:
    """The token that a tokenizer's chat template writes after an answer, if there is a template, and it does so.

    An invalid template is no error here, but where a dialog is encoded: texts can still be completed.
    """
    if tokenizer.chat_template is None:
        return set()
    try:
        end = ChatTemplate(tokenizer).end_of_turn
    except CheckpointError:
        return set()
    return set() if end is None else {end}


@functools.lru_cache(maxsize=8)
def compile_template(source: str, origin: str) -> jinja2.Template:
    """Compile a chat template; CheckpointError if it is no valid one, naming `origin`."""
    if len(source) > MAX_SOURCE:
        raise CheckpointError(f"{origin}: the chat template has {len(source)} characters, more than {MAX_SOURCE}")
    try:
        return template_environment().from_string(source)
    except Exception as error:  # Jinja and Python's compiler raise many kinds
        line = getattr(error, "lineno", None)
        where = "" if line is None else f", line {line}"
        raise CheckpointError(
            f"{origin}: the chat template is not valid Jinja{where}: {type(error).__name__}: {error!s:.300}"
        ) from error


@functools.cache
def template_environment() -> TemplateEnvironment:
    return TemplateEnvironment()


def leading_token(text: str, added_tokens: Iterable[AddedToken]) -> AddedToken | None:
    """The added token that a text begins with, white space aside, or None."""
    start = text.lstrip()
    tokens = [token for token in added_tokens if start.startswith(token.content)]
    return max(tokens, key=lambda token: len(token.content), default=None)


class HiddenTexts:
    """Texts that are replaced by private-use characters, each different text by one of its own, and put back later.

    Args:
        source: the chat template, and `dialog`: characters that occur in one of them are not used.
    """

    def __init__(self, source: str, dialog: Dialog) -> None:
        used = set(source).union(*(message["content"] for message in dialog))
        self._free = (c for c in map(chr, itertools.chain(*PRIVATE_USE)) if c not in used)
        self._characters: dict[str, str] = {}

    def next_character(self) -> str:
        """A character that stands for nothing yet."""
        character = next(self._free, None)
        if character is None:
            raise InputError("the dialog uses every private-use character of Unicode; leave some of them out")
        return character

    def hide(self, text: str, control_tokens: Iterable[str]) -> str:
        """Replace the control tokens in a message, and the parts of them that it begins and ends with.

        Such a part could become a whole token with what the template, or the next message, puts beside it.
        """
        whole, starts, ends = control_token_parts(frozenset(control_tokens))
        text = whole.sub(lambda match: self._character(match[0]), text)
        content = text.strip()  # which is what many templates take of it
        position, length = text.index(content), len(content)
        lengths = range(min(length, max(map(len, control_tokens), default=0)), 0, -1)
        head = next((content[:n] for n in lengths if content[:n] in ends), "")
        middle = content[len(head) :]
        tail = next((middle[-n:] for n in lengths if middle[-n:] in starts), "")
        middle = middle[: len(middle) - len(tail)]
        content = self._character(head) + middle + self._character(tail)
        return text[:position] + content + text[position + length :]

    def _character(self, text: str) -> str:
        """The character that stands for a text; nothing stands for none."""
        if text and text not in self._characters:
            self._characters[text] = self.next_character()
        return self._characters.get(text, "")

    def restore(self, text: str) -> str:
        """Put the texts back in which `hide` has replaced."""
        return text.translate({ord(character): hidden for hidden, character in self._characters.items()})


@functools.lru_cache(maxsize=8)
def control_token_parts(names: frozenset[str]) -> tuple[re.Pattern[str], frozenset[str], frozenset[str]]:
    """A pattern that matches each of these tokens, and all that they begin and end with, without the whole tokens."""
    pattern = "|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)"
    starts = frozenset(name[:cut] for name in names for cut in range(1, len(name)))
    ends = frozenset(name[cut:] for name in names for cut in range(1, len(name)))
    return re.compile(pattern), starts, ends
