"""Reading byte-pair vocabularies: one reader for each kind of file, all giving a `Vocabulary`."""

import base64
import binascii
import re
from dataclasses import dataclass, field
from pathlib import Path

from llama.errors import CheckpointError
from llama.gguf_file import GGUFFile

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SMOLLM_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"

# The tokens that follow the ranks of Llama 3's `tokenizer.model`, in this order.
LLAMA3_SPECIAL = [
    f"<|{name}|>"
    for name in (
        "begin_of_text",
        "end_of_text",
        *(f"reserved_special_token_{i}" for i in range(4)),
        "start_header_id",
        "end_header_id",
        "reserved_special_token_4",
        "eot_id",
        *(f"reserved_special_token_{i}" for i in range(5, 251)),
    )
]

# GGUF's `tokenizer.ggml.pre` -> the pattern that splits a text into the pieces that byte pairs are merged within.
GGUF_PATTERNS = {
    "llama-bpe": LLAMA3_PATTERN,
    "llama3": LLAMA3_PATTERN,
    "llama-v3": LLAMA3_PATTERN,
    "smollm": SMOLLM_PATTERN,
    "gpt-2": GPT2_PATTERN,
}

# Tokens that end a text, or a turn of a chat, whether a file says so or not.
ENDS = ("<|end_of_text|>", "<|eot_id|>", "<|im_end|>")

# GGUF's `tokenizer.ggml.token_type`
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


@dataclass
class Vocabulary:
    """What a byte-pair tokenizer is made of."""

    ranks: dict[bytes, int]  # the bytes of each ordinary token -> its id, which is also its merging priority
    special_tokens: dict[str, int]
    pattern: str
    bos_id: int | None
    eos_id: int
    stop_tokens: set[int]
    add_bos: bool = True  # whether a text starts with BOS
    chat_template: str | None = field(default=None, repr=False)  # Jinja, as its model's makers wrote it


def read_tiktoken(path: Path) -> Vocabulary:
    """Llama 3's `tokenizer.model`: lines of a base64 token and its rank, then 256 special tokens by convention."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise CheckpointError(
                f"{path}, line {number}: expected a base64 token and a rank, not {line!r:.80}"
            ) from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise CheckpointError(f"{path}: the ranks are not 0 to {len(ranks) - 1}, each once: the file is damaged or cut")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise CheckpointError(f"{path} has no token for the byte(s) {missing[:8]}: the file is damaged or cut")

    special = {name: len(ranks) + i for i, name in enumerate(LLAMA3_SPECIAL)}
    return Vocabulary(
        ranks,
        special,
        LLAMA3_PATTERN,
        bos_id=special["<|begin_of_text|>"],
        eos_id=special["<|end_of_text|>"],
        stop_tokens={special["<|end_of_text|>"], special["<|eot_id|>"]},
    )


def write_tiktoken(path: Path, vocabulary: Vocabulary) -> None:
    """Llama 3's `tokenizer.model`, of a vocabulary that `is_llama3`."""
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in vocabulary.ranks.items())
    path.write_bytes(b"".join(lines))


def is_llama3(vocabulary: Vocabulary) -> bool:
    """Whether a `tokenizer.model` of Llama 3's kind can hold this vocabulary.

    Of the special tokens, only those count that Llama 3's prompts are made of: other files have names for some that
    are reserved there, such as `<|eom_id|>` and `<|python_tag|>`.
    """
    n, special = len(vocabulary.ranks), vocabulary.special_tokens
    used = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    return (
        vocabulary.pattern == LLAMA3_PATTERN
        and sorted(vocabulary.ranks.values()) == list(range(n))
        and sorted(special.values()) == list(range(n, n + len(LLAMA3_SPECIAL)))
        and all(special.get(name) == n + LLAMA3_SPECIAL.index(name) for name in used)
    )


def is_tiktoken(head: bytes) -> bool:
    """Whether a file that begins like this holds lines of base64 tokens and ranks."""
    return re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", head) is not None


def read_gguf(file: GGUFFile) -> Vocabulary:
    """The byte-level vocabulary in a GGUF file's metadata."""
    path = file.path
    kind = file.get("tokenizer.ggml.model", str)
    if kind != "gpt2":
        raise CheckpointError(
            f"{path} holds a tokenizer of kind {kind!r}, and only 'gpt2' (byte-level) can be read from a GGUF file; "
            f"pass the model's own tokenizer.model as tokenizer_path"
        )
    pre = file.get("tokenizer.ggml.pre", str, "missing")
    if pre not in GGUF_PATTERNS:
        raise CheckpointError(f"{path}: tokenizer.ggml.pre is {pre!r}, not one of {sorted(GGUF_PATTERNS)}")
    tokens = file.get("tokenizer.ggml.tokens", list)
    types = file.get("tokenizer.ggml.token_type", list)
    merges = file.get("tokenizer.ggml.merges", list)
    if not all(isinstance(text, str) for text in (*tokens, *merges)):
        raise CheckpointError(f"{path}: the tokenizer's tokens and merges are not all text")
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{path}: {len(tokens)} tokens ({len(set(tokens))} different), {len(types)} token types")
    special = {token: i for i, token in enumerate(tokens) if types[i] in (CONTROL, USER_DEFINED, UNUSED)}
    ordinary = {token: i for i, token in enumerate(tokens) if types[i] == NORMAL}
    ranks = byte_level_ranks(ordinary, merges, path)

    eos_id = file.get("tokenizer.ggml.eos_token_id", int)
    ends = {eos_id, *(file.get(f"tokenizer.ggml.{end}_token_id", int, eos_id) for end in ("eot", "eom"))}
    ends |= {special[name] for name in ENDS if name in special}
    bos_id = file.get("tokenizer.ggml.bos_token_id", int, None)
    if not all(0 <= i < len(tokens) for i in (*ends, bos_id or 0)):
        raise CheckpointError(f"{path}: bos {bos_id} or eos {eos_id} is not one of the {len(tokens)} tokens")
    return Vocabulary(
        ranks,
        special,
        GGUF_PATTERNS[pre],
        bos_id=bos_id,
        eos_id=eos_id,
        stop_tokens=ends,
        add_bos=file.get("tokenizer.ggml.add_bos_token", bool, GGUF_PATTERNS[pre] == LLAMA3_PATTERN),
        chat_template=file.get("tokenizer.chat_template", str, None),
    )


def byte_level_ranks(tokens: dict[str, int], merges: list[str], path: Path, unmerged: bool = True) -> dict[bytes, int]:
    """A byte-level vocabulary (GPT-2's kind: bytes written as printable characters) as ranks of byte strings.

    Ids can stand for merging priorities only if no merge makes a token with a smaller id than the merge before it.
    (Llama 3's lists name each way to make a token, one after the other.)

    Args:
        tokens: each ordinary token, in GPT-2's characters, and its id.
        merges: "left right" pairs, first merged first.
        path: the file, for messages.
        unmerged: whether a piece of text that is a token is that token, even if no merges make it.
    """
    last = -1
    mergeable = set()
    for merge in merges:
        made = tokens.get(merge.replace(" ", "", 1))
        if made is None or made < last:
            raise CheckpointError(f"{path}: the merge {merge!r} is out of order; this vocabulary can't be used by rank")
        last = made
        mergeable.add(made)
    if not unmerged:
        odd = [token for token, i in tokens.items() if len(token) > 1 and i not in mergeable]
        if odd:
            raise CheckpointError(f"{path}: no merge makes the tokens {odd[:8]}; this vocabulary can't be used by rank")
    byte_of = {character: byte for byte, character in enumerate(gpt2_characters())}
    try:
        return {bytes(byte_of[character] for character in token): i for token, i in tokens.items()}
    except KeyError as error:
        raise CheckpointError(f"{path}: the character {error} in a token stands for no byte") from error


def gpt2_characters() -> list[str]:
    """The character that GPT-2's vocabularies write for each byte: itself if it is printable, else one from 256 up."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
