"""Writing a checkpoint in another layout: `llama convert`."""

import logging
from collections.abc import Iterator
from pathlib import Path

import torch

from llama.checkpoint.base import Checkpoint
from llama.checkpoint.load import check_tensors, open_checkpoint
from llama.checkpoint.lora_adapter import LoRAAdapter
from llama.checkpoint.parameters import parameter_shapes
from llama.checkpoint.save import write_checkpoint
from llama.device import dtype_named
from llama.model_args import ModelArgs
from llama.output_folder import check_free, exclusive, output_path
from llama.tokenizer import Tokenizer

logger = logging.getLogger("llama")


def convert(
    from_: str | Path,
    to: str | Path,
    layout: str = "meta",
    shards: int | None = None,
    dtype: str | None = None,
    tokenizer_path: str | None = None,
    *,
    adapter: str | Path | None = None,
) -> None:
    """Write a checkpoint in another layout, number of files or dtype; merge a LoRA adapter into it.

    Any layout is read: a folder in Meta's or Hugging Face's, or a GGUF file, which is dequantized. Tensors pass through
    memory one at a time. The new folder appears when it is complete.

    Args:
        from_: the checkpoint's folder or file, after --from or as the first argument
        to: the folder to write, which must not exist yet
        layout: meta (consolidated.NN.pth and params.json) or hf (safetensors and config.json)
        shards: number of files of weights; by default 1 for meta, and files of at most 5 GB for hf
        dtype: float32, float16 or bfloat16; by default the smallest that represents every weight exactly
        tokenizer_path: the tokenizer's file, if it is not with the checkpoint
        adapter: the folder of a PEFT LoRA adapter, which was trained on this checkpoint; it is computed in float32
    """
    requested_dtype = dtype_named(dtype)
    target = output_path(to)
    if target.exists():
        with exclusive(target):  # which also removes what a run has left that was killed in its last moment
            check_free(target)
    checkpoint = open_checkpoint(from_)
    tokenizer = find_tokenizer(checkpoint, tokenizer_path)
    vocab_size = checkpoint.settings.params.get("vocab_size", -1) if tokenizer is None else tokenizer.n_words
    args = checkpoint.settings.model_args(vocab_size, max_seq_len=1, max_batch_size=1)
    check_tensors(checkpoint, args)
    if args.max_position_embeddings is None:
        args.max_position_embeddings = checkpoint.settings.advised_seq_len
    tensors = read_parameters(checkpoint, args)
    if adapter is not None:
        lora = LoRAAdapter(adapter, args)
        tensors = lora.merge(tensors)
        own = [name for name in ("tokenizer.json", "tokenizer.model") if (lora.path / name).exists()]
        if own and tokenizer_path is None:
            logger.warning(
                "the base model's tokenizer is written, with its chat template; for the adapter's own, give "
                "tokenizer_path=%s",
                lora.path / own[0],
            )
    write_checkpoint(to, layout, args, tensors, requested_dtype or checkpoint.dtype(), shards, tokenizer)
    logger.info("wrote %s", output_path(to))


def find_tokenizer(checkpoint: Checkpoint, tokenizer_path: str | None) -> Tokenizer | None:
    """The tokenizer to write beside the weights, or None, with a warning, if there is none."""
    try:
        return checkpoint.tokenizer(tokenizer_path)
    except FileNotFoundError as error:
        if tokenizer_path is not None:
            raise
        logger.warning("no tokenizer is written, only the weights: %s", error)
        return None


def read_parameters(checkpoint: Checkpoint, args: ModelArgs) -> Iterator[tuple[str, torch.Tensor]]:
    """The name of every parameter and the whole parameter, one at a time."""
    for name, shape in parameter_shapes(args).items():
        axis = 0 if len(shape) == 2 else None
        yield name, checkpoint.read(name, axis, 0, shape[0])
