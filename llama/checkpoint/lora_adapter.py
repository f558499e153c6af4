"""PEFT's LoRA adapters, to be merged into the weights of their base model: W + scale * B A (arXiv 2106.09685).

An adapter's folder holds `adapter_config.json`, and `adapter_model.safetensors` or `adapter_model.bin` with two
matrices for each adapted module: A (rank, in_features) and B (out_features, rank). The scale is lora_alpha / rank, or
with `use_rslora` lora_alpha / sqrt(rank) (arXiv 2312.03732).
"""

import itertools
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import regex
import torch

from llama.checkpoint.hugging_face import (
    LAYER_PREFIX,
    NAMES,
    ROTARY_WEIGHTS,
    name_in_files,
    open_weights,
    to_adjacent_pairs,
)
from llama.checkpoint.parameters import network_name, parameter_shapes
from llama.errors import CheckpointError, InputError, MissingFileError
from llama.files import Metadata, listing, read_json, require_path
from llama.model_args import ModelArgs

T = TypeVar("T")

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

# Keys of adapter_config.json by which the matrices are merged, and those that make no difference to a merged model.
USED_KEYS = {
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora"),
}
IGNORED_KEYS = {
    *("base_model_name_or_path", "revision", "task_type", "auto_mapping", "peft_version", "inference_mode"),
    *("lora_dropout", "loftq_config", "eva_config", "megatron_core", "qalora_group_size", "runtime_config"),
}
# Further keys -> the values by which the formula is the usual one. All other keys must say no.
SUPPORTED_VALUES: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # others change the base model's weights too
}
NO: tuple[Any, ...] = (None, False, "", [], {})

EMBEDDING, OUTPUT = "model.embed_tokens", "lm_head"

# The name of a tensor in an adapter's file: the module, and the part of it. For an adapted embedding or output matrix
# PEFT also saves the weight that the change is added to.
TENSOR_NAME = re.compile(
    r"base_model\.model\.(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|base_layer)(?:\.default)?(?:\.weight)?"
)

# The regular expressions that are run: without recursion, and without counted repeats, which can fill the memory.
SAFE_PATTERN = re.compile(
    r"(?:[\w\s.*+?|^$)-]|\((?!\?)|\(\?(?:[:=!]|<[=!])|\\[.\-_dDwWb]|\[\^?[\w\\.-]+\]|\{[01],\}|\{0,1\})*"
)
MAX_PATTERN = 2000  # characters
MAX_DEPTH = 5  # groups within groups; for each, compiling may take twice as long
MAX_SECONDS = 5.0  # for all names and regular expressions of an adapter together


class Change(NamedTuple):
    """What an adapter does with a weight: it adds scale * b @ a, with a (rank, in_features) and b (out_features, rank).

    If there is a `base`, that weight is changed in place of the base model's.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    base: torch.Tensor | None


class LoRAAdapter:
    """An adapter that fits a base model. Its matrices are memory-mapped.

    Args:
        folder: the adapter's folder.
        args: the sizes of the base model.

    Raises:
        MissingFileError: no such folder, or no adapter in it.
        CheckpointError: it is damaged, doesn't fit the base model, or changes it in another way than by the formula.
    """

    def __init__(self, folder: str | Path, args: ModelArgs) -> None:
        self.path = require_path(folder, "adapter")
        if not self.path.is_dir():
            raise InputError(f"adapter={str(folder)!r} must be the folder of a PEFT adapter, not a file")
        config = AdapterConfig(require_path(self.path / ADAPTER_CONFIG, "the adapter's configuration"))
        weights = next((self.path / name for name in ADAPTER_WEIGHTS if (self.path / name).exists()), None)
        if weights is None:
            raise MissingFileError(f"{self.path} has none of {list(ADAPTER_WEIGHTS)}, but {listing(self.path)}")
        modules = _module_shapes(args)
        parts: dict[str, dict[str, torch.Tensor]] = {module: {} for module in modules}
        problems = []
        for name, tensor in open_weights(weights).items():
            match = TENSOR_NAME.fullmatch(name)
            if match is None or match[1] not in modules or match[2] in parts[match[1]]:
                problems.append(f"unexpected: {name} {tuple(tensor.shape)}")
            else:
                parts[match[1]][match[2]] = tensor
        for module, shape in modules.items():
            targeted = config.targets(module)
            if parts[module] or targeted:
                if not targeted:
                    problems.append(f"unexpected: {module}, which {ADAPTER_CONFIG} doesn't name")
                if module in (EMBEDDING, OUTPUT) and args.tie_embeddings:
                    problems.append(f"unsupported: {module}, since the base model's embedding is tied to its output")
                problems += _wrong_parts(module, shape, config.rank(module), parts[module])
        if problems:
            raise CheckpointError(
                f"{self.path} doesn't fit the base model; {len(problems)} problem(s):\n  " + "\n  ".join(problems)
            )
        self._changes: dict[str, Change] = {}
        for module in modules:
            if parts[module]:
                name = network_name(f"{module}.weight", LAYER_PREFIX, NAMES)
                if module == EMBEDDING:  # PEFT's matrices change the transposed weight
                    a, b = parts[module]["lora_embedding_B"].t(), parts[module]["lora_embedding_A"].t()
                else:
                    a, b = parts[module]["lora_A"], parts[module]["lora_B"]
                if name.endswith(ROTARY_WEIGHTS):
                    b = to_adjacent_pairs(b, args.head_size)
                self._changes[name] = Change(a, b, config.scale(module), parts[module].get("base_layer"))
        if not self._changes:
            raise CheckpointError(f"{self.path} changes nothing: {ADAPTER_CONFIG} names no module of a Llama")

    def merge(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Add the adapter's changes to the weights of the base model.

        Args:
            tensors: the name of each parameter in our network, and the whole parameter.

        Yields:
            The same, merged ones in float32 (or float64, if they were).

        Raises:
            CheckpointError: a merged weight is NaN or infinite.
        """
        for name, weight in tensors:
            if name in self._changes:
                a, b, scale, base = self._changes[name]
                weight = weight if base is None else base
                merged = weight.to(torch.promote_types(weight.dtype, torch.float32)) + scale * (b.float() @ a.float())
                if not merged.isfinite().all():
                    raise CheckpointError(f"{self.path}: merging makes {name} NaN or infinite")
                yield name, merged
            else:
                yield name, weight


def _module_shapes(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """The modules of Hugging Face's network that an adapter can change, with the shapes of their weights."""
    shapes = parameter_shapes(replace(args, tie_embeddings=False))
    return {name_in_files(name).removesuffix(".weight"): shape for name, shape in shapes.items() if len(shape) == 2}


def _wrong_parts(module: str, shape: tuple[int, ...], rank: int, parts: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """What is wrong with the tensors of an adapted module.

    Args:
        module: its name.
        shape: of its weight.
        rank: of its change.
        parts: its tensors.
    """
    out_features, in_features = shape
    expected = {"lora_A": (rank, in_features), "lora_B": (out_features, rank)}
    if module == EMBEDDING:
        expected = {"lora_embedding_A": (rank, out_features), "lora_embedding_B": (in_features, rank)}
    if module in (EMBEDDING, OUTPUT) and "base_layer" in parts:
        expected["base_layer"] = (out_features, in_features)
    actual = {part: tuple(tensor.shape) for part, tensor in parts.items()}
    for part in expected | actual:
        if part not in actual:
            yield f"missing: {part} of {module} {expected[part]}"
        elif part not in expected:
            yield f"unexpected: {part} of {module} {actual[part]}"
        elif actual[part] != expected[part]:
            yield f"wrong shape: {part} of {module} is {actual[part]}, should be {expected[part]} with rank {rank}"


class AdapterConfig:
    """What an `adapter_config.json` says: which modules are adapted, with which rank and scale.

    Modules have the names that they have in Hugging Face's network, such as "model.layers.0.self_attn.q_proj".

    Raises:
        CheckpointError: it is damaged, or the adapter does more than the formula; the message names what.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._deadline = time.monotonic() + MAX_SECONDS
        config = Metadata(path, read_json(path))
        config.get("peft_type", str)
        for key, value in config.values.items():
            supported = SUPPORTED_VALUES.get(key)
            if key not in USED_KEYS | IGNORED_KEYS and value not in (supported or NO):
                raise CheckpointError(
                    f"{path}: {key} is {value!r:.80}, and only {list(supported or ()) or 'adapters without it'} can be "
                    f"merged"
                )
        self._targets = self._read_modules(config, "target_modules")
        self._excluded = self._read_modules(config, "exclude_modules")
        if not self._targets:
            raise CheckpointError(f"{path}: target_modules names no modules")
        self._layers = self._read_layers(config)
        self._use_rslora = config.get("use_rslora", bool, False)
        self._rank, self._alpha = config.get("r", int), config.get("lora_alpha", float)
        ranks, alphas = (Metadata(path, config.get(key, dict, {})) for key in ("rank_pattern", "alpha_pattern"))
        self._ranks = [(self._compile(rf"(.*\.)?({key})"), ranks.get(key, int)) for key in ranks.values]
        self._alphas = [(self._compile(rf"(.*\.)?({key})"), alphas.get(key, float)) for key in alphas.values]
        for rank in (self._rank, *(rank for _, rank in self._ranks)):
            if rank < 1:
                raise CheckpointError(f"{path}: the rank {rank} must be at least 1")
        for alpha in (self._alpha, *(alpha for _, alpha in self._alphas)):
            if not math.isfinite(alpha):
                raise CheckpointError(f"{path}: lora_alpha is {alpha}, not a finite number")

    def _read_modules(self, config: Metadata, key: str) -> list[str] | regex.Pattern[str]:
        """The ends of names of modules, or the pattern that whole names match."""
        value = config.values.get(key)
        if isinstance(value, str) and value.lower() == "all-linear":  # all of a layer's matrices
            return [name for name in NAMES if name.startswith(("self_attn.", "mlp."))]
        if isinstance(value, str):
            return self._compile(value)
        names = config.get(key, list, [])
        if not all(isinstance(name, str) for name in names):
            raise CheckpointError(f"{self.path}: {key} is {names!r:.80}, not a list of names")
        return names

    def _read_layers(self, config: Metadata) -> set[int]:
        """The layers that are adapted; empty for all of them."""
        value, prefix = config.values.get("layers_to_transform"), config.values.get("layers_pattern")
        layers = [value] if isinstance(value, int) else value or []
        if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
            raise CheckpointError(f"{self.path}: layers_to_transform is {value!r:.80}, not a list of numbers")
        if layers and not isinstance(self._targets, list):
            raise CheckpointError(f"{self.path}: layers_to_transform has no meaning for a pattern of target_modules")
        if layers and prefix not in (None, "", [], "layers", ["layers"]):
            raise CheckpointError(f"{self.path}: layers_pattern is {prefix!r:.80}; a Llama's layers are in 'layers'")
        return set(layers)

    def _compile(self, pattern: str) -> regex.Pattern[str]:
        depths = itertools.accumulate((char == "(") - (char == ")") for char in re.sub(r"\\.", "", pattern))
        if len(pattern) > MAX_PATTERN or not SAFE_PATTERN.fullmatch(pattern) or max(depths, default=0) > MAX_DEPTH:
            raise CheckpointError(
                f"{self.path}: the pattern {pattern!r:.80} is too long, or not a simple regular expression"
            )
        self._seconds_left()
        try:
            return regex.compile(pattern)
        except regex.error as error:
            raise CheckpointError(f"{self.path}: the pattern {pattern!r:.80} is not valid: {error}") from error

    def _seconds_left(self) -> float:
        """What is left of the time for its names and patterns; CheckpointError if that is nothing."""
        seconds = self._deadline - time.monotonic()
        if seconds <= 0:
            raise CheckpointError(f"{self.path}: its names and patterns take over {MAX_SECONDS:g} s to compare")
        return seconds

    def _matches(self, pattern: regex.Pattern[str], module: str) -> bool:
        try:
            return pattern.fullmatch(module, timeout=self._seconds_left()) is not None
        except TimeoutError as error:
            raise CheckpointError(f"{self.path}: its patterns take over {MAX_SECONDS:g} s to match") from error

    def _selects(self, names: list[str] | regex.Pattern[str], module: str) -> bool:
        if isinstance(names, list):
            self._seconds_left()
            return any(f".{module}".endswith(f".{name}") for name in names)
        return self._matches(names, module)

    def targets(self, module: str) -> bool:
        """Whether the adapter changes a module."""
        if self._selects(self._excluded, module) or not self._selects(self._targets, module):
            return False
        if not self._layers or (isinstance(self._targets, list) and module in self._targets):
            return True
        layer = re.match(rf"{re.escape(LAYER_PREFIX)}(\d+)\.", module)
        return layer is not None and int(layer[1]) in self._layers

    def rank(self, module: str) -> int:
        """The rank of a module's change."""
        return self._value("rank_pattern", self._ranks, self._rank, module)

    def scale(self, module: str) -> float:
        """The factor of the product of a module's matrices."""
        alpha, rank = self._value("alpha_pattern", self._alphas, self._alpha, module), self.rank(module)
        return alpha / (math.sqrt(rank) if self._use_rslora else rank)

    def _value(self, key: str, patterns: list[tuple[regex.Pattern[str], T]], default: T, module: str) -> T:
        """What the patterns of one key give for a module, or the default."""
        values = [value for pattern, value in patterns if self._matches(pattern, module)] or [default]
        # PEFT takes the first, but in the order that they had in training; it sorts them when it saves them.
        if any(value != values[0] for value in values):
            raise CheckpointError(f"{self.path}: {key} has several values for {module}: {values!r:.80}")
        return values[0]


def describe_adapter(folder: Path) -> str:
    """What to say to someone who takes an adapter for a model."""
    config = Metadata(folder / ADAPTER_CONFIG, read_json(folder / ADAPTER_CONFIG))
    kind, base = config.get("peft_type", str, "LORA"), config.get("base_model_name_or_path", str, None)
    return (
        f"{folder} is a PEFT {'LoRA' if kind == 'LORA' else repr(kind)} adapter, not a model. Its base model is "
        f"{'not named' if base is None else repr(base)}: merge it into that with `llama convert --from BASE_MODEL "
        f"--adapter {folder} --to FOLDER`"
    )
