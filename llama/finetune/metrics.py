"""The course of a run: one JSON object a line, and a picture of the losses."""

import json
import logging
from pathlib import Path
from typing import Any

logger = logging.getLogger("llama")


def append(path: Path, **entry: Any) -> None:
    """Add a line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The lines; but for the last, if whoever wrote it was killed half way."""
    lines = (
        path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    )  # what ends in no "\n" is no line
    return [json.loads(line) for line in lines]


def cut_back(path: Path, step: int) -> None:
    """Leave only what a run had written when it had made `step` steps, and not yet gone on."""
    kept = [entry for entry in read(path) if entry["step"] < step or (entry["step"] == step and "loss" in entry)]
    shorter = path.with_name(path.name + ".cut")
    shorter.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
    shorter.replace(path)


def draw(entries: list[dict[str, Any]], path: Path) -> None:
    """A picture of the loss curves; nothing but a message without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.info("no picture of the loss: it needs matplotlib (pip install 'llama[train]')")
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("validation_loss", "validation", "o--")):
        points = [(entry["step"], entry[key]) for entry in entries if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set(xlabel="step", ylabel="loss, nats a learned token", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
