"""Instruction fine-tuning: teach a model by example what to answer.

    pairs -> token ids, and which of them the assistant says -> the network -> the loss on those -> gradients -> AdamW

Each file is one of the steps: `data` (from lines of text to batches), `loss` (what is made smaller), `optimizer` (how),
`lora` (of how few numbers), `training` (the loop), `run_folder` and `metrics` (what is kept on disk), `command` (the
command line).
"""

from llama.finetune.command import finetune

__all__ = ["finetune"]
