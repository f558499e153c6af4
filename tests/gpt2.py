"""GPT-2: a second network, to show that `llama.Llama` serves any network that satisfies `llama.protocols`.

    tokens and positions -> wte + wpe -> n_layers x [attn, mlp] -> ln_f -> lm_head -> logits

Unlike Llama it learns an embedding of each position, normalizes with LayerNorm, uses GELU in its feed-forward network,
has biases, and every query head has a kv head of its own. Dimensions in comments are those of `llama.model`; parameters
have the names of Hugging Face's GPT2LMHeadModel.

Sources: "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019) and its predecessor "Improving
Language Understanding by Generative Pre-Training" (Radford et al., 2018).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from llama.kv_cache import KVCache, LayerCache


@dataclass
class GPT2Params:
    """The sizes of the network and of its cache; `max_seq_len` is also the number of positions it has learned."""

    dim: int = 768
    n_layers: int = 12
    n_heads: int = 12
    vocab_size: int = 50257
    max_seq_len: int = 1024
    max_batch_size: int = 4
    norm_eps: float = 1e-5


class Attention(nn.Module):
    """Causal self-attention; one matrix computes queries, keys and values."""

    def __init__(self, params: GPT2Params) -> None:
        super().__init__()
        self.n_heads = params.n_heads
        self.c_attn = nn.Linear(params.dim, 3 * params.dim)
        self.c_proj = nn.Linear(params.dim, params.dim)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, cache: LayerCache) -> torch.Tensor:
        qkv = self.c_attn(x).unflatten(-1, (3 * self.n_heads, -1))  # (batch, seq, 3 * n_heads, head_dim)
        xq, xk, xv = qkv.transpose(1, 2).chunk(3, dim=1)  # each (batch, n_heads, seq, head_dim)
        xk, xv = cache.update(xk, xv)  # (batch, n_heads, end, head_dim)
        out = F.scaled_dot_product_attention(xq, xk, xv, attn_mask=mask)
        return self.c_proj(out.transpose(1, 2).flatten(2))  # (batch, seq, dim)


class FeedForward(nn.Module):
    """c_proj(gelu(c_fc x)), four times as wide inside, with GELU in its tanh form (arXiv 1606.08415)."""

    def __init__(self, params: GPT2Params) -> None:
        super().__init__()
        self.c_fc = nn.Linear(params.dim, 4 * params.dim)
        self.c_proj = nn.Linear(4 * params.dim, params.dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """One layer: attention, then feed-forward, each on the normalized residual stream and added to it."""

    def __init__(self, params: GPT2Params) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(params.dim, eps=params.norm_eps)
        self.attn = Attention(params)
        self.ln_2 = nn.LayerNorm(params.dim, eps=params.norm_eps)
        self.mlp = FeedForward(params)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, cache: LayerCache) -> torch.Tensor:
        h = x + self.attn(self.ln_1(x), mask, cache)
        return h + self.mlp(self.ln_2(h))


class Decoder(nn.Module):
    """Everything but the output matrix: embeddings, layers and the last normalization."""

    def __init__(self, params: GPT2Params) -> None:
        super().__init__()
        self.wte = nn.Embedding(params.vocab_size, params.dim)
        self.wpe = nn.Embedding(params.max_seq_len, params.dim)
        self.h = nn.ModuleList(Block(params) for _ in range(params.n_layers))
        self.ln_f = nn.LayerNorm(params.dim, eps=params.norm_eps)

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, caches: list[LayerCache]
    ) -> torch.Tensor:
        x = self.wte(tokens) + self.wpe(positions)  # (batch, seq, dim)
        for layer, cache in zip(self.h, caches, strict=True):
            x = layer(x, mask, cache)
        return self.ln_f(x)


class GPT2(nn.Module):
    """The whole network; its output matrix is its token embedding (arXiv 1608.05859)."""

    def __init__(self, params: GPT2Params) -> None:
        super().__init__()
        self.params = params
        self.transformer = Decoder(params)
        self.lm_head = nn.Linear(params.dim, params.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        self.cache: KVCache | None = None

    def setup_cache(self) -> KVCache:
        """The KV cache; made now if there is none yet."""
        if self.cache is None:
            params, weight = self.params, self.lm_head.weight
            head_dim = params.dim // params.n_heads
            shape = (params.n_layers, params.max_batch_size, params.n_heads, params.max_seq_len, head_dim)
            self.cache = KVCache(shape, device=weight.device, dtype=weight.dtype)
        return self.cache

    @torch.no_grad()  # the cache stores no gradients
    def forward(self, tokens: torch.Tensor, start_pos: int | torch.Tensor) -> torch.Tensor:
        """The logits of the token after each of `tokens`: see `llama.protocols.LanguageModel`."""
        batch, seq = tokens.shape
        positions = torch.as_tensor(start_pos).view(-1, 1) + torch.arange(seq)  # (batch, seq); (1, seq) if rows agree
        end = int(positions.max()) + 1
        positions = positions.to(tokens.device)
        mask = torch.arange(end, device=tokens.device) <= positions[:, None, :, None]  # (batch or 1, 1, seq, end)
        caches = self.setup_cache().layers(batch, seq, start_pos)
        return self.lm_head(self.transformer(tokens, positions, mask, caches))


def from_hugging_face(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of `GPT2`, from that of GPT2LMHeadModel, whose layers store matrices as (in, out)."""
    matrices = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {name: tensor.T if name.endswith(matrices) else tensor for name, tensor in state_dict.items()}
