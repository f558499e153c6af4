"""Llama 3's `tokenizer.model`: a line for each token, with its bytes in base64 and its rank."""

import base64
import binascii
import re
from pathlib import Path

from llama.errors import CheckpointError
from llama.files import read_whole
from llama.vocab.added_tokens import AddedToken
from llama.vocab.split_steps import LLAMA3_STEPS
from llama.vocab.tokenizer_config import TokenizerConfig
from llama.vocab.vocabulary import END_TOKENS, Vocabulary

MAX_BYTES = 2**23  # four times what Llama 3's has

# The file doesn't list them: they follow its ranks, in this order.
LLAMA3_SPECIAL_TOKENS = [
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


def is_tiktoken_file(head: bytes) -> bool:
    """Whether a file that begins with `head` consists of base64 tokens and ranks."""
    return re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", head) is not None


def read_tiktoken_file(path: Path, config: TokenizerConfig | None = None) -> Vocabulary:
    """The vocabulary in a `tokenizer.model` of Llama 3's kind, with Llama 3's special tokens and pattern.

    Args:
        path: the file.
        config: what other files say of it. They may give other names to Llama 3's special tokens.

    Raises:
        CheckpointError: a damaged file, or another than `config` is about.
    """
    config = (config or TokenizerConfig()).with_names(bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_whole(path, MAX_BYTES).splitlines(), 1):
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

    listed_ids = {token.id for token in config.added_tokens}
    listed_names = {token.content for token in config.added_tokens}
    own_tokens = [AddedToken(name, len(ranks) + i) for i, name in enumerate(LLAMA3_SPECIAL_TOKENS)]
    added_tokens = config.merge_added_tokens(
        (token for token in own_tokens if token.id not in listed_ids and token.content not in listed_names), {}, path
    )
    id_of = {token.content: token.id for token in added_tokens}
    template_tokens = config.template_tokens()
    bos_id, eos_id = id_of.get(template_tokens.get("bos_token", "")), id_of.get(template_tokens.get("eos_token", ""))
    stop_tokens = config.eos_ids | {id_of[name] for name in END_TOKENS if name in id_of}
    if eos_id is None or not stop_tokens <= {*ranks.values(), *id_of.values()}:
        raise CheckpointError(
            f"{path} lacks tokens that the files beside it name as ends of a text: "
            f"{template_tokens.get('eos_token')!r:.80}, {sorted(stop_tokens)}"
        )
    return Vocabulary(
        ranks,
        added_tokens,
        LLAMA3_STEPS,
        bos_id=bos_id,
        eos_id=eos_id,
        stop_tokens=stop_tokens | {eos_id},
        add_bos=config.add_bos is not False and bos_id is not None,
        chat_template=config.chat_template,
        chat_template_source=config.chat_template_source,
        template_tokens=template_tokens,
    )


def write_tiktoken_file(path: Path, vocabulary: Vocabulary) -> None:
    """Write a vocabulary that `fits_tiktoken_file` as a `tokenizer.model`."""
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in vocabulary.ranks.items())
    path.write_bytes(b"".join(lines))


def fits_tiktoken_file(vocabulary: Vocabulary) -> bool:
    """Whether a `tokenizer.model` of Llama 3's kind can express this vocabulary.

    Only the special tokens of Llama 3's prompts must have their ids: other files have names for some tokens that are
    reserved there, such as `<|eom_id|>` and `<|python_tag|>`.
    """
    n, special = len(vocabulary.ranks), vocabulary.special_tokens
    used = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    return (
        vocabulary.split_steps == LLAMA3_STEPS
        and sorted(vocabulary.ranks.values()) == list(range(n))
        and sorted(special.values()) == list(range(n, n + len(LLAMA3_SPECIAL_TOKENS)))
        and all(special.get(name) == n + LLAMA3_SPECIAL_TOKENS.index(name) for name in used)
    )
