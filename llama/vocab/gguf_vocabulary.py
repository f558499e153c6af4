"""The byte-pair vocabulary in a GGUF file's metadata."""

from llama.errors import CheckpointError
from llama.gguf_file import GGUFFile
from llama.vocab.added_tokens import AddedToken
from llama.vocab.vocabulary import (
    END_TOKENS,
    GPT2_PATTERN,
    LLAMA3_PATTERN,
    SMOLLM_PATTERN,
    Vocabulary,
    byte_level_ranks,
)

# By `tokenizer.ggml.pre`.
PATTERNS = {
    "llama-bpe": LLAMA3_PATTERN,
    "llama3": LLAMA3_PATTERN,
    "llama-v3": LLAMA3_PATTERN,
    "smollm": SMOLLM_PATTERN,
    "gpt-2": GPT2_PATTERN,
}

# Values of `tokenizer.ggml.token_type`.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


def read_gguf_vocabulary(file: GGUFFile) -> Vocabulary:
    """The byte-level vocabulary in a GGUF file.

    Raises:
        CheckpointError: damaged metadata, or a tokenizer that isn't byte-level; the message says which.
    """
    path = file.path
    kind = file.get("tokenizer.ggml.model", str)
    if kind != "gpt2":
        raise CheckpointError(
            f"{path} holds a tokenizer of kind {kind!r}, and only 'gpt2' (byte-level) can be read from a GGUF file; "
            f"pass the model's own tokenizer.model as tokenizer_path"
        )
    pre = file.get("tokenizer.ggml.pre", str, "missing")
    if pre not in PATTERNS:
        raise CheckpointError(f"{path}: tokenizer.ggml.pre is {pre!r}, not one of {sorted(PATTERNS)}")
    tokens = file.get("tokenizer.ggml.tokens", list)
    types = file.get("tokenizer.ggml.token_type", list)
    merges = file.get("tokenizer.ggml.merges", list)
    if not all(isinstance(text, str) for text in (*tokens, *merges)):
        raise CheckpointError(f"{path}: the tokenizer's tokens and merges are not all strings")
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{path}: {len(tokens)} tokens ({len(set(tokens))} different), {len(types)} token types")
    special = {token: i for i, token in enumerate(tokens) if types[i] in (CONTROL, USER_DEFINED, UNUSED)}
    ordinary = {token: i for i, token in enumerate(tokens) if types[i] == NORMAL}
    ranks = byte_level_ranks(ordinary, merges, path)

    eos_id = file.get("tokenizer.ggml.eos_token_id", int)
    stop_tokens = {eos_id, *(file.get(f"tokenizer.ggml.{end}_token_id", int, eos_id) for end in ("eot", "eom"))}
    stop_tokens |= {special[name] for name in END_TOKENS if name in special}
    bos_id = file.get("tokenizer.ggml.bos_token_id", int, None)
    if not all(0 <= i < len(tokens) for i in (*stop_tokens, bos_id or 0)):
        raise CheckpointError(f"{path}: bos {bos_id} or eos {eos_id} is not one of the {len(tokens)} tokens")
    chat_template = file.get("tokenizer.chat_template", str, None)
    return Vocabulary(
        ranks,
        tuple(AddedToken(token, i, special=types[i] != USER_DEFINED) for token, i in special.items()),
        PATTERNS[pre],
        bos_id=bos_id,
        eos_id=eos_id,
        stop_tokens=stop_tokens,
        add_bos=file.get("tokenizer.ggml.add_bos_token", bool, PATTERNS[pre] == LLAMA3_PATTERN),
        chat_template=chat_template,
        chat_template_source=None if chat_template is None else "tokenizer.chat_template",
    )
