"""The sizes of a model."""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

from llama.errors import InputError


@dataclass
class ModelArgs:
    """The sizes of a model, by the names that `params.json` uses. The first eleven are the reference's."""

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None  # None: as many as n_heads
    vocab_size: int = -1  # set from the tokenizer
    multiple_of: int = 256  # the feed-forward width is rounded up to a multiple of this
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 500000
    max_batch_size: int = 32
    max_seq_len: int = 2048
    _: KW_ONLY
    use_scaled_rope: bool = False  # Llama 3.1 and later; the next four say how
    rope_scaling_factor: float = 8.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_max_seq_len: int = 8192
    rope_divisors: Sequence[float] | None = None  # of each frequency, or one for all, where that rule isn't used
    ffn_dim: int | None = None  # the feed-forward width itself, where the rule can't express it
    head_dim: int | None = None  # None: dim / n_heads
    tie_embeddings: bool = False  # output.weight is tok_embeddings.weight
    max_position_embeddings: int | None = None  # the longest max_seq_len it was made for; None if that isn't known

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_size(self) -> int:
        return self.dim // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def ffn_size(self) -> int:
        if self.ffn_dim is not None:
            return self.ffn_dim
        return feed_forward_size(4 * self.dim, self.multiple_of, self.ffn_dim_multiplier)

    def check(self, model_parallel_size: int = 1) -> None:
        """Raise InputError if no network of these sizes can be made, or not on this many processes."""
        factors = ("norm_eps", "rope_theta", "rope_scaling_factor", "rope_original_max_seq_len", "ffn_dim_multiplier")
        sizes = ("dim", "n_layers", "n_heads", "kv_heads", "vocab_size", "head_size", "multiple_of", "ffn_size")
        limits = ("max_batch_size", "max_seq_len", "max_position_embeddings")
        for name in (*factors, *sizes, *limits):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name}={value} must be {'a number above 0' if name in factors else 'at least 1'}")
            if name == "ffn_dim_multiplier" and (value or 0) > 1e6:
                raise InputError(f"{name}={value} is too large")
        low, high, divisors = self.rope_low_freq_factor, self.rope_high_freq_factor, self.rope_divisors
        if not 0 < low < high < math.inf:
            raise InputError(f"rope_low_freq_factor={low} must be above 0, and below rope_high_freq_factor={high}")
        if self.head_dim is None and self.dim % self.n_heads:
            raise InputError(f"dim={self.dim} must be a multiple of n_heads={self.n_heads}, or head_dim be given")
        if self.head_size % 2:
            raise InputError(f"the head size, {self.head_size}, must be even: rotary embedding rotates pairs")
        if divisors is not None and len(divisors) not in (1, self.head_size // 2):
            raise InputError(f"{len(divisors)} rope_divisors for {self.head_size // 2} frequencies")
        if divisors is not None and not all(0 < divisor < math.inf for divisor in divisors):
            raise InputError(f"rope_divisors={divisors!r:.80} must be numbers above 0")
        if self.n_heads % self.kv_heads:
            raise InputError(f"n_heads={self.n_heads} must be a multiple of n_kv_heads={self.kv_heads}")
        if not self._fits(model_parallel_size):
            possible = [size for size in range(1, self.n_heads + 1) if self._fits(size)]
            raise InputError(
                f"this model can't be split over {model_parallel_size} processes, only over one of {possible}: each "
                f"needs an equal share of n_heads={self.n_heads}, n_kv_heads={self.kv_heads} (or several hold the same "
                f"kv head), feed-forward width {self.ffn_size} and vocab_size={self.vocab_size}"
            )

    def _fits(self, size: int) -> bool:
        shared_heads = self.kv_heads % size == 0 or size % self.kv_heads == 0
        return shared_heads and not (self.n_heads % size or self.ffn_size % size or self.vocab_size % size)


def feed_forward_size(hidden_dim: int, multiple_of: int, ffn_dim_multiplier: float | None) -> int:
    """The width of SwiGLU: two thirds of `hidden_dim` (it has three matrices, not two), scaled and rounded up."""
    hidden_dim = int(2 * hidden_dim / 3)
    if ffn_dim_multiplier is not None:
        hidden_dim = int(ffn_dim_multiplier * hidden_dim)
    return multiple_of * math.ceil(hidden_dim / multiple_of)
