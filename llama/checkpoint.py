"""Checkpoints on disk: what layout a folder or file has, what model is in it, and each tensor, a slice at a time.

Every layout is read by one small class with the same four things: `params`, `shapes()`, `read()` and `tokenizer()`.
All give the tensors by their names in our network (`layers.0.attention.wq.weight`), whole or a slice of them.
"""

import json
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import nn
from tqdm import tqdm

from llama.errors import CheckpointError, InputError, MissingFileError
from llama.files import first_bytes, listing, require_path
from llama.gguf_file import GGUFFile
from llama.model import Transformer
from llama.model_args import ModelArgs
from llama.parallel import model_parallel_rank, model_parallel_size
from llama.tokenizer import Tokenizer

logger = logging.getLogger("llama")

# The axis along which a parameter is split over files and processes; norms are whole in each.
SPLIT_AXIS = {"tok_embeddings": 0, "output": 0, "wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0}


def split_axis(name: str) -> int | None:
    """The axis along which the parameter of this name is split, or None."""
    return SPLIT_AXIS.get(name.split(".")[-2])


def parameter_shapes(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """The name and whole shape of every parameter of a network of these sizes."""
    heads, kv_heads = args.n_heads * args.head_size, args.kv_heads * args.head_size
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (args.vocab_size, args.dim)}
    for i in range(args.n_layers):
        shapes |= {
            f"layers.{i}.attention.wq.weight": (heads, args.dim),
            f"layers.{i}.attention.wk.weight": (kv_heads, args.dim),
            f"layers.{i}.attention.wv.weight": (kv_heads, args.dim),
            f"layers.{i}.attention.wo.weight": (args.dim, heads),
            f"layers.{i}.feed_forward.w1.weight": (args.ffn_size, args.dim),
            f"layers.{i}.feed_forward.w2.weight": (args.dim, args.ffn_size),
            f"layers.{i}.feed_forward.w3.weight": (args.ffn_size, args.dim),
            f"layers.{i}.attention_norm.weight": (args.dim,),
            f"layers.{i}.ffn_norm.weight": (args.dim,),
        }
    shapes["norm.weight"] = (args.dim,)
    if not args.tie_embeddings:
        shapes["output.weight"] = (args.vocab_size, args.dim)
    return shapes


def share(name: str, shape: tuple[int, ...], args: ModelArgs, rank: int, size: int) -> tuple[int | None, int, int]:
    """What one of `size` model-parallel processes holds of a parameter: from where to where along which axis."""
    axis = split_axis(name)
    if axis is None:
        return None, 0, 0  # whole
    if name.endswith(("wk.weight", "wv.weight")) and size > args.kv_heads:
        first = rank * args.kv_heads // size * args.head_size  # several processes hold the same kv head
        return axis, first, first + args.head_size
    return axis, rank * shape[axis] // size, (rank + 1) * shape[axis] // size


class Checkpoint(ABC):
    """A model on disk.

    Attributes:
        path: the folder or file.
        params: `ModelArgs` fields, as far as the files tell.
        max_seq_len: the longest context the model may be given, or None if the files don't say.
        advised_seq_len: the longest context the model was made for, where going past it is only a bad idea.
    """

    path: Path
    params: dict[str, Any]
    max_seq_len: int | None = None
    advised_seq_len: int | None = None

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The whole (unsplit) shape of every tensor that is there, by name."""

    @abstractmethod
    def read(self, name: str, axis: int | None, start: int, stop: int) -> torch.Tensor:
        """Tensor `name`, from `start` to `stop` along `axis`; whole if `axis` is None, as it is for those not split."""

    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that comes with the model."""

    def model_args(self, vocab_size: int, max_seq_len: int, max_batch_size: int) -> ModelArgs:
        """The model's sizes, with a tokenizer of `vocab_size` words and a cache of the given size.

        Raises:
            InputError: the tokenizer has another number of words, or the cache is too long for the model.
            CheckpointError: the sizes in the files fit no network.
        """
        args = ModelArgs(**self.params, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
        if args.vocab_size == -1:
            args.vocab_size = vocab_size
        if args.vocab_size != vocab_size:
            raise InputError(
                f"the model in {self.path} has vocab_size={args.vocab_size}, but its tokenizer has {vocab_size} words: "
                f"pass the tokenizer_path of this very model"
            )
        try:
            args.check()
        except InputError as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        if self.max_seq_len is not None and max_seq_len > self.max_seq_len:
            raise InputError(f"max_seq_len={max_seq_len} is over this model's limit of {self.max_seq_len}")
        if self.advised_seq_len is not None and max_seq_len > self.advised_seq_len:
            logger.warning(
                "max_seq_len=%d: this model was made for at most %d; its answers get worse past that",
                max_seq_len,
                self.advised_seq_len,
            )
        return args


def open_checkpoint(ckpt_dir: str | Path) -> Checkpoint:
    """Find out what layout a checkpoint has.

    Args:
        ckpt_dir: a folder with `*.pth` files and a `params.json` (Meta's layout), a `*.gguf` file, or a folder with
            one.

    Raises:
        MissingFileError: nothing there, or no checkpoint in the folder; the message tells what is.
        CheckpointError: a damaged or hostile file.
    """
    path = require_path(ckpt_dir, "ckpt_dir")
    if path.is_file():
        if path.suffix == ".pth":
            raise InputError(f"ckpt_dir={str(path)!r} is one of a checkpoint's files: pass its folder, {path.parent}")
        return GGUFCheckpoint(path)
    if any(path.glob("*.pth")):
        return MetaCheckpoint(path)
    gguf_files = sorted(path.glob("*.gguf"))
    if len(gguf_files) == 1:
        return GGUFCheckpoint(gguf_files[0])
    if gguf_files:
        raise InputError(f"{path} holds {len(gguf_files)} GGUF files; pass one of them: {listing(path)}")
    hint = ""
    if any((path / "original").glob("*.pth")):
        hint = f". Its folder original/ holds Meta's layout: pass ckpt_dir={str(path / 'original')!r}"
    elif any(path.glob("*.safetensors")):
        hint = ". That is Hugging Face's layout, which isn't read: get the model's original/ folder, or a GGUF file"
    raise MissingFileError(
        f"no checkpoint in ckpt_dir={str(path)!r}: looked for *.pth with params.json, or *.gguf, and found "
        f"{listing(path)}{hint}"
    )


class MetaCheckpoint(Checkpoint):
    """Meta's layout: `consolidated.NN.pth`, one for each process of whoever saved it, and `params.json`."""

    IGNORED = ("rope.freqs",)  # in Llama 2's files: the rotary table, which is computed

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.params, self.max_seq_len, self.advised_seq_len = read_params_json(folder / "params.json")
        self.files = sorted(folder.glob("*.pth"))
        self._parts = [open_pth(file) for file in self.files]
        for file, part in zip(self.files, self._parts, strict=True):
            odd = set(part) ^ set(self._parts[0])
            if odd:
                raise CheckpointError(f"{file} and {self.files[0]} hold different tensors: {sorted(odd)[:8]}")
        self._names = [name for name in self._parts[0] if name not in self.IGNORED]

    def _axis(self, name: str) -> int | None:
        """The axis along which the files split a tensor: Llama 2 splits the embedding along dim, not by words."""
        if name == "tok_embeddings.weight" and self._parts[0][name].shape[-1:] != (self.params["dim"],):
            return 1
        return split_axis(name) if name.endswith(".weight") else None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        whole = {}
        for name in self._names:
            shape, axis = list(self._parts[0][name].shape), self._axis(name)
            for file, part in zip(self.files, self._parts, strict=True):
                if part[name].shape != self._parts[0][name].shape:
                    raise CheckpointError(
                        f"{name} is {tuple(part[name].shape)} in {file}, but {tuple(shape)} in {self.files[0]}"
                    )
            if axis is not None and axis < len(shape):
                shape[axis] *= len(self._parts)
            whole[name] = tuple(shape)
        return whole

    def read(self, name: str, axis: int | None, start: int, stop: int) -> torch.Tensor:
        parts, file_axis = [part[name] for part in self._parts], self._axis(name)
        if axis is None:
            return parts[0]
        if axis != file_axis:  # the wanted slice lies across all files
            slices = [part.narrow(axis, start, stop - start) for part in parts]
            return slices[0] if len(slices) == 1 else torch.cat(slices, dim=file_axis or 0)
        size = parts[0].shape[axis]
        slices = []
        for i in range(start // size, -(-stop // size)):  # the files that the slice touches
            first, last = max(start - i * size, 0), min(stop - i * size, size)
            slices.append(parts[i].narrow(axis, first, last - first))
        return slices[0] if len(slices) == 1 else torch.cat(slices, dim=axis)

    def tokenizer(self) -> Tokenizer:
        return Tokenizer(require_path(self.path / "tokenizer.model", "tokenizer_path"))


def read_params_json(path: Path) -> tuple[dict[str, Any], int | None, int | None]:
    """What a `params.json` says: `ModelArgs` fields, the model's longest context, and the longest advised one."""
    head = first_bytes(require_path(path, "params.json"))
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); it begins with {head[:40]!r}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {found!r:.80}")
    known = {field.name for field in fields(ModelArgs)} - {"max_batch_size", "max_seq_len"}
    unknown = sorted(set(found) - known - {"max_batch_size", "max_seq_len"})
    if unknown:
        logger.warning("%s: unknown keys, which are ignored: %s", path, ", ".join(unknown))
    for name in ("dim", "n_layers", "n_heads"):
        if name not in found:
            raise CheckpointError(f"{path} lacks {name!r}")
    params = {name: value for name, value in found.items() if name in known}
    for name, value in params.items():
        whole = name in {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim", "head_dim"}
        optional = getattr(ModelArgs, name) is None and value is None
        flag = name in {"use_scaled_rope", "tie_embeddings"}
        right = isinstance(value, bool) if flag else isinstance(value, int if whole else (int, float))
        if not (optional or right) or (isinstance(value, bool) and not flag):
            raise CheckpointError(f"{path}: {name} is {value!r}, which is no {'flag' if flag else 'number'} it can be")

    if "rope_theta" not in params:  # Llama 2, which had only one
        return {**params, "rope_theta": 10000.0}, None, 4096
    if params.get("use_scaled_rope"):
        # The files of Llama 3.2's small models don't say that their factor is not 3.1's.
        if (params["dim"], params["n_layers"]) in {(2048, 16), (3072, 28)}:
            params.setdefault("rope_scaling_factor", 32.0)
        return params, 131072, None
    return params, 8192 if params["rope_theta"] == 500000 else None, None  # others, such as Code Llama, don't say


def open_pth(path: Path) -> Mapping[str, torch.Tensor]:
    """A `.pth` file's tensors, memory-mapped. Nothing in it is run: a pickle that asks for code is refused."""
    head = first_bytes(path)
    if not head.startswith(b"PK"):
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is not a PyTorch file: it begins with {head[:16]!r}. If it was "
            f"saved by a PyTorch older than 1.6, load it there and save it again with torch.save"
        )
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # whatever a damaged or hostile zip or pickle makes the reader raise
        forbidden = re.search(r"nsupported (?:global: )?GLOBAL (\S+)", str(error))
        if forbidden:
            raise CheckpointError(
                f"{path} would call {forbidden[1]} while it is read, which no file of weights needs: refused, not run"
            ) from None  # torch's own message tells how to run it
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is damaged or cut short: download it again ({type(error).__name__})"
        ) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
    ):
        raise CheckpointError(f"{path} holds something other than named tensors: {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise CheckpointError(f"{path}: {name} is no plain tensor of floating-point numbers, but {tensor.dtype}")
    return tensors


class GGUFCheckpoint(Checkpoint):
    """A `*.gguf` file of llama.cpp, quantized or not; read as the float32 numbers that its blocks stand for."""

    NAMES = {  # noqa: RUF012 - a table
        "token_embd": "tok_embeddings",
        "output_norm": "norm",
        "output": "output",
        "attn_q": "attention.wq",
        "attn_k": "attention.wk",
        "attn_v": "attention.wv",
        "attn_output": "attention.wo",
        "ffn_gate": "feed_forward.w1",
        "ffn_down": "feed_forward.w2",
        "ffn_up": "feed_forward.w3",
        "attn_norm": "attention_norm",
        "ffn_norm": "ffn_norm",
    }

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = GGUFFile(path)
        self._tensors = {self._our_name(name): tensor for name, tensor in self._file.tensors.items()}
        get = self._file.get
        architecture = get("general.architecture", str)
        if architecture != "llama":
            raise CheckpointError(f"{path} holds a model of architecture {architecture!r}; only 'llama' can be run")
        n_heads = get("llama.attention.head_count", int)
        self.params = {
            "dim": get("llama.embedding_length", int),
            "n_layers": get("llama.block_count", int),
            "n_heads": n_heads,
            "n_kv_heads": get("llama.attention.head_count_kv", int, n_heads),
            "ffn_dim": get("llama.feed_forward_length", int),
            "norm_eps": get("llama.attention.layer_norm_rms_epsilon", float),
            "rope_theta": get("llama.rope.freq_base", float, 10000.0),
            "head_dim": get("llama.attention.key_length", int, None),
            "tie_embeddings": "output.weight" not in self._tensors,
        }
        if "tok_embeddings.weight" in self._tensors:
            self.params["vocab_size"] = self.shapes()["tok_embeddings.weight"][0]
        self.max_seq_len = get("llama.context_length", int)
        head_size = self.params["head_dim"] or self.params["dim"] // max(n_heads, 1)
        for what, found, known in (
            ("rope scaling", get("llama.rope.scaling.type", str, "none"), "none"),
            ("rope scale", get("llama.rope.scale_linear", float, 1.0), 1.0),
            ("rotated features a head", get("llama.rope.dimension_count", int, head_size), head_size),
            ("experts", get("llama.expert_count", int, 0), 0),
            ("tensors of rope_freqs", int("rope_freqs.weight" in self._tensors), 0),
        ):
            if found != known:
                raise CheckpointError(f"{path}: {what}: {found!r}, but this network knows only {known!r}")

    @classmethod
    def _our_name(cls, name: str) -> str:
        block, short, kind = re.fullmatch(r"(?:blk\.(\d+)\.)?(.*?)(\.weight)?", name, re.DOTALL).groups()  # type: ignore[union-attr]
        if short not in cls.NAMES or not kind:
            return name  # and `check_tensors` will call it unexpected
        return f"layers.{block}.{cls.NAMES[short]}.weight" if block else f"{cls.NAMES[short]}.weight"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        # GGUF writes the fastest-running axis first
        return {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in self._tensors.items()}

    def read(self, name: str, axis: int | None, start: int, stop: int) -> torch.Tensor:
        tensor = self._tensors[name]
        rows = slice(start, stop) if axis == 0 else slice(None)  # a block of quantized numbers lies within a row
        try:
            array = gguf.dequantize(tensor.data[rows], tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise CheckpointError(f"{self.path}: {name} can't be dequantized: {error}") from error
        weights = torch.from_numpy(array if array.flags.writeable else array.copy())
        return weights[:, start:stop] if axis == 1 else weights

    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self._file)


def load_model(checkpoint: Checkpoint, args: ModelArgs, *, device: torch.device, dtype: torch.dtype) -> Transformer:
    """Make the network and give it this process's share of the checkpoint's weights, which `check_tensors` has seen.

    Weights that have the right dtype and device already stay where they are mapped, without a copy.
    """
    rank, size = model_parallel_rank(), model_parallel_size()
    wanted = parameter_shapes(args)
    with torch.device("meta"):
        model = Transformer(args)
    weights = {}
    hidden = None if rank == 0 else True  # None: shown on a terminal alone
    for name in tqdm(wanted, desc="loading", unit=" tensors", delay=1, leave=False, disable=hidden):
        weight = checkpoint.read(name, *share(name, wanted[name], args, rank, size))
        weight = weight.to(device=device, dtype=dtype).contiguous()
        weights[name] = nn.Parameter(weight)
    if args.tie_embeddings:
        weights["output.weight"] = weights["tok_embeddings.weight"]
    model.load_state_dict(weights, assign=True)
    return model


def check_tensors(checkpoint: Checkpoint, args: ModelArgs) -> None:
    """Raise CheckpointError listing every tensor that is missing, unexpected, or not of the shape the network needs."""
    found = checkpoint.shapes()
    if args.n_layers > len(found):  # and so no list of what they lack
        raise CheckpointError(f"{checkpoint.path}: {args.n_layers} layers can't lie in {len(found)} tensors")
    wanted = parameter_shapes(args)
    wrong = [f"missing: {name} {shape}" for name, shape in wanted.items() if name not in found]
    wrong += [f"unexpected: {name} {shape}" for name, shape in found.items() if name not in wanted]
    wrong += [
        f"wrong shape: {name} is {found[name]}, should be {shape}"
        for name, shape in wanted.items()
        if found.get(name, shape) != shape
    ]
    if wrong:
        raise CheckpointError(
            f"{checkpoint.path} doesn't hold the model that its settings describe; {len(wrong)} tensor(s):\n  "
            + "\n  ".join(wrong)
        )
