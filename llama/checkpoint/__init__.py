"""Checkpoints on disk: recognising a layout, reading and writing its tensors.

Each layout is read by a subclass of `Checkpoint` with the same interface: `settings`, `shapes()`, `dtype()`, `read()`
and `tokenizer()`. All of them give tensors, whole or sliced, by their names in our network
(`layers.0.attention.wq.weight`). So any layout can be loaded by any number of processes, and written as any other.
"""

from llama.checkpoint.base import Checkpoint, Settings
from llama.checkpoint.load import check_tensors, load_model, open_checkpoint, read_settings
from llama.checkpoint.parameters import parameter_count, parameter_shapes, share, split_axis
from llama.checkpoint.save import save_checkpoint

__all__ = [
    "Checkpoint",
    "Settings",
    "check_tensors",
    "load_model",
    "open_checkpoint",
    "parameter_count",
    "parameter_shapes",
    "read_settings",
    "save_checkpoint",
    "share",
    "split_axis",
]
