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


class LikelyToken(TypedDict):
    """One of the likeliest tokens in the place of another."""

    token: str  # its text
    id: int
    logprob: float


class OptionalKeys(TypedDict, total=False):
    """What predictions have when it is asked for."""

    tokens: list[str]  # each token's text; like `logprobs`, with logprobs=True
    logprobs: list[float]
    top_logprobs: list[list[LikelyToken]]  # in each token's place, the likeliest first; none for a prompt's tokens
    score: float  # of an answer of beam search
    finish_reason: Literal["stop", "length"]  # like what follows, with details=True
    prompt_tokens: int
    completion_tokens: int
    proposed_tokens: int  # the last two with speculative decoding
    accepted_tokens: int


class CompletionPrediction(OptionalKeys):
    generation: str


class ChatPrediction(OptionalKeys):
    generation: Message
