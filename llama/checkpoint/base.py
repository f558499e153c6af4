"""The interface of a checkpoint, common to all layouts on disk."""

import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama.errors import CheckpointError, InputError
from llama.model_args import ModelArgs
from llama.quantized import Int4Groups
from llama.tokenizer import Tokenizer

logger = logging.getLogger("llama")

DEFAULT_SEQ_LEN = 4096  # tokens; the KV cache grows with them

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # that weights may have in a file


# Far above the sizes of any model, and low enough to compute with, to list all layers, and to count to n_heads.
MAX_SIZE = 2**31
MAX_SIZES = {"n_layers": 2**12, "n_heads": 2**16}


@dataclass
class Settings:
    """A checkpoint's configuration: everything it says of its model apart from the weights.

    Attributes:
        path: the folder or file, for error messages.
        params: `ModelArgs` fields, as far as the checkpoint gives them.
        advised_seq_len: the context length the model was trained for, where a longer one gets a warning. (Where it is
            an error, the limit is in `params`, as `max_position_embeddings`.)

    Raises:
        CheckpointError: a size is absurd; computing with it might never end.
    """

    path: Path
    params: dict[str, Any]
    advised_seq_len: int | None = None

    def __post_init__(self) -> None:
        for name, size in self.params.items():
            if isinstance(size, int) and size > MAX_SIZES.get(name, MAX_SIZE):
                raise CheckpointError(f"{self.path}: {name}={size} is larger than that of any model")

    @property
    def default_seq_len(self) -> int:
        """The context where nothing else is asked for: `DEFAULT_SEQ_LEN`, or the model's own if that is shorter."""
        limits = (self.params.get("max_position_embeddings"), self.advised_seq_len)
        return min([DEFAULT_SEQ_LEN, *filter(None, limits)])

    def model_args(self, vocab_size: int, max_seq_len: int | None, max_batch_size: int) -> ModelArgs:
        """The model's sizes, completed by those of its tokenizer and its KV cache.

        Args:
            vocab_size: the tokenizer's number of tokens.
            max_seq_len: positions of the cache; None for `default_seq_len`.
            max_batch_size: rows of the cache.

        Raises:
            InputError: the tokenizer has another number of tokens, or the cache is too long for the model.
            CheckpointError: the sizes in the files are not those of a possible network.
        """
        max_seq_len = self.default_seq_len if max_seq_len is None else max_seq_len
        args = ModelArgs(**self.params, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
        if args.vocab_size == -1:
            args.vocab_size = vocab_size
        if args.vocab_size != vocab_size:
            raise InputError(
                f"the model in {self.path} has vocab_size={args.vocab_size}, but its tokenizer has {vocab_size} "
                f"tokens: pass the tokenizer_path that belongs to this model"
            )
        try:
            args.check()
        except InputError as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        limit = args.max_position_embeddings
        if limit is not None and max_seq_len > limit:
            raise InputError(f"max_seq_len={max_seq_len} is over this model's limit of {limit}")
        if self.advised_seq_len is not None and max_seq_len > self.advised_seq_len:
            logger.warning(
                "max_seq_len=%d: this model was trained for at most %d tokens; its answers get worse beyond that",
                max_seq_len,
                self.advised_seq_len,
            )
        return args


def check_dtypes(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise CheckpointError if one of the tensors in a file has another dtype than weights have."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise CheckpointError(f"{path}: {name} is stored as {tensor.dtype}, not as one of {list(DTYPES)}")


class Checkpoint(ABC):
    """A model on disk: its settings, and its tensors by their names in our network, whole or a slice at a time.

    Attributes:
        path: the folder or file.
        settings: its configuration.
    """

    path: Path
    settings: Settings

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The whole (unsplit) shape of every tensor of the checkpoint, by name."""

    @abstractmethod
    def dtypes(self) -> Iterable[torch.dtype]:
        """The dtype of every tensor, as `read` returns it."""

    def dtype(self) -> torch.dtype:
        """The smallest dtype that represents every tensor exactly."""
        return functools.reduce(torch.promote_types, self.dtypes())

    @abstractmethod
    def read(self, name: str, axis: int | None, start: int, stop: int) -> torch.Tensor:
        """A slice of a tensor.

        Args:
            name: its name in our network.
            axis: the axis that is sliced; None for the whole tensor, as for those that are never split.
            start, stop: the slice.
        """

    def read_int4(self, name: str, start: int, stop: int) -> Int4Groups | None:
        """Rows of a matrix that is stored in groups of 32 weights of 4 bits; None if it is stored in another way.

        Args:
            name: its name in our network.
            start, stop: the rows.
        """
        return None

    @abstractmethod
    def release(self, name: str) -> None:
        """Give back the memory into which a tensor has been read from its file; what is used again is read again.

        Args:
            name: its name in our network.
        """

    @abstractmethod
    def tokenizer(self, path: str | Path | None = None) -> Tokenizer:
        """A tokenizer for the model, completed by what the checkpoint says: padding of the embedding, stop tokens.

        Args:
            path: the tokenizer's file; None for the one that comes with the model.

        Raises:
            MissingFileError: there is none.
            CheckpointError: it is damaged, or of a kind that isn't supported.
        """
