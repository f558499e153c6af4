"""The metrics of a run: a file with one JSON object a line, and a plot of the losses."""

import json
import logging
from pathlib import Path
from typing import Any

from llama.errors import CheckpointError
from llama.files import require_file

logger = logging.getLogger("llama")


def append(path: Path, **entry: Any) -> None:
    """Append an entry to the file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Return the entries of the file; none if it doesn't exist.

    What stands after the last newline is ignored: the process that wrote it was killed before it had finished.

    Raises:
        CheckpointError: it is no ordinary file, or damaged.
    """
    if not path.exists():
        return []
    try:
        entries = [json.loads(line) for line in require_file(path, "the metrics").read_bytes().split(b"\n")[:-1]]
        if not all(isinstance(entry, dict) and isinstance(entry.get("step"), int) for entry in entries):
            raise ValueError("a line is no object with a step")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read: remove {path.parent} to start again ({error})") from error
    return entries


def truncate(path: Path, step: int) -> None:
    """Remove the entries that come after the loss of a step, or all if `step` is 0."""
    kept = [entry for entry in read(path) if entry["step"] < step or (entry["step"] == step and "loss" in entry)]
    shorter = path.with_name(path.name + ".cut")
    shorter.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
    shorter.replace(path)


def plot(entries: list[dict[str, Any]], path: Path) -> None:
    """Plot training and validation loss into an image file. Without matplotlib, only log that there is no plot."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.info("no plot of the loss: it needs matplotlib (pip install 'llama[train]')")
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("validation_loss", "validation", "o--")):
        points = [(entry["step"], entry[key]) for entry in entries if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set(xlabel="step", ylabel="loss (nats per token)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
