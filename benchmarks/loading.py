"""Measures loading a checkpoint of 400 MB, beside reading and copying it: python benchmarks/loading.py

Each load runs in a process of its own, so that its memory can be measured; the methods take turns, and medians are
printed. Time and memory count from after the imports. The column "+ 1 token" includes one forward pass, which makes the
system bring every weight into memory.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from llama import ModelArgs, Transformer
from llama.checkpoint import check_tensors, load_model, open_checkpoint, read_settings, save_checkpoint

ROUNDS = 5
SIZES: dict[str, Any] = {"dim": 1024, "n_layers": 8, "n_heads": 16, "n_kv_heads": 8, "vocab_size": 2048}


def ours(folder: Path) -> Transformer:
    """Load as `Llama.build` does, but without the tokenizer."""
    checkpoint = open_checkpoint(folder)
    args = checkpoint.settings.model_args(SIZES["vocab_size"], max_seq_len=16, max_batch_size=1)
    check_tensors(checkpoint, args)
    return load_model(checkpoint, args, device=torch.device("cpu"), dtype=torch.float32)


def read_and_copy(folder: Path) -> Transformer:
    """Load in the usual way: read the whole file, make the network, and copy the weights into it."""
    weights = torch.load(folder / "consolidated.00.pth", weights_only=True)
    model = Transformer(read_settings(folder).model_args(SIZES["vocab_size"], max_seq_len=16, max_batch_size=1))
    model.load_state_dict(weights)
    return model


def peak_memory() -> int:
    """Return the most memory that this process has held so far, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def measure(method: str, folder: str) -> dict[str, float]:
    """Load once, in this process; return seconds and bytes."""
    memory_before, start = peak_memory(), time.perf_counter()
    model = {"ours": ours, "read and copy": read_and_copy}[method](Path(folder))
    result: dict[str, float] = {
        "seconds": time.perf_counter() - start,
        "peak when loaded": peak_memory() - memory_before,
    }
    with torch.no_grad():
        model(torch.tensor([[5]]))
    return result | {"seconds + 1 token": time.perf_counter() - start, "peak": peak_memory() - memory_before}


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        model = Transformer(ModelArgs(**SIZES))
        size = 4 * sum(weight.numel() for weight in model.parameters())
        for layout in ("meta", "hf"):
            save_checkpoint(Path(scratch) / layout, model, layout=layout)
        del model
        reference = ("read and copy", "meta")
        results: dict[tuple[str, str], list[dict[str, float]]] = {
            ("ours", "meta"): [],
            ("ours", "hf"): [],
            reference: [],
        }
        for _ in range(ROUNDS):
            for (method, layout), runs in results.items():
                command = [sys.executable, __file__, method, f"{scratch}/{layout}"]
                runs.append(json.loads(subprocess.check_output(command)))
        print(f"{size / 1e6:.0f} MB in float32, {ROUNDS} rounds, medians [lowest to highest]")
        print(f"{'':24}{'load, s':24}{'load + 1 token, s':24}{'peak memory / size':24}")
        for (method, layout), runs in results.items():
            columns = []
            for key, unit in (("seconds", 1), ("seconds + 1 token", 1), ("peak", size)):
                values = sorted(run[key] / unit for run in runs)
                columns.append(f"{statistics.median(values):.3f} [{values[0]:.3f} to {values[-1]:.3f}]")
            print(f"{method + ', ' + layout:24}" + "".join(f"{column:24}" for column in columns))
        for layout in ("meta", "hf"):
            for key in ("seconds", "seconds + 1 token"):
                pairs = zip(results[reference], results["ours", layout], strict=True)
                ratio = statistics.median(slow[key] / fast[key] for slow, fast in pairs)
                print(f"{layout}, {key}: {ratio:.1f} times as fast as reading and copying")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(measure(*sys.argv[1:])))
    else:
        main()
