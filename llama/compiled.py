"""Decoding steps in compiled form: `Llama.build(..., compile=True)`.

The network stays the one of `llama.model`. Its layers are all alike, so that one of them is compiled, as a function of
its inputs and its weights, and serves as all of them. On a CPU that gives one C++ function, whose loops read each
weight once, at the speed of the memory, where the same layer takes some 45 operations of torch (see `llama.fused`).

Steps of one token of one row are compiled. Prompts, batches and beams run as they are: with more tokens the time is
that of the matrix products, which are fast already.

The compiler is TorchInductor, that of `torch.compile`, ahead of time: what `torch.compile` itself returns checks some
200 facts about the layer at each call, which takes a quarter of a step. The result is kept on disk.
"""

import functools
import hashlib
import inspect
import logging
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from llama.distributed import model_parallel_size
from llama.kv_cache import LayerCache
from llama.model import Transformer

logger = logging.getLogger("llama")

Step = Callable[[list[torch.Tensor]], list[torch.Tensor]]  # inputs and weights of a layer -> its output
Layer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, LayerCache], torch.Tensor]
MIN_SEQ_LEN = 4  # a shorter context has no step to compile


def compile_layers(model: Transformer) -> None:
    """Compile the layers of a network, or take them from the disk, and have them run its steps of one row.

    Where that fails, a warning says why, and all steps run as they are.
    """
    if model_parallel_size() > 1:
        logger.warning("compile=True has no effect with several processes: they exchange data within each layer")
        return
    model.compiled = CompiledLayers()
    model.compiled.refresh(model)


class CompiledLayers:
    """The layers of a network in compiled form, for steps of one token of one row.

    Attributes:
        layers: what takes the place of `Transformer.layers` in a call that they are ready for.
    """

    def __init__(self) -> None:
        self.layers: Sequence[Layer] = []
        self._step: Step | None = None
        self._key = ""  # what `_step` was compiled for, or could not be
        self._is_current = False  # whether `layers` are known to be those of the network as it is now

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return CompiledLayers, ()  # a copy of the network compiles for itself

    def ready(self, model: Transformer, tokens: torch.Tensor, start_pos: int | torch.Tensor | None, end: int) -> bool:
        """Whether `layers` can take this call.

        Args:
            model: the network, always the same.
            tokens: (batch, seq)
            start_pos: see `Transformer.forward`.
            end: the position after the last of `tokens`.
        """
        # From position 1 to the last but one: the compiler makes special code for sizes of 1 and for the whole cache.
        if tokens.numel() != 1 or start_pos is None or not 2 <= end < model.params.max_seq_len:
            self._is_current = False  # the network may have been changed before this prompt
            return False
        if not self._is_current:
            self.refresh(model)
        return bool(self.layers)

    def refresh(self, model: Transformer) -> None:
        """Make `layers` those of the network as it is now: a weight may have been replaced, or a hook registered."""
        self.layers, self._is_current = [], True
        if has_hooks(model.layers) or model.params.max_seq_len < MIN_SEQ_LEN:
            return
        weights = [layer_weights(layer) for layer in model.layers]
        key = compilation_key(model, weights[0])
        if key != self._key:
            self._step, self._key = None, key
            try:
                self._step = load_or_compile(model, key)
            except Exception as error:
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                logger.warning(
                    "decoding steps run without being compiled, more slowly (%s). Compiling takes a C++ compiler, such "
                    "as g++, and the header files of Python",
                    reason,
                )
        descriptions = [describe(tensors) for tensors in weights]
        if self._step is not None and all(description == descriptions[0] for description in descriptions):
            self.layers = [bind(self._step, list(tensors.values())) for tensors in weights]


def bind(step: Step, weights: list[torch.Tensor]) -> Layer:
    """A layer that calls the compiled step with its weights."""

    def layer(h: torch.Tensor, freqs_cis: torch.Tensor, mask: torch.Tensor | None, cache: LayerCache) -> torch.Tensor:
        return step([h, torch.view_as_real(freqs_cis), cache.keys, cache.values, *cache.slots, *weights])[0]

    return layer


class LayerFunction(nn.Module):
    """A layer as a function of its inputs and its weights."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = [layer]  # in a list: its weights are to be inputs, not a part of this module
        self.names = list(layer_weights(layer))

    def forward(
        self,
        h: torch.Tensor,
        freqs_cis: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rows: torch.Tensor,
        heads: torch.Tensor,
        positions: torch.Tensor,
        weights: list[torch.Tensor],
    ) -> torch.Tensor:
        cache = LayerCache(keys, values, (rows, heads, positions))
        weights_by_name = dict(zip(self.names, weights, strict=True))
        h = functional_call(self.layer[0], weights_by_name, (h, freqs_cis, None, cache))
        return h


def load_or_compile(model: Transformer, key: str) -> Step:
    """The compiled layer, from the disk if it is there. Its input is a list of those of `LayerFunction.forward`."""
    path = cache_folder() / f"{key}.pt2"
    if path.exists():
        try:
            return load(path)
        except RuntimeError as error:
            logger.warning("%s can't be loaded and is compiled again: %s", path, error)
    logger.info("compiling the decoding step for this model and processor: once, some 10 to 30 s")
    begin = time.monotonic()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".compiling-") as folder:
        compile_layer(model, Path(folder) / path.name).replace(path)
    step = load(path)
    logger.info("compiled in %.1f s", time.monotonic() - begin)
    return step


def load(path: Path) -> Step:
    """The function in a file of `compile_layer`."""
    step: Step = torch._inductor.aoti_load_package(str(path)).loader.boxed_run
    return step


@torch.inference_mode(False)
@torch.no_grad()
def compile_layer(model: Transformer, path: Path) -> Path:
    """Compile a layer of the network into a file."""
    weight, layer = model.norm.weight, model.layers[0]
    start_pos = 2  # any that the compiler makes no special code for
    (cache, *_) = model.setup_cache().layers(1, 1, torch.tensor([start_pos], device="cpu"))
    freqs_cis = torch.view_as_real(model.freqs_cis[start_pos][None, None].to(weight.device))
    end = torch.export.Dim("end", min=2, max=model.params.max_seq_len - 1)
    weights = [tensor.detach() for tensor in layer_weights(layer).values()]
    inputs = (weight.new_zeros(1, 1, len(weight)), freqs_cis, cache.keys, cache.values, *cache.slots, weights)
    dynamic_shapes = (None, None, {2: end}, {2: end}, None, None, None, [None] * len(weights))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler, about itself
        exported = torch.export.export(LayerFunction(layer), inputs, dynamic_shapes=dynamic_shapes)
        return Path(torch._inductor.aoti_compile_and_package(exported, package_path=str(path)))


def cache_folder() -> Path:
    """Where compiled code is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama" / "compiled"


def layer_weights(layer: nn.Module) -> dict[str, torch.Tensor]:
    """All tensors of a layer by name: its parameters, and the buffers of quantized weights."""
    return {**dict(layer.named_parameters()), **dict(layer.named_buffers())}


def describe(tensors: dict[str, torch.Tensor]) -> list[Any]:
    """What compiled code depends on."""
    return [(name, t.shape, t.stride(), t.dtype, t.device) for name, t in tensors.items()]


def has_hooks(layers: nn.Module) -> bool:
    """Whether a module of the layers has a hook, which compiled code would not call."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in layers.modules())


def compilation_key(model: Transformer, weights: dict[str, torch.Tensor]) -> str:
    """A name for all that the compiled layer depends on: its code, its sizes, torch, and the processor."""
    layer, keys = model.layers[0], model.setup_cache().keys
    instructions: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch can't tell
    facts = [
        [code_digest(frozenset(map(type, layer.modules()))), repr(layer)],
        [model.params, describe(weights), keys.shape, keys.dtype, keys.device],
        [torch.__version__, torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()],
        [platform.machine(), sorted(instructions.items())],
    ]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


@functools.cache
def code_digest(classes: frozenset[type]) -> str:
    """A checksum of the code of these classes and of what they use of this package."""
    files = {Path(inspect.getfile(cls)) for cls in classes} | set(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()
