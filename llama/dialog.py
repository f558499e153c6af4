"""Dialogs: lists of messages, each with the role of who speaks."""

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict, get_args

from llama.errors import InputError

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    """One turn: who speaks, and what."""

    role: Role
    content: str


Dialog = Sequence[Message]


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
            raise InputError(f"message {number}: unknown role {message['role']!r}; known: {list(get_args(Role))}")


class Details(TypedDict, total=False):
    """Optional keys of a prediction."""

    tokens: list[str]  # each token's text; like `logprobs`, with logprobs=True
    logprobs: list[float]
    score: float  # of an answer of beam search


class CompletionPrediction(Details):
    generation: str


class ChatPrediction(Details):
    generation: Message
