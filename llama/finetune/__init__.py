"""Instruction fine-tuning: training a model on examples of prompts and answers.

    examples -> token ids and loss masks -> batches -> network -> masked loss -> gradients -> AdamW

`data` turns lines of text into batches, `loss` computes the masked loss, `optimizer` updates the weights, `lora` trains
low-rank matrices in their place, and `training` is the loop. `run_folder` and `metrics` keep a run on disk, and
`command` is the command line.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama.finetune.command import finetune

__all__ = ["finetune"]


def __getattr__(name: str) -> Any:
    """`finetune`, imported when it is first used: its imports take a second, in which a program may be interrupted."""
    if name == "finetune":
        from llama.finetune.command import finetune

        return finetune
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
