"""llama.cpp's layout: a `*.gguf` file, or several that a model is split over; quantized or not, with the tokenizer."""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType as Quantization

from llama.checkpoint.base import Checkpoint, Settings
from llama.checkpoint.int4_blocks import INT4_BLOCKS
from llama.checkpoint.parameters import network_name
from llama.errors import CheckpointError, MissingFileError
from llama.files import release_pages
from llama.gguf_file import GGUFFile, GGUFTensor
from llama.model import precompute_freqs_cis
from llama.quantized import Int4Groups
from llama.tokenizer import Tokenizer

# Names of tensors in the file, without layer and ".weight" -> names in our network.
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
ROPE_DIVISORS = "rope_freqs.weight"

# Not quantized, so used as stored. Tensors of all other types are dequantized to float32.
UNQUANTIZED = {
    Quantization.F64: torch.float64,
    Quantization.F32: torch.float32,
    Quantization.F16: torch.float16,
    Quantization.BF16: torch.bfloat16,
}


class GGUFCheckpoint(Checkpoint):
    """A `*.gguf` file; of a model that is split over several, any of them."""

    def __init__(self, path: Path) -> None:
        parts = open_parts(GGUFFile(path))
        self._file = parts[0]  # the one with the model's metadata
        self.path = self._file.path
        tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
        rope_divisors = tensors.pop(ROPE_DIVISORS, None)
        self._tensors = {network_name(name, "blk.", NAMES): tensor for name, tensor in tensors.items()}
        self.settings = Settings(self.path, self._read_params(rope_divisors))

    def _read_params(self, rope_divisors: GGUFTensor | None) -> dict[str, Any]:
        """The `ModelArgs` fields in the metadata.

        Raises:
            CheckpointError: the model has a feature that our network lacks.
        """
        get = self._file.get
        architecture = get("general.architecture", str)
        if architecture != "llama":
            raise CheckpointError(
                f"{self.path} holds a model of architecture {architecture!r}; only 'llama' can be run"
            )
        dim, n_heads = get("llama.embedding_length", int), get("llama.attention.head_count", int)
        rope_theta = get("llama.rope.freq_base", float, 10000.0)
        params: dict[str, Any] = {
            "dim": dim,
            "n_layers": get("llama.block_count", int),
            "n_heads": n_heads,
            "n_kv_heads": get("llama.attention.head_count_kv", int, n_heads),
            "ffn_dim": get("llama.feed_forward_length", int),
            "norm_eps": get("llama.attention.layer_norm_rms_epsilon", float),
            "rope_theta": rope_theta,
            "head_dim": get("llama.attention.key_length", int, None),
            "tie_embeddings": "output.weight" not in self._tensors,
            "max_position_embeddings": get("llama.context_length", int),
        }
        if "tok_embeddings.weight" in self._tensors:
            params["vocab_size"] = self.shapes()["tok_embeddings.weight"][0]
        scaling = get("llama.rope.scaling.type", str, "linear")
        divisors = None if rope_divisors is None else self._check_divisors(rope_divisors)
        factor = get("llama.rope.scaling.factor", float, get("llama.rope.scale_linear", float, 0.0)) or 1.0
        if scaling == "linear" and factor != 1:
            divisors = tuple(factor * divisor for divisor in divisors or (1.0,))
        if divisors is not None:
            params |= as_scaled_rope(divisors, rope_theta) or {"rope_divisors": divisors}

        head_size = params["head_dim"] or dim // max(n_heads, 1)
        for feature, value, supported in (
            ("rope scaling", scaling, ("none", "linear")),
            ("rotated features per head", get("llama.rope.dimension_count", int, head_size), (head_size,)),
            ("features per value head", get("llama.attention.value_length", int, head_size), (head_size,)),
            ("experts", get("llama.expert_count", int, 0), (0,)),
        ):
            if value not in supported:
                raise CheckpointError(
                    f"{self.path}: {feature}: {value!r}, and this network knows only {list(supported)}"
                )
        return params

    def _check_divisors(self, tensor: GGUFTensor) -> tuple[float, ...]:
        """The divisors of the rotary frequencies (Llama 3.1 and later) as numbers."""
        if tensor.kind != Quantization.F32 or len(tensor.shape) != 1:
            raise CheckpointError(f"{self.path}: {ROPE_DIVISORS} must be one-dimensional and float32")
        return tuple(tensor.data.tolist())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        # GGUF stores shapes in the reverse order, the contiguous axis first.
        return {name: tensor.shape[::-1] for name, tensor in self._tensors.items()}

    def dtypes(self) -> Iterable[torch.dtype]:
        return (UNQUANTIZED.get(tensor.kind, torch.float32) for tensor in self._tensors.values())

    def read(self, name: str, axis: int | None, start: int, stop: int) -> torch.Tensor:
        tensor = self._tensors[name]
        data, kind = tensor.data, tensor.kind  # data: (rows, items of a row), stored numbers or bytes of blocks
        if axis == 0:
            data = data[start:stop]
        if axis == 1:
            # A row consists of blocks: dequantize those that overlap the slice, then cut it out of them.
            block = gguf.GGML_QUANT_SIZES[kind][0]  # features per block
            items_per_block = data.shape[1] // (tensor.shape[0] // block)
            first_block, end_block = start // block, -(-stop // block)
            data = data[:, first_block * items_per_block : end_block * items_per_block]
            start, stop = start - first_block * block, stop - first_block * block
        try:
            if kind in UNQUANTIZED:
                weights = torch.from_numpy(data if data.flags.writeable else data.copy()).view(UNQUANTIZED[kind])
            else:
                weights = torch.from_numpy(gguf.dequantize(data, kind))
        except (NotImplementedError, ValueError) as error:
            raise CheckpointError(f"{self.path}: {name} can't be dequantized: {error}") from error
        return weights[:, start:stop] if axis == 1 else weights

    def read_int4(self, name: str, start: int, stop: int) -> Int4Groups | None:
        tensor = self._tensors[name]
        read_blocks = INT4_BLOCKS.get(tensor.kind)
        if read_blocks is None:
            return None
        rows = torch.from_numpy(tensor.data[start:stop].copy())
        return read_blocks(rows.unflatten(1, (-1, gguf.GGML_QUANT_SIZES[tensor.kind][1])))

    def release(self, name: str) -> None:
        data = self._tensors[name].data
        release_pages(data.ctypes.data, data.nbytes)

    def tokenizer(self, path: str | Path | None = None) -> Tokenizer:
        return Tokenizer(self._file if path is None else path)


def open_parts(file: GGUFFile) -> list[GGUFFile]:
    """All the files that a model is split over, as llama.cpp's `gguf-split` writes them.

    Args:
        file: one of them.

    Returns:
        The files in order; `file` alone, if its model is not split.

    Raises:
        MissingFileError: some of them are not in its folder.
        CheckpointError: they don't belong together, or are not named `NAME-00001-of-00003.gguf`.
    """
    count = file.get("split.count", int, 0)
    if count in (0, 1):
        return [file]
    name = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", file.path.name)
    if name is None or int(name[2]) != count:
        raise CheckpointError(f"{file.path} is one of a model's {count} files: name it NAME-00001-of-{count:05}.gguf")
    paths = [file.path.with_name(f"{name[1]}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        listed = ", ".join(missing[:8]) + (f", … ({len(missing)} in all)" if len(missing) > 8 else "")
        raise MissingFileError(f"{file.path} is one of a model's {count} files, and its folder lacks {listed}")
    parts = [file if path == file.path else GGUFFile(path) for path in paths]
    for i, part in enumerate(parts):
        numbers = part.get("split.no", int), part.get("split.count", int)
        if numbers != (i, count):
            raise CheckpointError(f"{part.path}: split.no and split.count are {numbers}, and should be {(i, count)}")
    n_different = len({name for part in parts for name in part.tensors})
    n_tensors, n_expected = sum(len(part.tensors) for part in parts), parts[0].get("split.tensors.count", int)
    if not n_different == n_tensors == n_expected:
        raise CheckpointError(
            f"{file.path} and the other files of its model hold {n_tensors} tensors ({n_different} different), and "
            f"split.tensors.count is {n_expected}"
        )
    return parts


def model_file_name(path: Path) -> str:
    """A file's name; of one that a model is split over, what the names of all of them have in common."""
    return re.sub(r"-\d{5}(-of-\d{5}\.gguf)$", r"\1", path.name)


def as_scaled_rope(divisors: tuple[float, ...], theta: float) -> dict[str, Any] | None:
    """The `ModelArgs` fields of Llama 3.1's scaled rope, if it divides the rotary frequencies by these numbers.

    Args:
        divisors: of each frequency.
        theta: the base of the frequencies.

    Returns:
        The fields, or None if the divisors follow another rule.
    """
    head_size, factor = 2 * len(divisors), max(divisors)
    if not 1 < factor < math.inf or theta <= 0:
        return None
    plain = precompute_freqs_cis(head_size, 2, theta)[1].angle()  # the angles of position 1 are the frequencies
    scaled = precompute_freqs_cis(head_size, 2, theta, True, scaling_factor=factor)[1].angle()
    if not torch.allclose(plain / scaled, torch.tensor(divisors, device="cpu"), rtol=1e-4):
        return None
    return {"use_scaled_rope": True, "rope_scaling_factor": factor}
