"""llama.cpp's layout: one `*.gguf` file, quantized or not, with its tokenizer inside."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType as Quantization

from llama.checkpoint.layout import Checkpoint, Settings
from llama.checkpoint.parameters import our_name
from llama.errors import CheckpointError
from llama.gguf_file import GGUFFile
from llama.model import precompute_freqs_cis
from llama.tokenizer import Tokenizer

NAMES = {
    "token_embd": "tok_embeddings",
    "output_norm": "norm",
    "output": "output",
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
    "attn_norm": "attention_norm",
    "ffn_norm": "ffn_norm",
}
DIVISORS = "rope_freqs.weight"

# Stored number by number, and so used as they are; every other kind is float32 numbers, quantized in blocks.
PLAIN = {
    Quantization.F64: torch.float64,
    Quantization.F32: torch.float32,
    Quantization.F16: torch.float16,
    Quantization.BF16: torch.bfloat16,
}


class GGUFCheckpoint(Checkpoint):
    """A `*.gguf` file; quantized tensors are read as the float32 numbers that their blocks stand for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = GGUFFile(path)
        found = dict(self._file.tensors)
        divisors = self._divisors(found.pop(DIVISORS, None))
        self._tensors = {our_name(name, "blk.", NAMES): tensor for name, tensor in found.items()}
        get = self._file.get
        architecture = get("general.architecture", str)
        if architecture != "llama":
            raise CheckpointError(f"{path} holds a model of architecture {architecture!r}; only 'llama' can be run")
        n_heads = get("llama.attention.head_count", int)
        params: dict[str, Any] = {
            "dim": get("llama.embedding_length", int),
            "n_layers": get("llama.block_count", int),
            "n_heads": n_heads,
            "n_kv_heads": get("llama.attention.head_count_kv", int, n_heads),
            "ffn_dim": get("llama.feed_forward_length", int),
            "norm_eps": get("llama.attention.layer_norm_rms_epsilon", float),
            "rope_theta": get("llama.rope.freq_base", float, 10000.0),
            "head_dim": get("llama.attention.key_length", int, None),
            "tie_embeddings": "output.weight" not in self._tensors,
            "max_position_embeddings": get("llama.context_length", int),
        }
        if "tok_embeddings.weight" in self._tensors:
            params["vocab_size"] = self.shapes()["tok_embeddings.weight"][0]
        scaling = get("llama.rope.scaling.type", str, "linear")
        stretch = get("llama.rope.scaling.factor", float, get("llama.rope.scale_linear", float, 0.0)) or 1.0
        if scaling == "linear" and stretch != 1:
            divisors = tuple(stretch * divisor for divisor in divisors or (1.0,))
        if divisors is not None:
            scaled = as_scaled_rope(divisors, params["rope_theta"])
            params |= {"rope_divisors": divisors} if scaled is None else scaled
        self.settings = Settings(path, params)

        head_size = params["head_dim"] or params["dim"] // max(n_heads, 1)
        for what, found, known in (
            ("rope scaling", scaling, ("none", "linear")),
            ("rotated features a head", get("llama.rope.dimension_count", int, head_size), (head_size,)),
            ("features of a value head", get("llama.attention.value_length", int, head_size), (head_size,)),
            ("experts", get("llama.expert_count", int, 0), (0,)),
            ("parts it is split into", get("split.count", int, 0), (0, 1)),
        ):
            if found not in known:
                raise CheckpointError(f"{path}: {what}: {found!r}, but this network knows only {list(known)}")

    def _divisors(self, tensor: Any) -> tuple[float, ...] | None:
        """What the rotary frequencies are divided by (Llama 3.1 and later), if the file says so."""
        if tensor is None:
            return None
        if tensor.tensor_type != Quantization.F32 or len(tensor.shape) != 1:
            raise CheckpointError(f"{self.path}: {DIVISORS} must be a row of float32 numbers")
        return tuple(tensor.data.tolist())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        # GGUF writes the fastest-running axis first
        return {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in self._tensors.items()}

    def dtypes(self) -> Iterable[torch.dtype]:
        return (PLAIN.get(tensor.tensor_type, torch.float32) for tensor in self._tensors.values())

    def read(self, name: str, axis: int | None, start: int, stop: int) -> torch.Tensor:
        tensor = self._tensors[name]
        data, kind = tensor.data, tensor.tensor_type
        if axis == 0:
            data = data[start:stop]
        if axis == 1:
            # A row is made of blocks: take those that the slice touches, then cut.
            block = gguf.GGML_QUANT_SIZES[kind][0]
            per_block = data.shape[1] // (int(tensor.shape[0]) // block)  # of the array's items
            first = start // block
            data = data[:, first * per_block : -(-stop // block) * per_block]
            start, stop = start - first * block, stop - first * block
        try:
            if kind in PLAIN:
                dtype = PLAIN[kind]
                weights = torch.from_numpy(data if data.flags.writeable else data.copy()).view(dtype)
            else:
                weights = torch.from_numpy(gguf.dequantize(data, kind))
        except (NotImplementedError, ValueError) as error:
            raise CheckpointError(f"{self.path}: {name} can't be dequantized: {error}") from error
        return weights[:, start:stop] if axis == 1 else weights

    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self._file)


def as_scaled_rope(divisors: tuple[float, ...], theta: float) -> dict[str, Any] | None:
    """The numbers of Llama 3.1's rule that makes these divisors of the rotary frequencies, if there are some."""
    head_size, factor = 2 * len(divisors), max(divisors)
    if not 1 < factor < math.inf or theta <= 0:
        return None
    plain = precompute_freqs_cis(head_size, 2, theta)[1].angle()  # at position 1, the frequencies themselves
    scaled = precompute_freqs_cis(head_size, 2, theta, True, scaling_factor=factor)[1].angle()
    if not torch.allclose(plain / scaled, torch.tensor(divisors), rtol=1e-4):
        return None
    return {"use_scaled_rope": True, "rope_scaling_factor": factor}
