"""`finetune`: a whole fine-tuning run, from the command line or from a program."""

import hashlib
import inspect
import logging
import os
import shlex
from collections.abc import Mapping

import torch

from llama import distributed
from llama.chat_format import ChatFormat, named_format
from llama.checkpoint import check_tensors, load_model, open_checkpoint
from llama.default_model import default_checkpoint
from llama.device import default_dtype, dtype_name, dtype_named
from llama.errors import InputError
from llama.files import as_path
from llama.finetune.data import find_data, read_examples, split_validation
from llama.finetune.run_folder import RunFolder
from llama.finetune.training import train as train_model
from llama.finetune.training_params import TrainingParams
from llama.out_of_memory import out_of_memory_explained
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
    chat_format: str | None = None,
) -> None:
    """Fine-tune a model on examples of prompts and answers, and write the result as a checkpoint.

    The data is a file of JSON Lines: {"prompt": "...", "completion": "..."}, or {"messages": [{"role": "user",
    "content": "..."}, {"role": "assistant", "content": "..."}]}, or the shapes of Alpaca's and ShareGPT's data. Only
    the assistant's answers count in the loss. Ctrl-C and SIGTERM save the state. To resume an interrupted run, give the
    same command again.

    Args:
        data: the file of examples, or a folder with one .jsonl file
        out_dir: the folder to write; it must not exist yet, and is created when the run has finished
        ckpt_dir: the checkpoint to start from: a folder in Meta's or Hugging Face's layout, or a GGUF file; by default
            SmolLM2-135M-Instruct, which is downloaded once
        tokenizer_path: the tokenizer file; by default the one that comes with the checkpoint
        format: chat (the model's chat format), or plain (the completion directly follows the prompt)
        train: which weights to train: all, attention, norms, or lora (LoRA matrices beside those of every layer, merged
            into them at the end)
        lr: peak learning rate; by default 2e-5 for all and attention, 1e-3 for norms, 2e-4 for lora
        epochs: number of passes over the training examples
        batch_size: number of examples that pass through the network together
        grad_accum: number of batches of each training step; if there are several copies of the model, for each copy
        max_seq_len: maximum number of tokens of an example; in a longer one, the beginning of the prompt is cut off
        warmup: fraction of the steps in which the learning rate rises to its peak, before cosine decay
        weight_decay: AdamW's weight decay; norms have none
        clip: maximum gradient norm (0: no clipping)
        val_fraction: fraction of the examples that are not trained on, but used for the validation loss
        save_every: number of steps between saved states, from which an interrupted run is resumed; one is saved after
            each epoch too
        seed: random seed, for the order of the examples, the validation split and the initial LoRA matrices
        lora_rank: rank of the LoRA matrices
        activation_checkpointing: save memory by computing activations twice; takes a third more time
        dtype: bfloat16 or float32, for computation and for the written checkpoint; by default bfloat16 if the device
            supports it, else float32
        model_parallel_size: under torchrun, the number of processes that share one copy of the model; by default all.
            With fewer, there are several copies, and each trains on its own part of the examples
        chat_format: llama2, llama3 or chatml; by default the chat template that the model's files carry, or without one
            the format that its control tokens tell
    """
    options = dict(locals())
    params = TrainingParams(
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
    params.check()
    torch_dtype = dtype_named(dtype)
    if torch_dtype == torch.float16:
        raise InputError("dtype='float16' must be 'bfloat16' or 'float32': small gradients would underflow in float16")

    data_path = find_data(data)
    device = distributed.setup(None, model_parallel_size)
    with RunFolder(out_dir) as folder:
        checkpoint = open_checkpoint(default_checkpoint() if ckpt_dir is None else ckpt_dir)
        tokenizer = checkpoint.tokenizer(tokenizer_path)
        args = checkpoint.settings.model_args(tokenizer.n_words, max_seq_len, max_batch_size=1)
        check_tensors(checkpoint, args)
        args.check(distributed.model_parallel_size())
        formatter = find_chat_format(tokenizer, chat_format) if format == "chat" else None
        examples = read_examples(data_path, tokenizer, formatter, max_seq_len)
        truncated = [example.line for example in examples if example.n_truncated]
        if truncated:
            logger.warning(
                "max_seq_len=%d: the prompts of %d examples were cut, the first in line %d",
                max_seq_len,
                len(truncated),
                truncated[0],
            )
        training, validation = split_validation(examples, val_fraction, seed)

        torch_dtype = torch_dtype or default_dtype(device)
        torch_dtype = torch.float32 if torch_dtype == torch.float16 else torch_dtype
        folder.begin(
            params.settings()
            | {
                "ckpt_dir": str(checkpoint.path.absolute()),
                "tokenizer_path": None if tokenizer_path is None else str(as_path(tokenizer_path, "tokenizer_path")),
                "data": hashlib.sha256(data_path.read_bytes()).hexdigest(),
                "dtype": dtype_name(torch_dtype),
                "chat_format": chat_format,
                "model_parallel_size": distributed.model_parallel_size(),
                "copies": distributed.data_parallel_size(),
            },
        )
        try:
            with out_of_memory_explained(
                f"not enough memory to train {train!r} with batch_size={batch_size}, max_seq_len={max_seq_len}: lower "
                f"them (a higher grad_accum makes up for a lower batch_size), or use activation_checkpointing, "
                f"train='lora' or more processes"
            ):
                model = load_model(checkpoint, args, device=device, dtype=torch_dtype)
                train_model(model, training, validation, params, folder)
            folder.finish(model, tokenizer)
        except (KeyboardInterrupt, SystemExit, OSError):
            done = f"after {folder.saved_step} steps" if folder.saved_step else "from the beginning"
            logger.warning("the run has not ended; it goes on %s with:\n  %s", done, resume_command(options))
            raise
    if chat_format is not None:  # which no file of a checkpoint can say
        logger.warning("chat with this model by --chat_format %s, in which it was trained", chat_format)


def resume_command(options: Mapping[str, object]) -> str:
    """The command that makes the same run.

    Args:
        options: the arguments of `finetune`, by name.
    """
    parameters = inspect.signature(finetune).parameters
    given = {name: value for name, value in options.items() if value != parameters[name].default}
    n_processes = distributed.model_parallel_size() * distributed.data_parallel_size()
    program = ["llama", "finetune"]
    if n_processes > 1:
        n_here = os.environ.get("LOCAL_WORLD_SIZE", str(n_processes))
        program = ["torchrun", "--nproc_per_node", n_here, "-m", "llama.finetune"]
    return shlex.join([*program, *(part for name, value in given.items() for part in (f"--{name}", str(value)))])


def find_chat_format(tokenizer: Tokenizer, name: str | None) -> ChatFormat:
    """The chat format of this name, or of the tokenizer's model."""
    try:
        formatter = (ChatFormat if name is None else named_format(name))(tokenizer)
    except InputError as error:
        raise InputError(f"{error}; or train with --format plain") from error
    logger.info("chat format: %s", formatter.description)
    return formatter
