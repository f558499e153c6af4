"""Tokenizer files of every kind: one reader each, and the two engines that encode and decode with what they hold."""

from pathlib import Path

from llama.files import first_bytes, require_path
from llama.gguf_file import GGUFFile
from llama.vocab.byte_pairs import BytePairs
from llama.vocab.sentence_pieces import SentencePieces
from llama.vocab.tokenizer_json import read_tokenizer_json
from llama.vocab.vocabulary import Vocabulary, is_tiktoken, read_gguf, read_tiktoken

__all__ = ["BytePairs", "SentencePieces", "Vocabulary", "open_vocabulary"]


def open_vocabulary(model_path: str | Path | GGUFFile) -> BytePairs | SentencePieces:
    """The engine for a tokenizer file, told apart by its first bytes.

    Raises:
        MissingFileError: no such file.
        CheckpointError: not a tokenizer, or a damaged one.
    """
    if isinstance(model_path, GGUFFile):
        return BytePairs(read_gguf(model_path), model_path.path)
    path = require_path(model_path, "tokenizer_path")
    head = first_bytes(path)
    if head.startswith(b"GGUF"):
        return BytePairs(read_gguf(GGUFFile(path)), path)
    if head.lstrip().startswith(b"{"):
        return BytePairs(read_tokenizer_json(path), path)
    if is_tiktoken(head):
        return BytePairs(read_tiktoken(path), path)
    return SentencePieces(path)
