"""Measures a step of fine-tuning, beside a plain loop with transformers: python benchmarks/finetuning.py

The default model is trained in float32 on two dialogs of about 600 tokens, made of example_pairs.jsonl. Each method
runs in a process of its own, so that its memory can be measured; the methods take turns, and medians are printed.
Memory is the most that a process held beyond its imports: weights, gradients, AdamW's state, activations. The first
loss must be the same for all methods.
"""

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from loading import peak_memory

from llama import ChatFormat
from llama.checkpoint import load_model, open_checkpoint, save_checkpoint
from llama.default_model import default_checkpoint
from llama.finetune.data import Example, make_batch, read_examples
from llama.finetune.optimizer import Optimizer
from llama.finetune.training import checkpoint_activations, select_trainable, train_step
from llama.finetune.training_params import TrainingParams

N_DIALOGS = 2
LEARNING_RATE, WEIGHT_DECAY, CLIP = 1e-5, 0.01, 1.0
METHODS = {  # the option `train`, and whether activations are computed again in the backward pass
    "ours": ("all", False),
    "ours, activation checkpointing": ("all", True),
    "ours, LoRA": ("lora", False),
    "ours, LoRA, activation checkpointing": ("lora", True),
    "transformers": ("all", False),
    "transformers, activation checkpointing": ("all", True),
}


def write_dialogs(path: Path) -> None:
    """Write dialogs of 16 questions and answers, one about each of the 16 facts of example_pairs.jsonl."""
    pairs = [json.loads(line) for line in Path(__file__).with_name("..").joinpath("example_pairs.jsonl").open()]
    with path.open("w") as file:
        for i in range(N_DIALOGS):
            messages = []
            for pair in pairs[i::4]:
                messages.append({"role": "user", "content": pair["prompt"]})
                messages.append({"role": "assistant", "content": pair["completion"]})
            file.write(json.dumps({"messages": messages}) + "\n")


def our_step(examples: list[Example], folder: str, train: str, activation_checkpointing: bool) -> Callable[[], float]:
    """Return a function that makes a step of this library, and returns its loss."""
    params = TrainingParams(
        format="chat",
        train=train,
        lr=LEARNING_RATE,
        epochs=1,
        batch_size=N_DIALOGS,
        grad_accum=1,
        max_seq_len=2048,
        warmup=0,
        weight_decay=WEIGHT_DECAY,
        clip=CLIP,
        val_fraction=0,
        save_every=1,
        seed=1,
        lora_rank=16,
        activation_checkpointing=activation_checkpointing,
    )
    checkpoint = open_checkpoint(folder)
    args = checkpoint.settings.model_args(checkpoint.settings.params["vocab_size"], params.max_seq_len, 1)
    model = load_model(checkpoint, args, device=torch.device("cpu"), dtype=torch.float32)
    select_trainable(model, params)
    if activation_checkpointing:
        checkpoint_activations(model)
    optimizer = Optimizer(model, WEIGHT_DECAY)
    return lambda: train_step(model, optimizer, examples, LEARNING_RATE, params)[0]


def transformers_step(examples: list[Example], folder: str, activation_checkpointing: bool) -> Callable[[], float]:
    """Return a function that makes a step of a plain loop with transformers and torch, and returns its loss."""
    import transformers

    model: Any = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    if activation_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    tokens, targets, loss_mask = make_batch(examples)
    labels = torch.cat([torch.full((len(examples), 1), -100), targets.masked_fill(~loss_mask, -100)], dim=1)
    tokens = torch.cat([tokens[:, :1], targets], dim=1)  # (batch, seq + 1)
    lengths = torch.tensor([[len(example.tokens)] for example in examples])
    attention_mask = torch.arange(tokens.shape[1]) < lengths

    def step() -> float:
        loss: torch.Tensor = model(input_ids=tokens, attention_mask=attention_mask, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def measure(method: str, folder: str, steps: int) -> dict[str, float]:
    """Measure a method in this process; return its first loss, the number of tokens of a step, tokens/s and bytes."""
    tokenizer = open_checkpoint(folder).tokenizer()
    examples = read_examples(Path(folder) / "dialogs.jsonl", tokenizer, ChatFormat(tokenizer), 2048)
    train, activation_checkpointing = METHODS[method]
    if method.startswith("transformers"):
        importlib.import_module("transformers.models.llama.modeling_llama")  # before memory is measured
    memory_before = peak_memory()
    if method.startswith("transformers"):
        step = transformers_step(examples, folder, activation_checkpointing)
    else:
        step = our_step(examples, folder, train, activation_checkpointing)
    loss = step()  # not timed: it includes what is done only once
    start = time.perf_counter()
    for _ in range(steps):
        step()
    seconds = (time.perf_counter() - start) / steps
    tokens = sum(len(example.tokens) for example in examples)
    return {"loss": loss, "tokens": tokens, "tokens/s": tokens / seconds, "memory": peak_memory() - memory_before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how many times each method is measured")
    parser.add_argument("--steps", type=int, default=2, help="number of timed steps of each round")
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)  # given to the processes it starts
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.method:
        print(json.dumps(measure(arguments.method, arguments.folder, arguments.steps)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        checkpoint = open_checkpoint(default_checkpoint())
        args = checkpoint.settings.model_args(checkpoint.settings.params["vocab_size"], 2048, 1)
        model = load_model(checkpoint, args, device=torch.device("cpu"), dtype=torch.float32)
        save_checkpoint(folder, model, checkpoint.tokenizer(), layout="hf")
        del model
        write_dialogs(folder / "dialogs.jsonl")
        results: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
        for _ in range(arguments.rounds):
            for method, runs in results.items():
                command = [sys.executable, __file__, "--method", method, "--folder", str(folder)]
                command += ["--steps", str(arguments.steps)]
                runs.append(json.loads(subprocess.check_output(command, stderr=subprocess.DEVNULL)))
                print(f"{method}: {runs[-1]}", file=sys.stderr)
    first = results["ours"][0]
    for runs in results.values():
        if abs(runs[0]["loss"] - first["loss"]) > 1e-3:
            raise SystemExit(f"the losses differ: {results}")
    tokens = first["tokens"] / N_DIALOGS
    print(f"{N_DIALOGS} dialogs of {tokens:.0f} tokens; the first loss of each method is {first['loss']:.4f}")
    print(
        f"{arguments.rounds} rounds, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"medians [lowest to highest]"
    )
    print(f"{'':42}{'tokens/s':22}peak memory, GB")
    for method, runs in results.items():
        columns = []
        for key, unit, digits in (("tokens/s", 1.0, 0), ("memory", 1e9, 2)):
            values = sorted(run[key] / unit for run in runs)
            spread = f"[{values[0]:.{digits}f} to {values[-1]:.{digits}f}]"
            columns.append(f"{statistics.median(values):.{digits}f} {spread}")
        print(f"{method:42}{columns[0]:22}{columns[1]}")


if __name__ == "__main__":
    main()
