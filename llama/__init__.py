"""A faithful, readable reference implementation of Llama 2 and Llama 3 text generation in PyTorch.

To learn how Llama works, read `model` (the network), `tokenizer` and `chat` (text to ids), `sampling` (logits to the
next id), `decoding` (the decode loop) and `generation` (what lies on it), in this order.
"""

from llama.chat_format import ChatFormat, Dialog, Message, Role
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
