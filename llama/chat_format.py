"""Chat prompts: a dialog in, the token ids that its model was trained on out.

The control tokens go in as ids, and what people write is always encoded as plain text, so that no message can open a
turn of its own.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypedDict, get_args

from llama.errors import InputError

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    """One turn: who speaks, and what."""

    role: Role
    content: str


Dialog = Sequence[Message]


class Segment(NamedTuple):
    """Tokens of a dialog that follow each other."""

    tokens: list[int]
    from_assistant: bool


class ChatFormat:
    """Turns a dialog into the prompt that asks for the assistant's next message.

    `ChatFormat(tokenizer)` gives the format of the tokenizer's model: `Llama3Format` if it has
    `<|start_header_id|>`, `ChatMLFormat` if it has `<|im_start|>`, and `Llama2Format` if it has no special tokens.

    Args:
        tokenizer: a `Tokenizer`, or anything with its `encode` and, but for Llama 2, `special_tokens`.

    Raises:
        InputError: the tokenizer has special tokens, but those of no known format.
    """

    def __new__(cls, tokenizer: Any = None) -> "ChatFormat":  # None: a copy is being made
        if cls is ChatFormat:
            special = getattr(tokenizer, "special_tokens", None)
            if not special:
                cls = Llama2Format
            elif set(special) >= Llama3Format.TOKENS:
                cls = Llama3Format
            elif "<|im_start|>" in special:
                cls = ChatMLFormat
            else:
                raise InputError(
                    "no chat format is known for this tokenizer: it has neither <|start_header_id|> nor <|im_start|>, "
                    "with all that belongs to them; pass a formatter to Llama(model, tokenizer, formatter=…)"
                )
        return super().__new__(cls)

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def encode_header(self, message: Message) -> list[int]:
        """The tokens that open a message: who speaks."""
        raise NotImplementedError(f"{type(self).__name__} has no headers")

    def encode_message(self, message: Message) -> list[int]:
        """The tokens of one whole message."""
        raise NotImplementedError(f"{type(self).__name__} encodes whole turns")

    def encode_dialog_prompt(self, dialog: Dialog) -> list[int]:
        """The tokens of a dialog, up to where the assistant's next message begins.

        Raises:
            InputError: an empty dialog, an unknown role, or an order of roles that the format can't express.
        """
        raise NotImplementedError

    def encode_turns(self, dialog: Dialog) -> list[Segment]:
        """The tokens of a whole dialog, in segments, with what the assistant says told apart: to learn from.

        What the assistant says is the content of its messages, and the token that ends each. What stands before the
        first is what `encode_dialog_prompt` gives for the dialog so far, so that learning and answering see the same.

        Raises:
            InputError: as `encode_dialog_prompt`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no encode_turns, which training needs")

    def refusal(self, dialog: Dialog) -> str | None:
        """What to answer in place of the model, if the dialog can't be put to it."""
        return None

    def _text(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, bos=False, eos=False)


class Llama3Format(ChatFormat):
    """begin_of_text, then for each message: start_header role end_header, a blank line, the content, eot."""

    TOKENS = frozenset({"<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"})

    def encode_header(self, message: Message) -> list[int]:
        special = self.tokenizer.special_tokens
        role = self._text(message["role"])
        return [special["<|start_header_id|>"], *role, special["<|end_header_id|>"], *self._text("\n\n")]

    def encode_message(self, message: Message) -> list[int]:
        content = self._text(message["content"].strip())
        return [*self.encode_header(message), *content, self.tokenizer.special_tokens["<|eot_id|>"]]

    def encode_dialog_prompt(self, dialog: Dialog) -> list[int]:
        check_dialog(dialog)
        ids = [self.tokenizer.special_tokens["<|begin_of_text|>"]]
        for message in dialog:
            ids += self.encode_message(message)
        return ids + self.encode_header({"role": "assistant", "content": ""})

    def encode_turns(self, dialog: Dialog) -> list[Segment]:
        check_dialog(dialog)
        segments = [Segment([self.tokenizer.special_tokens["<|begin_of_text|>"]], False)]
        for message in dialog:
            header = self.encode_header(message)
            content = self.encode_message(message)[len(header) :]  # with eot
            segments += [Segment(header, False), Segment(content, message["role"] == "assistant")]
        return segments


class ChatMLFormat(ChatFormat):
    """For each message: im_start, the role, a new line, the content, im_end, a new line.

    A dialog without a system message gets the one that the file's chat template gives it, if any.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        default = re.search(
            r"\[0\]\['role'\] != 'system'.*?<\|im_start\|>system(?:\n|\\n)(.*?)<\|im_end\|>",
            getattr(tokenizer, "chat_template", None) or "",
            re.DOTALL,
        )
        self.default_system = default[1] if default else None

    def encode_header(self, message: Message) -> list[int]:
        return [self.tokenizer.special_tokens["<|im_start|>"], *self._text(message["role"] + "\n")]

    def encode_message(self, message: Message) -> list[int]:
        special = self.tokenizer.special_tokens
        # Role and content are one text: white space at the content's start may share a token with the new line.
        text = self._text(message["role"] + "\n" + message["content"])
        return [special["<|im_start|>"], *text, special["<|im_end|>"], *self._text("\n")]

    def encode_dialog_prompt(self, dialog: Dialog) -> list[int]:
        check_dialog(dialog)
        ids: list[int] = []
        for message in [*self._before(dialog), *dialog]:
            ids += self.encode_message(message)
        return ids + self.encode_header({"role": "assistant", "content": ""})

    def encode_turns(self, dialog: Dialog) -> list[Segment]:
        check_dialog(dialog)
        segments: list[Segment] = []
        for message in [*self._before(dialog), *dialog]:
            if message["role"] == "assistant":  # the content on its own, as it will be generated after the header
                content = [*self._text(message["content"]), self.tokenizer.special_tokens["<|im_end|>"]]
                segments += [Segment(self.encode_header(message), False), Segment(content, True)]
                segments.append(Segment(self._text("\n"), False))
            else:
                segments.append(Segment(self.encode_message(message), False))
        return segments

    def _before(self, dialog: Dialog) -> list[Message]:
        """What is said before a dialog begins."""
        if self.default_system is None or dialog[0]["role"] == "system":
            return []
        return [{"role": "system", "content": self.default_system}]


class Llama2Format(ChatFormat):
    """Each answered turn on its own as `[INST] user [/INST] answer `, between BOS and EOS; then the open `[INST]`.

    A system message is folded into the first user message.
    """

    TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
    REFUSAL = "Error: special tags are not allowed as part of the prompt."

    def encode_dialog_prompt(self, dialog: Dialog) -> list[int]:
        turns = self._turns(dialog)
        ids: list[int] = []
        for user, answer in zip(turns[:-1:2], turns[1::2], strict=True):
            ids += self.tokenizer.encode(f"{self._asked(user)} {answer.strip()} ", bos=True, eos=True)
        return ids + self.tokenizer.encode(self._asked(turns[-1]), bos=True, eos=False)

    def encode_turns(self, dialog: Dialog) -> list[Segment]:
        check_dialog(dialog)
        if dialog[-1]["role"] != "assistant":
            raise InputError("to be learned from, a dialog must end with what the assistant says")
        turns = [*self._turns(dialog[:-1]), dialog[-1]["content"]]
        segments: list[Segment] = []
        for user, answer in zip(turns[::2], turns[1::2], strict=True):
            ids, answer_ids = encode_continued(self.tokenizer, self._asked(user), f" {answer.strip()} ", bos=True)
            segments += [Segment(ids, False), Segment([*answer_ids, self.tokenizer.eos_id], True)]
        return segments

    def _asked(self, user: str) -> str:
        return f"[INST] {user.strip()} [/INST]"

    def _turns(self, dialog: Dialog) -> list[str]:
        """What user and assistant say by turns, the system message folded into the first."""
        check_dialog(dialog)
        roles = [message["role"] for message in dialog]
        turns = [message["content"] for message in dialog]
        if roles[0] == "system":
            roles, system = roles[1:], turns.pop(0)
            turns[:1] = [f"<<SYS>>\n{system}\n<</SYS>>\n\n{user}" for user in turns[:1]]
        if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
            raise InputError(
                f"roles {[message['role'] for message in dialog]}: Llama 2 takes an optional system message, then user "
                f"and assistant by turns, ending with user"
            )
        return turns

    def refusal(self, dialog: Dialog) -> str | None:
        unsafe = any(tag in message["content"] for message in dialog for tag in self.TAGS)
        return self.REFUSAL if unsafe else None


def encode_continued(tokenizer: Any, text: str, continuation: str, *, bos: bool) -> tuple[list[int], list[int]]:
    """The tokens of a text, and those of what follows it.

    The first are those of the text alone, which is what generation starts from. Where they begin the tokens of both
    together, the second are the rest of those: sentencepiece would put a space of its own before any other text.
    """
    ids = tokenizer.encode(text, bos=bos, eos=False)
    whole = tokenizer.encode(text + continuation, bos=bos, eos=False)
    if whole[: len(ids)] == ids:
        return ids, whole[len(ids) :]
    return ids, tokenizer.encode(continuation, bos=False, eos=False)


def check_dialog(dialog: Dialog) -> None:
    """Raise InputError if `dialog` is no list of messages with known roles and text."""
    if isinstance(dialog, str | Mapping) or not isinstance(dialog, Sequence):
        raise InputError(f"a dialog is a list of messages, not {dialog!r:.80}; chat_completion takes a list of dialogs")
    if not dialog:
        raise InputError("an empty dialog: it needs at least one message")
    for number, message in enumerate(dialog):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str) or "role" not in message:
            raise InputError(f"message {number}, {message!r:.80}, must be {{'role': …, 'content': text}}")
        if message["role"] not in get_args(Role):
            raise InputError(
                f"message {number}: unknown role {message['role']!r}; the roles are {list(get_args(Role))}"
            )
