"""Measures this library beside its peers: python benchmarks/compare.py --out results

The contestants of a group are libraries with options. They have the same weights in the same number of bits, the same
number of threads, and each a process of its own. They take turns, round by round, so that a busy machine slows down all
of them. The ratios of their times are taken within each round, and their medians are printed. The folder gets a file
with all values for each model and group, and `results.png`.
"""

import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peers import MODULES, PEERS
from weights import write_weights

from llama.cli import run
from llama.errors import InputError


class Contestant(NamedTuple):
    """A library with its options.

    Attributes:
        peer: the library, a key of `PEERS`.
        layout: the layout of its checkpoint: see `weights.write_weights`.
        quantize, compile: see `Llama.build`; for ours only.
    """

    peer: str
    layout: str
    quantize: str | None = None
    compile: bool = False


FLOAT = {
    "ours": Contestant("ours", "meta"),
    "ours compiled": Contestant("ours", "meta", compile=True),
    "llama-models": Contestant("llama-models", "meta"),
    "transformers": Contestant("transformers", "hf"),
    "llama.cpp": Contestant("llama.cpp", "gguf"),
}
# Contestants with the same bits; those with 8 and 4 are also compared with ours in bfloat16.
GROUPS: dict[str, dict[str, Contestant]] = {
    "float32": FLOAT,
    "bfloat16": FLOAT,
    "int8": {
        "ours bfloat16": Contestant("ours", "meta"),
        "ours int8": Contestant("ours", "meta", "int8"),
        "ours int8 compiled": Contestant("ours", "meta", "int8", compile=True),
        "llama.cpp Q8_0": Contestant("llama.cpp", "Q8_0"),
    },
    "int4": {  # ours takes the blocks of the file Q4_0 as they are
        "ours bfloat16": Contestant("ours", "meta"),
        "ours int4": Contestant("ours", "Q4_0", "int4"),
        "ours int4 compiled": Contestant("ours", "Q4_0", "int4", compile=True),
        "llama.cpp Q4_0": Contestant("llama.cpp", "Q4_0"),
        "llama.cpp Q4_K_M": Contestant("llama.cpp", "Q4_K_M"),  # of rows of 256: not in the default model's sizes
    },
}
MODELS = ("smollm2", "1b")
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
FIRST_COMPILATION = "load + 2 tokens, nothing compiled before"  # measured once, of contestants that compile
# Measured while a process starts.
STARTING = ("load", "load + 1 token", "load + 2 tokens", FIRST_COMPILATION, "memory", "memory afterwards")
# The processor's instructions that make matrix products faster, as /proc/cpuinfo calls them.
INSTRUCTIONS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "i8mm", "bf16")


class Worker:
    """The process of a contestant.

    Args:
        contestant: the library and its options.
        folder: with the checkpoints, one folder for each layout; it also gets what is compiled.
        dtype: the name of the dtype.
        threads: its number of threads.
        max_batch_size, max_seq_len: the size of its KV cache, in rows and in tokens of each.

    Attributes:
        started: what loading and the first two tokens took: see `peers.start`.
    """

    def __init__(
        self, contestant: Contestant, folder: Path, dtype: str, threads: int, max_batch_size: int, max_seq_len: int
    ) -> None:
        options = {"quantize": contestant.quantize, "compile": contestant.compile}
        arguments = {
            "peer": contestant.peer,
            "folder": str(folder / contestant.layout),
            "dtype": dtype,
            "threads": threads,
            "max_batch_size": max_batch_size,
            "max_seq_len": max_seq_len,
            "options": options if contestant.peer == "ours" else {},
        }
        cache = folder / "cache"
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("peers.py"), json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=os.environ | {"XDG_CACHE_HOME": str(cache), "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor")},
        )
        self.started: dict[str, float] = self._response()

    def ask(self, request: dict[str, Any]) -> Any:
        """Send a request, and return the response."""
        assert self.process.stdin is not None  # noqa: S101 - it is a pipe
        time.sleep(0.2)  # the threads of the library before wait for work in a busy loop for a while
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


def processor() -> str:
    """Name the processor, its instructions for matrix products, and the widest ones that torch uses."""
    first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    fields = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in first.splitlines())
    model = ", ".join(f"{key} {fields[key]}" for key in ("model name", "cpu family", "model") if key in fields)
    flags = fields.get("flags", fields.get("Features", "")).split()  # "Features" on ARM
    instructions = ", ".join(flag for flag in INSTRUCTIONS if flag in flags)
    return f"{model} ({instructions}; torch uses {torch.backends.cpu.get_cpu_capability()})"


def is_measured(model: str, group: str, contestant: Contestant, case: str) -> bool:
    """Return whether a case is measured with this model, group and contestant."""
    if model == "1b" and case not in CASES_OF_1B:
        return False
    return case not in UNEQUAL or (group == "float32" and contestant.peer != "llama.cpp")  # it has no call for a batch


def measure(
    model: str, group: str, contestants: dict[str, Contestant], rounds: int, threads: int, folder: Path
) -> dict[str, Any]:
    """Measure one model in one group of contestants.

    Returns:
        The circumstances, and "values": case -> contestant -> a value (seconds or bytes) for each round; only one of
        what is measured once.
    """
    dtype = "float32" if group == "float32" else "bfloat16"
    layouts = {contestant.layout for contestant in contestants.values()}
    sizes = write_weights(model, getattr(torch, dtype), layouts, folder)
    values: dict[str, dict[str, list[float]]] = {case: {} for case in STARTING}
    for i in range(rounds):
        for name, contestant in contestants.items():
            if i == 0 and contestant.compile:
                worker = Worker(contestant, folder, dtype, threads, 1, 512)
                values[FIRST_COMPILATION][name] = [worker.started["load + 2 tokens"]]
                worker.close()
            worker = Worker(contestant, folder, dtype, threads, 1, 512)
            for case, value in worker.started.items():
                values[case].setdefault(name, []).append(value)
            worker.close()
    workers = {
        name: Worker(contestant, folder, dtype, threads, 8, 2048 + 64) for name, contestant in contestants.items()
    }
    tokens = {name: worker.ask({"request": "greedy", "context": 64, "steps": 8}) for name, worker in workers.items()}
    if group == "float32" and len(set(map(str, tokens.values()))) > 1:
        raise RuntimeError(f"the libraries don't compute the same tokens: {tokens}")
    rates = []
    for i in range(rounds):
        rates.append(machine_rates(getattr(torch, dtype)))
        for case, request in CASES.items():
            if case in MEMORY and i > 0:  # it hardly varies
                continue
            for name, worker in workers.items():
                if is_measured(model, group, contestants[name], case):
                    values.setdefault(case, {}).setdefault(name, []).append(worker.ask(request))
        print(f"{model}, {group}: round {i + 1} of {rounds}", file=sys.stderr)
    for worker in workers.values():
        worker.close()
    bandwidth, arithmetic = (statistics.median(rate) for rate in zip(*rates, strict=True))
    return {
        "model": model,
        "group": group,
        "rounds": rounds,
        "threads": threads,
        "processor": processor(),
        "sizes": sizes,
        "bandwidth": bandwidth,
        "arithmetic": arithmetic,
        "values": values,
    }


def format_value(case: str, value: float) -> str:
    """Format seconds or bytes: as MB, tokens/s or seconds."""
    if case.startswith("memory"):
        return f"{value / 1e6:.0f} MB"
    if case in DECODE:
        return f"{CASES[case]['batch'] / value:.1f} tok/s"
    return f"{value:.2f} s"


def utilization(result: dict[str, Any], case: str) -> str:
    """Return the fraction of the machine's rate that the first contestant reaches, ours without options.

    That of memory in decoding, of arithmetic in prefill.
    """
    if case not in DECODE and case not in PREFILL:
        return ""
    seconds = statistics.median(next(iter(result["values"][case].values())))
    sizes, request = result["sizes"], CASES[case]
    if case in DECODE:
        bytes_read = sizes["weights"] + request["batch"] * request["context"] * sizes["cache"]
        return f"{bytes_read / seconds / result['bandwidth']:.0%} of memory"
    operations = 2 * sizes["matrix numbers"] * request["lengths"][0]
    return f"{operations / seconds / result['arithmetic']:.0%} of arithmetic"


def ratios(result: dict[str, Any], case: str, name: str, reference: str) -> list[float]:
    """Return a contestant's times in multiples of another's, one for each round, in ascending order."""
    by_name = result["values"][case]
    pairs = zip(by_name.get(name, []), by_name.get(reference, []), strict=False)  # one may be measured only once
    return sorted(value / of_reference for value, of_reference in pairs)


def table(result: dict[str, Any], reference: str) -> Iterator[str]:
    """Yield the lines of a Markdown table of a result of `measure`: what each took, also in multiples of another."""
    names = list(result["values"]["load"])
    yield (
        f"{result['model']}, {result['group']}, in multiples of {reference}: {result['rounds']} rounds on "
        f"{result['threads']} threads of {result['processor']}; memory read at {result['bandwidth'] / 1e9:.1f} GB/s, "
        f"products of large matrices at {result['arithmetic'] / 1e9:.0f} GFLOP/s"
    )
    yield ""
    yield f"| | {' | '.join(names)} | {names[0]}, of the machine |"
    yield "|---" * (len(names) + 2) + "|"
    for case, by_name in result["values"].items():
        cells = []
        for name in names:
            cell = format_value(case, statistics.median(by_name[name])) if name in by_name else ""
            multiples = ratios(result, case, name, reference) if name != reference else []
            if multiples:
                cell += f" ({statistics.median(multiples):.2f}x, {multiples[0]:.2f}-{multiples[-1]:.2f})"
            cells.append(cell)
        yield f"| {case} | {' | '.join(cells)} | {utilization(result, case)} |"
    yield ""


def ours(names: Iterable[str]) -> list[str]:
    """Return the names of our contestants without those of another group: eager, then compiled."""
    return [name for name in names if name.startswith("ours")][-2:]


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Plot bars: the time that each contestant takes, in multiples of ours compiled."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = (len(results) + 1) // 2
    figure, all_axes = pyplot.subplots(rows, 2, figsize=(12, 6 * rows), squeeze=False)
    if len(results) < all_axes.size:
        all_axes[-1, -1].axis("off")
    for axes, result in zip(all_axes.flat, results, strict=False):
        cases = [case for case in result["values"] if case not in STARTING and case not in MEMORY]
        reference = ours(result["values"]["load"])[-1]
        names = [name for name in result["values"]["load"] if name != reference]
        for i, name in enumerate(names):
            for j, case in enumerate(cases):
                multiples = ratios(result, case, name, reference)
                if multiples:
                    ratio, height = statistics.median(multiples), 0.8 / len(names)
                    axes.barh(-j - i * height, ratio, height, color=f"C{i}", label=name if j == 0 else None)
                    axes.text(ratio, -j - i * height, f" {ratio:.1f}", va="center", fontsize=7)
        axes.axvline(1, color="black", linewidth=1)
        axes.set_yticks([-j - 0.25 for j in range(len(cases))], cases, fontsize=8)
        axes.set_xscale("log")
        axes.set_title(f"{result['model']}: time, in multiples of {reference}", fontsize=10)
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
    models: str = ",".join(MODELS),
    groups: str = ",".join(GROUPS),
    peers: str = ",".join(PEERS),
    rounds: int = 5,
    threads: int = 0,
) -> None:
    """Compare the speed and memory of this library with those of other libraries; takes half an hour or more.

    Args:
        out: the folder for the results: a file for each model and group, and a picture of all that are there
        models: comma-separated: smollm2 (the default model), 1b (a random one of Llama 3.2 1B's sizes; not in float32)
        groups: comma-separated: float32, bfloat16, int8, int4: how the weights are kept
        peers: comma-separated: the libraries to measure, ours first
        rounds: how many times each case is measured
        threads: number of threads of each library; 0 for as many as there are cores
    """
    model_names = choices("models", models, MODELS)
    group_names = choices("groups", groups, tuple(GROUPS))
    peer_names = choices("peers", peers, tuple(PEERS))
    if model_names == ["1b"] and group_names == ["float32"]:
        raise InputError(f"groups={groups} must include one with fewer bits, in which 1b is measured")
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
    for model in model_names:
        for group in group_names:
            if model == "1b" and group == "float32":
                continue
            contestants = {
                name: contestant
                for name, contestant in GROUPS[group].items()
                if contestant.peer in peer_names and (contestant.layout != "Q4_K_M" or model == "1b")
            }
            with tempfile.TemporaryDirectory() as scratch:
                n_threads = threads or torch.get_num_threads()
                result = measure(model, group, contestants, rounds, n_threads, Path(scratch))
            (target / f"{model}-{group}.json").write_text(json.dumps(result, indent=1))
            for reference in ours(contestants):
                print("\n".join(table(result, reference)), flush=True)
    paths = [target / f"{model}-{group}.json" for model in MODELS for group in GROUPS]
    plot([json.loads(path.read_text()) for path in paths if path.exists()], target / "results.png")


if __name__ == "__main__":
    run(main)
