"""A faithful, readable reference implementation of Llama 2 and Llama 3 text generation in PyTorch.

To learn how Llama works, read in this order: `model` (the network), `tokenizer` and `chat_format` (text and dialogs to
ids), `sampling` (logits to the next token), `decoding` (the decode loop), and `generation` (text in, text out).
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama.chat_format import ChatFormat
    from llama.dialog import Dialog, Message, Role
    from llama.generation import ChatPrediction, CompletionPrediction, Llama
    from llama.model import Transformer
    from llama.model_args import ModelArgs
    from llama.sampling import sample_top_p
    from llama.tokenizer import Tokenizer

__all__ = [
    "ChatFormat",
    "ChatPrediction",
    "CompletionPrediction",
    "Dialog",
    "Llama",
    "Message",
    "ModelArgs",
    "Role",
    "Tokenizer",
    "Transformer",
    "sample_top_p",
]

_MODULES = {
    "chat_format": ("ChatFormat",),
    "dialog": ("Dialog", "Message", "Role"),
    "generation": ("ChatPrediction", "CompletionPrediction", "Llama"),
    "model": ("Transformer",),
    "model_args": ("ModelArgs",),
    "sampling": ("sample_top_p",),
    "tokenizer": ("Tokenizer",),
}


def __getattr__(name: str) -> Any:
    """A public name, a module or the version, imported when it is first used, so that `llama --help` needs no torch."""
    for module, names in _MODULES.items():
        if name == module or name in names:
            imported = importlib.import_module(f"llama.{module}")
            return imported if name == module else getattr(imported, name)
    if name == "__version__":
        from importlib.metadata import version  # not at the top: it takes as long as `llama --help`

        return version("llama")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


if "ipykernel" in sys.modules:
    from llama.notebook import show_log

    show_log()
