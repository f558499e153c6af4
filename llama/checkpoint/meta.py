"""Meta's layout: `params.json`, and a `consolidated.NN.pth` for each of the model-parallel processes that saved it."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import torch

from llama.checkpoint.base import Checkpoint, Settings
from llama.checkpoint.parameters import parameter_shapes, share, split_axis
from llama.checkpoint.pickled_weights import open_pickled_weights
from llama.checkpoint.staging import Staging
from llama.errors import CheckpointError
from llama.files import read_json, release_pages, require_path, write_json
from llama.model_args import ModelArgs, feed_forward_size
from llama.tokenizer import Tokenizer
from llama.vocab.tiktoken_file import LLAMA3_SPECIAL_TOKENS, fits_tiktoken_file

logger = logging.getLogger("llama")

EMBEDDING, OUTPUT = "tok_embeddings.weight", "output.weight"
RESERVED_FOR_EOM = "<|reserved_special_token_4|>"  # the name that <|eom_id|> has in tokenizer.model
ROTARY_TABLE = "rope.freqs"  # in Llama 2's files; our network computes it


class MetaCheckpoint(Checkpoint):
    """A folder in Meta's layout. Its weights are memory-mapped, and may be split over any number of files."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.settings = read_params_json(folder / "params.json")
        self._files = sorted(folder.glob("*.pth"))
        self._shards = [open_pickled_weights(file) for file in self._files]
        for shard in self._shards:
            shard.pop(ROTARY_TABLE, None)
        for file, shard in zip(self._files, self._shards, strict=True):
            difference = set(shard) ^ set(self._shards[0])
            if difference:
                raise CheckpointError(
                    f"{file} and {self._files[0]} hold different tensors: {sorted(difference)[:8]} are in only one"
                )
        params = self.settings.params
        if params.get("vocab_size", -1) == -1 and EMBEDDING in self._shards[0]:
            params["vocab_size"] = next(iter(self._whole_shape(EMBEDDING)), -1)
        # Meta's files have a tied embedding twice, and params.json doesn't say that it is tied.
        if params.setdefault("tie_embeddings", self._output_equals_embedding()):
            for shard in self._shards:
                shard.pop(OUTPUT, None)
        self._names = list(self._shards[0])

    def _output_equals_embedding(self) -> bool:
        def equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
            if a is None or b is None or (a.shape, a.dtype) != (b.shape, b.dtype) or a.dim() != 2:
                return False
            # Most models differ in the first row, so that the rest need not be read.
            return a.data_ptr() == b.data_ptr() or (torch.equal(a[:1], b[:1]) and torch.equal(a, b))

        return all(equal(shard.get(EMBEDDING), shard.get(OUTPUT)) for shard in self._shards)

    def _axis(self, name: str) -> int | None:
        """The axis that the files split a tensor along. Llama 2's split the embedding along dim, not the vocabulary."""
        if name == EMBEDDING and self._shards[0][name].shape[-1:] != (self.settings.params["dim"],):
            return 1
        return split_axis(name) if name.endswith(".weight") else None

    def _starts(self, name: str) -> list[int]:
        """Where along `_axis` the slice in each file begins."""
        shard, count = self._shards[0][name], len(self._shards)
        if name.endswith(("wk.weight", "wv.weight")):
            args = ModelArgs(**self.settings.params)
            if count > args.kv_heads and shard.shape[0] == args.head_size:  # several files hold the same head
                return [share(name, tuple(shard.shape), args, i, count).start for i in range(count)]
        return [i * shard.shape[self._axis(name) or 0] for i in range(count)]

    def _whole_shape(self, name: str) -> tuple[int, ...]:
        shape, axis = list(self._shards[0][name].shape), self._axis(name)
        if axis is not None and axis < len(shape):
            shape[axis] += self._starts(name)[-1]
        return tuple(shape)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        for name in self._names:
            for file, shard in zip(self._files, self._shards, strict=True):
                shape, first_shape = tuple(shard[name].shape), tuple(self._shards[0][name].shape)
                if shape != first_shape:
                    raise CheckpointError(f"{name} is {shape} in {file}, but {first_shape} in {self._files[0]}")
        return {name: self._whole_shape(name) for name in self._names}

    def dtypes(self) -> Iterable[torch.dtype]:
        return (shard[name].dtype for shard in self._shards for name in self._names)

    def read(self, name: str, axis: int | None, start: int, stop: int) -> torch.Tensor:
        tensors, file_axis = [shard[name] for shard in self._shards], self._axis(name)
        if axis is None:
            return tensors[0]
        if axis != file_axis:  # every file holds a part of the slice
            parts = [tensor.narrow(axis, start, stop - start) for tensor in tensors]
        else:
            parts, starts, length = [], self._starts(name), tensors[0].shape[axis]
            while start < stop:
                i = next(i for i, first in enumerate(starts) if first <= start < first + length)
                end = min(stop, starts[i] + length)
                parts.append(tensors[i].narrow(axis, start - starts[i], end - start))
                start = end
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=file_axis or 0)

    def release(self, name: str) -> None:
        for shard in self._shards:
            release_pages(shard[name].data_ptr(), shard[name].nbytes)

    def tokenizer(self, path: str | Path | None = None) -> Tokenizer:
        tokenizer = Tokenizer(self._tokenizer_file() if path is None else path)
        tokenizer.stop_tokens |= implied_stop_tokens(tokenizer, self.settings.params.get("use_scaled_rope", False))
        return tokenizer

    def _tokenizer_file(self) -> Path:
        json_path, path = self.path / "tokenizer.json", self.path / "tokenizer.model"
        # `save_checkpoint` writes tokenizer.json if tokenizer.model can't express everything; but if there is a
        # config.json, it is part of Hugging Face's files, which may be those of another download.
        if json_path.exists() and not (path.exists() and (self.path / "config.json").exists()):
            return json_path
        return path


def implied_stop_tokens(tokenizer: Tokenizer, use_scaled_rope: bool) -> set[int]:
    """The ids that end a text or a turn in this layout without its files saying so.

    With Llama 3.1 came, together with scaled rope, <|eom_id|>: it ends a message that calls a tool. In tokenizer.model
    it is one of the reserved special tokens.
    """
    vocabulary = tokenizer.vocabulary
    if not use_scaled_rope or vocabulary is None or not fits_tiktoken_file(vocabulary):
        return set()
    ids = {name: len(vocabulary.ranks) + i for i, name in enumerate(LLAMA3_SPECIAL_TOKENS)}
    end_id, eom_id, eot_id = (ids[name] for name in ("<|end_of_text|>", RESERVED_FOR_EOM, "<|eot_id|>"))
    if eom_id not in (vocabulary.special_tokens.get(name) for name in (RESERVED_FOR_EOM, "<|eom_id|>")):
        return set()  # this vocabulary has another use for it
    return {end_id, eom_id, eot_id}


def read_params_json(path: Path) -> Settings:
    """The settings in a `params.json`.

    Raises:
        MissingFileError: no such file.
        CheckpointError: it is damaged, lacks a size, or has a value of the wrong type.
    """
    values = read_json(require_path(path, "params.json"))
    types = {field.name: get_args(field.type) or (field.type,) for field in fields(ModelArgs)}
    del types["max_batch_size"], types["max_seq_len"]
    unknown = sorted(set(values) - set(types) - {"max_batch_size", "max_seq_len"})
    if unknown:
        logger.warning("%s: %d unknown keys, which are ignored: %.500r", path, len(unknown), unknown)
    for name in ("dim", "n_layers", "n_heads"):
        if name not in values:
            raise CheckpointError(f"{path} lacks {name!r}")
    params = {name: value for name, value in values.items() if name in types}
    for name, value in params.items():
        if not _has_type(value, types[name]):
            expected = " or ".join(getattr(kind, "__name__", str(kind)) for kind in types[name])
            raise CheckpointError(f"{path}: {name} is {value!r:.80}, not a valid {expected}")
    return add_implied_params(path, params)


def _has_type(value: Any, types: tuple[Any, ...]) -> bool:
    """Whether a JSON value has one of the types of a `ModelArgs` field, and integers fit into 64 bits."""
    if isinstance(value, bool):
        return bool in types
    if isinstance(value, list):
        return Sequence[float] in types and all(_has_type(item, (float,)) for item in value)
    if isinstance(value, int):
        return (int in types or float in types) and abs(value) < 2**63
    return type(value) in types


def read_params_json_without_weights(path: Path) -> Settings:
    """The settings in a `params.json` whose weights are not at hand.

    The small models of Llama 3.2 have tied embeddings, which only their weights show.
    """
    settings = read_params_json(path)
    if is_small_llama_3_2(settings.params):
        settings.params.setdefault("tie_embeddings", True)
    return settings


def is_small_llama_3_2(params: dict[str, Any]) -> bool:
    """Whether this is Llama 3.2 1B or 3B, whose `params.json` is incomplete."""
    return bool(params.get("use_scaled_rope")) and (params["dim"], params["n_layers"]) in {(2048, 16), (3072, 28)}


def add_implied_params(path: Path, params: dict[str, Any]) -> Settings:
    """Settings with what the keys that are present, and those that are missing, imply in Meta's folders."""
    if "rope_theta" not in params:  # Llama 2
        return Settings(path, {**params, "rope_theta": 10000.0}, advised_seq_len=4096)
    if params.get("use_scaled_rope"):  # Llama 3.1 and later
        # Llama 3.2's small models have another factor than Llama 3.1, which their files don't say.
        implied: dict[str, Any] = {"rope_scaling_factor": 32.0} if is_small_llama_3_2(params) else {}
        return Settings(path, {**implied, "max_position_embeddings": 131072, **params})
    if params["rope_theta"] == 500000:  # Llama 3
        return Settings(path, {"max_position_embeddings": 8192, **params})
    return Settings(path, params)  # others, such as Code Llama


def write_meta(
    folder: Path, args: ModelArgs, tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype, shards: int
) -> None:
    """Write a model in Meta's layout.

    Args:
        folder: an empty folder.
        args: the model's sizes.
        tensors: every parameter of the network, whole, in the order of `parameter_shapes`.
        dtype: of the written weights.
        shards: number of files; each holds what one of as many model-parallel processes would.
    """
    shapes = parameter_shapes(args)
    contents: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    with Staging(folder) as staging:
        for name, tensor in tensors:
            for i, content in enumerate(contents):
                axis, start, stop = share(name, shapes[name], args, i, shards)
                part = tensor if axis is None else tensor.narrow(axis, start, stop - start)
                content[name] = staging.add(part, dtype)
        for i, content in enumerate(contents):
            if args.tie_embeddings:  # as in Meta's files
                content[OUTPUT] = content[EMBEDDING]
            torch.save(content, folder / f"consolidated.{i:02d}.pth")
            content.clear()  # before their mappings' files are removed
    write_json(folder / "params.json", to_params_json(args))


def to_params_json(args: ModelArgs) -> dict[str, Any]:
    """The content of `params.json` for a model of these sizes.

    Where they suffice it has only the reference's keys, so that the reference can load it.
    """
    names = ["dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps"]
    params: dict[str, Any] = {name: getattr(args, name) for name in names}
    if args.ffn_dim is not None:
        # Expressed by the reference's rule: a width of at most ffn_dim, rounded up to a multiple of ffn_dim.
        unrounded = feed_forward_size(4 * args.dim, 1, None)
        params["multiple_of"] = args.ffn_dim
        params["ffn_dim_multiplier"] = min(1.0, args.ffn_dim / unrounded)
    if args.rope_theta != 10000:
        params["rope_theta"] = args.rope_theta
    if args.use_scaled_rope:
        params["use_scaled_rope"] = True
    params = {name: value for name, value in params.items() if value is not None}

    # Our own keys are added only where the ones above, as `read_params_json` would read them, mean something else.
    settings = add_implied_params(Path("params.json"), params)
    read_back = ModelArgs(**settings.params)
    own_keys = ["rope_divisors"]
    if args.max_position_embeddings not in (None, settings.advised_seq_len):
        own_keys.append("max_position_embeddings")
    if args.use_scaled_rope:
        own_keys += [
            "rope_scaling_factor",
            "rope_low_freq_factor",
            "rope_high_freq_factor",
            "rope_original_max_seq_len",
        ]
    params |= {name: getattr(args, name) for name in own_keys if getattr(args, name) != getattr(read_back, name)}
    if read_back.head_size != args.head_size:
        params["head_dim"] = args.head_size
    if read_back.ffn_size != args.ffn_size:
        params["ffn_dim"] = args.ffn_size
    return params
