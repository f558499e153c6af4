"""Tokenizer files: a reader for each kind, and the two tokenizers that work with what was read.

Byte-level vocabularies of every kind of file become a `Vocabulary`, with which `BytePairTokenizer` works by tiktoken.
Those of Llama 2's kind become a serialized sentencepiece model, with which `SentencePieceTokenizer` works.
"""

from dataclasses import replace
from pathlib import Path

from llama.files import Metadata, first_bytes, read_json, read_whole, require_path
from llama.gguf_file import GGUFFile
from llama.vocab.added_tokens import AddedToken
from llama.vocab.byte_pair_tokenizer import BytePairTokenizer
from llama.vocab.gguf_vocabulary import read_gguf_sentencepiece_config, read_gguf_vocabulary
from llama.vocab.sentencepiece_json import is_sentencepiece_json, json_sentencepiece_proto
from llama.vocab.sentencepiece_proto import gguf_sentencepiece_proto
from llama.vocab.sentencepiece_tokenizer import SentencePieceTokenizer
from llama.vocab.tiktoken_file import is_tiktoken_file, read_tiktoken_file
from llama.vocab.tokenizer_config import TokenizerConfig, read_tokenizer_config
from llama.vocab.tokenizer_json import leading_special_token, read_tokenizer_json
from llama.vocab.vocabulary import Vocabulary

MAX_MODEL_BYTES = 2**23  # of a sentencepiece model; those with 256,000 pieces have 4 million

__all__ = ["AddedToken", "BytePairTokenizer", "SentencePieceTokenizer", "Vocabulary", "open_vocabulary"]


def open_vocabulary(model_path: str | Path | GGUFFile) -> BytePairTokenizer | SentencePieceTokenizer:
    """The tokenizer in a file, whose kind is recognised by its first bytes.

    Args:
        model_path: a `tokenizer.model` of Llama 3 or Llama 2, a `tokenizer.json`, or a GGUF file, which may be open.

    Raises:
        MissingFileError: no such file.
        CheckpointError: not a tokenizer, or a damaged one.
    """
    if isinstance(model_path, GGUFFile):
        return _open_gguf_vocabulary(model_path)
    path = require_path(model_path, "tokenizer_path")
    head = first_bytes(path)
    if head.startswith(b"GGUF"):
        return _open_gguf_vocabulary(GGUFFile(path))
    if head.lstrip().startswith(b"{"):
        return _open_tokenizer_json(Metadata(path, read_json(path)))
    # Meta's own folders have no such files; what else stands there may be that of another download.
    is_meta = (path.parent / "params.json").exists()
    if is_tiktoken_file(head):
        config = TokenizerConfig() if is_meta else read_tokenizer_config(path.parent)
        return BytePairTokenizer(read_tiktoken_file(path, config), path)
    # `save_checkpoint` writes them beside a sentencepiece model in Meta's layout, but no config.json.
    is_mixed = is_meta and (path.parent / "config.json").exists()
    config = TokenizerConfig() if is_mixed else read_tokenizer_config(path.parent)
    return SentencePieceTokenizer(read_whole(path, MAX_MODEL_BYTES), path, config)


def _open_tokenizer_json(file: Metadata) -> BytePairTokenizer | SentencePieceTokenizer:
    if not is_sentencepiece_json(file):
        return BytePairTokenizer(read_tokenizer_json(file), file.path)
    config = read_tokenizer_config(file.path.parent)
    if config.add_bos is None:
        config = replace(config, add_bos=leading_special_token(file.values.get("post_processor"))[1])
    return SentencePieceTokenizer(json_sentencepiece_proto(file), file.path, config)


def _open_gguf_vocabulary(file: GGUFFile) -> BytePairTokenizer | SentencePieceTokenizer:
    if file.get("tokenizer.ggml.model", str) == "llama":
        return SentencePieceTokenizer(gguf_sentencepiece_proto(file), file.path, read_gguf_sentencepiece_config(file))
    return BytePairTokenizer(read_gguf_vocabulary(file), file.path)
