"""The `pre_tokenizer` of Hugging Face's `tokenizer.json`: how a text is split before byte pairs are merged."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import regex

from llama.errors import CheckpointError
from llama.vocab.split_steps import GPT2_PATTERN, PUNCTUATION_PATTERN, Behavior, SplitStep

MAX_PARTS = 30


def read_pre_tokenizer(pre_tokenizer: Any, path: Path) -> tuple[SplitStep, ...]:
    """The steps of a byte-level pre-tokenizer.

    Args:
        pre_tokenizer: the JSON value.
        path: the file it is from, for error messages.

    Raises:
        CheckpointError: another kind of pre-tokenizer; the message has it.
    """
    steps: list[SplitStep] = []
    on_bytes = False
    parts = list(_flattened(pre_tokenizer, 0))
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        step = _read_step(part, on_bytes) if kind is not None and not part.get("add_prefix_space") else None
        if step is not None:
            steps.append(step)
        elif on_bytes or kind != "ByteLevel" or part.get("add_prefix_space"):
            raise CheckpointError(f"{path}: the pre_tokenizer {part!r:.300} is not supported")
        on_bytes = on_bytes or kind == "ByteLevel"
    if not on_bytes or len(parts) > MAX_PARTS:
        raise CheckpointError(f"{path}: the pre_tokenizer {pre_tokenizer!r:.300} is not supported")
    return tuple(steps)


def _flattened(pre_tokenizer: Any, depth: int) -> Iterator[Any]:
    """The parts of a sequence of pre-tokenizers, or else the one itself."""
    parts = pre_tokenizer.get("pretokenizers") if isinstance(pre_tokenizer, dict) else None
    if isinstance(parts, list) and depth < MAX_PARTS:
        for part in parts:
            yield from _flattened(part, depth + 1)
    else:
        yield pre_tokenizer


def _read_step(value: dict[str, Any], on_bytes: bool) -> SplitStep | None:
    """What one pre-tokenizer does, or None if that is nothing, or can't be expressed."""
    kind, behavior = value.get("type"), value.get("behavior", "Isolated")
    if kind == "ByteLevel":
        return SplitStep(GPT2_PATTERN) if value.get("use_regex", True) and not on_bytes else None
    if kind == "Digits":
        return SplitStep(r"\p{N}", "Isolated" if value.get("individual_digits") else "Contiguous", on_bytes=on_bytes)
    if behavior not in get_args(Behavior):
        return None
    if kind == "Punctuation":
        return SplitStep(PUNCTUATION_PATTERN, behavior, on_bytes=on_bytes)
    pattern = value.get("pattern")
    if kind != "Split" or not isinstance(pattern, dict):
        return None
    text, expression = pattern.get("String"), pattern.get("Regex")
    if isinstance(text, str) and text:
        expression = regex.escape(text, special_only=True, literal_spaces=True)
    return SplitStep(expression, behavior, bool(value.get("invert")), on_bytes) if isinstance(expression, str) else None


def write_pre_tokenizer(steps: tuple[SplitStep, ...]) -> dict[str, Any]:
    """The JSON value that `read_pre_tokenizer` reads as these steps."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    values = [
        {"type": "Split", "pattern": {"Regex": step.pattern}, "behavior": step.behavior, "invert": step.invert}
        for step in steps
    ]
    on_text = sum(not step.on_bytes for step in steps)
    return {"type": "Sequence", "pretokenizers": [*values[:on_text], byte_level, *values[on_text:]]}
