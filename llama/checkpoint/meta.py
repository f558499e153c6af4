"""Meta's layout: `consolidated.NN.pth`, one for each process of whoever saved it, and `params.json`."""

import logging
import re
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import torch

from llama.checkpoint.layout import Checkpoint, Settings
from llama.checkpoint.parameters import parameter_shapes, share, split_axis
from llama.checkpoint.staging import Staging
from llama.errors import CheckpointError
from llama.files import first_bytes, read_json, refuse_if_unmappable, require_path, write_json
from llama.model_args import ModelArgs, feed_forward_size
from llama.tokenizer import Tokenizer

logger = logging.getLogger("llama")

EMBEDDING, OUTPUT = "tok_embeddings.weight", "output.weight"
ROTARY_TABLE = "rope.freqs"  # in Llama 2's files; it is computed
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class MetaCheckpoint(Checkpoint):
    """A folder in Meta's layout. Its weights are mapped, and may be split over any number of files."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.settings = read_params_json(folder / "params.json")
        self.files = sorted(folder.glob("*.pth"))
        self._parts = [open_pth(file) for file in self.files]
        for part in self._parts:
            part.pop(ROTARY_TABLE, None)
        for file, part in zip(self.files, self._parts, strict=True):
            odd = set(part) ^ set(self._parts[0])
            if odd:
                raise CheckpointError(f"{file} and {self.files[0]} hold different tensors: {sorted(odd)[:8]}")
        params = self.settings.params
        if params.get("vocab_size", -1) == -1 and EMBEDDING in self._parts[0]:
            params["vocab_size"] = next(iter(self._whole_shape(EMBEDDING)), -1)
        # Meta's files hold a tied embedding twice, and don't say so.
        if params.setdefault("tie_embeddings", self._output_is_embedding()):
            for part in self._parts:
                part.pop(OUTPUT, None)
        self._names = list(self._parts[0])

    def _output_is_embedding(self) -> bool:
        def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
            if a is None or b is None or (a.shape, a.dtype) != (b.shape, b.dtype) or a.dim() != 2:
                return False
            return a.data_ptr() == b.data_ptr() or (torch.equal(a[:1], b[:1]) and torch.equal(a, b))

        return all(same(part.get(EMBEDDING), part.get(OUTPUT)) for part in self._parts)

    def _axis(self, name: str) -> int | None:
        """The axis along which the files split a tensor: Llama 2 splits the embedding along dim, not by words."""
        if name == EMBEDDING and self._parts[0][name].shape[-1:] != (self.settings.params["dim"],):
            return 1
        return split_axis(name) if name.endswith(".weight") else None

    def _starts(self, name: str) -> list[int]:
        """Where along `_axis` the slice of each file begins."""
        part, count = self._parts[0][name], len(self._parts)
        if name.endswith(("wk.weight", "wv.weight")):
            args = ModelArgs(**self.settings.params)
            if count > args.kv_heads and part.shape[0] == args.head_size:  # several files hold the same head
                return [share(name, tuple(part.shape), args, i, count).start for i in range(count)]
        return [i * part.shape[self._axis(name) or 0] for i in range(count)]

    def _whole_shape(self, name: str) -> tuple[int, ...]:
        shape, axis = list(self._parts[0][name].shape), self._axis(name)
        if axis is not None and axis < len(shape):
            shape[axis] += self._starts(name)[-1]
        return tuple(shape)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        for name in self._names:
            for file, part in zip(self.files, self._parts, strict=True):
                found, first = tuple(part[name].shape), tuple(self._parts[0][name].shape)
                if found != first:
                    raise CheckpointError(f"{name} is {found} in {file}, but {first} in {self.files[0]}")
        return {name: self._whole_shape(name) for name in self._names}

    def dtypes(self) -> Iterable[torch.dtype]:
        return (part[name].dtype for part in self._parts for name in self._names)

    def read(self, name: str, axis: int | None, start: int, stop: int) -> torch.Tensor:
        parts, file_axis = [part[name] for part in self._parts], self._axis(name)
        if axis is None:
            return parts[0]
        if axis != file_axis:  # the wanted slice lies across all files
            pieces = [part.narrow(axis, start, stop - start) for part in parts]
        else:
            pieces, starts, length = [], self._starts(name), parts[0].shape[axis]
            while start < stop:  # a piece from each file that the slice touches
                i = next(i for i, first in enumerate(starts) if first <= start < first + length)
                end = min(stop, starts[i] + length)
                pieces.append(parts[i].narrow(axis, start - starts[i], end - start))
                start = end
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=file_axis or 0)

    def tokenizer(self) -> Tokenizer:
        as_json = self.path / "tokenizer.json"  # beside the other where that can't say all there is to say
        path = as_json if as_json.exists() else self.path / "tokenizer.model"
        return Tokenizer(require_path(path, "tokenizer_path"))


def read_params_json(path: Path) -> Settings:
    """What a `params.json` says."""
    found = read_json(require_path(path, "params.json"))
    kinds = {field.name: get_args(field.type) or (field.type,) for field in fields(ModelArgs)}
    del kinds["max_batch_size"], kinds["max_seq_len"]
    unknown = sorted(set(found) - set(kinds) - {"max_batch_size", "max_seq_len"})
    if unknown:
        logger.warning("%s: unknown keys, which are ignored: %s", path, ", ".join(unknown))
    for name in ("dim", "n_layers", "n_heads"):
        if name not in found:
            raise CheckpointError(f"{path} lacks {name!r}")
    params = {name: value for name, value in found.items() if name in kinds}
    for name, value in params.items():
        if not _is_a(value, kinds[name]):
            raise CheckpointError(f"{path}: {name} is {value!r:.80}, which is no {name} there can be")
    return interpret_params(path, params)


def _is_a(value: Any, kinds: tuple[Any, ...]) -> bool:
    """Whether a JSON value is of one of the types that `ModelArgs` annotates."""
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, list):
        return Sequence[float] in kinds and all(_is_a(item, (float,)) for item in value)
    if isinstance(value, int):
        return (int in kinds or float in kinds) and abs(value) < 2**63
    return type(value) in kinds


def read_params_json_alone(path: Path) -> Settings:
    """What a `params.json` says of a model whose weights nobody looks at.

    Llama 3.2's small models are tied, which their files don't say; with the weights at hand, it shows.
    """
    settings = read_params_json(path)
    if is_small(settings.params):
        settings.params.setdefault("tie_embeddings", True)
    return settings


def is_small(params: dict[str, Any]) -> bool:
    """Whether this is Llama 3.2 1B or 3B, whose `params.json` leaves some things out."""
    return bool(params.get("use_scaled_rope")) and (params["dim"], params["n_layers"]) in {(2048, 16), (3072, 28)}


def interpret_params(path: Path, params: dict[str, Any]) -> Settings:
    """Add what the keys that are there, and those that are not, mean by convention."""
    if "rope_theta" not in params:  # Llama 2, which had only one
        return Settings(path, {**params, "rope_theta": 10000.0}, advised_seq_len=4096)
    if params.get("use_scaled_rope"):
        # The files of Llama 3.2's small models don't say that their factor is not 3.1's.
        meant: dict[str, Any] = {"rope_scaling_factor": 32.0} if is_small(params) else {}
        return Settings(path, {**meant, "max_position_embeddings": 131072, **params})
    if params["rope_theta"] == 500000:
        return Settings(path, {"max_position_embeddings": 8192, **params})
    return Settings(path, params)  # others, such as Code Llama, don't say


def open_pth(path: Path) -> dict[str, torch.Tensor]:
    """A `.pth` file's tensors, memory-mapped. Nothing in it is run: a pickle that asks for code is refused."""
    head, size = first_bytes(path), path.stat().st_size
    if not head.startswith(b"PK"):
        raise CheckpointError(
            f"{path} ({size} bytes) is not a PyTorch file: it begins with {head[:16]!r}. If it was "
            f"saved by a PyTorch older than 1.6, load it there and save it again with torch.save"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.file_size != member.compress_size or member.header_offset + member.file_size > size:
                    raise ValueError(f"{member.filename} claims {member.file_size} bytes")
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # whatever a damaged or hostile zip or pickle makes the reader raise
        forbidden = re.search(r"nsupported (?:global: )?GLOBAL (\S+)", str(error))
        if forbidden:
            raise CheckpointError(
                f"{path} would call {forbidden[1]} while it is read, which no file of weights needs: refused, not run"
            ) from None  # torch's own message tells how to run it
        refuse_if_unmappable(path, error)
        raise CheckpointError(
            f"{path} ({size} bytes) is damaged or cut short: download it again ({type(error).__name__}: {error!s:.200})"
        ) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
    ):
        raise CheckpointError(f"{path} holds something other than named tensors: {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise CheckpointError(f"{path}: {name} is no plain tensor of floating-point numbers, but {tensor.dtype}")
        if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: {name} is {tuple(tensor.shape)}, more numbers than the file holds of it")
    return tensors


def write_meta(
    folder: Path, args: ModelArgs, tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype, shards: int
) -> None:
    """Write a model in Meta's layout, over `shards` files; each holds what one of as many processes would.

    Args:
        folder: an empty folder.
        tensors: every parameter of the network, whole, in the order of `parameter_shapes`.
    """
    shapes = parameter_shapes(args)
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    with Staging(folder) as scratch:
        for name, tensor in tensors:
            for i, part in enumerate(parts):
                axis, start, stop = share(name, shapes[name], args, i, shards)
                piece = tensor if axis is None else tensor.narrow(axis, start, stop - start)
                part[name] = scratch.keep(piece, dtype)
        for i, part in enumerate(parts):
            if args.tie_embeddings:  # as Meta's files have it
                part[OUTPUT] = part[EMBEDDING]
            torch.save(part, folder / f"consolidated.{i:02d}.pth")
            part.clear()
    write_json(folder / "params.json", params_of(args))


def params_of(args: ModelArgs) -> dict[str, Any]:
    """A model's sizes as `params.json` has them: in the reference's own keys, as far as those can express them."""
    names = ["dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps"]
    params: dict[str, Any] = {name: getattr(args, name) for name in names}
    if args.ffn_dim is not None:  # rounded up to a multiple of itself
        unrounded = feed_forward_size(4 * args.dim, 1, None)
        params["multiple_of"] = args.ffn_dim
        params["ffn_dim_multiplier"] = min(1.0, args.ffn_dim / unrounded)
    if args.rope_theta != 10000:
        params["rope_theta"] = args.rope_theta
    if args.use_scaled_rope:
        params["use_scaled_rope"] = True
    params = {name: value for name, value in params.items() if value is not None}

    settings = interpret_params(Path("params.json"), params)
    meant = ModelArgs(**settings.params)
    ours = ["rope_divisors"]
    if args.max_position_embeddings not in (None, settings.advised_seq_len):
        ours.append("max_position_embeddings")
    if args.use_scaled_rope:
        ours += ["rope_scaling_factor", "rope_low_freq_factor", "rope_high_freq_factor", "rope_original_max_seq_len"]
    params |= {name: getattr(args, name) for name in ours if getattr(args, name) != getattr(meant, name)}
    if meant.head_size != args.head_size:
        params["head_dim"] = args.head_size
    if meant.ffn_size != args.ffn_size:
        params["ffn_dim"] = args.ffn_size
    return params
