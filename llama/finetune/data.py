"""Data: lines of JSON in, sequences of token ids out, each with a mask of the tokens that are to be learned.

A sequence is a whole dialog, just as the model would see it: the prompt, and what the assistant says, up to the token
that ends its turn. Only what the assistant says is learned. The prompt is read, but nobody wants the model to learn to
ask the questions.

    <|im_start|> user \n What is 2 + 2 ? <|im_end|> \n <|im_start|> assistant \n Four . <|im_end|>
         -        -   -   -   -  - - - -      -      -       -         -       -   x   x      x
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llama.chat_format import ChatFormat, Segment, encode_continued
from llama.errors import InputError
from llama.files import require_path
from llama.tokenizer import Tokenizer

SHOWN = 10  # bad lines that an error message tells


class Example(NamedTuple):
    """One line of the data."""

    line: int  # of the file, from 1
    tokens: list[int]
    learned: list[bool]  # of each token, whether the assistant says it
    cut: int = 0  # tokens of the prompt that are missing, for want of room

    @property
    def n_learned(self) -> int:
        """How many of its tokens are learned."""
        return sum(self.learned)


class Batch(NamedTuple):
    """Examples that pass through the network together."""

    tokens: torch.Tensor  # (batch, seq) int64
    targets: torch.Tensor  # (batch, seq) int64: of each token, the one that follows it
    learned: torch.Tensor  # (batch, seq) bool: where the target is learned


def read_examples(
    path: str | Path, tokenizer: Tokenizer, formatter: ChatFormat | None, max_seq_len: int
) -> list[Example]:
    """Read a file of JSON Lines, every one of which must be good.

    Args:
        path: each line is `{"prompt": text, "completion": text}` or `{"messages": [{"role": …, "content": …}, …]}`.
            Empty lines are left out.
        formatter: the chat format; None for plain texts, where the completion simply follows the prompt.
        max_seq_len: most tokens of an example. Of a longer one the prompt is cut from its left (a BOS stays). What the
            assistant says is never cut.

    Raises:
        InputError: bad lines, each with its number and what is wrong; or there are no lines.
    """
    examples, problems = [], []
    with require_path(path, "data").open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    examples.append(read_line(number, line, tokenizer, formatter, max_seq_len))
                except InputError as error:
                    problems.append(f"line {number}: {error}")
    if problems:
        shown = problems[:SHOWN] + ([f"… ({len(problems)} in all)"] if len(problems) > SHOWN else [])
        raise InputError(f"{path} can't be learned from:\n  " + "\n  ".join(shown))
    if not examples:
        raise InputError(f"{path} holds no examples: give lines such as " + '{"prompt": "…", "completion": "…"}')
    return examples


def read_line(
    number: int, line: bytes, tokenizer: Tokenizer, formatter: ChatFormat | None, max_seq_len: int
) -> Example:
    """The example in one line; InputError if there is none."""
    try:
        found = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}") from error
    keys = set(found) if isinstance(found, dict) else None
    if keys == {"prompt", "completion"}:
        segments = encode_pair(found["prompt"], found["completion"], tokenizer, formatter)
    elif keys == {"messages"}:
        segments = encode_messages(found["messages"], formatter)
    else:
        what = f"the keys {sorted(keys)}" if keys is not None else f"{found!r:.80}"
        raise InputError(f"it must be an object with prompt and completion, or with messages, and is {what}")
    tokens = [i for segment in segments for i in segment.tokens]
    learned = [segment.from_assistant for segment in segments for _ in segment.tokens]
    while not learned[-1]:  # nothing is learned from what follows the last word
        tokens.pop()
        learned.pop()
    return cut_left(Example(number, tokens, learned), tokenizer.bos_id, max_seq_len)


def encode_pair(prompt: Any, completion: Any, tokenizer: Tokenizer, formatter: ChatFormat | None) -> list[Segment]:
    """A prompt and its completion as a chat of two turns, or as plain text with the tokenizer's end token."""
    for name, text in (("prompt", prompt), ("completion", completion)):
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"the {name} must be a text that isn't empty, and is {text!r:.80}")
    if formatter is not None:
        user, assistant = {"role": "user", "content": prompt}, {"role": "assistant", "content": completion}
        return encode_messages([user, assistant], formatter)
    ids, completion_ids = encode_continued(tokenizer, prompt, completion, bos=tokenizer.add_bos)
    return [Segment(ids, False), Segment([*completion_ids, tokenizer.eos_id], True)]


def encode_messages(messages: Any, formatter: ChatFormat | None) -> list[Segment]:
    """A dialog in its model's chat format, every message of the assistant's to be learned."""
    if formatter is None:
        raise InputError("messages need a chat format; a plain text is a prompt and a completion")
    segments = formatter.encode_turns(messages)  # which checks the roles
    if messages[-1]["role"] != "assistant":
        raise InputError(f"the last message must be the assistant's, and is the {messages[-1]['role']}'s")
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and not message["content"].strip():
            raise InputError(f"message {number}: the assistant says nothing")
    refusal = formatter.refusal(messages)
    if refusal is not None:
        raise InputError(refusal)
    return segments


def cut_left(example: Example, bos_id: int | None, max_seq_len: int) -> Example:
    """An example that fits into `max_seq_len`; InputError if more than its prompt would have to go."""
    excess = len(example.tokens) - max_seq_len
    if excess <= 0:
        return example
    keep = 1 if example.tokens[0] == bos_id else 0
    first = example.learned.index(True)
    if keep + excess >= first:  # a token must be left to answer
        raise InputError(
            f"from the first to the last word of the assistant there are {len(example.tokens) - first} tokens, too "
            f"many for max_seq_len={max_seq_len}: nothing of that is cut; shorten it, or give a larger max_seq_len"
        )
    tokens, learned = list(example.tokens), list(example.learned)
    del tokens[keep : keep + excess], learned[keep : keep + excess]
    return Example(example.line, tokens, learned, excess)


def split_off(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Examples to learn from, and others, drawn by the seed, to see how well that goes."""
    count = round(fraction * len(examples))
    if fraction > 0:
        count = max(count, 1)
    if count >= len(examples):
        raise InputError(
            f"val_fraction={fraction} of {len(examples)} example(s) leaves none to learn from: give more "
            f"examples, or a lower val_fraction"
        )
    chosen = set(random.Random(f"validation, seed {seed}").sample(range(len(examples)), count))
    return (
        [example for i, example in enumerate(examples) if i not in chosen],
        [example for i, example in enumerate(examples) if i in chosen],
    )


def shuffled(examples: Sequence[Example], epoch: int, seed: int) -> list[Example]:
    """The order of an epoch. It follows from the seed alone, so that a run that was interrupted finds it again."""
    return random.Random(f"epoch {epoch}, seed {seed}").sample(examples, len(examples))


def make_batch(examples: Sequence[Example], device: torch.device | None = None) -> Batch:
    """Put examples into one tensor.

    Shorter rows are filled up at their end. What the filling holds doesn't matter: no earlier position attends to it,
    and no target of its own is learned.
    """
    seq = max(len(example.tokens) for example in examples) - 1  # the last token is only a target
    tokens = torch.zeros(len(examples), seq + 1, dtype=torch.int64)
    learned = torch.zeros(len(examples), seq + 1, dtype=torch.bool)
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens)] = torch.tensor(example.tokens)
        learned[row, : len(example.tokens)] = torch.tensor(example.learned)
    tokens, learned = tokens.to(device), learned.to(device)
    return Batch(tokens[:, :-1], tokens[:, 1:], learned[:, 1:])
