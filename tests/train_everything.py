"""Trains a checkpoint in each way and writes down all it can: run under torchrun by test_finetune_parallel.py."""

import os
import random
import sys
from pathlib import Path

import torch

from llama import distributed
from llama.checkpoint import load_model, open_checkpoint
from llama.finetune import finetune
from llama.finetune.data import Example
from llama.finetune.loss import mean_loss
from llama.finetune.optimizer import Optimizer
from llama.finetune.training import choose_parameters, learn
from llama.finetune.training_params import Options

OPTIONS = {"format": "chat", "train": "all", "lr": 1e-3, "epochs": 1, "batch_size": 4, "grad_accum": 1}
OPTIONS |= {"max_seq_len": 96, "warmup": 0.1, "weight_decay": 0.01, "clip": 1.0, "val_fraction": 0.1, "save_every": 9}
OPTIONS |= {"seed": 1, "lora_rank": 4, "activation_checkpointing": False}


def options(**changes):
    return Options(**(OPTIONS | changes))


def examples(count=7, seed=0):
    """Of unlike lengths, each with two segments that are learned."""
    draw = random.Random(seed)
    made = []
    for line in range(count):
        lengths = [draw.randrange(1, 20) for _ in range(4)]
        learned = [bool(i % 2) for i, length in enumerate(lengths) for _ in range(length)]
        made.append(Example(line, [draw.randrange(320) for _ in learned], learned))
    return made


def everything(ckpt_dir: Path, data: Path, out: Path, model_parallel_size: int, batch_size: int) -> dict:
    """The loss and its gradients over seven examples, then whole runs of `finetune`."""
    device = distributed.setup("cpu", model_parallel_size)
    checkpoint = open_checkpoint(ckpt_dir)
    args = checkpoint.settings.model_args(checkpoint.tokenizer().n_words, 96, 1)
    model = load_model(checkpoint, args, device=device, dtype=torch.float32)
    how = options(batch_size=batch_size)
    found = {"loss": mean_loss(model, examples(), batch_size)}
    choose_parameters(model, how)
    optimizer = Optimizer(model, 0.0)
    step, optimizer.step = optimizer.step, lambda rate, clip: optimizer.gradient_norm()
    found["step loss"], found["norm"] = learn(model, optimizer, examples(), 0.0, how)
    found["gradients"] = {name: master.grad.clone() for name, master in optimizer.masters.items()}
    step(0.0, 1.0)
    # one example alone: with two copies of the model, there is none for the other
    found["loss of one"], found["norm of one"] = learn(model, optimizer, examples(1), 0.0, how)

    grad_accum = 8 // batch_size // distributed.data_parallel_size()  # 8 examples a step
    for train in ("all", "lora"):
        run = {"train": train, "lr": 1e-2, "clip": 2.0, "lora_rank": 4, "dtype": "float32", "max_seq_len": 96}
        run |= {"batch_size": batch_size, "grad_accum": grad_accum, "activation_checkpointing": train == "lora"}
        run |= {"epochs": 2, "save_every": 2, "val_fraction": 0.2}
        finetune(data, out / train, ckpt_dir, model_parallel_size=model_parallel_size, **run)
    return found


if __name__ == "__main__":
    ckpt_dir, data, out = map(Path, sys.argv[1:4])
    found = everything(ckpt_dir, data, out, *map(int, sys.argv[4:]))
    out.mkdir(exist_ok=True)
    torch.save(found | {"part": distributed.model_parallel_rank()}, out / f"rank-{os.environ['RANK']}")
