"""Writing models: from a checkpoint of any layout, or from a network on any number of processes."""

import errno
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llama.checkpoint.hugging_face import SHARD_BYTES, write_hugging_face
from llama.checkpoint.meta import write_meta
from llama.checkpoint.parameters import parameter_count, parameter_shapes, share
from llama.checkpoint.progress import progress
from llama.distributed import gather, is_first_rank, model_parallel_size, raise_on_all_ranks
from llama.errors import InputError
from llama.files import new_folder
from llama.model import Transformer
from llama.model_args import ModelArgs
from llama.tokenizer import Tokenizer
from llama.vocab.tokenizer_json import write_neighbours, write_tokenizer_json
from llama.vocab.vocabulary import is_llama3, read_tiktoken, write_tiktoken

LAYOUTS = ("meta", "hf")


def save_checkpoint(
    folder: str | Path,
    model: Transformer,
    tokenizer: Tokenizer | None = None,
    *,
    layout: str = "meta",
    shards: int | None = None,
) -> None:
    """Write a model as a checkpoint that `Llama.build` loads, on any number of processes.

    Every process that holds a part of the model must call this; the first writes. The folder gets its name when all of
    it is written.

    Args:
        folder: a new folder.
        model: its weights are written in the number format they have.
        tokenizer: written beside the weights, if given.
        layout: "meta" for Meta's (`consolidated.NN.pth` and `params.json`), "hf" for Hugging Face's (safetensors and
            `config.json`).
        shards: files of weights; by default 1 in Meta's layout, and files of at most 5 GB in Hugging Face's.

    Raises:
        InputError: an unknown layout, a number of files that the model can't be split over, or a folder that is there.
        OSError: there is no room, or no permission.
    """
    args, dtype, tensors = model.params, model.norm.weight.dtype, whole_parameters(model)
    failure: BaseException | None = None
    if is_first_rank():
        try:
            write(folder, layout, args, tensors, dtype, shards, tokenizer)
        except BaseException as error:
            failure = error
    for _ in tensors:  # what the first process hasn't taken, the others still give; and they take nothing
        pass
    raise_on_all_ranks(failure)


def whole_parameters(model: Transformer) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter, put together on the first model-parallel process from what each holds of it."""
    args, size = model.params, model_parallel_size()
    held = dict(model.named_parameters())
    for name, shape in parameter_shapes(args).items():
        part = held[name].detach()
        shares = [share(name, shape, args, rank, size) for rank in range(size)]
        axis = shares[0].axis
        if axis is not None and size > 1:
            parts = gather(part)  # several processes may hold the same
            kept = [part for i, part in enumerate(parts) if i == 0 or shares[i] != shares[i - 1]]
            part = torch.cat(kept, dim=axis) if kept else part
        yield name, part


def check_target(layout: str, shards: int | None, args: ModelArgs) -> str:
    """The name of the layout, if a model can be written in it."""
    found = {"huggingface": "hf"}.get(str(layout).lower().replace("_", "").replace("-", ""), str(layout).lower())
    if found not in LAYOUTS:
        raise InputError(f"layout={layout!r} must be one of {list(LAYOUTS)}")
    if shards is not None and (not isinstance(shards, int) or isinstance(shards, bool) or shards < 1):
        raise InputError(f"shards={shards!r} must be a whole number of at least 1")
    try:
        args.check(shards if shards and found == "meta" else 1)
    except InputError as error:
        raise InputError(f"shards={shards}: {error}") from error
    return found


def write(
    folder: str | Path,
    layout: str,
    args: ModelArgs,
    tensors: Iterable[tuple[str, torch.Tensor]],
    dtype: torch.dtype,
    shards: int | None,
    tokenizer: Tokenizer | None,
) -> None:
    """Write a checkpoint whole, or not at all.

    Args:
        tensors: every parameter of the network, whole, in the order of `parameter_shapes`; taken one at a time.

    Raises:
        InputError, OSError: as `save_checkpoint` says.
    """
    if tokenizer is not None and str(layout).lower() == "meta":  # where vocabularies agree
        args = replace(args, vocab_size=args.vocab_size - tokenizer.n_padding)
    layout = check_target(layout, shards, args)
    with new_folder(folder) as scratch:
        total = parameter_count(args) * dtype.itemsize
        # Besides, the tensors of all files (of one file, in Hugging Face's layout) wait in files of their own.
        needed = total + (total if layout == "meta" else total // (shards or max(1, total // SHARD_BYTES)))
        free = shutil.disk_usage(scratch).free
        if needed > free:
            message = f"writing takes {needed / 1e9:.1f} GB, and only {free / 1e9:.1f} GB are free"
            raise OSError(errno.ENOSPC, message, str(folder))
        shown = progress(tensors, "writing", " tensors", total=len(parameter_shapes(args)))
        if layout == "meta":
            write_meta(scratch, args, shown, dtype, shards or 1)
        else:
            write_hugging_face(scratch, args, shown, dtype, shards)
        if tokenizer is not None:
            write_tokenizer(scratch, layout, tokenizer)


def write_tokenizer(folder: Path, layout: str, tokenizer: Tokenizer) -> None:
    """Write a tokenizer in the form that readers of the layout look for."""
    vocabulary = tokenizer.vocabulary
    if vocabulary is None:
        pieces: Any = tokenizer.model
        (folder / "tokenizer.model").write_bytes(pieces.serialized_model_proto())
        if layout == "hf":
            names = {"bos_token": pieces.bos_id(), "eos_token": pieces.eos_id(), "unk_token": pieces.unk_id()}
            config = {key: pieces.id_to_piece(i) for key, i in names.items() if i >= 0}
            config |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": tokenizer.add_bos, "legacy": True}
            write_neighbours(folder, config, tokenizer.bos_id, tokenizer.stop_tokens)
        return
    said = False
    if layout == "meta" and is_llama3(vocabulary):
        write_tiktoken(folder / "tokenizer.model", vocabulary)
        plain = read_tiktoken(folder / "tokenizer.model")
        said = (plain.stop_tokens, plain.add_bos) == (vocabulary.stop_tokens, vocabulary.add_bos)
    if not said:
        write_tokenizer_json(folder, vocabulary)
