"""The tokenizer in a GGUF file's metadata: a byte-level vocabulary, or what is known of a sentencepiece model."""

from llama.errors import CheckpointError
from llama.gguf_file import GGUFFile
from llama.vocab.added_tokens import AddedToken
from llama.vocab.split_steps import (
    DEEPSEEK_CODER_STEPS,
    DEEPSEEK_LLM_STEPS,
    GPT2_STEPS,
    LLAMA3_STEPS,
    SMOLLM_STEPS,
)
from llama.vocab.tokenizer_config import TokenizerConfig
from llama.vocab.vocabulary import END_TOKENS, Vocabulary, byte_level_ranks

# By `tokenizer.ggml.pre`.
SPLIT_STEPS = {
    "llama-bpe": LLAMA3_STEPS,
    "llama3": LLAMA3_STEPS,
    "llama-v3": LLAMA3_STEPS,
    "falcon3": LLAMA3_STEPS,
    "smollm": SMOLLM_STEPS,
    "starcoder": SMOLLM_STEPS,
    "refact": SMOLLM_STEPS,
    "gpt-2": GPT2_STEPS,
    "deepseek-llm": DEEPSEEK_LLM_STEPS,
    "deepseek-coder": DEEPSEEK_CODER_STEPS,
}

SENTENCEPIECE_TOKENS = ("<unk>", "<s>", "</s>")  # which every sentencepiece model has; others are added ones

# Names of tokens in chat templates -> in the metadata's keys.
NAMED_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
CHAT_TEMPLATE = "tokenizer.chat_template"

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
            f"{path} holds a tokenizer of kind {kind!r}, and only 'gpt2' (byte-level) and 'llama' (sentencepiece) "
            f"can be read from a GGUF file; pass the model's own tokenizer as tokenizer_path"
        )
    pre = file.get("tokenizer.ggml.pre", str, "missing")
    if pre not in SPLIT_STEPS:
        raise CheckpointError(f"{path}: tokenizer.ggml.pre is {pre!r}, not one of {sorted(SPLIT_STEPS)}")
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
    bos_id = file.get("tokenizer.ggml.bos_token_id", int, None)
    if not all(0 <= i < len(tokens) for i in (eos_id, bos_id or 0)):
        raise CheckpointError(f"{path}: bos {bos_id} or eos {eos_id} is not one of the {len(tokens)} tokens")
    chat_template = file.get(CHAT_TEMPLATE, str, None)
    return Vocabulary(
        ranks,
        tuple(AddedToken(token, i, special=types[i] != USER_DEFINED) for token, i in special.items()),
        SPLIT_STEPS[pre],
        bos_id=bos_id,
        eos_id=eos_id,
        stop_tokens=_read_end_ids(file, tokens) | {special[name] for name in END_TOKENS if name in special},
        add_bos=file.get("tokenizer.ggml.add_bos_token", bool, SPLIT_STEPS[pre] == LLAMA3_STEPS),
        chat_template=chat_template,
        chat_template_source=None if chat_template is None else CHAT_TEMPLATE,
        template_tokens={name: token.content for name, token in _read_named_tokens(file, tokens).items()},
    )


def read_gguf_sentencepiece_config(file: GGUFFile) -> TokenizerConfig:
    """What a GGUF file says of a sentencepiece model beyond its pieces.

    Args:
        file: one whose pieces `gguf_sentencepiece_proto` has accepted.

    Raises:
        CheckpointError: damaged metadata.
    """
    tokens, types = file.get("tokenizer.ggml.tokens", list), file.get("tokenizer.ggml.token_type", list)
    control = [i for i, kind in enumerate(types) if kind == CONTROL and tokens[i] not in SENTENCEPIECE_TOKENS]
    chat_template = file.get(CHAT_TEMPLATE, str, None)
    return TokenizerConfig(
        added_tokens=[AddedToken(tokens[i], i) for i in control],
        named_tokens=dict(_read_named_tokens(file, tokens)),
        eos_ids=_read_end_ids(file, tokens),
        add_bos=file.get("tokenizer.ggml.add_bos_token", bool, True),
        chat_template=chat_template,
        chat_template_source=None if chat_template is None else CHAT_TEMPLATE,
    )


def _read_end_ids(file: GGUFFile, tokens: list[str]) -> set[int]:
    """The ids that end a text, a turn or a message."""
    ids = {end: file.get(f"tokenizer.ggml.{end}_token_id", int, None) for end in ("eos", "eot", "eom")}
    end_ids = {i for i in ids.values() if i is not None}
    if not all(0 <= i < len(tokens) for i in end_ids):
        raise CheckpointError(
            f"{file.path}: not all the ids that end a text, {ids}, are among its {len(tokens)} tokens"
        )
    return end_ids


def _read_named_tokens(file: GGUFFile, tokens: list[str]) -> dict[str, AddedToken]:
    """The tokens that chat templates know by name; ids without a token, which some files have for padding, are not."""
    ids = {name: file.get(f"tokenizer.ggml.{key}_token_id", int, -1) for name, key in NAMED_TOKENS.items()}
    return {name: AddedToken(tokens[i], i) for name, i in ids.items() if 0 <= i < len(tokens)}
