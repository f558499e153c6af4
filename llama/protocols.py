"""What `Llama` needs of a network, of a tokenizer and of a chat format: anything with these methods will do.

`Transformer`, `Tokenizer` and `ChatFormat` have them; so may a network of your own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from llama.dialog import Dialog

if TYPE_CHECKING:  # a tokenizer needs no torch
    import torch


class ModelLimits(Protocol):
    """The sizes that calls are checked against. With a `vocab_size` beside them, token ids are checked too."""

    @property
    def max_batch_size(self) -> int: ...

    @property
    def max_seq_len(self) -> int: ...


class LanguageModel(Protocol):
    """A network that continues sequences of token ids.

    Tokens are passed on the device of its parameters if it is an `nn.Module`, else on the CPU. `forward` is called as a
    method. Calls wait for each other by a lock that is kept in an attribute of the object, `generation_lock`.
    """

    @property
    def params(self) -> ModelLimits: ...

    def forward(self, tokens: torch.Tensor, start_pos: int | torch.Tensor) -> torch.Tensor:
        """The logits of the token after each of `tokens`.

        Args:
            tokens: (batch, seq) int64. In the first call of a generation they are the prompts; shorter ones are padded
                on the right, with tokens that must not change the logits of those before them. After that, each call
                has one token a row.
            start_pos: the position of each row's first token: an int, or (batch,) int64 on the CPU where rows differ.
                What stands before it was passed in earlier calls.

        Returns:
            (batch, seq, vocab_size), of any floating-point dtype.
        """
        ...


class Cache(Protocol):
    """The keys and values of the tokens so far. `llama.kv_cache.KVCache` is one, for networks of any kind."""

    tokens: list[list[int]]

    def reorder(self, rows: torch.Tensor, end: int) -> None:
        """Make row i hold what row `rows[i]` holds, up to position `end`. `rows` is (rows) int64, on any device."""
        ...

    def clear(self, start: int, end: int) -> None:
        """Set positions from `start` to `end` to zeros."""
        ...


@runtime_checkable
class CachedModel(LanguageModel, Protocol):
    """A network whose cache can be reordered, as beam search needs it, and reused.

    With `reuse_cache` or speculative decoding, later calls of `forward` may have several tokens a row, too.
    """

    def setup_cache(self) -> Cache:
        """The cache that `forward` uses; made now if there is none yet, or if the device or dtype has changed.

        Whenever `forward` writes into the cache, it empties the cache's `tokens` (`KVCache.layers` does).
        """
        ...


class CompiledForm(Protocol):
    """A form of a `Transformer` that is quicker for decoding steps: see `llama.compiled` and `llama.captured`."""

    is_current: bool  # whether it is known to be that of the network as it is now; False makes it look again

    def step(self, model: Any, tokens: torch.Tensor, start_pos: int | torch.Tensor | None) -> torch.Tensor | None:
        """The logits of this call of `forward`; None for one that it can't take."""
        ...


class TextTokenizer(Protocol):
    """Turns text into ids and back.

    The ids that end an answer are its `stop_tokens`, or else its `eos_id`. Chat formats look for its `special_tokens`.
    """

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]: ...

    def decode(self, t: list[int]) -> str: ...


class TextGenerator(Protocol):
    """A network and its tokenizer, such as a `Llama`."""

    @property
    def model(self) -> LanguageModel: ...

    @property
    def tokenizer(self) -> TextTokenizer: ...


class DialogFormat(Protocol):
    """Turns a dialog into the prompt that asks for the assistant's next message.

    If it has a method `refusal`, that is asked what to answer in the model's place, or None.
    """

    def encode_dialog_prompt(self, dialog: Dialog) -> list[int]: ...
