"""Instruction fine-tuning: training a model on examples of prompts and answers.

    examples -> token ids and loss masks -> batches -> network -> masked loss -> gradients -> AdamW

`data` turns lines of text into batches, `loss` computes the masked loss, `optimizer` updates the weights, `lora` trains
low-rank matrices in their place, and `training` is the loop. `run_folder` and `metrics` keep a run on disk, and
`command` is the command line.
"""

from llama.finetune.command import finetune

__all__ = ["finetune"]
