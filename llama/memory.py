"""The memory that a model takes: the public import of `footprint`, which `llama.checkpoint.memory` implements."""

from llama.checkpoint.memory import Footprint, footprint

__all__ = ["Footprint", "footprint"]
