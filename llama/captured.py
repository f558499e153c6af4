"""Decoding steps in CUDA graphs: `Llama.build(..., compile=True)` on a GPU.

A step of a large model is some 800 kernels of a few microseconds each, which the host can't start as fast as the GPU
runs them. A graph starts them all at once. It repeats exactly what was captured, at the same addresses, so the step has
a fixed shape: tokens and positions lie in tensors that are filled before each replay, and attention covers a length
that is rounded up (`llama.positions.fixed_end`). One graph serves each number of rows and each such length.

The network captured is that of `llama.model`: a replay's logits are, to the bit, those of the same step as it is.
"""

import logging
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from llama.kv_cache import KVCache
from llama.model import Transformer
from llama.out_of_memory import is_out_of_memory
from llama.positions import fixed_end, has_fixed_steps, step_positions
from llama.step_form import StepForm, is_hooked

logger = logging.getLogger("llama")


class Buffers(NamedTuple):
    """What the graphs for one number of rows read and write."""

    tokens: torch.Tensor  # (batch, 1)
    positions: torch.Tensor  # (batch)
    logits: torch.Tensor  # (batch, 1, vocab_size)


class CapturedModel(StepForm):
    """The decoding steps of a network on a GPU, captured when they are first needed."""

    def __init__(self) -> None:
        super().__init__()
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}  # by number of rows and of positions
        self._buffers: dict[int, Buffers] = {}  # by number of rows
        self._cache: KVCache | None = None
        self._parts: list[Any] = []  # what the network consisted of when they were captured
        self._has_failed = False
        self._is_hooked = False

    def step(
        self, model: Transformer, tokens: torch.Tensor, start_pos: int | torch.Tensor | None
    ) -> torch.Tensor | None:
        """The logits of a decoding step; None for a call that isn't one, or can't be captured.

        Args:
            model: the network, always the same.
            tokens, start_pos: see `Transformer.forward`.
        """
        end = self.end_of_step(model, tokens, start_pos)
        if end is None or start_pos is None or not has_fixed_steps(tokens.device):
            return None
        cache = model.setup_cache()
        if not self.is_current or cache is not self._cache:
            self._forget_if_changed(model, cache)
        if self._has_failed or self._is_hooked:
            return None
        batch, end = len(tokens), fixed_end(end, model.params.max_seq_len)
        if batch not in self._buffers:
            self._buffers[batch] = make_buffers(batch, model.vocab_size, tokens.device)
        buffers = self._buffers[batch]
        buffers.tokens.copy_(tokens)
        buffers.positions.copy_(step_positions(start_pos, batch, tokens.device))
        if (batch, end) not in self._graphs and not self._capture(model, buffers, end):
            return None
        cache.tokens = []  # a step changes what is there
        self._graphs[batch, end].replay()
        return buffers.logits.clone()  # the next replay writes there again

    def _forget_if_changed(self, model: Transformer, cache: KVCache) -> None:
        """Forget all graphs, unless the network consists of the same tensors as when they were captured."""
        tensors = [*model.parameters(), *model.buffers(), model.freqs_cis, cache.keys, cache.values]
        parts = [(tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
        if parts != self._parts:
            self._graphs, self._buffers, self._parts, self._has_failed = {}, {}, parts, False
        self._is_hooked = is_hooked(model)
        self._cache, self.is_current = cache, True

    def _capture(self, model: Transformer, buffers: Buffers, end: int) -> bool:
        """Capture the step whose tokens and positions are in the buffers, and return whether that was possible."""

        def run() -> None:
            hidden_states = model.run_layers(buffers.tokens, buffers.positions, end, model.layers)
            buffers.logits.copy_(model.logits(hidden_states))

        pool = next((graph.pool() for graph in self._graphs.values()), None)
        try:
            self._graphs[len(buffers.tokens), end] = capture(run, buffers.tokens.device, pool)
        except RuntimeError as error:
            self._graphs = {}
            if is_out_of_memory(error):  # which their memory, given back, may mend
                raise
            self._has_failed = True
            logger.warning("decoding steps run without CUDA graphs, more slowly: %s", error)
        return not self._has_failed


@torch.inference_mode(False)  # so that they can be written to in any mode
def make_buffers(batch: int, vocab_size: int, device: torch.device) -> Buffers:
    """Buffers for steps of this many rows."""
    tokens = torch.zeros(batch, 1, dtype=torch.long, device=device)
    logits = torch.zeros(batch, 1, vocab_size, dtype=torch.float32, device=device)
    return Buffers(tokens, torch.zeros_like(tokens[:, 0]), logits)


_capturing = threading.Lock()  # torch captures one graph at a time
_streams: dict[torch.device, torch.cuda.Stream] = {}  # one for each GPU: libraries keep memory for each they have seen


@torch.no_grad()
def capture(run: Callable[[], None], device: torch.device, pool: Any) -> torch.cuda.CUDAGraph:
    """Capture what a function does on a GPU, after running it once.

    Args:
        run: never waits for the GPU, and starts the same kernels at each call.
        pool: of memory, that of graphs which are never replayed at the same time; None for a new one.
    """
    with _capturing, torch.cuda.device(device):
        if device not in _streams:
            _streams[device] = torch.cuda.Stream()
        stream, current = _streams[device], torch.cuda.current_stream()
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                run()  # as it is: libraries prepare themselves at their first call
            current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # thread_local: other threads may allocate memory in the meantime
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                run()
        finally:
            torch.cuda.set_stream(current)  # where torch leaves the other one if a capture fails
    return graph
