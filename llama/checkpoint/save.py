"""Writing checkpoints: from a network on any number of processes, or from a checkpoint of any layout."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from llama.checkpoint.disk_space import check_disk_space, full_disk_explained
from llama.checkpoint.hugging_face import MAX_SHARD_BYTES, write_hugging_face
from llama.checkpoint.meta import implied_stop_tokens, write_meta
from llama.checkpoint.parameters import parameter_count, parameter_shapes, share
from llama.checkpoint.progress import progress
from llama.device import dtype_name
from llama.distributed import gather, is_first_rank, model_parallel_size, raise_on_all_ranks
from llama.errors import InputError
from llama.model import Transformer
from llama.model_args import ModelArgs
from llama.output_folder import new_folder, output_path
from llama.quantized import QuantizedWeight
from llama.tokenizer import Tokenizer
from llama.vocab import SentencePieceTokenizer, Vocabulary
from llama.vocab.sentencepiece_tokenizer import write_sentencepiece_config
from llama.vocab.tiktoken_file import fits_tiktoken_file, read_tiktoken_file, write_tiktoken_file
from llama.vocab.tokenizer_config import TokenizerConfig
from llama.vocab.tokenizer_json import write_tokenizer_json

logger = logging.getLogger("llama")

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

    Every process that holds a part of the model must call this; the first rank writes. The folder appears when it is
    complete.

    Args:
        folder: a new folder.
        model: its weights are written in their dtype; quantized ones, of 8 or 4 bits, in the dtype of its norms.
        tokenizer: written beside the weights, if given.
        layout: "meta" for Meta's (`consolidated.NN.pth` and `params.json`), "hf" for Hugging Face's (safetensors and
            `config.json`).
        shards: number of files of weights; by default 1 in Meta's layout, and files of at most 5 GB in Hugging Face's.

    Raises:
        InputError: an unknown layout, a number of files that the model can't be split over, or a folder that exists.
        OSError: not enough disk space, or no permission.
    """
    args, dtype, tensors = model.params, model.norm.weight.dtype, gather_parameters(model)
    failure: BaseException | None = None
    if is_first_rank():
        if any(isinstance(module, QuantizedWeight) for module in model.modules()):
            logger.warning(
                "the weights of this model are rounded to 8 or 4 bits, and so are those that are written, as %s",
                dtype_name(dtype),
            )
        try:
            write_checkpoint(folder, layout, args, tensors, dtype, shards, tokenizer)
        except BaseException as error:
            failure = error
    # Each tensor is gathered from all ranks, which must take part in every gather: the other ranks do so here, as does
    # the first in those that are left when writing has failed.
    for _ in tensors:
        pass
    raise_on_all_ranks(failure)


def gather_parameters(model: Transformer) -> Iterator[tuple[str, torch.Tensor]]:
    """The name of every parameter and, on the first model-parallel rank, the whole parameter, from all ranks' slices.

    The tensors are on the CPU: a GPU may be full. Quantized weights are dequantized, one at a time. The tensors on the
    other ranks are to be ignored.
    """
    args, size = model.params, model_parallel_size()
    for name, shape in parameter_shapes(args).items():
        weight = model.get_submodule(name.removesuffix(".weight")).weight
        if isinstance(weight, QuantizedWeight):
            tensor = weight.dequantize().cpu()
        else:
            tensor = model.get_parameter(name).detach().cpu()
        shares = [share(name, shape, args, rank, size) for rank in range(size)]
        axis = shares[0].axis
        if axis is not None and size > 1:
            gathered = gather(tensor)  # empty on the other ranks
            # Several ranks in a row may hold the same kv head.
            distinct = [part for i, part in enumerate(gathered) if i == 0 or shares[i] != shares[i - 1]]
            tensor = torch.cat(distinct, dim=axis) if distinct else tensor
        yield name, tensor


def check_layout(layout: str, shards: int | None, args: ModelArgs) -> str:
    """The layout's name as in `LAYOUTS`; InputError if it is unknown, or the model can't be split over the shards."""
    name = {"huggingface": "hf"}.get(str(layout).lower().replace("_", "").replace("-", ""), str(layout).lower())
    if name not in LAYOUTS:
        raise InputError(f"layout={layout!r} must be one of {list(LAYOUTS)}")
    if shards is not None and (not isinstance(shards, int) or isinstance(shards, bool) or shards < 1):
        raise InputError(f"shards={shards!r} must be a whole number of at least 1")
    try:
        args.check(shards if shards and name == "meta" else 1)
    except InputError as error:
        raise InputError(f"shards={shards}: {error}") from error
    return name


def write_checkpoint(
    folder: str | Path,
    layout: str,
    args: ModelArgs,
    tensors: Iterable[tuple[str, torch.Tensor]],
    dtype: torch.dtype,
    shards: int | None,
    tokenizer: Tokenizer | None,
) -> None:
    """Write a complete checkpoint, or nothing.

    Args:
        folder, layout, shards, tokenizer: see `save_checkpoint`.
        args: the model's sizes.
        tensors: every parameter of the network, whole, in the order of `parameter_shapes`; taken one at a time.
        dtype: of the written weights.

    Raises:
        InputError, OSError: see `save_checkpoint`.
    """
    if tokenizer is not None and str(layout).lower() == "meta":  # the layout has no padded embeddings
        args = replace(args, vocab_size=args.vocab_size - tokenizer.n_padding)
    layout = check_layout(layout, shards, args)
    target, needed = output_path(folder), disk_bytes(layout, parameter_count(args) * dtype.itemsize, shards)
    with new_folder(target) as temporary:
        check_disk_space(target, needed, temporary)
        with full_disk_explained(target, needed, temporary):
            shown = progress(tensors, "writing", " tensors", total=len(parameter_shapes(args)))
            if layout == "meta":
                write_meta(temporary, args, shown, dtype, shards or 1)
            else:
                write_hugging_face(temporary, args, shown, dtype, shards)
            if tokenizer is not None:
                write_tokenizer(temporary, layout, tokenizer, implied_stop_tokens(tokenizer, args.use_scaled_rope))


def disk_bytes(layout: str, weight_bytes: int, shards: int | None) -> int:
    """The disk space that writing takes at most.

    Args:
        layout, shards: see `save_checkpoint`.
        weight_bytes: of all files of weights.
    """
    # Staged tensors need space too: those of all files, or in Hugging Face's layout those of one.
    files = 1 if layout == "meta" else shards or max(1, weight_bytes // MAX_SHARD_BYTES)
    return weight_bytes + weight_bytes // files


def write_tokenizer(folder: Path, layout: str, tokenizer: Tokenizer, implied_stop_tokens: set[int]) -> None:
    """Write a tokenizer in the form that programs look for in a folder of this layout.

    Args:
        folder, layout, tokenizer: see `save_checkpoint`.
        implied_stop_tokens: the stop tokens that Meta's layout implies for this model.
    """
    engine, path = tokenizer.engine, folder / "tokenizer.model"

    def is_complete(alone: SentencePieceTokenizer | Vocabulary) -> bool:
        """Whether the files need say no more than what `tokenizer.model` alone says."""
        ours, theirs = (tokens | implied_stop_tokens for tokens in (tokenizer.stop_tokens, alone.stop_tokens))
        says_the_same = (ours, tokenizer.add_bos) == (theirs, alone.add_bos)
        return layout == "meta" and says_the_same and tokenizer.chat_template is None

    if isinstance(engine, SentencePieceTokenizer):
        path.write_bytes(engine.proto)
        alone = SentencePieceTokenizer(engine.proto, path, TokenizerConfig())
        names = ("bos_id", "eos_id", "add_prefix_space", "added_tokens", "special_tokens")
        if not is_complete(alone) or any(getattr(alone, name) != getattr(engine, name) for name in names):
            write_sentencepiece_config(folder, engine, tokenizer.stop_tokens, tokenizer.add_bos)
        return
    if layout == "meta" and fits_tiktoken_file(engine.vocabulary):
        write_tiktoken_file(path, engine.vocabulary)
        if is_complete(read_tiktoken_file(path)) and all(token.special for token in engine.added_tokens):
            return
    vocabulary = replace(engine.vocabulary, stop_tokens=tokenizer.stop_tokens, add_bos=tokenizer.add_bos)
    write_tokenizer_json(folder, vocabulary)
