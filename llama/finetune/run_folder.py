"""The files of a run. Whatever interrupts it, the same command resumes it from them.

Until the run has finished, there is no OUT_DIR, but a folder OUT_DIR.training beside it:

    settings.json            what the run was started with; only the same settings resume it
    metrics.jsonl            the metrics so far
    step-000100/part-00.pt   the last saved state (weights and optimizer), one file for each model-parallel process

Files and folders are written under a temporary name, and renamed when they are complete. So is OUT_DIR, at the end.
While a process works at the run, `.OUT_DIR.lock` is locked, and no other can write there.
"""

import contextlib
import logging
import shutil
from pathlib import Path
from typing import Any

import torch

from llama.checkpoint import save_checkpoint
from llama.checkpoint.disk_space import check_disk_space, full_disk_explained
from llama.checkpoint.save import disk_bytes
from llama.distributed import (
    data_parallel_rank,
    is_first_rank,
    model_parallel_rank,
    on_first_rank,
    raising_on_all_ranks,
)
from llama.errors import CheckpointError, InputError
from llama.files import first_bytes, read_json, write_json
from llama.finetune import metrics
from llama.model import Transformer
from llama.output_folder import check_free, exclusive, move_into_place, output_path, temporary_path
from llama.tokenizer import Tokenizer

logger = logging.getLogger("llama")

SMALL_FILES = 2**25  # bytes, generously: the metrics, their plot, the tokenizer


class RunFolder:
    """The folder of a run that has not finished: a context manager, which keeps other processes out.

    Every process must make the same calls.

    Args:
        out_dir: the folder that the run writes in the end.

    Attributes:
        out_dir: its path, with symbolic links resolved.
        path: the folder of the run, beside it.
        saved_step: after how many steps the last state was saved; 0 if none was.

    Raises:
        InputError: `out_dir` is no path; or, on entry, exists already, can't be replaced (as a mount point can't), or
            is being written by another process.
        OSError: on entry, nothing can be written beside `out_dir`.
    """

    def __init__(self, out_dir: str | Path) -> None:
        self.out_dir = output_path(out_dir)
        self.path = self.out_dir.with_name(self.out_dir.name + ".training")
        self.metrics_path = self.path / "metrics.jsonl"
        self.saved_step = 0
        self._reserved = contextlib.ExitStack()

    def __enter__(self) -> "RunFolder":
        def reserve() -> None:
            self._reserved.enter_context(exclusive(self.out_dir))
            if self._is_finished():  # and was killed in its last moment, when it would have removed this folder
                self._remove()
            check_free(self.out_dir)

        try:
            on_first_rank(reserve)
        except BaseException:
            self._reserved.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._reserved.close()

    def begin(self, settings: dict[str, Any]) -> None:
        """Make the folder, or find it if the run was interrupted.

        Args:
            settings: everything that the result depends on, by name.

        Raises:
            InputError: a run with other settings was interrupted here, or what is in the folder can't be moved to
                `out_dir`, since the folder is a mount point or a link to another disk.
        """

        def create() -> None:
            beside, inside = temporary_path(self.out_dir), self.path / "unfinished"
            if not self.path.exists():
                beside.mkdir()
                write_json(beside / "settings.json", settings)
                beside.rename(self.path)
            # At the end the checkpoint is moved out of this folder. Now an empty folder is.
            shutil.rmtree(inside, ignore_errors=True)
            inside.mkdir()
            try:
                inside.rename(beside)
            except OSError as error:
                raise InputError(
                    f"nothing can be moved from {self.path} to {self.out_dir} ({error.strerror}): give another folder"
                ) from error
            beside.rmdir()

        on_first_rank(create)
        saved = read_json(self.path / "settings.json")
        changed = [key for key in sorted({*saved, *settings}) if saved.get(key) != settings.get(key)]
        if changed:
            differences = ", ".join(f"{key}={saved.get(key)!r} (now {settings.get(key)!r})" for key in changed)
            raise InputError(
                f"{self.path} holds an interrupted run with {differences}: give the same options to resume it, or "
                f"remove that folder to start again"
            )

    def check_disk_space(self, state_bytes: int, weight_bytes: int) -> None:
        """Raise OSError if there is less free disk space than the rest of the run takes.

        Args:
            state_bytes: of a whole state. There are two of them while one is saved.
            weight_bytes: of the checkpoint, which is written while there is still a state.
        """

        def check() -> None:
            needed = max(2 * state_bytes, state_bytes + disk_bytes("meta", weight_bytes, None)) + SMALL_FILES
            present = sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())
            check_disk_space(self.out_dir, needed - present, self.path)

        on_first_rank(check)

    def log(self, **entry: Any) -> None:
        """Append an entry to the metrics."""
        if is_first_rank():
            with full_disk_explained(self.path, 0, self.path):
                metrics.append(self.metrics_path, **entry)

    def save_state(self, step: int, state: dict[str, Any], size: int) -> None:
        """Save the state after `step` steps, in place of the last one.

        Args:
            step: how many steps have been made.
            state: this process's part.
            size: its size in bytes, for an error message.

        Raises:
            OSError: the disk is full. The last state is still there, and the run can be resumed from it.
        """
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
        try:
            with raising_on_all_ranks():
                if data_parallel_rank() == 0:
                    with full_disk_explained(self.path, size, unfinished):
                        torch.save({"step": step, **state}, unfinished / self._part_name)
        except OSError:
            if is_first_rank():
                shutil.rmtree(unfinished, ignore_errors=True)
            raise
        on_first_rank(finish)
        self.saved_step = step

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
                first_bytes(path)  # which it has if it is an ordinary file
                state = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:
                message = f"{path} can't be read: remove {self.path} to start again"
                raise CheckpointError(f"{message} ({type(error).__name__}: {error!s:.200})") from error
        step = 0 if state is None else state["step"]
        on_first_rank(lambda: metrics.truncate(self.metrics_path, step))
        self.saved_step = step
        return state

    def finish(self, model: Transformer, tokenizer: Tokenizer) -> None:
        """Write `out_dir`: a checkpoint in Meta's layout, metrics, and their plot. Then remove this folder."""
        checkpoint = self.path / "checkpoint"
        on_first_rank(lambda: shutil.rmtree(checkpoint, ignore_errors=True))  # left by an interrupted `finish`
        save_checkpoint(checkpoint, model, tokenizer)

        def move_to_out_dir() -> None:
            with full_disk_explained(self.path, 0, self.path):
                shutil.copy(self.metrics_path, checkpoint)
                metrics.plot(metrics.read(self.metrics_path), checkpoint / "loss.png")
            move_into_place(checkpoint, self.out_dir)
            self._remove()

        on_first_rank(move_to_out_dir)
        logger.info("wrote %s", self.out_dir)

    def _is_finished(self) -> bool:
        """Whether the metrics of `out_dir` are those of this run."""
        ours, theirs = self.metrics_path, self.out_dir / self.metrics_path.name
        return ours.is_file() and theirs.is_file() and ours.read_bytes() == theirs.read_bytes()

    def _remove(self) -> None:
        """Remove the folder, under a name by which the next process would know what is left if this one is killed."""
        removed = temporary_path(self.out_dir)
        self.path.replace(removed)
        shutil.rmtree(removed, ignore_errors=True)

    @property
    def _part_name(self) -> str:
        return f"part-{model_parallel_rank():02}.pt"
