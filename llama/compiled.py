"""Decoding steps in compiled form: `Llama.build(..., compile=True)`. On a GPU, see `llama.captured` instead.

The network stays the one of `llama.model`. Its layers are all alike, so that one of them is compiled, as a function of
its inputs and its weights, and serves as all of them. On a CPU a layer becomes one C++ function, whose loops read each
weight once, at the speed of the memory, where it takes some 45 operations of torch otherwise (see `llama.fused`).

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

from llama.captured import CapturedModel
from llama.distributed import model_parallel_size
from llama.kv_cache import LayerCache
from llama.model import Transformer
from llama.quantized import COMPILED_INT8_IS_FAST, Int8Weight
from llama.step_form import StepForm, is_hooked

logger = logging.getLogger("llama")

Function = Callable[[list[torch.Tensor]], list[torch.Tensor]]  # inputs, then weights -> the output, alone in a list
MIN_SEQ_LEN = 4  # a shorter context has no step to compile
EXAMPLE_POSITION = 2  # any that the compiler makes no special code for


def compile_model(model: Transformer) -> None:
    """Make a network's decoding steps faster. Where that fails, a warning says why, and they run as they are.

    On a CPU its layers and output are compiled, or taken from the disk; on CUDA, steps will be captured when they come.
    """
    device = model.norm.weight.device
    if model_parallel_size() > 1:
        logger.warning("compile=True has no effect with several processes: they exchange data within each layer")
    elif device.type == "cuda":
        model.compiled = CapturedModel()
    elif device.type == "cpu":
        model.compiled = CompiledModel()
        model.compiled.refresh(model)
    else:
        logger.warning("compile=True has no effect on %s", device)


class CompiledModel(StepForm):
    """The layers and the output of a network in compiled form, for steps of one token of one row.

    Attributes:
        layers: what takes the place of the network's layers; empty where they run as they are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[Callable[..., torch.Tensor]] = []
        self._logits: Callable[[torch.Tensor], torch.Tensor]  # hidden states -> logits
        self._slots: Sequence[torch.Tensor] = ()  # of the step's token in the cache: rows, heads, positions
        self._functions: tuple[Function, Function | None] | None = None  # of a layer, and of the output
        self._key = ""  # what they were compiled for, or could not be

    def step(
        self, model: Transformer, tokens: torch.Tensor, start_pos: int | torch.Tensor | None
    ) -> torch.Tensor | None:
        """The logits of a decoding step of one row; None for any other call.

        Args:
            model: the network, always the same.
            tokens, start_pos: see `Transformer.forward`.
        """
        end = self.end_of_step(model, tokens, start_pos)
        # From position 1 to the last but one: the compiler makes special code for sizes of 1 and for the whole cache.
        if end is None or len(tokens) > 1 or not 2 <= end < model.params.max_seq_len:
            return None
        if not self.is_current:
            self.refresh(model)
            self.is_current = True
        if not self.layers:
            return None
        self._slots[-1].fill_(end - 1)
        return self._logits(model.run_layers(tokens, end - 1, end, self.layers))

    def refresh(self, model: Transformer) -> None:
        """Make `layers` those of the network as it is now: a weight may have been replaced, or a hook registered."""
        self.layers = []
        if is_hooked(model.layers) or is_hooked(model.output) or model.params.max_seq_len < MIN_SEQ_LEN:
            return
        weights, output_weights = [weights_of(layer) for layer in model.layers], weights_of(model.output)
        descriptions = [describe(tensors) for tensors in weights]
        if any(description != descriptions[0] for description in descriptions):
            return
        key = compilation_key(model, descriptions[0] + describe(output_weights))
        if key != self._key:
            self._functions, self._key = None, key
            try:
                self._functions = self._compile(model, key)
            except Exception as error:
                logger.warning(
                    "decoding steps run without being compiled, more slowly (%s). Compiling takes a C++ compiler, such "
                    "as g++, and the header files of Python",
                    str(error).strip().partition("\n")[0] or type(error).__name__,
                )
        if self._functions is not None:
            layer_function, output_function = self._functions
            self._slots = slots_of_step(model)
            self.layers = [bind_layer(layer_function, self._slots, list(tensors.values())) for tensors in weights]
            self._logits = model.logits
            if output_function is not None:
                self._logits = bind_output(output_function, list(output_weights.values()))

    def _compile(self, model: Transformer, key: str) -> tuple[Function, Function | None]:
        """The compiled layer, and the compiled output where it is faster than torch's product."""
        folder = cache_folder()
        layer = load_or_compile(folder / f"{key}-layer.pt2", functools.partial(compile_layer, model), "layers")
        if not (COMPILED_INT8_IS_FAST and isinstance(model.output.weight, Int8Weight)):
            return layer, None
        return layer, load_or_compile(folder / f"{key}-output.pt2", functools.partial(compile_output, model), "output")


@torch.inference_mode(False)  # so that they can be changed in any mode
def slots_of_step(model: Transformer) -> tuple[torch.Tensor, ...]:
    """The index, in a layer's cache, of the token of a step of one row: rows, heads, and positions, all 2 here."""
    (cache, *_) = model.setup_cache().layers(1, 1, torch.tensor([EXAMPLE_POSITION], device="cpu"))
    return cache.slots


def bind_layer(
    function: Function, slots: Sequence[torch.Tensor], weights: list[torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """What takes a layer's place, with its weights, and with the slots that the step's keys and values go into."""

    def layer(h: torch.Tensor, freqs_cis: torch.Tensor, mask: torch.Tensor | None, cache: LayerCache) -> torch.Tensor:
        return function([h, torch.view_as_real(freqs_cis), cache.keys, cache.values, *slots, *weights])[0]

    return layer


def bind_output(function: Function, weights: list[torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """What takes the place of `Transformer.logits`, with the output's weights."""
    return lambda h: function([h, *weights])[0].float()


class ModuleFunction(nn.Module):
    """A module as a function of its inputs and its weights."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = [module]  # in a list: its weights are to be inputs, not a part of this module
        self.names = list(weights_of(module))

    def call(self, weights: list[torch.Tensor], *inputs: Any) -> torch.Tensor:
        output: torch.Tensor = functional_call(self.module[0], dict(zip(self.names, weights, strict=True)), inputs)
        return output


class LayerFunction(ModuleFunction):
    """A `TransformerBlock` as a function."""

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
        return self.call(weights, h, freqs_cis, None, LayerCache(keys, values, (rows, heads, positions)))


class OutputFunction(ModuleFunction):
    """The output layer as a function."""

    def forward(self, h: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
        return self.call(weights, h)


def load_or_compile(path: Path, compile_part: Callable[[Path], Path], name: str) -> Function:
    """The function in a file, which is made now if it isn't there.

    Args:
        path: of the file.
        compile_part: makes such a file.
        name: what the function computes, for the log.
    """
    if path.exists():
        try:
            return load(path)
        except RuntimeError as error:
            logger.warning("%s can't be loaded and is compiled again: %s", path, error)
    logger.info("compiling the %s for this model and processor: once, some 10 to 20 s", name)
    begin = time.monotonic()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".compiling-") as folder:
        compile_part(Path(folder) / path.name).replace(path)
    logger.info("compiled in %.1f s", time.monotonic() - begin)
    return load(path)


def load(path: Path) -> Function:
    """The function in a file that `compile_function` has written."""
    function: Function = torch._inductor.aoti_load_package(str(path)).loader.boxed_run
    return function


@torch.inference_mode(False)
def compile_layer(model: Transformer, path: Path) -> Path:
    """Compile a layer of the network into a file."""
    start_pos = EXAMPLE_POSITION
    (cache, *_) = model.setup_cache().layers(1, 1, torch.tensor([start_pos], device="cpu"))
    h = model.norm.weight.new_zeros(1, 1, model.params.dim)
    freqs_cis = torch.view_as_real(model.freqs_cis[start_pos][None].to(h.device))
    end = torch.export.Dim("end", min=2, max=model.params.max_seq_len - 1)
    inputs = (h, freqs_cis, cache.keys, cache.values, *cache.slots)
    sizes = (None, None, {2: end}, {2: end}, None, None, None)
    return compile_function(LayerFunction(model.layers[0]), inputs, sizes, path)


@torch.inference_mode(False)
def compile_output(model: Transformer, path: Path) -> Path:
    """Compile the output of the network into a file."""
    h = model.norm.weight.new_zeros(1, 1, model.params.dim)
    return compile_function(OutputFunction(model.output), (h,), (None,), path)


@torch.no_grad()
def compile_function(function: ModuleFunction, inputs: tuple[Any, ...], sizes: tuple[Any, ...], path: Path) -> Path:
    """Compile a function into a file.

    Args:
        inputs: examples of its inputs, without the weights.
        sizes: of each input, the dimensions whose size may be another.
        path: of the file.
    """
    weights = [tensor.detach() for tensor in weights_of(function.module[0]).values()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler, about itself
        dynamic_shapes = (*sizes, [None] * len(weights))
        exported = torch.export.export(function, (*inputs, weights), dynamic_shapes=dynamic_shapes)
        return Path(torch._inductor.aoti_compile_and_package(exported, package_path=str(path)))


def cache_folder() -> Path:
    """Where compiled code is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama" / "compiled"


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """All tensors of a module by name: its parameters, and the buffers of quantized weights."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def describe(tensors: dict[str, torch.Tensor]) -> list[Any]:
    """What compiled code depends on, of these tensors."""
    return [(name, t.shape, t.stride(), t.dtype, t.device) for name, t in tensors.items()]


def compilation_key(model: Transformer, weights: list[Any]) -> str:
    """A name for all that the compiled functions depend on: their code, their sizes, torch, and the processor.

    Args:
        weights: what `describe` says of those of a layer and of the output.
    """
    layer, keys = model.layers[0], model.setup_cache().keys
    instructions: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch can't tell
    facts = [
        [
            code_digest(frozenset(map(type, (*layer.modules(), *model.output.modules())))),
            repr(layer),
            repr(model.output),
        ],
        [model.params, weights, keys.shape, keys.dtype, keys.device],
        [torch.__version__, torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()],
        [platform.machine(), sorted(instructions.items()) or platform.node()],
    ]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


@functools.cache
def code_digest(classes: frozenset[type]) -> str:
    """A checksum of the code of these classes and of what they use of this package."""
    files = {Path(inspect.getfile(cls)) for cls in classes} | set(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()
