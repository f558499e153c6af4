"""What a run keeps on disk, so that whatever interrupts it, the same command goes on where it stopped.

Until a run is done there is no OUT_DIR, only OUT_DIR.training beside it:

    settings.json            what the run was started with: it goes on only with the same
    metrics.jsonl            its course so far
    step-000100/part-00.pt   the newest state: weights and optimizer, a file for each process that shares a model

Everything is written under another name first, and gets its own when it is whole. So does OUT_DIR, at the end.
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
    """The folder of a run that is not done yet: made anew, or found.

    Every process calls each method.

    Args:
        out_dir: the folder that there will be when all is done.
        settings: all that the outcome depends on, by name.

    Raises:
        InputError: `out_dir` is there already, or a run with other settings was interrupted there.
    """

    def __init__(self, out_dir: str | Path, settings: dict[str, Any]) -> None:
        self.target = free_path(out_dir)
        self.path = self.target.with_name(self.target.name + ".training")
        self.metrics = self.path / "metrics.jsonl"

        def begin() -> None:
            if not self.path.exists():
                with new_folder(self.path) as folder:
                    write_json(folder / "settings.json", settings)

        on_first_rank(begin)
        before = read_json(self.path / "settings.json")
        changed = [key for key in sorted({*before, *settings}) if before.get(key) != settings.get(key)]
        if changed:
            raise InputError(
                f"{self.path} holds a run that was interrupted, and that had "
                + ", ".join(f"{key}={before.get(key)!r} (now {settings.get(key)!r})" for key in changed)
                + ": give the same to go on with it, or remove that folder to begin anew"
            )

    def log(self, **entry: Any) -> None:
        """Add a line to the metrics."""
        if is_first_rank():
            metrics.append(self.metrics, **entry)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Keep the state after `step` steps, in place of the one before."""
        folder, unfinished = self.path / f"step-{step:06}", self.path / "unfinished"

        def begin() -> None:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()

        def end() -> None:
            unfinished.replace(folder)
            for older in self.path.glob("step-*"):
                if older != folder:
                    shutil.rmtree(older)

        on_first_rank(begin)
        if data_parallel_rank() == 0:
            torch.save({"step": step, **state}, unfinished / self._part)
        on_first_rank(end)

    def newest(self) -> dict[str, Any] | None:
        """The state to go on from, if there is one; the metrics are cut back to it."""
        folders = sorted(self.path.glob("step-*"))  # two, if the removal of the older was interrupted
        state: dict[str, Any] | None = None
        if folders:
            path = folders[-1] / self._part
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:
                message = f"{path} can't be read: remove {self.path} to begin anew"
                raise CheckpointError(f"{message} ({type(error).__name__}: {error!s:.200})") from error
        step = 0 if state is None else state["step"]
        on_first_rank(lambda: metrics.cut_back(self.metrics, step))
        return state

    def finish(self, model: Transformer, tokenizer: Tokenizer) -> None:
        """Make `out_dir`: the checkpoint, in Meta's layout, with metrics and picture; and remove all else."""
        whole = self.path / "checkpoint"
        on_first_rank(lambda: shutil.rmtree(whole, ignore_errors=True))  # of an interrupted `finish`
        save_checkpoint(whole, model, tokenizer)

        def end() -> None:
            shutil.copy(self.metrics, whole)
            metrics.draw(metrics.read(self.metrics), whole / "loss.png")
            if self.target.exists():  # an empty folder
                self.target.rmdir()
            whole.replace(self.target)
            shutil.rmtree(self.path, ignore_errors=True)

        on_first_rank(end)
        logger.info("wrote %s", self.target)

    @property
    def _part(self) -> str:
        return f"part-{model_parallel_rank():02}.pt"
