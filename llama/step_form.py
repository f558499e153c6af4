"""What compiled and captured decoding steps have in common: they are made for the network as it is at the time."""

import torch
from torch import nn

from llama.model import Transformer


class StepForm:
    """A form of a network's decoding steps that is made once. A network may be changed, though, before a prompt.

    Attributes:
        is_current: whether the form is known to be that of the network as it is. `Transformer` sets it to False at each
            prompt, and a step that doesn't follow the last one does: a prompt may have one token.
    """

    def __init__(self) -> None:
        self.is_current = False
        self._last_step = 0, 0  # its number of rows, and the position after it

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()  # a copy of the network makes its own

    def end_of_step(self, model: Transformer, tokens: torch.Tensor, start_pos: int | torch.Tensor | None) -> int | None:
        """The position after a decoding step; None for a call that isn't one, or is under autocast.

        Args:
            tokens, start_pos: see `Transformer.forward`.
        """
        if start_pos is None or tokens.shape[-1] != 1 or torch.is_autocast_enabled(tokens.device.type):
            return None
        end = model.check_call(tokens, start_pos)
        if self._last_step not in ((len(tokens), end - 1), (len(tokens), end)):
            self.is_current = False
        self._last_step = len(tokens), end
        return end


def is_hooked(module: nn.Module) -> bool:
    """Whether a module, or one in it, has a hook, which another form would not call."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
