"""Measures this library beside its peers: python benchmarks/compare.py --out results

All libraries have the same weights, dtype and number of threads, and each runs in a process of its own. They take
turns, round by round, so that a busy machine slows down all of them. The ratios of their times are taken within each
round, and their medians are printed. The folder gets `results.json` and `results.png`.
"""

import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peers import MODULES, PEERS
from weights import write_weights

from llama.cli import run
from llama.errors import InputError

# The measured cases -> requests to the processes of the libraries (see peers.py). "read" stands for prefill.
DECODE = {
    f"decode, batch {batch}, context {context}": {
        "request": "decode", "batch": batch, "context": context, "steps": steps,
    }
    for batch, steps in ((1, 16), (8, 6))
    for context in (128, 512, 2048)
}  # fmt: skip
PREFILL = {f"read {length} tokens": {"request": "prefill", "lengths": [length]} for length in (512, 2048)}
MEMORY = {
    f"memory to read {length} tokens": {"request": "prefill memory", "lengths": [length]} for length in (512, 2048)
}
GENERATE = {
    "prompt of 128, 32 sampled": {"request": "generate", "lengths": [128], "max_new_tokens": 32, "temperature": 0.6},
}
UNEQUAL = {
    "prompts of 8, 8, 8, 512; 16 new": {
        "request": "generate", "lengths": [8, 8, 8, 512], "max_new_tokens": 16, "temperature": 0.0,
    },
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = DECODE | PREFILL | MEMORY | GENERATE | UNEQUAL
# The cases that are measured with a network of Llama 3.2 1B's sizes, which takes long for each.
CASES_OF_1B = (
    "decode, batch 1, context 512",
    "decode, batch 8, context 512",
    "read 512 tokens",
    "prompt of 128, 32 sampled",
)
LOADING = ("load", "load + 1 token", "memory")  # measured while a process starts


class Worker:
    """A process of a library.

    Args:
        name: the library, a key of `PEERS`.
        folder: the checkpoint in its layout.
        dtype: the name of the dtype.
        threads: its number of threads.
        max_batch_size, max_seq_len: the size of its KV cache, in rows and in tokens of each.
    """

    def __init__(
        self, name: str, folder: Path, dtype: str, threads: int, max_batch_size: int, max_seq_len: int
    ) -> None:
        script = Path(__file__).with_name("peers.py")
        arguments = map(str, (name, folder, dtype, threads, max_batch_size, max_seq_len))
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        self.process = subprocess.Popen(
            [sys.executable, script, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        self.loading: dict[str, float] = self._response()

    def ask(self, request: dict[str, Any]) -> Any:
        """Send a request, and return the response."""
        assert self.process.stdin is not None  # noqa: S101 - it is a pipe
        time.sleep(
            0.2
        )  # until the threads of the library before, which wait for work in a busy loop, have gone to sleep
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._response()

    def _response(self) -> Any:
        assert self.process.stdout is not None  # noqa: S101 - it is a pipe
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"{self.process.args!r} ended:\n{self.log.read()[-2000:]}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def machine_rates(dtype: torch.dtype) -> tuple[float, float]:
    """Measure what the machine can do: bytes of memory and arithmetic operations a second, the best of five times."""
    values = torch.ones(2**26)  # 256 MB
    square = torch.ones(2048, 2048, dtype=dtype)
    rates = []
    work_and_amounts: list[tuple[Callable[[], torch.Tensor], int]] = [
        (values.sum, values.nbytes),
        (lambda: square @ square, 2 * 2048**3),
    ]
    for work, amount in work_and_amounts:
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            work()
            best = min(best, time.perf_counter() - start)
        rates.append(amount / best)
    return rates[0], rates[1]


def is_measured(model: str, dtype: str, name: str, case: str) -> bool:
    """Return whether a case is measured with this model, dtype and library."""
    if model == "1b" and case not in CASES_OF_1B:
        return False
    return case not in UNEQUAL or (dtype == "float32" and name != "llama.cpp")  # which has no call for a batch


def measure(model: str, dtype: str, names: list[str], rounds: int, threads: int, folder: Path) -> dict[str, Any]:
    """Measure one model in one dtype.

    Returns:
        The circumstances, and "found": case -> library -> a value (seconds or bytes) for each round.
    """
    sizes = write_weights(model, getattr(torch, dtype), folder)
    values: dict[str, dict[str, list[float]]] = {case: {} for case in LOADING}
    for _ in range(rounds):
        for name in names:
            # Ours from Meta's layout, in the dtype of the computation, as the others have it.
            layout = "meta" if name == "ours" else PEERS[name].layout
            worker = Worker(name, folder / layout, dtype, threads, 1, 512)
            for case in LOADING:
                values[case].setdefault(name, []).append(worker.loading[case])
            worker.close()
    workers = {name: Worker(name, folder / PEERS[name].layout, dtype, threads, 8, 2048 + 64) for name in names}
    tokens = {name: worker.ask({"request": "greedy", "context": 64, "steps": 8}) for name, worker in workers.items()}
    if dtype == "float32" and len(set(map(str, tokens.values()))) > 1:
        raise RuntimeError(f"the libraries don't compute the same tokens: {tokens}")
    rates = []
    for i in range(rounds):
        rates.append(machine_rates(getattr(torch, dtype)))
        for case, request in CASES.items():
            for name, worker in workers.items():
                if is_measured(model, dtype, name, case):
                    values.setdefault(case, {}).setdefault(name, []).append(worker.ask(request))
        print(f"{model}, {dtype}: round {i + 1} of {rounds}", file=sys.stderr)
    for worker in workers.values():
        worker.close()
    bandwidth, arithmetic = (statistics.median(rate) for rate in zip(*rates, strict=True))
    return {"model": model, "dtype": dtype, "rounds": rounds, "threads": threads, "sizes": sizes} | {
        "bandwidth": bandwidth,
        "arithmetic": arithmetic,
        "found": values,
    }


def format_value(case: str, value: float) -> str:
    """Format seconds or bytes: as MB, tokens/s or seconds."""
    if case.startswith("memory"):
        return f"{value / 1e6:.0f} MB"
    if case in DECODE:
        return f"{CASES[case]['batch'] / value:.1f} tok/s"
    return f"{value:.2f} s"


def utilization(result: dict[str, Any], case: str) -> str:
    """Return the fraction of the machine's rate that ours reaches: of memory in decoding, of arithmetic in prefill."""
    if case not in DECODE and case not in PREFILL:
        return ""
    seconds = statistics.median(result["found"][case]["ours"])
    sizes, request = result["sizes"], CASES[case]
    if case in DECODE:
        bytes_read = sizes["weights"] + request["batch"] * request["context"] * sizes["cache"]
        return f"{bytes_read / seconds / result['bandwidth']:.0%} of memory"
    operations = 2 * sizes["matrix numbers"] * request["lengths"][0]
    return f"{operations / seconds / result['arithmetic']:.0%} of arithmetic"


def table(result: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a Markdown table of a result of `measure`."""
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
            cell = format_value(case, statistics.median(values))
            if name != "ours":
                ratios = sorted(theirs / ours for theirs, ours in zip(values, by_name["ours"], strict=True))
                cell += f" ({statistics.median(ratios):.2f}x, {ratios[0]:.2f}-{ratios[-1]:.2f})"
            cells.append(cell)
        yield f"| {case} | {' | '.join(cells)} | {utilization(result, case)} |"
    yield ""


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Plot bars: the time that each library takes, in multiples of ours."""
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
        axes.set_title(f"{result['model']}, {result['dtype']}: time, in multiples of ours", fontsize=10)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def choices(name: str, value: str, possible: tuple[str, ...]) -> list[str]:
    """Return the choices in a comma-separated value; InputError if one of them isn't possible."""
    chosen = value.split(",")
    if not set(chosen) <= set(possible):
        raise InputError(f"{name}={value} must be some of {','.join(possible)}")
    return chosen


def main(
    out: str = "results",
    models: str = "smollm2,1b",
    dtypes: str = "float32,bfloat16",
    peers: str = ",".join(PEERS),
    rounds: int = 5,
    threads: int = 0,
) -> None:
    """Compare the speed and memory of this library with those of other libraries; takes half an hour or more.

    Args:
        out: the folder for results.json and results.png
        models: comma-separated: smollm2 (the default model), 1b (a random one of Llama 3.2 1B's sizes, in bfloat16)
        dtypes: comma-separated: float32, bfloat16
        peers: comma-separated: the libraries to measure, ours first
        rounds: how many times each case is measured
        threads: number of threads of each library; 0 for as many as there are cores
    """
    model_names = choices("models", models, ("smollm2", "1b"))
    dtype_names = choices("dtypes", dtypes, ("float32", "bfloat16"))
    peer_names = choices("peers", peers, tuple(PEERS))
    if model_names == ["1b"] and "bfloat16" not in dtype_names:
        raise InputError(f"dtypes={dtypes} must include bfloat16, in which 1b is measured")
    if peer_names[0] != "ours":
        raise InputError(f"peers={peers} must begin with ours, which the others are compared with")
    for name, value, minimum in (("rounds", rounds, 1), ("threads", threads, 0)):
        if not isinstance(value, int) or value < minimum:
            raise InputError(f"{name}={value!r} must be a whole number of at least {minimum}")
    needed = {MODULES[name].split(".")[0] for name in peer_names} | {"matplotlib"}
    missing = sorted(name for name in needed if importlib.util.find_spec(name) is None)
    if missing:
        raise InputError(f"not installed: {', '.join(missing)}; install them with: pip install -e '.[bench]'")
    target = Path(out)
    target.mkdir(parents=True, exist_ok=True)
    results = []
    for model in model_names:
        for dtype in dtype_names:
            if model == "1b" and dtype != "bfloat16":
                continue
            with tempfile.TemporaryDirectory() as scratch:
                n_threads = threads or torch.get_num_threads()
                result = measure(model, dtype, peer_names, rounds, n_threads, Path(scratch))
            results.append(result)
            (target / "results.json").write_text(json.dumps(results, indent=1))
            print("\n".join(table(result)), flush=True)
    plot(results, target / "results.png")


if __name__ == "__main__":
    run(main)
