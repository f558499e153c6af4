"""Checkpoints on disk: what layout a folder or file has, what model is in it, and reading and writing its tensors.

Every layout is read by one class with the same few things: `settings`, `shapes()`, `dtype()`, `read()` and
`tokenizer()`. All give the tensors by their names in our network (`layers.0.attention.wq.weight`), whole or a slice of
them, so that any layout loads on any number of processes, and can be written as any other.
"""

from llama.checkpoint.layout import Checkpoint, Settings
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
