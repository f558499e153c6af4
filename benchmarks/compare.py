"""Measures this library beside its peers: python benchmarks/compare.py --out results

The same weights, number format and threads for all, each library in a process of its own; they take turns, round by
round, so that a busy machine slows all of them. Ratios are taken within a round; medians are printed. `results.json`
and `results.png` go into the folder.
"""

import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peers import MODULES, PEERS
from weights import write_weights

from llama.cli.command_line import run
from llama.errors import InputError

# What is asked of a library, and of which.
DECODE = {
    f"decode, batch {batch}, context {context}": {"do": "decode", "batch": batch, "context": context, "steps": steps}
    for batch, steps in ((1, 16), (8, 6))
    for context in (128, 512, 2048)
}
READ = {f"read {length} tokens": {"do": "read", "lengths": [length]} for length in (512, 2048)}
MEMORY = {f"memory to read {length} tokens": {"do": "memory", "lengths": [length]} for length in (512, 2048)}
SAMPLE = {
    "prompt of 128, 32 sampled": {"do": "generate", "lengths": [128], "new": 32, "temperature": 0.6},
}
UNEQUAL = {
    "prompts of 8, 8, 8, 512; 16 new": {"do": "generate", "lengths": [8, 8, 8, 512], "new": 16, "temperature": 0.0},
}
CASES: dict[str, dict[str, Any]] = DECODE | READ | MEMORY | SAMPLE | UNEQUAL
# A network of Llama 3.2 1B's shape takes a while for each.
LARGE = ("decode, batch 1, context 512", "decode, batch 8, context 512", "read 512 tokens", "prompt of 128, 32 sampled")
LOADING = ("load", "load + 1 token", "memory")


class Worker:
    """A library in its own process."""

    def __init__(self, name: str, folder: Path, dtype: str, threads: int, rows: int, length: int) -> None:
        command = [sys.executable, Path(__file__).with_name("peers.py"), name, folder, dtype, threads, rows, length]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        self.process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        self.loading = self._answer()

    def ask(self, request: dict[str, Any]) -> Any:
        assert self.process.stdin is not None  # noqa: S101 - it is a pipe
        time.sleep(0.2)  # the others' threads may still be waiting for work, busily
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None  # noqa: S101 - it is a pipe
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"{self.process.args!r} ended:\n{self.log.read()[-2000:]}")
        return json.loads(line)

    def close(self) -> None:
        self.process.communicate()


def machine(dtype: torch.dtype) -> tuple[float, float]:
    """What the machine can do, in bytes read a second and arithmetic operations a second: the best of a few."""
    numbers = torch.ones(2**26)  # 256 MB
    square = torch.ones(2048, 2048, dtype=dtype)
    rates = []
    for work, amount in ((numbers.sum, numbers.nbytes), (lambda: square @ square, 2 * 2048**3)):
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            work()
            best = min(best, time.perf_counter() - start)
        rates.append(amount / best)
    return rates[0], rates[1]


def able(name: str, case: str) -> bool:
    """llama.cpp has no call for a batch of prompts."""
    return not (name == "llama.cpp" and case in UNEQUAL)


def measure(model: str, dtype: str, names: list[str], rounds: int, threads: int, folder: Path) -> dict[str, Any]:
    """One model in one number format: what is measured, by case and by library, a number a round."""
    sizes = write_weights(model, getattr(torch, dtype), folder)
    found: dict[str, dict[str, list[float]]] = {case: {} for case in LOADING}
    for _ in range(rounds):
        for name in names:
            # Ours from Meta's layout, in the number format it is used in, as the others have theirs.
            layout = "meta" if name == "ours" else PEERS[name].layout
            worker = Worker(name, folder / layout, dtype, threads, 1, 512)
            for case in LOADING:
                found[case].setdefault(name, []).append(worker.loading[case])
            worker.close()
    workers = {name: Worker(name, folder / PEERS[name].layout, dtype, threads, 8, 2048 + 64) for name in names}
    chosen = {name: worker.ask({"do": "greedy", "context": 64, "steps": 8}) for name, worker in workers.items()}
    if dtype == "float32" and len(set(map(str, chosen.values()))) > 1:
        raise RuntimeError(f"the libraries don't compute the same: {chosen}")
    rates = []
    for i in range(rounds):
        rates.append(machine(getattr(torch, dtype)))
        for case, request in CASES.items():
            if (model == "1b" and case not in LARGE) or (case in UNEQUAL and dtype != "float32"):
                continue
            for name, worker in workers.items():
                if able(name, case):
                    found.setdefault(case, {}).setdefault(name, []).append(worker.ask(request))
        print(f"{model}, {dtype}: round {i + 1} of {rounds}", file=sys.stderr)
    for worker in workers.values():
        worker.close()
    bandwidth, arithmetic = (statistics.median(rate) for rate in zip(*rates, strict=True))
    return {"model": model, "dtype": dtype, "rounds": rounds, "threads": threads, "sizes": sizes} | {
        "bandwidth": bandwidth,
        "arithmetic": arithmetic,
        "found": found,
    }


def shown(case: str, value: float) -> str:
    """A number of seconds or bytes as people say it."""
    if case.startswith("memory"):
        return f"{value / 1e6:.0f} MB"
    if case.startswith("decode"):
        rows = int(case.split()[2].rstrip(","))
        return f"{rows / value:.1f} tok/s"
    return f"{value:.2f} s"


def limit(result: dict[str, Any], case: str) -> str:
    """Which part of the machine's rate ours reaches: memory's when it decodes, arithmetic's when it reads."""
    if not case.startswith(("decode", "read")):
        return ""
    seconds = statistics.median(result["found"][case]["ours"])
    words = case.replace(",", "").split()
    if words[0] == "decode":
        bytes_read = result["sizes"]["weights"] + int(words[2]) * int(words[4]) * result["sizes"]["cache"]
        return f"{bytes_read / seconds / result['bandwidth']:.0%} of memory"
    operations = 2 * result["sizes"]["matrix numbers"] * int(words[1])
    return f"{operations / seconds / result['arithmetic']:.0%} of arithmetic"


def table(result: dict[str, Any]) -> Iterator[str]:
    """Lines of Markdown."""
    names = list(result["found"]["load"])
    yield (
        f"{result['model']}, {result['dtype']}, {result['threads']} threads, {result['rounds']} rounds; memory read at "
        f"{result['bandwidth'] / 1e9:.1f} GB/s, products of large matrices at {result['arithmetic'] / 1e9:.0f} GFLOP/s"
    )
    yield ""
    yield f"| | {' | '.join(names)} | of the machine |"
    yield "|---" * (len(names) + 2) + "|"
    for case, by_name in result["found"].items():
        cells = []
        for name in names:
            values = by_name.get(name)
            if not values:
                cells.append("")
                continue
            cell = shown(case, statistics.median(values))
            if name != "ours":
                ratios = sorted(theirs / ours for theirs, ours in zip(values, by_name["ours"], strict=True))
                cell += f" ({statistics.median(ratios):.2f}x, {ratios[0]:.2f}-{ratios[-1]:.2f})"
            cells.append(cell)
        yield f"| {case} | {' | '.join(cells)} | {limit(result, case)} |"
    yield ""


def picture(results: list[dict[str, Any]], path: Path) -> None:
    """Bars: how many times as long as ours each library takes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(1, len(results), figsize=(6 * len(results), 7), squeeze=False)
    for axes, result in zip(all_axes[0], results, strict=True):
        cases = [case for case in result["found"] if case not in LOADING and case not in MEMORY]
        names = [name for name in result["found"]["load"] if name != "ours"]
        for i, name in enumerate(names):
            for j, case in enumerate(cases):
                values = result["found"][case].get(name)
                if values:
                    pairs = zip(values, result["found"][case]["ours"], strict=True)
                    ratio = statistics.median(theirs / ours for theirs, ours in pairs)
                    height = 0.8 / len(names)
                    axes.barh(-j - i * height, ratio, height, color=f"C{i}", label=name if j == 0 else None)
                    axes.text(ratio, -j - i * height, f" {ratio:.1f}", va="center", fontsize=7)
        axes.axvline(1, color="black", linewidth=1)
        axes.set_yticks([-j - 0.25 for j in range(len(cases))], cases, fontsize=8)
        axes.set_xscale("log")
        axes.set_title(f"{result['model']}, {result['dtype']}: time, in times of ours", fontsize=10)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(
    out: str = "results",
    models: str = "smollm2,1b",
    dtypes: str = "float32,bfloat16",
    peers: str = ",".join(PEERS),
    rounds: int = 5,
    threads: int = 0,
) -> None:
    """Measure this library beside its peers, in half an hour or more.

    Args:
        out: the folder for results.json and results.png
        models: smollm2 (the default model) and 1b (a random one of Llama 3.2 1B's shape, in bfloat16 only)
        dtypes: float32 and bfloat16
        peers: whom to measure: ours first
        rounds: how often each is measured, by turns
        threads: for each library; 0 for as many as there are cores
    """
    listed = [list(words) if isinstance(words, tuple) else str(words).split(",") for words in (models, dtypes, peers)]
    known = (("smollm2", "1b"), ("float32", "bfloat16"), tuple(PEERS))
    for what, words, possible in zip(("models", "dtypes", "peers"), listed, known, strict=True):
        if not set(words) <= set(possible):
            raise InputError(f"{what}={','.join(map(str, words))} must be some of {','.join(possible)}")
    if listed[0] == ["1b"] and "bfloat16" not in listed[1]:
        raise InputError(f"dtypes={','.join(listed[1])} must have bfloat16, in which 1b is measured")
    if listed[2][0] != "ours":
        raise InputError(f"peers={','.join(listed[2])} must begin with ours, which the others are compared with")
    for name, value, least in (("rounds", rounds, 1), ("threads", threads, 0)):
        if not isinstance(value, int) or value < least:
            raise InputError(f"{name}={value!r} must be a whole number of at least {least}")
    needed = {MODULES[name].split(".")[0] for name in listed[2]} | {"matplotlib"}
    missing = sorted(name for name in needed if importlib.util.find_spec(name) is None)
    if missing:
        raise InputError(f"not installed: {', '.join(missing)}; install them with: pip install -e '.[bench]'")
    target = Path(out)
    target.mkdir(parents=True, exist_ok=True)
    results = []
    for model in listed[0]:
        for dtype in listed[1]:
            if model == "1b" and dtype != "bfloat16":
                continue
            with tempfile.TemporaryDirectory() as scratch:
                names = listed[2]
                result = measure(model, dtype, names, rounds, threads or torch.get_num_threads(), Path(scratch))
            results.append(result)
            (target / "results.json").write_text(json.dumps(results, indent=1))
            print("\n".join(table(result)), flush=True)
    picture(results, target / "results.png")


if __name__ == "__main__":
    run(main)
