"""What a model takes in memory. The code is in `llama.checkpoint.memory`; programs import `footprint` from here."""

from llama.checkpoint.memory import Footprint, footprint

__all__ = ["Footprint", "footprint"]
