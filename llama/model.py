"""The network: token ids in, logits out.

    tokens -> tok_embeddings -> n_layers x [attention, feed_forward] -> norm -> output -> logits

Dimensions in comments: `batch` rows, `seq` tokens of this call, `end` positions that can be attended to (the cache's
and this call's), `dim` features, `n_heads` query heads, `n_kv_heads` key/value heads, `head_dim` features a head.
`n_local_` counts are this process's share under tensor parallelism.

Sources: Llama 2 (arXiv 2307.09288), Llama 3 (arXiv 2407.21783).
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from llama.distributed import model_parallel_size
from llama.errors import InputError
from llama.fast_kernels import fast_kernels
from llama.fused import attention, multiply_complex, normalize
from llama.kv_cache import KVCache, LayerCache
from llama.model_args import ModelArgs, feed_forward_size
from llama.parallel import (
    ColumnParallelLinear,
    KVHeadParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    local_kv_heads,
)
from llama.positions import fixed_end, has_fixed_steps, lay_out_positions, rotations_on, step_positions
from llama.protocols import CompiledForm

Layer = Callable[..., torch.Tensor]  # a `TransformerBlock`, or what takes its place


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in float32 (arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return normalize(x, self.eps) * self.weight  # not in float32 any more, as in the reference


def precompute_freqs_cis(
    dim: int,
    end: int,
    theta: float = 10000.0,
    use_scaled: bool = False,
    *,
    scaling_factor: float = 8.0,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    original_max_seq_len: int = 8192,
    divisors: Sequence[float] | None = None,
) -> torch.Tensor:
    """The rotations of rotary embedding (arXiv 2104.09864): e^(i pos theta^(-2j/dim)).

    `use_scaled` extends the context as Llama 3.1 does: frequencies with a wavelength above
    `original_max_seq_len / low_freq_factor` are divided by `scaling_factor`, those with a wavelength below
    `original_max_seq_len / high_freq_factor` are kept, and those between are interpolated.

    Args:
        dim: features a head.
        end: number of positions.
        divisors: further divisors of the frequencies: one for each of the dim / 2, or one for all.

    Returns:
        complex64 (end, dim / 2), on the CPU.
    """
    freqs = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)  # (dim / 2)
    if use_scaled:
        wavelengths = 2 * math.pi / freqs
        keep = (original_max_seq_len / wavelengths - low_freq_factor) / (high_freq_factor - low_freq_factor)
        keep = keep.clamp(0, 1)
        freqs = (1 - keep) * freqs / scaling_factor + keep * freqs
    if divisors is not None:
        freqs = freqs / torch.tensor(divisors, dtype=torch.float32, device="cpu")
    angles = torch.outer(torch.arange(end, dtype=torch.float32, device="cpu"), freqs)  # (end, dim / 2)
    return torch.polar(torch.ones_like(angles), angles)


def reshape_for_broadcast(freqs_cis: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Insert a heads dimension, so that the rotations broadcast over x.

    Args:
        freqs_cis: complex (seq, head_dim / 2), or (batch, seq, head_dim / 2) where rows stand at different positions;
            or real, with another last dimension: real and imaginary parts.
        x: (batch, seq, heads, head_dim / 2)

    Returns:
        (1 or batch, seq, 1, head_dim / 2), or (1 or batch, seq, 1, head_dim / 2, 2)
    """
    seq_axis = -2 if freqs_cis.is_complex() else -3
    if freqs_cis.shape[seq_axis : seq_axis + 2 or None] != (x.shape[1], x.shape[-1]):
        raise InputError(f"freqs_cis of shape {tuple(freqs_cis.shape)} don't fit a tensor of shape {tuple(x.shape)}")
    return freqs_cis.view(-1, x.shape[1], 1, *freqs_cis.shape[seq_axis + 1 :])


def apply_rotary_emb(xq: torch.Tensor, xk: torch.Tensor, freqs_cis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate each pair of neighbouring features (2j, 2j + 1) by its position's angle, in float32.

    Hugging Face pairs feature j with j + head_dim / 2 instead, which is why its wq and wk have their rows in another
    order.

    Args:
        xq: (batch, seq, n_heads, head_dim)
        xk: (batch, seq, n_kv_heads, head_dim)
        freqs_cis: see `reshape_for_broadcast`.

    Returns:
        xq and xk, rotated, with the shapes and dtypes they came with.
    """
    xq_pairs = xq.float().reshape(*xq.shape[:-1], -1, 2)  # (batch, seq, n_heads, head_dim / 2, 2)
    xk_pairs = xk.float().reshape(*xk.shape[:-1], -1, 2)
    freqs_cis = reshape_for_broadcast(freqs_cis, xq_pairs[..., 0])
    xq_rotated, xk_rotated = multiply_complex(xq_pairs, freqs_cis), multiply_complex(xk_pairs, freqs_cis)
    return xq_rotated.flatten(-2).type_as(xq), xk_rotated.flatten(-2).type_as(xk)


def repeat_kv(x: torch.Tensor, n_rep: int) -> torch.Tensor:
    """Repeat each kv head: (batch, seq, n_kv_heads, head_dim) -> (batch, seq, n_kv_heads * n_rep, head_dim).

    This is what grouped queries mean. `Attention` gets the same result without the copies.
    """
    return x.repeat_interleave(n_rep, dim=2)


class Attention(nn.Module):
    """Causal self-attention with grouped queries (arXiv 2305.13245): query head i reads kv head i // n_rep."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.head_dim = args.head_size
        self.n_local_heads = args.n_heads // model_parallel_size()
        self.n_local_kv_heads = local_kv_heads(args.kv_heads)
        self.n_rep = self.n_local_heads // self.n_local_kv_heads
        self.wq = ColumnParallelLinear(args.dim, args.n_heads * self.head_dim)
        self.wk = KVHeadParallelLinear(args.dim, args.kv_heads, self.head_dim)
        self.wv = KVHeadParallelLinear(args.dim, args.kv_heads, self.head_dim)
        self.wo = RowParallelLinear(args.n_heads * self.head_dim, args.dim)

    def forward(
        self, x: torch.Tensor, freqs_cis: torch.Tensor, mask: torch.Tensor | None, cache: LayerCache | None
    ) -> torch.Tensor:
        batch, seq, _ = x.shape  # (batch, seq, dim)
        xq, xk, xv = self.wq(x), self.wk(x), self.wv(x)
        xq = xq.view(batch, seq, self.n_local_heads, self.head_dim)
        xk = xk.view(batch, seq, self.n_local_kv_heads, self.head_dim)
        xv = xv.view(batch, seq, self.n_local_kv_heads, self.head_dim)
        xq, xk = apply_rotary_emb(xq, xk, freqs_cis)
        xq, xk, xv = xq.transpose(1, 2), xk.transpose(1, 2), xv.transpose(1, 2)  # (batch, heads, seq, head_dim)
        if cache is not None:
            xk, xv = cache.update(xk, xv)  # (batch, n_local_kv_heads, end, head_dim)

        if mask is None and seq > 1:
            out = F.scaled_dot_product_attention(xq, xk, xv, is_causal=True, enable_gqa=self.n_rep > 1)
        else:
            # The n_rep query heads that share a kv head become rows of one head: plain attention, on any device.
            xq = xq.reshape(batch, self.n_local_kv_heads, self.n_rep * seq, self.head_dim)
            out = attention(xq, xk, xv, mask)
        out = out.reshape(batch, self.n_local_heads, seq, self.head_dim)
        return self.wo(out.transpose(1, 2).flatten(2))  # (batch, seq, dim)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x) (arXiv 2002.05202).

    `hidden_dim` is the width before the rule of `feed_forward_size`; with multiple_of=None, the width itself.
    """

    def __init__(
        self, dim: int, hidden_dim: int, multiple_of: int | None = None, ffn_dim_multiplier: float | None = None
    ) -> None:
        super().__init__()
        if multiple_of is not None:
            hidden_dim = feed_forward_size(hidden_dim, multiple_of, ffn_dim_multiplier)
        self.w1 = ColumnParallelLinear(dim, hidden_dim)
        self.w2 = RowParallelLinear(hidden_dim, dim)
        self.w3 = ColumnParallelLinear(dim, hidden_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    """One layer: attention, then feed-forward, each on the normalized residual stream and added to it."""

    def __init__(self, layer_id: int, args: ModelArgs) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args.dim, args.ffn_size)
        self.attention_norm = RMSNorm(args.dim, eps=args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, eps=args.norm_eps)

    def forward(
        self, x: torch.Tensor, freqs_cis: torch.Tensor, mask: torch.Tensor | None, cache: LayerCache | None
    ) -> torch.Tensor:
        h = x + self.attention(self.attention_norm(x), freqs_cis, mask, cache)
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    """The whole network, with a KV cache that is made at the first call that needs it.

    Args:
        params: the sizes. Under a model-parallel group this process gets its share of every matrix.

    Raises:
        InputError: sizes that don't fit each other, or the number of processes.
    """

    def __init__(self, params: ModelArgs) -> None:
        super().__init__()
        params.check(model_parallel_size())
        self.params = params
        self.vocab_size, self.n_layers = params.vocab_size, params.n_layers
        self.n_rep = params.n_heads // model_parallel_size() // local_kv_heads(params.kv_heads)
        self.tok_embeddings = VocabParallelEmbedding(params.vocab_size, params.dim)
        self.layers = nn.ModuleList(TransformerBlock(layer_id, params) for layer_id in range(params.n_layers))
        self.norm = RMSNorm(params.dim, eps=params.norm_eps)
        self.output = ColumnParallelLinear(params.dim, params.vocab_size, gather_output=True)
        if params.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        # Not a buffer: `.half()` or `.to(bfloat16)` would cast it, and it isn't part of a checkpoint.
        self.freqs_cis = precompute_freqs_cis(
            params.head_size,
            params.max_seq_len,
            params.rope_theta,
            params.use_scaled_rope,
            scaling_factor=params.rope_scaling_factor,
            low_freq_factor=params.rope_low_freq_factor,
            high_freq_factor=params.rope_high_freq_factor,
            original_max_seq_len=params.rope_original_max_seq_len,
            divisors=params.rope_divisors,
        )
        self.cache: KVCache | None = None
        self.compiled: CompiledForm | None = None  # see `llama.compiled`

    def forward(self, tokens: torch.Tensor, start_pos: int | torch.Tensor | None = None) -> torch.Tensor:
        """The logits of the token after each of `tokens`.

        Args:
            tokens: (batch, seq) int64.
            start_pos: the position of each row's first token: an int, or (batch,) int64 where rows differ (best on the
                CPU: the largest is needed there). Earlier keys and values are taken from the cache, and those of
                `tokens` are added to it, without gradients. None: `tokens` are whole sequences, the cache is neither
                used nor changed, and gradients flow.

        Returns:
            (batch, seq, vocab_size) float32.

        Raises:
            InputError: more rows or positions than `max_batch_size` or `max_seq_len`.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and start_pos is None):
            logits = None if self.compiled is None else self.compiled.step(self, tokens, start_pos)
            return self.logits(self.hidden_states(tokens, start_pos)) if logits is None else logits

    def hidden_states(
        self, tokens: torch.Tensor, start_pos: int | torch.Tensor | None = None, layers: Iterable[Layer] | None = None
    ) -> torch.Tensor:
        """`forward` without `logits`: (batch, seq, dim). `layers`, if given, are run in place of the network's."""
        end, max_seq_len = self.check_call(tokens, start_pos), self.params.max_seq_len
        if self.compiled is not None and tokens.shape[1] > 1:
            self.compiled.is_current = False  # before this prompt, the network may have been changed
        if start_pos is not None and tokens.shape[1] == 1 and has_fixed_steps(tokens.device):
            start_pos, end = step_positions(start_pos, len(tokens), tokens.device), fixed_end(end, max_seq_len)
        with torch.set_grad_enabled(torch.is_grad_enabled() and start_pos is None):
            return self.run_layers(tokens, start_pos, end, self.layers if layers is None else layers)

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., dim) -> (..., vocab_size) float32."""
        with fast_kernels(hidden_states.shape[:-1].numel(), self.norm.weight):
            return self.output(hidden_states).float()

    def setup_cache(self) -> KVCache:
        """The cache; made now if there is none yet, or if the model has since changed its device or dtype."""
        cache, weight, args = self.cache, self.norm.weight, self.params
        if cache is None or (cache.keys.device, cache.keys.dtype) != (weight.device, weight.dtype):
            cache = self.cache = None  # frees its memory before new memory is taken
            kv_heads = local_kv_heads(args.kv_heads)
            shape = (args.n_layers, args.max_batch_size, kv_heads, args.max_seq_len, args.head_size)
            cache = self.cache = KVCache(shape, device=weight.device, dtype=weight.dtype)
        return cache

    def run_layers(
        self, tokens: torch.Tensor, start_pos: int | torch.Tensor | None, end: int, layers: Iterable[Layer]
    ) -> torch.Tensor:
        """`hidden_states` of a call that `check_call` has accepted.

        Args:
            start_pos: see `forward`; as a tensor, (batch,) on any device: its values are not looked at.
            end: how many positions the last token attends to, or more: those after a row's own tokens are masked.
            layers: the network's, or others in their place.
        """
        with fast_kernels(tokens.numel(), self.norm.weight):
            h = self.tok_embeddings(tokens)  # (batch, seq, dim)
            batch, seq, _ = h.shape
            if self.freqs_cis.device != h.device:
                self.freqs_cis = rotations_on(h.device, self.freqs_cis)
            freqs_cis, mask = lay_out_positions(self.freqs_cis, start_pos, seq, end, self.n_rep, h.dtype)
            caches: Sequence[LayerCache | None] = [None] * self.n_layers
            if start_pos is not None:
                caches = self.setup_cache().layers(batch, seq, start_pos, end)
            for layer, layer_cache in zip(layers, caches, strict=True):
                h = layer(h, freqs_cis, mask, layer_cache)
            return self.norm(h)

    def check_call(self, tokens: torch.Tensor, start_pos: int | torch.Tensor | None) -> int:
        """The position after the last of `tokens` in any row. InputError if they don't fit the cache."""
        if tokens.dim() != 2:
            raise InputError(f"tokens must be (batch, seq), not of shape {tuple(tokens.shape)}")
        batch, seq = tokens.shape
        first = last = 0 if start_pos is None else start_pos
        if isinstance(start_pos, torch.Tensor):
            if start_pos.shape != (batch,):
                raise InputError(f"start_pos must have shape ({batch},), not {tuple(start_pos.shape)}")
            first, last = int(start_pos.min()), int(start_pos.max())
        if first < 0:
            raise InputError(f"start_pos={first} must be at least 0")
        if last + seq > self.params.max_seq_len:
            raise InputError(f"position {last + seq - 1} is past the end: max_seq_len={self.params.max_seq_len}")
        if start_pos is not None and batch > self.params.max_batch_size:
            raise InputError(f"{batch} rows are more than max_batch_size={self.params.max_batch_size}")
        return int(last + seq)
