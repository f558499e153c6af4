"""From a folder or file to a network with weights: find the layout, check every tensor, read this process's share."""

from pathlib import Path

import torch
from torch import nn

from llama.checkpoint import hugging_face
from llama.checkpoint.gguf import GGUFCheckpoint
from llama.checkpoint.hugging_face import HuggingFaceCheckpoint, read_config_json
from llama.checkpoint.layout import Checkpoint, Settings
from llama.checkpoint.meta import MetaCheckpoint, read_params_json_alone
from llama.checkpoint.parameters import parameter_shapes, share
from llama.checkpoint.progress import progress
from llama.distributed import model_parallel_rank, model_parallel_size
from llama.errors import CheckpointError, InputError, MissingFileError
from llama.files import listing, require_path
from llama.model import Transformer
from llama.model_args import ModelArgs


def open_checkpoint(ckpt_dir: str | Path | Checkpoint) -> Checkpoint:
    """Find out what layout a checkpoint has.

    Args:
        ckpt_dir: a folder with `*.pth` files and a `params.json` (Meta's layout); one with `config.json` and
            `*.safetensors` (Hugging Face's); a `*.gguf` file, or a folder with one. Or a checkpoint that is open.

    Raises:
        MissingFileError: nothing there, or no checkpoint in the folder; the message tells what is.
        CheckpointError: a damaged or hostile file.
    """
    if isinstance(ckpt_dir, Checkpoint):
        return ckpt_dir
    path = require_path(ckpt_dir, "ckpt_dir")
    if path.is_file():
        if path.suffix in {".pth", ".safetensors", ".json", ".bin", ".model"}:
            raise InputError(f"ckpt_dir={str(path)!r} is one of a checkpoint's files: pass its folder, {path.parent}")
        return GGUFCheckpoint(path)
    if any(path.glob("*.pth")) and (path / "params.json").exists():
        return MetaCheckpoint(path)
    if (path / hugging_face.WEIGHTS).exists() or (path / hugging_face.INDEX).exists():
        return HuggingFaceCheckpoint(path)
    gguf_files = sorted(path.glob("*.gguf"))
    if len(gguf_files) == 1:
        return GGUFCheckpoint(gguf_files[0])
    if gguf_files:
        raise InputError(f"{path} holds {len(gguf_files)} GGUF files; pass one of them: {listing(path)}")
    raise MissingFileError(
        f"no checkpoint in ckpt_dir={str(path)!r}: looked for *.pth with params.json, {hugging_face.WEIGHTS} (or its "
        f"index) with {hugging_face.CONFIG}, or *.gguf, and found {listing(path)}{_hint(path)}"
    )


def _hint(path: Path) -> str:
    """What may have gone wrong with a folder that holds no whole checkpoint."""
    if any((path / "original").glob("*.pth")):
        return f". Its folder original/ holds Meta's layout: pass ckpt_dir={str(path / 'original')!r}"
    if any(path.glob("*.pth")):
        return ". Files of weights are there, but their params.json isn't"
    if any(path.glob("model-*.safetensors")):
        return f". Files of weights are there, but their {hugging_face.INDEX} isn't"
    if any(path.glob("pytorch_model*.bin")):
        return ". pytorch_model*.bin isn't read: load it with transformers, and write it with save_pretrained"
    return ""


def read_settings(path: str | Path) -> Settings:
    """What a checkpoint says of its model, from `params.json` or `config.json` alone: no weights are needed.

    Args:
        path: one of those files, or a folder with one; else whatever `open_checkpoint` takes.
    """
    found = require_path(path, "ckpt_dir")
    for name, read in (("params.json", read_params_json_alone), (hugging_face.CONFIG, read_config_json)):
        if found.name == name:
            return read(found)
        if (found / name).is_file():
            return read(found / name)
    return open_checkpoint(found).settings


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


def load_model(checkpoint: Checkpoint, args: ModelArgs, *, device: torch.device, dtype: torch.dtype) -> Transformer:
    """Make the network and give it this process's share of the checkpoint's weights, which `check_tensors` has seen.

    Weights that already have the right dtype and device stay where they are mapped, without a copy.
    """
    rank, size = model_parallel_rank(), model_parallel_size()
    wanted = parameter_shapes(args)
    with torch.device("meta"):
        model = Transformer(args)
    parameters: dict[str, nn.Parameter] = {}
    for name in progress(wanted, "loading", " tensors"):
        weight = checkpoint.read(name, *share(name, wanted[name], args, rank, size))
        parameters[name] = nn.Parameter(weight.to(device=device, dtype=dtype).contiguous())
    if args.tie_embeddings:
        parameters["output.weight"] = parameters["tok_embeddings.weight"]
    model.load_state_dict(parameters, assign=True)
    return model
