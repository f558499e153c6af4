"""What every layout of a checkpoint can be asked for, whatever lies on the disk."""

import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama.errors import CheckpointError, InputError
from llama.model_args import ModelArgs
from llama.tokenizer import Tokenizer

logger = logging.getLogger("llama")


@dataclass
class Settings:
    """What a checkpoint says of its model, the weights aside.

    Attributes:
        path: the folder or file, for messages.
        params: `ModelArgs` fields, as far as they are told.
        advised_seq_len: the longest context the model was made for, where going past it is only a bad idea. (Where it
            is an error, `params` has it, as `max_position_embeddings`.)
    """

    path: Path
    params: dict[str, Any]
    advised_seq_len: int | None = None

    def model_args(self, vocab_size: int, max_seq_len: int, max_batch_size: int) -> ModelArgs:
        """The model's sizes, with a tokenizer of `vocab_size` words and a cache of the given size.

        Raises:
            InputError: the tokenizer has another number of words, or the cache is too long for the model.
            CheckpointError: the sizes in the files fit no network.
        """
        args = ModelArgs(**self.params, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
        if args.vocab_size == -1:
            args.vocab_size = vocab_size
        if args.vocab_size != vocab_size:
            raise InputError(
                f"the model in {self.path} has vocab_size={args.vocab_size}, but its tokenizer has {vocab_size} words: "
                f"pass the tokenizer_path of this very model"
            )
        try:
            args.check()
        except InputError as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        longest = args.max_position_embeddings
        if longest is not None and max_seq_len > longest:
            raise InputError(f"max_seq_len={max_seq_len} is over this model's limit of {longest}")
        if self.advised_seq_len is not None and max_seq_len > self.advised_seq_len:
            logger.warning(
                "max_seq_len=%d: this model was made for at most %d; its answers get worse past that",
                max_seq_len,
                self.advised_seq_len,
            )
        return args


class Checkpoint(ABC):
    """A model on disk: its settings, and its tensors by their names in our network, whole or a slice at a time.

    Attributes:
        path: the folder or file.
        settings: what it says of the model.
    """

    path: Path
    settings: Settings

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The whole (unsplit) shape of every tensor that is there, by name."""

    @abstractmethod
    def dtypes(self) -> Iterable[torch.dtype]:
        """The number format of every tensor, as `read` gives it."""

    def dtype(self) -> torch.dtype:
        """The smallest number format that loses nothing of any tensor."""
        return functools.reduce(torch.promote_types, self.dtypes())

    @abstractmethod
    def read(self, name: str, axis: int | None, start: int, stop: int) -> torch.Tensor:
        """Tensor `name`, from `start` to `stop` along `axis`; whole if `axis` is None, as it is for those not split."""

    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that comes with the model."""
