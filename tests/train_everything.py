"""Trains a checkpoint in several ways and records the results: run by test_finetune_parallel.py in several ranks."""

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
from llama.finetune.training import select_trainable, train_step
from llama.finetune.training_params import TrainingParams

PARAMS = {"format": "chat", "train": "all", "lr": 1e-3, "epochs": 1, "batch_size": 4, "grad_accum": 1}
PARAMS |= {"max_seq_len": 96, "warmup": 0.1, "weight_decay": 0.01, "clip": 1.0, "val_fraction": 0.1, "save_every": 9}
PARAMS |= {"seed": 1, "lora_rank": 4, "activation_checkpointing": False}


def training_params(**changes):
    return TrainingParams(**(PARAMS | changes))


def random_examples(count=7, seed=0):
    """Examples of different lengths, each with two segments that count in the loss."""
    generator = random.Random(seed)
    examples = []
    for line in range(count):
        lengths = [generator.randrange(1, 20) for _ in range(4)]
        loss_mask = [bool(i % 2) for i, length in enumerate(lengths) for _ in range(length)]
        examples.append(Example(line, [generator.randrange(320) for _ in loss_mask], loss_mask))
    return examples


def train_everything(ckpt_dir: Path, data: Path, out: Path, model_parallel_size: int, batch_size: int) -> dict:
    """Compute the loss and its gradients over seven examples, then make whole runs of `finetune`."""
    device = distributed.setup("cpu", model_parallel_size)
    checkpoint = open_checkpoint(ckpt_dir)
    args = checkpoint.settings.model_args(checkpoint.tokenizer().n_words, 96, 1)
    model = load_model(checkpoint, args, device=device, dtype=torch.float32)
    params = training_params(batch_size=batch_size)
    results = {"loss": mean_loss(model, random_examples(), batch_size)}
    select_trainable(model, params)
    optimizer = Optimizer(model, 0.0)
    step, optimizer.step = optimizer.step, lambda rate, clip: optimizer.gradient_norm()
    results["step loss"], results["norm"] = train_step(model, optimizer, random_examples(), 0.0, params)
    results["gradients"] = {name: weight.grad.clone() for name, weight in optimizer.master_weights.items()}
    step(0.0, 1.0)
    # A single example: where there are two copies of the model, one of them gets none.
    loss, norm = train_step(model, optimizer, random_examples(1), 0.0, params)
    results["loss of one example"], results["norm of one example"] = loss, norm

    grad_accum = 8 // batch_size // distributed.data_parallel_size()  # 8 examples a step
    for train in ("all", "lora"):
        options = {"train": train, "lr": 1e-2, "clip": 2.0, "lora_rank": 4, "dtype": "float32", "max_seq_len": 96}
        options |= {"batch_size": batch_size, "grad_accum": grad_accum, "activation_checkpointing": train == "lora"}
        options |= {"epochs": 2, "save_every": 2, "val_fraction": 0.2}
        finetune(data, out / train, ckpt_dir, model_parallel_size=model_parallel_size, **options)
    return results


if __name__ == "__main__":
    ckpt_dir, data, out = map(Path, sys.argv[1:4])
    results = train_everything(ckpt_dir, data, out, *map(int, sys.argv[4:]))
    out.mkdir(exist_ok=True)
    torch.save(results | {"part": distributed.model_parallel_rank()}, out / f"rank-{os.environ['RANK']}")
