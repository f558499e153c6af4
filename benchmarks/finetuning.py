"""What a step of fine-tuning takes, beside a plain loop with transformers: python benchmarks/finetuning.py

The default model, in float32, learns from two dialogs of about 600 tokens, made of example_pairs.jsonl. Each way runs
in a process of its own, so that memory can be told apart; the ways take turns, and medians are printed. Memory is the
most a process held beyond what its imports take: weights, gradients, AdamW's state, activations. All must find the same
loss at first.
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
from loading import peak

from llama import ChatFormat
from llama.checkpoint import load_model, open_checkpoint, save_checkpoint
from llama.default_model import default_checkpoint
from llama.finetune.data import Example, make_batch, read_examples
from llama.finetune.optimizer import Optimizer
from llama.finetune.training import checkpoint_activations, choose_parameters, learn
from llama.finetune.training_params import TrainingParams

DIALOGS = 2
RATE, DECAY, CLIP = 1e-5, 0.01, 1.0
WAYS = {  # what is trained, whether activations are computed again
    "ours": ("all", False),
    "ours, activation checkpointing": ("all", True),
    "ours, LoRA": ("lora", False),
    "ours, LoRA, activation checkpointing": ("lora", True),
    "transformers": ("all", False),
    "transformers, activation checkpointing": ("all", True),
}


def write_dialogs(path: Path) -> None:
    """Dialogs of 16 turns: one question about each of the pairs' 16 facts."""
    pairs = [json.loads(line) for line in Path(__file__).with_name("..").joinpath("example_pairs.jsonl").open()]
    with path.open("w") as file:
        for i in range(DIALOGS):
            messages = []
            for pair in pairs[i::4]:
                messages.append({"role": "user", "content": pair["prompt"]})
                messages.append({"role": "assistant", "content": pair["completion"]})
            file.write(json.dumps({"messages": messages}) + "\n")


def ours(rows: list[Example], folder: str, train: str, again: bool) -> Callable[[], float]:
    """A step of this library's."""
    how: dict[str, Any] = {"format": "chat", "train": train, "lr": RATE, "epochs": 1, "batch_size": DIALOGS, "seed": 1}
    how |= {"grad_accum": 1, "max_seq_len": 2048, "warmup": 0, "weight_decay": DECAY, "clip": CLIP, "val_fraction": 0}
    options = TrainingParams(**how, save_every=1, lora_rank=16, activation_checkpointing=again)
    checkpoint = open_checkpoint(folder)
    args = checkpoint.settings.model_args(checkpoint.settings.params["vocab_size"], options.max_seq_len, 1)
    model = load_model(checkpoint, args, device=torch.device("cpu"), dtype=torch.float32)
    choose_parameters(model, options)
    if again:
        checkpoint_activations(model)
    optimizer = Optimizer(model, DECAY)
    return lambda: learn(model, optimizer, rows, RATE, options)[0]


def plain_loop(rows: list[Example], folder: str, again: bool) -> Callable[[], float]:
    """A step of the loop that one writes with transformers and torch."""
    import transformers

    model: Any = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    if again:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=DECAY)
    tokens, targets, learned = make_batch(rows)
    labels = torch.cat([torch.full((len(rows), 1), -100), targets.masked_fill(~learned, -100)], dim=1)
    tokens = torch.cat([tokens[:, :1], targets], dim=1)  # (batch, seq + 1)
    lengths = torch.tensor([[len(row.tokens)] for row in rows])
    attention_mask = torch.arange(tokens.shape[1]) < lengths

    def step() -> float:
        loss = model(input_ids=tokens, attention_mask=attention_mask, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def measure(way: str, folder: str, steps: int) -> dict[str, float]:
    """Some steps, in this process."""
    tokenizer = open_checkpoint(folder).tokenizer()
    rows = read_examples(Path(folder) / "dialogs.jsonl", tokenizer, ChatFormat(tokenizer), 2048)
    train, again = WAYS[way]
    if way.startswith("transformers"):
        importlib.import_module("transformers.models.llama.modeling_llama")  # before memory is counted
    before = peak()
    step = plain_loop(rows, folder, again) if way.startswith("transformers") else ours(rows, folder, train, again)
    loss = step()  # what is done once is done now
    start = time.perf_counter()
    for _ in range(steps):
        step()
    seconds = (time.perf_counter() - start) / steps
    tokens = sum(len(row.tokens) for row in rows)
    return {"loss": loss, "tokens": tokens, "tokens/s": tokens / seconds, "memory": peak() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="that are timed, in each round")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # how this program calls itself
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        print(json.dumps(measure(given.way, given.folder, given.steps)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        checkpoint = open_checkpoint(default_checkpoint())
        args = checkpoint.settings.model_args(checkpoint.settings.params["vocab_size"], 2048, 1)
        model = load_model(checkpoint, args, device=torch.device("cpu"), dtype=torch.float32)
        save_checkpoint(folder, model, checkpoint.tokenizer(), layout="hf")
        del model
        write_dialogs(folder / "dialogs.jsonl")
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(given.rounds):
            for way in WAYS:
                command = [sys.executable, __file__, "--way", way, "--folder", str(folder), "--steps", str(given.steps)]
                found[way].append(json.loads(subprocess.check_output(command, stderr=subprocess.DEVNULL)))
                print(f"{way}: {found[way][-1]}", file=sys.stderr)
    first = found["ours"][0]
    for runs in found.values():
        if abs(runs[0]["loss"] - first["loss"]) > 1e-3:
            raise SystemExit(f"the losses differ: {found}")
    print(f"{DIALOGS} dialogs of {first['tokens'] / DIALOGS:.0f} tokens; the first loss of all is {first['loss']:.4f}")
    print(
        f"{given.rounds} rounds, {torch.get_num_threads()} threads, torch {torch.__version__}; medians [least to most]"
    )
    print(f"{'':42}{'tokens/s':22}peak memory, GB")
    for way, runs in found.items():
        columns = []
        for key, unit, digits in (("tokens/s", 1.0, 0), ("memory", 1e9, 2)):
            values = sorted(run[key] / unit for run in runs)
            spread = f"[{values[0]:.{digits}f} to {values[-1]:.{digits}f}]"
            columns.append(f"{statistics.median(values):.{digits}f} {spread}")
        print(f"{way:42}{columns[0]:22}{columns[1]}")


if __name__ == "__main__":
    main()
