"""From a folder or file to a network with weights: recognise the layout, check all tensors, read this rank's slices."""

import ctypes
import sys
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from llama.checkpoint import hugging_face
from llama.checkpoint.base import Checkpoint, Settings
from llama.checkpoint.gguf import GGUFCheckpoint, model_file_name
from llama.checkpoint.hugging_face import HuggingFaceCheckpoint, read_config_json
from llama.checkpoint.lora_adapter import ADAPTER_CONFIG, describe_adapter
from llama.checkpoint.mapped_files import mapped_files
from llama.checkpoint.meta import MetaCheckpoint, read_params_json_without_weights
from llama.checkpoint.parameters import Share, parameter_shapes, quantization_of, share
from llama.checkpoint.progress import progress
from llama.distributed import model_parallel_rank, model_parallel_size, raising_on_all_ranks
from llama.errors import CheckpointError, InputError, MissingFileError
from llama.files import listing, require_path
from llama.int4_packing import CHUNK_ROWS
from llama.model import Transformer
from llama.model_args import ModelArgs
from llama.quantized import (
    Int4Weight,
    Int8Weight,
    QuantizedWeight,
    check_quantize,
    round_to_int4,
    round_to_int8,
)

WEIGHTS_AT_ONCE = 2**20  # of a matrix that is quantized: 4 MB in float32
CHUNKS_BEFORE_RELEASE = 16  # after these, the memory into which the file was read is given back


def open_checkpoint(ckpt_dir: str | Path | Checkpoint) -> Checkpoint:
    """Open a checkpoint of any layout.

    Args:
        ckpt_dir: a folder with `*.pth` files and a `params.json` (Meta's layout); one with `config.json` and
            `*.safetensors` or `pytorch_model*.bin` (Hugging Face's); a `*.gguf` file, or a folder with one or with all
            files of a split one. A checkpoint that is already open is returned as it is.

    Raises:
        MissingFileError: nothing exists there, or no checkpoint is in the folder; the message lists what is.
        InputError: a file of a checkpoint in place of its folder, several GGUF models, or a PEFT adapter.
        CheckpointError: a damaged or hostile file.
    """
    if isinstance(ckpt_dir, Checkpoint):
        return ckpt_dir
    path = require_path(ckpt_dir, "ckpt_dir")
    if not path.is_dir():
        if path.suffix in {".pth", ".safetensors", ".json", ".bin", ".model"}:
            raise InputError(f"ckpt_dir={str(path)!r} is one of a checkpoint's files: pass its folder, {path.parent}")
        return GGUFCheckpoint(path)
    if any(path.glob("*.pth")) and (path / "params.json").exists():
        return MetaCheckpoint(path)
    if hugging_face.find_weights(path) is not None:
        return HuggingFaceCheckpoint(path)
    gguf_files = sorted(path.glob("*.gguf"))
    if len({model_file_name(file) for file in gguf_files}) == 1:
        return GGUFCheckpoint(gguf_files[0])
    if gguf_files:
        raise InputError(f"{path} holds {len(gguf_files)} GGUF files; pass one of them: {listing(path)}")
    if (path / ADAPTER_CONFIG).exists():
        raise InputError(describe_adapter(path))
    raise MissingFileError(
        f"no checkpoint in ckpt_dir={str(path)!r}: looked for *.pth with params.json, {hugging_face.WEIGHTS} or "
        f"{hugging_face.BIN_WEIGHTS} (or an index) with {hugging_face.CONFIG}, or *.gguf, and found "
        f"{listing(path)}{_hint(path)}"
    )


def _hint(path: Path) -> str:
    """The likely mistake with a folder that holds no complete checkpoint, to add to an error message."""
    if any((path / "original").glob("*.pth")):
        return f". Its folder original/ holds Meta's layout: pass ckpt_dir={str(path / 'original')!r}"
    if any(path.glob("*.pth")):
        return ". Files of weights are there, but their params.json isn't"
    for pattern, index in (("model-*.safetensors", hugging_face.INDEX), ("pytorch_model-*", hugging_face.BIN_INDEX)):
        if any(path.glob(pattern)):
            return f". Files of weights are there, but their {index} isn't"
    return ""


def read_settings(path: str | Path) -> Settings:
    """A checkpoint's settings; where there is a `params.json` or `config.json`, no weights are needed.

    Args:
        path: one of those files, or a folder with one; otherwise whatever `open_checkpoint` takes.
    """
    ckpt_path = require_path(path, "ckpt_dir")
    for name, read in (("params.json", read_params_json_without_weights), (hugging_face.CONFIG, read_config_json)):
        if ckpt_path.name == name:
            return read(ckpt_path)
        if (ckpt_path / name).is_file():
            return read(ckpt_path / name)
    return open_checkpoint(ckpt_path).settings


def check_tensors(checkpoint: Checkpoint, args: ModelArgs) -> None:
    """Raise CheckpointError listing every tensor that is missing, unexpected, or not of the shape the network needs."""
    actual = checkpoint.shapes()
    if args.n_layers > len(actual):  # all that is missing would be a long list
        raise CheckpointError(f"{checkpoint.path}: {len(actual)} tensors can't hold {args.n_layers} layers")
    expected = parameter_shapes(args)
    problems = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in actual]
    problems += [f"unexpected: {name} {shape}" for name, shape in actual.items() if name not in expected]
    problems += [
        f"wrong shape: {name} is {actual[name]}, should be {shape}"
        for name, shape in expected.items()
        if actual.get(name, shape) != shape
    ]
    if problems:
        raise CheckpointError(
            f"{checkpoint.path} doesn't hold the model that its settings describe; {len(problems)} tensor(s):\n  "
            + "\n  ".join(problems)
        )


def load_model(
    checkpoint: Checkpoint,
    args: ModelArgs,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantize: str | None = None,
    mmap: bool = True,
) -> Transformer:
    """The network with this process's share of the checkpoint's weights.

    Weights that already have the right dtype and device stay mapped from their file, without a copy. All processes wait
    for each other at the end, however slow a disk is; what one raises, all raise.

    Args:
        checkpoint: one that `check_tensors` has accepted.
        args: the model's sizes.
        device, dtype: of the weights.
        quantize: keep the matrices in fewer bits: "int8" or "int4", see `quantization_of`; `dtype` is then that of the
            other weights, of the scales and of the activations.
        mmap: False: copy all weights into memory, so that nothing that happens to the files matters.

    Raises:
        InputError: see `check_quantize`.
    """
    check_quantize(quantize, dtype)
    rank, size = model_parallel_rank(), model_parallel_size()
    shapes = parameter_shapes(args)
    with torch.device("meta"):
        model = Transformer(args)
    with raising_on_all_ranks():
        for name in progress(shapes, "loading", " tensors"):
            part = share(name, shapes[name], args, rank, size)
            quantization = quantization_of(name, args, quantize, size)
            weight: nn.Parameter | QuantizedWeight
            if quantization is None:
                read = checkpoint.read(name, *part)
                tensor = read.to(dtype).to(device).contiguous()  # in this order: MPS has no float64
                weight = nn.Parameter(tensor if mmap or tensor.data_ptr() != read.data_ptr() else tensor.clone())
                if quantize is not None:
                    checkpoint.release(name)
            else:
                weight = read_quantized(checkpoint, name, shapes[name], part, quantization, device=device, dtype=dtype)
                release_free_memory()
            set_weight(model.get_submodule(name.removesuffix(".weight")), weight)
    if args.tie_embeddings:
        set_weight(model.output, model.tok_embeddings.weight)
    cast(Any, model).mapped_files = mapped_files(model)
    return model


def release_free_memory() -> None:
    """Give back freed memory that glibc keeps between what is in use: a fifth of a model that has been quantized."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # other C libraries have none
        trim(0)


def set_weight(layer: nn.Module, weight: torch.Tensor | QuantizedWeight) -> None:
    """Give a layer this weight in place of the one it has."""
    del layer.weight  # a module doesn't take a parameter's place otherwise
    layer.weight = weight


def read_quantized(
    checkpoint: Checkpoint,
    name: str,
    shape: tuple[int, ...],
    part: Share,
    quantization: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> QuantizedWeight:
    """This process's share of a matrix, in fewer bits.

    Whole rows are rounded and then cut, so that the weights are the same for any number of processes, and few rows at a
    time, so that little more memory is needed than for the result.
    """
    rows, columns = (range(n) for n in shape)
    if part.axis == 0:
        rows = rows[part.start : part.stop]
    else:
        columns = columns[part.start : part.stop]
    kind = Int8Weight if quantization == "int8" else Int4Weight
    weight = kind(len(rows), len(columns), dtype=dtype, device=device)
    step = max(WEIGHTS_AT_ONCE // shape[1] // CHUNK_ROWS, 1) * CHUNK_ROWS
    for i, first in enumerate(range(0, len(rows), step)):
        start, stop = rows[first], rows[first : first + step].stop
        if isinstance(weight, Int8Weight):
            values, scales = round_to_int8(checkpoint.read(name, 0, start, stop), dtype)
            weight.set_rows(first, values[:, columns.start : columns.stop], scales)
        else:
            groups = checkpoint.read_int4(name, start, stop)
            if groups is None:
                groups = round_to_int4(checkpoint.read(name, 0, start, stop), dtype)
            weight.set_rows(first, groups.columns(columns.start, columns.stop))
        if i % CHUNKS_BEFORE_RELEASE == CHUNKS_BEFORE_RELEASE - 1:
            checkpoint.release(name)
    checkpoint.release(name)
    return weight
