"""Chat prompts: a dialog in, the token ids that its model was trained on out.

The control tokens go in as ids, and what people write is always encoded as plain text, so that no message can begin a
turn of its own.
"""

from typing import cast

from llama.chat_template import ChatTemplate, TemplateTokenizer
from llama.dialog import Dialog, Message, Role, check_dialog
from llama.errors import InputError
from llama.protocols import TextTokenizer
from llama.segments import Segment, encode_continued

__all__ = ["ChatFormat", "Dialog", "Message", "Role", "Segment", "check_dialog", "encode_continued"]


class ChatFormat:
    """Turns a dialog into the prompt that asks for the assistant's next message.

    `ChatFormat(tokenizer)` gives the chat template that the model's files carry (`TemplateFormat`), or without one the
    format that the control tokens tell: `Llama3Format` if there is `<|start_header_id|>`, `ChatMLFormat` if there is
    `<|im_start|>`, and `Llama2Format` if the tokenizer is sentencepiece's or has no special tokens.

    Args:
        tokenizer: a `Tokenizer`, or anything with its `encode` and, but for Llama 2, `special_tokens`.

    Raises:
        InputError: the tokenizer has special tokens, but those of no known format.
        CheckpointError: the chat template is not valid, or hostile.
    """

    description: str  # for people: which format it is
    TOKENS: frozenset[str] = frozenset()  # the control tokens that it needs

    def __new__(cls, tokenizer: TextTokenizer | None = None) -> "ChatFormat":  # None: copy and pickle pass nothing
        if cls is ChatFormat:
            special = set(getattr(tokenizer, "special_tokens", None) or ())
            if getattr(tokenizer, "chat_template", None) is not None:
                cls = TemplateFormat
            elif special >= Llama3Format.TOKENS:
                cls = Llama3Format
            elif special >= ChatMLFormat.TOKENS:
                cls = ChatMLFormat
            elif not special or getattr(tokenizer, "vocabulary", special) is None:
                cls = Llama2Format
            else:
                raise InputError(
                    f"no chat format is known for this tokenizer: it has neither {sorted(Llama3Format.TOKENS)} nor "
                    f"{sorted(ChatMLFormat.TOKENS)}; pass a formatter to Llama(model, tokenizer, formatter=…)"
                )
        return super().__new__(cls)

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        self.special_tokens: dict[str, int] = getattr(tokenizer, "special_tokens", {})
        if missing := self.TOKENS - set(self.special_tokens):
            raise InputError(f"{self.description}'s chat format needs the special tokens {sorted(missing)}")

    def encode_header(self, message: Message) -> list[int]:
        """The tokens that begin a message: who speaks."""
        raise NotImplementedError(f"{type(self).__name__} has no headers")

    def encode_message(self, message: Message) -> list[int]:
        """The tokens of one whole message."""
        raise NotImplementedError(f"{type(self).__name__} encodes whole turns")

    def encode_dialog_prompt(self, dialog: Dialog) -> list[int]:
        """The tokens of a dialog, up to where the assistant's next message begins.

        Raises:
            InputError: an empty dialog, an unknown role, or an order of roles that the format can't express.
        """
        raise NotImplementedError(f"{type(self).__name__} has no encode_dialog_prompt")

    def encode_turns(self, dialog: Dialog) -> list[Segment]:
        """The tokens of a whole dialog, to learn from; before each answer stand those of the prompt so far."""
        raise NotImplementedError(f"{type(self).__name__} has no encode_turns, which training needs")

    def refusal(self, dialog: Dialog) -> str | None:
        """What to answer in the model's place, if the dialog can't be put to it."""
        return None

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, bos=False, eos=False)


class TemplateFormat(ChatFormat):
    """The chat template that the model's files carry."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        super().__init__(tokenizer)
        self.template = ChatTemplate(cast(TemplateTokenizer, tokenizer))
        self.description = f"the model's own template, from {self.template.origin}"

    def encode_dialog_prompt(self, dialog: Dialog) -> list[int]:
        check_dialog(dialog)
        return self.template.encode_prompt(dialog)

    def encode_turns(self, dialog: Dialog) -> list[Segment]:
        check_dialog(dialog)
        return self.template.encode_turns(dialog)


class Llama3Format(ChatFormat):
    """begin_of_text, then for each message: start_header role end_header, a blank line, the content, eot."""

    description = "Llama 3"
    TOKENS = frozenset({"<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"})

    def encode_header(self, message: Message) -> list[int]:
        start, end = self.special_tokens["<|start_header_id|>"], self.special_tokens["<|end_header_id|>"]
        return [start, *self._encode(message["role"]), end, *self._encode("\n\n")]

    def encode_message(self, message: Message) -> list[int]:
        content = self._encode(message["content"].strip())
        return [*self.encode_header(message), *content, self.special_tokens["<|eot_id|>"]]

    def encode_dialog_prompt(self, dialog: Dialog) -> list[int]:
        check_dialog(dialog)
        tokens = [self.special_tokens["<|begin_of_text|>"]]
        for message in dialog:
            tokens += self.encode_message(message)
        return tokens + self.encode_header({"role": "assistant", "content": ""})

    def encode_turns(self, dialog: Dialog) -> list[Segment]:
        check_dialog(dialog)
        segments = [Segment([self.special_tokens["<|begin_of_text|>"]], False)]
        for message in dialog:
            header = self.encode_header(message)
            content = self.encode_message(message)[len(header) :]  # with eot
            segments += [Segment(header, False), Segment(content, message["role"] == "assistant")]
        return segments


class ChatMLFormat(ChatFormat):
    """For each message: im_start, the role, a new line, the content, im_end, a new line."""

    description = "ChatML"
    TOKENS = frozenset({"<|im_start|>", "<|im_end|>"})

    def encode_header(self, message: Message) -> list[int]:
        return [self.special_tokens["<|im_start|>"], *self._encode(message["role"] + "\n")]

    def encode_message(self, message: Message) -> list[int]:
        # Role and content are one text: white space at the content's start may share a token with the new line.
        text = self._encode(message["role"] + "\n" + message["content"])
        return [self.special_tokens["<|im_start|>"], *text, self.special_tokens["<|im_end|>"], *self._encode("\n")]

    def encode_dialog_prompt(self, dialog: Dialog) -> list[int]:
        check_dialog(dialog)
        tokens: list[int] = []
        for message in dialog:
            tokens += self.encode_message(message)
        return tokens + self.encode_header({"role": "assistant", "content": ""})

    def encode_turns(self, dialog: Dialog) -> list[Segment]:
        check_dialog(dialog)
        segments: list[Segment] = []
        for message in dialog:
            if message["role"] == "assistant":  # the content on its own, as it will be generated after the header
                content = [*self._encode(message["content"]), self.special_tokens["<|im_end|>"]]
                segments += [Segment(self.encode_header(message), False), Segment(content, True)]
                segments.append(Segment(self._encode("\n"), False))
            else:
                segments.append(Segment(self.encode_message(message), False))
        return segments


class Llama2Format(ChatFormat):
    """Each answered turn on its own as `[INST] user [/INST] answer `, between BOS and EOS; then the last `[INST]`.

    A system message is put into the first user message.
    """

    description = "Llama 2"
    TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
    REFUSAL = "Error: special tags are not allowed as part of the prompt."

    def encode_dialog_prompt(self, dialog: Dialog) -> list[int]:
        *answered, last = self._turns(dialog)
        tokens: list[int] = []
        for user, answer in zip(answered[::2], answered[1::2], strict=True):
            tokens += self.tokenizer.encode(f"{user} {answer.strip()} ", bos=True, eos=True)
        return tokens + self.tokenizer.encode(last, bos=True, eos=False)

    def encode_turns(self, dialog: Dialog) -> list[Segment]:
        check_dialog(dialog)
        if dialog[-1]["role"] != "assistant":
            raise InputError("to be learned from, a dialog must end with what the assistant says")
        turns = [*self._turns(dialog[:-1]), dialog[-1]["content"]]
        segments: list[Segment] = []
        for user, answer in zip(turns[::2], turns[1::2], strict=True):
            tokens, answer_tokens = encode_continued(self.tokenizer, user, f" {answer.strip()} ", bos=True)
            eos = self.tokenizer.encode("", bos=False, eos=True)
            segments += [Segment(tokens, False), Segment(answer_tokens + eos, True)]
        return segments

    def _turns(self, dialog: Dialog) -> list[str]:
        """What the user asks, as `[INST] … [/INST]`, and the assistant answers, alternating."""
        check_dialog(dialog)
        roles = [message["role"] for message in dialog]
        turns = [message["content"] for message in dialog]
        if roles[0] == "system":
            system = turns.pop(0)
            turns[:1] = [f"<<SYS>>\n{system}\n<</SYS>>\n\n{user}" for user in turns[:1]]
        if roles[len(roles) - len(turns) :] != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
            raise InputError(
                f"roles {roles}: Llama 2 takes an optional system message, then user and assistant alternating, ending "
                f"with user"
            )
        turns[::2] = [f"[INST] {user.strip()} [/INST]" for user in turns[::2]]
        return turns

    def refusal(self, dialog: Dialog) -> str | None:
        normalize = getattr(getattr(self.tokenizer, "engine", None), "normalize", str)  # may make tags of other texts
        has_tags = any(normalize(tag) in normalize(message["content"]) for message in dialog for tag in self.TAGS)
        return self.REFUSAL if has_tags else None


FORMATS: dict[str, type[ChatFormat]] = {"llama2": Llama2Format, "llama3": Llama3Format, "chatml": ChatMLFormat}


def named_format(name: str) -> type[ChatFormat]:
    """The format of this name in `FORMATS`; InputError if there is none."""
    if name not in FORMATS:
        raise InputError(f"chat_format={name!r} must be one of {list(FORMATS)}; without it, the model's own is used")
    return FORMATS[name]
