"""The files of a run. Whatever interrupts it, the same command resumes it from them.

Until the run has finished, there is no OUT_DIR, but a folder OUT_DIR.training beside it:

    settings.json            what the run was started with; only the same settings resume it
    metrics.jsonl            the metrics so far
    step-000100/part-00.pt   the last saved state (weights and optimizer), one file for each model-parallel process

Files and folders are written under a temporary name, and renamed when they are complete. So is OUT_DIR, at the end.
"""

import logging
import shutil
from pathlib import Path
from typing import Any

import torch

from llama.checkpoint import save_checkpoint
from llama.distributed import data_parallel_rank, is_first_rank, model_parallel_rank, on_first_rank
from llama.errors import CheckpointError, InputError
from llama.files import free_path, new_folder, read_json, write_json
from llama.finetune import metrics
from llama.model import Transformer
from llama.tokenizer import Tokenizer

logger = logging.getLogger("llama")


class RunFolder:
    """The folder of a run that has not finished. It is created, or found if the run was interrupted.

    Every process must make the same calls.

    Args:
        out_dir: the folder that the run writes in the end.
        settings: everything that the result depends on, by name.

    Raises:
        InputError: `out_dir` exists already, or a run with other settings was interrupted there.
    """

    def __init__(self, out_dir: str | Path, settings: dict[str, Any]) -> None:
        self.out_dir = free_path(out_dir)
        self.path = self.out_dir.with_name(self.out_dir.name + ".training")
        self.metrics_path = self.path / "metrics.jsonl"

        def create() -> None:
            if not self.path.exists():
                with new_folder(self.path) as folder:
                    write_json(folder / "settings.json", settings)

        on_first_rank(create)
        saved = read_json(self.path / "settings.json")
        changed = [key for key in sorted({*saved, *settings}) if saved.get(key) != settings.get(key)]
        if changed:
            differences = ", ".join(f"{key}={saved.get(key)!r} (now {settings.get(key)!r})" for key in changed)
            raise InputError(
                f"{self.path} holds an interrupted run with {differences}: give the same options to resume it, or "
                f"remove that folder to start again"
            )

    def log(self, **entry: Any) -> None:
        """Append an entry to the metrics."""
        if is_first_rank():
            metrics.append(self.metrics_path, **entry)

    def save_state(self, step: int, state: dict[str, Any]) -> None:
        """Save the state after `step` steps, in place of the last one."""
        folder, unfinished = self.path / f"step-{step:06}", self.path / "unfinished"

        def begin() -> None:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()

        def finish() -> None:
            unfinished.replace(folder)
            for older in self.path.glob("step-*"):
                if older != folder:
                    shutil.rmtree(older)

        on_first_rank(begin)
        if data_parallel_rank() == 0:
            torch.save({"step": step, **state}, unfinished / self._part_name)
        on_first_rank(finish)

    def load_state(self) -> dict[str, Any] | None:
        """Return the last saved state, or None if there is none, and remove the metrics of later steps.

        Raises:
            CheckpointError: its file is damaged.
        """
        folders = sorted(self.path.glob("step-*"))  # two, if the removal of the older one was interrupted
        state: dict[str, Any] | None = None
        if folders:
            path = folders[-1] / self._part_name
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:
                message = f"{path} can't be read: remove {self.path} to start again"
                raise CheckpointError(f"{message} ({type(error).__name__}: {error!s:.200})") from error
        step = 0 if state is None else state["step"]
        on_first_rank(lambda: metrics.truncate(self.metrics_path, step))
        return state

    def finish(self, model: Transformer, tokenizer: Tokenizer) -> None:
        """Write `out_dir`: a checkpoint in Meta's layout, metrics, and their plot. Then remove this folder."""
        checkpoint = self.path / "checkpoint"
        on_first_rank(lambda: shutil.rmtree(checkpoint, ignore_errors=True))  # left by an interrupted `finish`
        save_checkpoint(checkpoint, model, tokenizer)

        def move_to_out_dir() -> None:
            shutil.copy(self.metrics_path, checkpoint)
            metrics.plot(metrics.read(self.metrics_path), checkpoint / "loss.png")
            if self.out_dir.exists():  # as an empty folder, which `free_path` allows
                self.out_dir.rmdir()
            checkpoint.replace(self.out_dir)
            shutil.rmtree(self.path, ignore_errors=True)

        on_first_rank(move_to_out_dir)
        logger.info("wrote %s", self.out_dir)

    @property
    def _part_name(self) -> str:
        return f"part-{model_parallel_rank():02}.pt"
