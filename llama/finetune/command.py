"""Fine-tuning from the command line, or from a program."""

import hashlib
import logging
from pathlib import Path

import torch

from llama import distributed
from llama.chat_format import ChatFormat
from llama.checkpoint import check_tensors, load_model, open_checkpoint
from llama.checkpoint.memory import is_out_of_memory
from llama.default_model import default_checkpoint
from llama.device import default_dtype, dtype_named
from llama.errors import InputError
from llama.finetune.data import read_examples, split_off
from llama.finetune.run_folder import RunFolder
from llama.finetune.training import train as train_model
from llama.finetune.training_params import TrainingParams
from llama.tokenizer import Tokenizer

logger = logging.getLogger("llama")


def finetune(
    data: str,
    out_dir: str,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    format: str = "chat",
    train: str = "all",
    lr: float | None = None,
    epochs: int = 3,
    batch_size: int = 4,
    grad_accum: int = 1,
    max_seq_len: int = 512,
    warmup: float = 0.1,
    weight_decay: float = 0.01,
    clip: float = 1.0,
    val_fraction: float = 0.1,
    save_every: int = 100,
    seed: int = 1,
    lora_rank: int = 16,
    activation_checkpointing: bool = False,
    dtype: str | None = None,
    model_parallel_size: int | None = None,
) -> None:
    """Teach a model to answer as given examples do, and write it as a checkpoint that Llama.build loads.

    The data is a file of JSON Lines: {"prompt": "...", "completion": "..."}, or {"messages": [{"role": "user",
    "content": "..."}, {"role": "assistant", "content": "..."}]}. Only what the assistant says is learned. Without
    ckpt_dir this trains SmolLM2-135M-Instruct, which is fetched once. A run that was interrupted goes on where it
    stopped when the same command is given again.

    Args:
        data: the file of examples
        out_dir: the folder to write, which must not be there yet; it appears when all is done
        ckpt_dir: the checkpoint to begin with: a folder in Meta's or Hugging Face's layout, or a GGUF file
        tokenizer_path: the tokenizer's file, where it isn't with the checkpoint
        format: chat (the model's own chat format), or plain (prompt, completion, end token)
        train: all, attention or norms (those weights), or lora (thin matrices beside them, which are merged at the end)
        lr: the highest learning rate; by default 2e-5, or 1e-3 for norms, 2e-4 for lora
        epochs: how often each example is learned from
        batch_size: examples that pass through the network together
        grad_accum: batches to a step of training; with several copies of the model, of each copy
        max_seq_len: longest example, in tokens; of a longer one, the beginning of the prompt is left out
        warmup: the part of the steps in which the learning rate rises, before it falls as a cosine does
        weight_decay: how strongly matrices are drawn towards zero
        clip: longest gradient of a step; a longer one is shortened to it. 0 for no limit
        val_fraction: the part of the examples that is kept apart, to see the loss on what wasn't learned
        save_every: steps after which the state is written that an interrupted run goes on from
        seed: of the order of the examples, and of what else is drawn
        lora_rank: how thick the thin matrices are
        activation_checkpointing: take less memory and a third more time
        dtype: of the network's arithmetic, and of the checkpoint: bfloat16 or float32
        model_parallel_size: under torchrun, processes that share one copy of the model; by default all. With fewer,
            there are more copies, each of which learns from other examples
    """
    options = TrainingParams(
        format=format,
        train=train,
        lr=lr,
        epochs=epochs,
        batch_size=batch_size,
        grad_accum=grad_accum,
        max_seq_len=max_seq_len,
        warmup=warmup,
        weight_decay=weight_decay,
        clip=clip,
        val_fraction=val_fraction,
        save_every=save_every,
        seed=seed,
        lora_rank=lora_rank,
        activation_checkpointing=activation_checkpointing,
    )
    options.check()
    chosen = dtype_named(dtype)
    if chosen == torch.float16:
        raise InputError("dtype='float16' must be 'bfloat16' or 'float32': small gradients would vanish in float16")

    checkpoint = open_checkpoint(default_checkpoint() if ckpt_dir is None else ckpt_dir)
    tokenizer = Tokenizer(tokenizer_path) if tokenizer_path is not None else checkpoint.tokenizer()
    args = checkpoint.settings.model_args(tokenizer.n_words, max_seq_len, max_batch_size=1)
    check_tensors(checkpoint, args)
    examples = read_examples(data, tokenizer, chat_format(tokenizer) if format == "chat" else None, max_seq_len)
    cut = [example.line for example in examples if example.cut]
    if cut:
        logger.warning(
            "max_seq_len=%d: the prompts of %d examples were cut, of line %d first", max_seq_len, len(cut), cut[0]
        )
    training, validation = split_off(examples, val_fraction, seed)

    device = distributed.setup(None, model_parallel_size)
    args.check(distributed.model_parallel_size())
    chosen = chosen or default_dtype(device)
    chosen = torch.float32 if chosen == torch.float16 else chosen
    folder = RunFolder(
        out_dir,
        options.settings()
        | {
            "ckpt_dir": str(checkpoint.path.absolute()),
            "tokenizer_path": None if tokenizer_path is None else str(tokenizer_path),
            "data": hashlib.sha256(Path(data).read_bytes()).hexdigest(),
            "dtype": str(chosen).removeprefix("torch."),
            "model_parallel_size": distributed.model_parallel_size(),
            "copies": distributed.data_parallel_size(),
        },
    )
    try:
        model = load_model(checkpoint, args, device=device, dtype=chosen)
        train_model(model, training, validation, options, folder)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(
            f"not enough memory to train {train!r} with batch_size={batch_size}, max_seq_len={max_seq_len}: lower them "
            f"(a higher grad_accum makes up for a lower batch_size), or give activation_checkpointing, train='lora', "
            f"or more processes"
        ) from error
    folder.finish(model, tokenizer)


def chat_format(tokenizer: Tokenizer) -> ChatFormat:
    """The chat format of a tokenizer's model."""
    try:
        return ChatFormat(tokenizer)
    except InputError as error:
        raise InputError(f"{error}; or train with --format plain") from error
