"""Decoding steps in CUDA graphs: `Llama.build(..., compile=True)` on a GPU.

A step of a large model is some 850 kernels of a few microseconds each, which the host can't start as fast as the GPU
runs them. A graph starts them all at once. It repeats exactly what was captured, at the same addresses, so the step has
a fixed shape: tokens and positions lie in tensors that are filled before each replay, and attention covers a length
that is rounded up (`llama.positions.fixed_end`). One graph serves each number of rows and each such length.

The network captured is that of `llama.model`: a replay's logits are, to the bit, those of the same step as it is.
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from llama.model import Transformer
from llama.positions import fixed_end, step_positions

logger = logging.getLogger("llama")


class CapturedStep(NamedTuple):
    """A step of a number of rows, with attention over a number of positions."""

    graph: torch.cuda.CUDAGraph
    tokens: torch.Tensor  # (batch, 1), read by each replay
    positions: torch.Tensor  # (batch), likewise
    logits: torch.Tensor  # (batch, 1, vocab_size), written by each replay


class CapturedModel:
    """The decoding steps of a network on a GPU, captured when they are first needed.

    Attributes:
        is_current: whether the network is known to be as it was captured. Set to False, it is looked at again.
    """

    def __init__(self) -> None:
        self.is_current = False
        self._steps: dict[tuple[int, int], CapturedStep] = {}  # by number of rows and of positions
        self._parts: list[Any] = []  # what the network consisted of when they were captured
        self._has_failed = False
        self._has_hooks = False

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return CapturedModel, ()  # a copy of the network captures its own steps

    def step(
        self, model: Transformer, tokens: torch.Tensor, start_pos: int | torch.Tensor | None
    ) -> torch.Tensor | None:
        """The logits of a decoding step; None for a call that isn't one, or can't be captured.

        Args:
            model: the network, always the same.
            tokens, start_pos: see `Transformer.forward`.
        """
        if start_pos is None or tokens.shape[-1] != 1 or torch.is_autocast_enabled(tokens.device.type):
            return None
        end = fixed_end(model.check_call(tokens, start_pos), model.params.max_seq_len)
        if not self.is_current:
            self._look_at(model)
        if self._has_failed or self._has_hooks:
            return None
        key = len(tokens), end
        if key not in self._steps:
            try:
                self._steps[key] = self._capture(model, *key)
            except RuntimeError as error:
                self._has_failed = True
                logger.warning("decoding steps run without CUDA graphs, more slowly: %s", error)
                return None
        step = self._steps[key]
        step.tokens.copy_(tokens)
        step.positions.copy_(step_positions(start_pos, len(tokens), step.tokens.device))
        model.setup_cache().tokens = []  # a step changes what is there
        step.graph.replay()
        return step.logits.clone()  # the next replay writes there again

    def _look_at(self, model: Transformer) -> None:
        """Forget all captured steps, unless the network consists of the same tensors as before."""
        cache = model.setup_cache()
        tensors = [*model.parameters(), *model.buffers(), model.freqs_cis, cache.keys, cache.values]
        parts = [(tensor.data_ptr(), tensor.shape, tensor.dtype) for tensor in tensors]
        if parts != self._parts:
            self._steps, self._parts, self._has_failed = {}, parts, False
        self._has_hooks = has_hooks(model)  # a replay would not call them
        self.is_current = True

    @torch.inference_mode(False)
    @torch.no_grad()
    def _capture(self, model: Transformer, batch: int, end: int) -> CapturedStep:
        tokens = torch.zeros(batch, 1, dtype=torch.long, device=model.norm.weight.device)
        positions = torch.full((batch,), end - 1, device=tokens.device)  # which no row has passed
        pool = next((step.graph.pool() for step in self._steps.values()), None)

        def run() -> torch.Tensor:
            return model.logits(model.run_layers(tokens, positions, end, model.layers))

        graph, logits = capture(run, tokens.device, pool)
        return CapturedStep(graph, tokens, positions, logits)


def capture(
    run: Callable[[], torch.Tensor], device: torch.device, pool: Any
) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """Capture what a function does on a GPU.

    Args:
        run: waits for nothing, and computes the same at each call.
        pool: of memory, that of graphs which are never replayed at the same time; None for a new one.

    Returns:
        The graph, and the tensor into which its replays write what `run` returns.
    """
    with torch.cuda.device(device):
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            run()  # as it is: libraries prepare themselves at their first call
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may allocate memory in the meantime
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            output = run()
    return graph, output


def has_hooks(module: nn.Module) -> bool:
    """Whether a module, or one in it, has a hook, which a faster form would not call."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
