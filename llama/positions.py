"""Where the tokens of a call stand: their rotations, what they attend to, and steps of a fixed shape."""

import math

import torch

from llama.device import copy_without_wait

FIXED_STEPS_ON = ("cuda",)  # kinds of devices
SHORTEST_END = 256  # positions that a decoding step of fixed shape attends to, at least
ALIGNMENT = 8  # rows of a mask begin at multiples of it: on a GPU torch's attention copies one whose rows don't


def has_fixed_steps(device: torch.device) -> bool:
    """Whether decoding steps have a fixed shape: the same operations at every position, without a wait for the host.

    On a GPU a step can then be captured (see `llama.captured`), and no operation prepares itself for each new length.
    """
    return device.type in FIXED_STEPS_ON


def fixed_end(end: int, max_seq_len: int) -> int:
    """How many positions a step of fixed shape attends to, where `end` are filled.

    It is rounded up, from 1024 on by a quarter at most, so that few different shapes serve a whole answer.
    """
    step = max(SHORTEST_END, 2 ** (end.bit_length() - 3))
    return min(-(-end // step) * step, max_seq_len)


def start_positions(lengths: list[int]) -> int | torch.Tensor:
    """Positions that `LanguageModel.forward` starts at, one for each row: an int, or (batch,) where they differ."""
    return lengths[0] if min(lengths) == max(lengths) else torch.tensor(lengths, device="cpu")


def step_positions(start_pos: int | torch.Tensor, batch: int, device: torch.device) -> torch.Tensor:
    """The position of each row's token, (batch) int64, brought to the device without a wait."""
    if isinstance(start_pos, torch.Tensor):
        return copy_without_wait(start_pos, device)
    return torch.full((batch,), start_pos, device=device)


@torch.inference_mode(False)  # as tensors that can also be used with gradients
def rotations_on(device: torch.device, freqs_cis: torch.Tensor) -> torch.Tensor:
    """The rotations on a device, for `apply_rotary_emb`: complex, or as real and imaginary parts where it must be."""
    if device.type == "mps" and not torch.backends.mps.is_macos_or_newer(14, 0):  # it has no complex numbers
        freqs_cis = torch.view_as_real(freqs_cis)
    return freqs_cis.to(device)


def lay_out_positions(
    freqs_cis: torch.Tensor,
    start_pos: int | torch.Tensor | None,
    seq: int,
    end: int,
    n_rep: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What every layer needs to know of the positions of a call's tokens.

    Args:
        freqs_cis: the rotations of all positions, on the device of the tokens.
        start_pos: the position of each row's first token: an int, or (batch,) int64 where rows differ; None for 0.
        seq: how many tokens a row has.
        end: how many positions are attended to, at most.
        n_rep: how many query heads share a kv head.
        dtype: of the mask.

    Returns:
        freqs_cis: the rotations of the tokens, (seq, head_dim / 2), or (batch, seq, head_dim / 2) where rows differ.
        mask: 0 where a token may attend and minus infinity elsewhere, (1 or batch, 1, 1, end), or for several tokens
            (1 or batch, 1, n_rep * seq, end); None if each may to all positions up to its own.
    """
    device = freqs_cis.device
    if isinstance(start_pos, torch.Tensor):
        positions = start_pos.to(device)[:, None] + torch.arange(seq, device=device)  # (batch, seq)
        freqs_cis = freqs_cis[positions]
    else:
        start_pos = start_pos or 0
        freqs_cis = freqs_cis[start_pos : start_pos + seq]
        if start_pos == 0 or seq == 1:
            return freqs_cis, None
        positions = torch.arange(start_pos, start_pos + seq, device=device)[None]
    width = -(-end // ALIGNMENT) * ALIGNMENT
    later = torch.arange(width, device=device) > positions[:, None, :, None]  # (1 or batch, 1, seq, width)
    mask = torch.zeros_like(later, dtype=dtype).masked_fill_(later, -math.inf)
    return freqs_cis, (mask if seq == 1 else mask.repeat(1, 1, n_rep, 1))[..., :end]
