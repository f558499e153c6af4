"""Training data: JSON Lines in, sequences of token ids out, each with a mask of the tokens that count in the loss.

A sequence is a whole dialog as the model sees it, up to the token that ends the assistant's last turn. Only the
assistant's messages, with the tokens that end them, count in the loss (x): the model should learn to answer, and not to
ask.

    <|im_start|> user \n What is 2 + 2 ? <|im_end|> \n <|im_start|> assistant \n Four . <|im_end|>
         -        -   -   -   -  - - - -      -      -       -         -       -   x   x      x
"""

import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llama.chat_format import ChatFormat, Segment, encode_continued
from llama.errors import InputError
from llama.files import check_json_depth, listing, require_file, require_path
from llama.tokenizer import Tokenizer

BOM = b"\xef\xbb\xbf"

MAX_REPORTED_LINES = 10  # of the invalid ones, in an error message

# The keys of each kind of line: those that it has, and those that it may have. The last two are those of Alpaca's data
# and of ShareGPT's.
SHAPES = (
    (frozenset({"prompt", "completion"}), frozenset[str]()),
    (frozenset({"messages"}), frozenset[str]()),
    (frozenset({"instruction", "output"}), frozenset({"input", "system"})),
    (frozenset({"conversations"}), frozenset({"system"})),
)
# Keys of lines and messages that say where these come from, and are ignored; so are those whose value is null.
IGNORED_KEYS = frozenset(
    {"id", "idx", "index", "uuid", "conversation_id", "prompt_id", "message_id", "source", "dataset", "url", "license"}
    | {"category", "topic", "task", "lang", "language", "author", "date", "timestamp", "metadata", "meta", "comment"}
)
SHARE_GPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}


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


def find_data(path: str | Path) -> Path:
    """The file of examples: `path` itself, with `~` expanded, or the only `.jsonl` file in the folder of this name.

    Raises:
        InputError: not a path, no ordinary file, or a folder with no such file or several.
        MissingFileError: nothing exists there.
    """
    folder = require_path(path, "data")
    if not folder.is_dir():
        return require_file(path, "data")
    files = [file for file in folder.iterdir() if file.suffix == ".jsonl"]
    if len(files) != 1:
        raise InputError(f"data={str(path)!r} is a folder; give the file of examples. It holds {listing(folder)}")
    return require_file(files[0], "data")


def read_examples(
    path: str | Path, tokenizer: Tokenizer, formatter: ChatFormat | None, max_seq_len: int
) -> list[Example]:
    """Read and tokenize a file of JSON Lines.

    Args:
        path: see `find_data`. Each line has the keys of one of `SHAPES`; blank lines are skipped.
        tokenizer: the tokenizer.
        formatter: the chat format; None for plain text, where the completion directly follows the prompt.
        max_seq_len: maximum number of tokens of an example. A longer one loses tokens at the beginning of its prompt
            (but not its BOS), and never any of the assistant's that count.

    Raises:
        InputError: some lines are invalid (the message lists them and says why), or there are no lines.
    """
    path = find_data(path)
    examples: list[Example] = []
    problems: list[str] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                if not examples and not problems and re.match(rb"\s*\[\s*(\{|$)", line.removeprefix(BOM)):
                    raise InputError(
                        f"{path} is one JSON array, not JSON Lines: write each of its elements on a line of its own, "
                        f"for example with `jq -c '.[]' {path.name} > {path.stem}.jsonl`"
                    )
                try:
                    examples.append(parse_line(number, line, tokenizer, formatter, max_seq_len))
                except (InputError, RecursionError) as error:
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
        check_json_depth(value)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}") from error
    segments = encode_line(value, tokenizer, formatter)
    tokens = [token for segment in segments for token in segment.tokens]
    loss_mask = [segment.from_assistant for segment in segments for _ in segment.tokens]
    while not loss_mask[-1]:  # tokens after the last one that counts would change nothing
        tokens.pop()
        loss_mask.pop()
    return truncate_prompt(Example(number, tokens, loss_mask), tokenizer.bos_id, max_seq_len)


def encode_line(value: object, tokenizer: Tokenizer, formatter: ChatFormat | None) -> list[Segment]:
    """Encode what a line says, in whichever of `SHAPES` it is; InputError if it is in none of them."""
    kinds = "prompt and completion, with messages, with instruction and output, or with conversations"
    if not isinstance(value, dict):
        raise InputError(f"it must be an object with {kinds}, but it is {value!r:.80}")
    fields = known_keys(value)
    if not any(required <= set(fields) <= required | optional for required, optional in SHAPES):
        raise InputError(f"it must be an object with {kinds}, but it has the keys {sorted(fields)}")
    if "prompt" in fields:
        return encode_pair(fields["prompt"], fields["completion"], tokenizer, formatter)
    if "instruction" in fields:
        instruction, given, answer = fields["instruction"], fields.get("input", ""), fields["output"]
        for name, text in (("instruction", instruction), ("output", answer)):
            check_text(name, text)
        if not isinstance(given, str):
            raise InputError(f"the input must be a text, but it is {given!r:.80}")
        question = f"{instruction}\n\n{given}" if given.strip() else instruction
        messages: Any = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    else:
        messages = fields["messages"] if "messages" in fields else fields["conversations"]
    if "system" in fields and isinstance(messages, list):
        messages = [{"role": "system", "content": fields["system"]}, *messages]
    return encode_messages(messages, formatter)


def known_keys(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that mean something, with their values."""
    return {key: value for key, value in fields.items() if value is not None and key not in IGNORED_KEYS}


def check_text(name: str, text: object) -> None:
    """Raise InputError unless this is a text that isn't empty."""
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"the {name} must be a text that isn't empty, but it is {text!r:.80}")


def encode_pair(prompt: Any, completion: Any, tokenizer: Tokenizer, formatter: ChatFormat | None) -> list[Segment]:
    """Encode a prompt and its completion: as a dialog, or as plain text that the end-of-text token ends."""
    check_text("prompt", prompt)
    check_text("completion", completion)
    if formatter is not None:
        user, assistant = {"role": "user", "content": prompt}, {"role": "assistant", "content": completion}
        return encode_messages([user, assistant], formatter)
    prompt_tokens, completion_tokens = encode_continued(tokenizer, prompt, completion, bos=tokenizer.add_bos)
    return [Segment(prompt_tokens, False), Segment([*completion_tokens, tokenizer.eos_id], True)]


def encode_messages(messages: Any, formatter: ChatFormat | None) -> list[Segment]:
    """Encode a dialog in its model's chat format; InputError if it isn't one that can be trained on.

    An assistant's message with `"weight": 0` doesn't count in the loss.
    """
    if formatter is None:
        raise InputError("a dialog needs a chat format; with --format plain, give a prompt and a completion")
    counts: list[bool] = []
    if isinstance(messages, list):
        read = [read_message(number, message) for number, message in enumerate(messages)]
        messages, counts = [message for message, _ in read], [count for _, count in read]
    segments = formatter.encode_turns(messages)  # raises InputError for invalid messages
    if messages[-1]["role"] != "assistant":
        raise InputError(f"the last message must be the assistant's, but it is the {messages[-1]['role']}'s")
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and not message["content"].strip():
            raise InputError(f"message {number}: the assistant's message is empty")
    refusal = formatter.refusal(messages)
    if refusal is not None:
        raise InputError(refusal)
    answer_counts = [count for message, count in zip(messages, counts, strict=True) if message["role"] == "assistant"]
    return leave_out(segments, answer_counts)


def read_message(number: int, message: Any) -> tuple[Any, bool]:
    """Return a message with its role and content alone, and whether it counts in the loss if it is the assistant's.

    Raises:
        InputError: it has a weight other than 0 and 1, or keys that mean something unknown. The rest is left to
            `check_dialog`.
    """
    if not isinstance(message, dict):
        return message, True
    fields = known_keys(message)
    if {"from", "value"} <= set(fields):
        speaker = str(fields.pop("from"))
        fields |= {"role": SHARE_GPT_ROLES.get(speaker, speaker), "content": fields.pop("value")}
    weight = fields.pop("weight", None)
    if weight not in (None, 0, 1):
        raise InputError(f"message {number}: weight={weight!r:.80} must be 0, so that it isn't learned, or 1")
    if weight and fields.get("role") != "assistant":
        raise InputError(f"message {number}: weight={weight!r}, but only the assistant's messages are learned")
    if unknown := sorted(set(fields) - {"role", "content"}):
        raise InputError(f"message {number}: unknown keys {unknown}; there are role, content and weight: remove others")
    return fields, weight != 0


def leave_out(segments: list[Segment], counts: Sequence[bool]) -> list[Segment]:
    """Mark the answers that don't count in the loss as not to be learned.

    Args:
        segments: the result of `encode_turns`.
        counts: for each of the assistant's messages, whether it counts.

    Raises:
        InputError: none counts, or the model's chat template doesn't show which is which.
    """
    if not any(counts):
        raise InputError("every message of the assistant's has weight 0: there is nothing to learn")
    answers = [i for i, segment in enumerate(segments) if segment.from_assistant]
    if len(answers) < len(counts) and not all(counts):  # a chat template may leave earlier answers out; not the last
        if any(counts[:-1]):
            raise InputError(
                "the model's chat template leaves some earlier answers out, so weights can't be told apart: give each "
                "answer that is to be learned as the last of a dialog of its own"
            )
        counts = [False] * (len(answers) - 1) + [True]
    omitted = {i for i, count in zip(answers, counts, strict=False) if not count}
    return [Segment(tokens, learned and i not in omitted) for i, (tokens, learned) in enumerate(segments)]


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
