"""The KV cache: the keys and values of earlier tokens, kept for a network of any kind."""

from typing import Any, NamedTuple

import torch

from llama.device import copy_without_wait


class LayerCache(NamedTuple):
    """The part of one layer's cache that a call uses."""

    keys: torch.Tensor  # (batch, n_kv_heads, end, head_dim)
    values: torch.Tensor
    slots: tuple[Any, ...]  # index of this call's tokens in them

    def update(self, xk: torch.Tensor, xv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store this call's keys and values, (batch, n_kv_heads, seq, head_dim), and return all up to `end`."""
        self.keys[self.slots] = xk.type_as(self.keys)  # under autocast, theirs is another
        self.values[self.slots] = xv.type_as(self.values)
        return self.keys, self.values


class KVCache:
    """The keys and values of the tokens so far, so that each token passes through the network once.

    Its memory is taken when it is made.

    Args:
        shape: n_layers, max_batch_size, n_kv_heads, max_seq_len, head_dim.

    Attributes:
        keys, values: tensors of this shape.
        tokens: of each row, the ids whose keys and values are known to be there; a call that reuses the cache looks
            here. Empty whenever that isn't known.
    """

    def __init__(self, shape: tuple[int, int, int, int, int], *, device: torch.device, dtype: torch.dtype) -> None:
        with torch.inference_mode(False):  # a tensor made in inference mode could not be written to outside of it
            # Zeros, since a masked position has weight 0, and 0 times a NaN that happens to lie there would be NaN.
            self.keys = torch.zeros(shape, device=device, dtype=dtype)
            self.values = torch.zeros_like(self.keys)
        self.tokens: list[list[int]] = []

    def layers(self, batch: int, seq: int, start_pos: int | torch.Tensor, end: int | None = None) -> list[LayerCache]:
        """Each layer's part of the cache for a call that adds `seq` tokens to each of the first `batch` rows.

        Args:
            start_pos: the position of each row's first new token: an int, or (batch,) int64 where rows differ.
            end: how many positions are attended to, where `start_pos` is a tensor; None for those that are filled then.
        """
        self.tokens = []  # this call changes what is there
        if isinstance(start_pos, torch.Tensor):
            end, device = int(start_pos.max()) + seq if end is None else end, self.keys.device
            positions = start_pos.to(device)[:, None] + torch.arange(seq, device=device)  # (batch, seq)
            rows = torch.arange(batch, device=device)[:, None, None]
            heads = torch.arange(self.keys.shape[2], device=device)[:, None]
            # (batch, n_kv_heads, seq) each, and whole: a GPU would otherwise lay them out again in every layer.
            indices = torch.broadcast_tensors(rows, heads, positions[:, None])
            slots: tuple[Any, ...] = tuple(i.clone(memory_format=torch.contiguous_format) for i in indices)
        else:
            end = start_pos + seq
            slots = (..., slice(start_pos, end), slice(None))
        keys, values = self.keys[:, :batch, :, :end].unbind(0), self.values[:, :batch, :, :end].unbind(0)
        return [LayerCache(k, v, slots) for k, v in zip(keys, values, strict=True)]

    def reorder(self, rows: torch.Tensor, end: int) -> None:
        """Make row i hold what row `rows[i]` holds, up to position `end`."""
        self.tokens = []
        rows = copy_without_wait(rows, self.keys.device)
        for tensor in (*self.keys, *self.values):  # a layer at a time, so that the copies stay small
            tensor[: len(rows), :, :end] = tensor[:, :, :end].index_select(0, rows)

    def clear(self, start: int, end: int) -> None:
        """Set positions from `start` to `end` to zeros."""
        self.tokens = []
        self.keys[..., start:end, :] = 0
        self.values[..., start:end, :] = 0
