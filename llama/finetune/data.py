"""Training data: JSON Lines in, sequences of token ids out, each with a mask of the tokens that count in the loss.

A sequence is a whole dialog as the model sees it, up to the token that ends the assistant's last turn. Only the
assistant's messages, with the tokens that end them, count in the loss (x): the model should learn to answer, and not to
ask.

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
from llama.files import require_file
from llama.tokenizer import Tokenizer

MAX_REPORTED_LINES = 10  # of the invalid ones, in an error message


class Example(NamedTuple):
    """A tokenized line of the data."""

    line: int  # its number in the file, from 1
    tokens: list[int]
    loss_mask: list[bool]  # for each token, whether it counts in the loss
    n_truncated: int = 0  # how many tokens of the prompt were left out because the example was too long

    @property
    def n_loss_tokens(self) -> int:
        """How many of the tokens count in the loss."""
        return sum(self.loss_mask)


class Batch(NamedTuple):
    """Examples that pass through the network together."""

    tokens: torch.Tensor  # (batch, seq) int64
    targets: torch.Tensor  # (batch, seq) int64: the token after each of `tokens`
    loss_mask: torch.Tensor  # (batch, seq) bool: whether the target counts in the loss


def read_examples(
    path: str | Path, tokenizer: Tokenizer, formatter: ChatFormat | None, max_seq_len: int
) -> list[Example]:
    """Read and tokenize a file of JSON Lines.

    Args:
        path: the file. Each line is `{"prompt": text, "completion": text}` or `{"messages": [{"role": …, "content":
            …}, …]}`; blank lines are skipped.
        tokenizer: the tokenizer.
        formatter: the chat format; None for plain text, where the completion directly follows the prompt.
        max_seq_len: maximum number of tokens of an example. A longer one loses tokens at the beginning of its prompt
            (but not its BOS), and never any of the assistant's.

    Raises:
        InputError: some lines are invalid (the message lists them and says why), or there are no lines.
    """
    examples, problems = [], []
    with require_file(path, "data").open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    examples.append(parse_line(number, line, tokenizer, formatter, max_seq_len))
                except InputError as error:
                    problems.append(f"line {number}: {error}")
    if problems:
        omitted = [f"… ({len(problems)} in all)"] if len(problems) > MAX_REPORTED_LINES else []
        listed = "\n  ".join(problems[:MAX_REPORTED_LINES] + omitted)
        raise InputError(f"{path} has lines that can't be used for training:\n  {listed}")
    if not examples:
        raise InputError(f"{path} has no examples: give lines such as " + '{"prompt": "…", "completion": "…"}')
    return examples


def parse_line(
    number: int, line: bytes, tokenizer: Tokenizer, formatter: ChatFormat | None, max_seq_len: int
) -> Example:
    """Return the example in a line; InputError if the line is invalid."""
    try:
        value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}") from error
    keys = set(value) if isinstance(value, dict) else None
    if keys == {"prompt", "completion"}:
        segments = encode_pair(value["prompt"], value["completion"], tokenizer, formatter)
    elif keys == {"messages"}:
        segments = encode_messages(value["messages"], formatter)
    else:
        actual = f"has the keys {sorted(keys)}" if keys is not None else f"is {value!r:.80}"
        raise InputError(f"it must be an object with prompt and completion, or with messages, but it {actual}")
    tokens = [token for segment in segments for token in segment.tokens]
    loss_mask = [segment.from_assistant for segment in segments for _ in segment.tokens]
    while not loss_mask[-1]:  # tokens after the last one that counts would change nothing
        tokens.pop()
        loss_mask.pop()
    return truncate_prompt(Example(number, tokens, loss_mask), tokenizer.bos_id, max_seq_len)


def encode_pair(
    prompt: object, completion: object, tokenizer: Tokenizer, formatter: ChatFormat | None
) -> list[Segment]:
    """Encode a prompt and its completion: as a dialog, or as plain text that the end-of-text token ends."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(f"the prompt must be a text that isn't empty, but it is {prompt!r:.80}")
    if not isinstance(completion, str) or not completion.strip():
        raise InputError(f"the completion must be a text that isn't empty, but it is {completion!r:.80}")
    if formatter is not None:
        user, assistant = {"role": "user", "content": prompt}, {"role": "assistant", "content": completion}
        return encode_messages([user, assistant], formatter)
    prompt_tokens, completion_tokens = encode_continued(tokenizer, prompt, completion, bos=tokenizer.add_bos)
    return [Segment(prompt_tokens, False), Segment([*completion_tokens, tokenizer.eos_id], True)]


def encode_messages(messages: Any, formatter: ChatFormat | None) -> list[Segment]:
    """Encode a dialog in its model's chat format; InputError if it isn't one that can be trained on."""
    if formatter is None:
        raise InputError("messages need a chat format; with --format plain, give a prompt and a completion")
    segments = formatter.encode_turns(messages)  # raises InputError for invalid messages
    if messages[-1]["role"] != "assistant":
        raise InputError(f"the last message must be the assistant's, but it is the {messages[-1]['role']}'s")
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and not message["content"].strip():
            raise InputError(f"message {number}: the assistant's message is empty")
    refusal = formatter.refusal(messages)
    if refusal is not None:
        raise InputError(refusal)
    return segments


def truncate_prompt(example: Example, bos_id: int | None, max_seq_len: int) -> Example:
    """Shorten an example to `max_seq_len` tokens by removing tokens at the beginning of its prompt, after BOS.

    Raises:
        InputError: less than one token of the prompt, besides BOS, would be left.
    """
    excess = len(example.tokens) - max_seq_len
    if excess <= 0:
        return example
    n_kept = 1 if example.tokens[0] == bos_id else 0
    prompt_length = example.loss_mask.index(True)
    if n_kept + excess >= prompt_length:
        raise InputError(
            f"from the first to the last of the assistant's tokens there are {len(example.tokens) - prompt_length}, "
            f"too many for max_seq_len={max_seq_len}, and none is cut: shorten them, or give a larger max_seq_len"
        )
    tokens, loss_mask = list(example.tokens), list(example.loss_mask)
    del tokens[n_kept : n_kept + excess], loss_mask[n_kept : n_kept + excess]
    return Example(example.line, tokens, loss_mask, excess)


def split_validation(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Split examples at random into those to train on, and a fraction (at least one if it is above 0) for validation.

    Raises:
        InputError: none would be left to train on.
    """
    count = round(fraction * len(examples))
    if fraction > 0:
        count = max(count, 1)
    if count >= len(examples):
        raise InputError(
            f"val_fraction={fraction} of {len(examples)} example(s) leaves none to train on: give more examples, or a "
            f"lower val_fraction"
        )
    chosen = set(random.Random(f"validation, seed {seed}").sample(range(len(examples)), count))
    return (
        [example for i, example in enumerate(examples) if i not in chosen],
        [example for i, example in enumerate(examples) if i in chosen],
    )


def shuffled(examples: Sequence[Example], epoch: int, seed: int) -> list[Example]:
    """Return the examples in the random order of an epoch, which is the same in a resumed run with the same seed."""
    return random.Random(f"epoch {epoch}, seed {seed}").sample(examples, len(examples))


def make_batch(examples: Sequence[Example], device: torch.device | str = "cpu") -> Batch:
    """Put examples into one batch, on a device.

    Shorter rows are padded on the right. The value of the padding doesn't matter: no earlier position attends to it,
    and it doesn't count in the loss.
    """
    length = max(len(example.tokens) for example in examples)
    padded_tokens = [example.tokens + [0] * (length - len(example.tokens)) for example in examples]
    padded_mask = [example.loss_mask + [False] * (length - len(example.tokens)) for example in examples]
    tokens = torch.tensor(padded_tokens, dtype=torch.int64, device=device)
    loss_mask = torch.tensor(padded_mask, dtype=torch.bool, device=device)
    return Batch(tokens[:, :-1], tokens[:, 1:], loss_mask[:, 1:])
