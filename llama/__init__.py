"""A faithful, readable reference implementation of Llama 2 and Llama 3 text generation in PyTorch.

To learn how Llama works, read in this order: `model` (the network), `tokenizer` and `chat_format` (text and dialogs to
ids), `sampling` (logits to the next token), `decoding` (the decode loop), and `generation` (text in, text out).
"""

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
