"""Hugging Face's layout: `config.json`, and `model.safetensors` or several files and their index."""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llama.checkpoint.layout import Checkpoint, Settings
from llama.checkpoint.parameters import our_name, parameter_shapes
from llama.checkpoint.staging import Staging
from llama.errors import CheckpointError, InputError
from llama.files import Metadata, first_bytes, read_json, refuse_if_unmappable, require_path, write_json
from llama.model_args import ModelArgs
from llama.tokenizer import Tokenizer
from llama.vocab.tokenizer_json import adds_bos, end_ids
from llama.vocab.vocabulary import is_tiktoken

LAYER = "model.layers."
NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
THEIR_NAMES = {ours: theirs for theirs, ours in NAMES.items()}
ROTATED = ("attention.wq.weight", "attention.wk.weight")  # whose rows lie in another order

CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# What else a Llama configuration can ask for -> what this network does.
ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "sliding_window": (),
    "quantization_config": (),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
}

MOST_PADDING = 1024  # words that an embedding may have more than the tokenizer; with more, they don't belong together

SHARD_BYTES = 5_000_000_000  # of the files that a model is written to, unless their number is given


class HuggingFaceCheckpoint(Checkpoint):
    """A folder in Hugging Face's layout. Its weights are mapped."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.settings = read_config_json(folder / CONFIG)
        self._tensors: dict[str, tuple[Path, Any]] = {}  # our name -> its file, and what gives slices of it
        for path, names in self._files().items():
            file = open_safetensors(path)
            for name in file.keys() if names is None else names:
                if not name.endswith(".rotary_emb.inv_freq"):  # in old files: computed
                    try:
                        self._tensors[our_name(name, LAYER, NAMES)] = path, file.get_slice(name)
                    except Exception as error:
                        raise CheckpointError(f"{folder / INDEX}: {name} should be in {path}: {error}") from error
        params = self.settings.params
        if params["tie_embeddings"] is None:  # not told
            params["tie_embeddings"] = "output.weight" not in self._tensors
        if params["tie_embeddings"]:
            self._tensors.pop("output.weight", None)

    def _files(self) -> dict[Path, list[str] | None]:
        """The files of weights, each with the names of its tensors, or None for all in it."""
        if (self.path / WEIGHTS).exists():
            return {self.path / WEIGHTS: None}
        index = Metadata(self.path / INDEX, read_json(self.path / INDEX))
        files: dict[Path, list[str] | None] = {}
        for name, file in index.get("weight_map", dict).items():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise CheckpointError(f"{index.path}: {name} lies in {file!r}, which is no file of this folder")
            names = files.setdefault(self.path / file, [])
            if names is not None:
                names.append(name)
        return files

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.get_shape()) for name, (_, tensor) in self._tensors.items()}

    def dtypes(self) -> Iterable[torch.dtype]:
        return (self._dtype(name) for name in self._tensors)

    def _dtype(self, name: str) -> torch.dtype:
        path, tensor = self._tensors[name]
        if tensor.get_dtype() not in DTYPES:
            raise CheckpointError(f"{path}: {name} is stored as {tensor.get_dtype()}, not as one of {list(DTYPES)}")
        return DTYPES[tensor.get_dtype()]

    def read(self, name: str, axis: int | None, start: int, stop: int) -> torch.Tensor:
        self._dtype(name)
        tensor = self._tensors[name][1]
        if axis is None:
            return tensor[:]
        if axis == 1:
            return tensor[:, start:stop]
        if not name.endswith(ROTATED):
            return tensor[start:stop]
        head_size = ModelArgs(**self.settings.params).head_size
        first = start // head_size * head_size  # whole heads
        heads = to_adjacent_pairs(tensor[first : -(-stop // head_size) * head_size], head_size)
        return heads[start - first : stop - first]

    def tokenizer(self) -> Tokenizer:
        as_json, path = self.path / "tokenizer.json", self.path / "tokenizer.model"
        # A sentencepiece model is also there as JSON, but only the JSON of the others is read.
        if as_json.exists() and not (path.exists() and not is_tiktoken(first_bytes(path))):
            path = as_json
        tokenizer = Tokenizer(require_path(path, "tokenizer_path"))
        if path != as_json:  # which is read together with its neighbours
            tokenizer.stop_tokens |= end_ids(self.path)
            tokenizer.add_bos = adds_bos(self.path, tokenizer.add_bos)
        # Embeddings are often padded to a round number of words.
        padding = self.settings.params["vocab_size"] - tokenizer.n_words
        if 0 < padding < MOST_PADDING:
            tokenizer.n_words += padding
            tokenizer.n_padding = padding
        return tokenizer


def to_adjacent_pairs(weight: torch.Tensor, head_size: int) -> torch.Tensor:
    """From rows whose rotary pairs are (j, j + head_size / 2) of a head to ours, (2j, 2j + 1)."""
    return weight.unflatten(0, (-1, 2, head_size // 2)).transpose(1, 2).flatten(0, 2)


def to_half_split(weight: torch.Tensor, head_size: int) -> torch.Tensor:
    """The other way."""
    return weight.unflatten(0, (-1, head_size // 2, 2)).transpose(1, 2).flatten(0, 2)


def open_safetensors(path: Path) -> Any:
    """A mapped `.safetensors` file; its header has been checked against its size."""
    head = first_bytes(require_path(path, "the file of weights"))
    try:
        return safe_open(path, framework="pt", device="cpu")
    except Exception as error:
        refuse_if_unmappable(path, error)
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is damaged or cut short, or no safetensors file: {error}; it begins "
            f"with {head[:16]!r}"
        ) from error


def read_config_json(path: Path) -> Settings:
    """What a `config.json` says.

    Raises:
        CheckpointError: it is damaged, or asks for something that this network can't do; the message names it.
    """
    config = Metadata(path, read_json(require_path(path, CONFIG)))
    get = config.get
    if get("model_type", str, "missing") != "llama":
        raise CheckpointError(f"{path}: model_type is {config.values.get('model_type')!r}; only 'llama' can be run")
    rope = Metadata(path, get("rope_parameters", dict, None) or get("rope_scaling", dict, None) or {})
    for key, known in ONLY.items():
        value = config.values.get(key, rope.values.get(key))
        if value is not None and value not in known:
            raise CheckpointError(f"{path}: {key} is {value!r:.80}, and this network knows only {list(known) or None}")
    other_layers = set(map(str, get("layer_types", list, []))) - {"full_attention"}
    if other_layers:
        raise CheckpointError(f"{path}: layer_types has {other_layers}, and this network knows only full_attention")

    n_heads = get("num_attention_heads", int)
    params = {
        "dim": get("hidden_size", int),
        "n_layers": get("num_hidden_layers", int),
        "n_heads": n_heads,
        "n_kv_heads": get("num_key_value_heads", int, n_heads),
        "vocab_size": get("vocab_size", int),
        "ffn_dim": get("intermediate_size", int),
        "norm_eps": get("rms_norm_eps", float, 1e-6),
        "rope_theta": rope.get("rope_theta", float, get("rope_theta", float, 10000.0)),
        "head_dim": get("head_dim", int, None),
        "tie_embeddings": get("tie_word_embeddings", bool, None),
        "max_position_embeddings": get("max_position_embeddings", int, None),
    }
    kind = rope.get("rope_type", str, rope.get("type", str, "default"))
    if kind == "llama3":
        params |= {
            "use_scaled_rope": True,
            "rope_scaling_factor": rope.get("factor", float),
            "rope_low_freq_factor": rope.get("low_freq_factor", float),
            "rope_high_freq_factor": rope.get("high_freq_factor", float),
            "rope_original_max_seq_len": rope.get("original_max_position_embeddings", int),
        }
    elif kind == "linear":
        params["rope_divisors"] = (rope.get("factor", float),)
    elif kind != "default":
        raise CheckpointError(f"{path}: rope scaling of type {kind!r}; only 'default', 'linear' and 'llama3' are known")
    return Settings(path, params)


def config_of(args: ModelArgs, dtype: torch.dtype) -> dict[str, Any]:
    """A model's sizes as `config.json` has them.

    Raises:
        InputError: the layout has no words for this model's rotary embedding.
    """
    scaling: dict[str, Any] | None = None
    if args.use_scaled_rope:
        scaling = {
            "rope_type": "llama3",
            "factor": args.rope_scaling_factor,
            "low_freq_factor": args.rope_low_freq_factor,
            "high_freq_factor": args.rope_high_freq_factor,
            "original_max_position_embeddings": args.rope_original_max_seq_len,
        }
    if args.rope_divisors is not None:
        if scaling is not None or len(set(args.rope_divisors)) > 1:
            raise InputError("Hugging Face's layout can't express the rope_divisors of this model: write Meta's layout")
        scaling = {"rope_type": "linear", "factor": args.rope_divisors[0]}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": args.dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.head_size,
        "intermediate_size": args.ffn_size,
        "vocab_size": args.vocab_size,
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "rope_scaling": scaling,
        "max_position_embeddings": args.max_position_embeddings,
        "tie_word_embeddings": args.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    return {key: value for key, value in config.items() if value is not None}


def write_hugging_face(
    folder: Path,
    args: ModelArgs,
    tensors: Iterable[tuple[str, torch.Tensor]],
    dtype: torch.dtype,
    shards: int | None,
) -> None:
    """Write a model in Hugging Face's layout, over `shards` files, or files of at most about 5 GB.

    Args:
        folder: an empty folder.
        tensors: every parameter of the network, whole, in the order of `parameter_shapes`.
    """
    config = config_of(args, dtype)
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in parameter_shapes(args).items()}
    total = sum(sizes.values())
    count = shards or -(-total // SHARD_BYTES)
    stream = iter(tensors)
    weight_map: dict[str, str] = {}
    for i, names in enumerate(even_parts(sizes, count)):
        file = WEIGHTS if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        part = {}
        with Staging(folder) as scratch:
            for name in names:
                _, tensor = next(stream)
                if name.endswith(ROTATED):
                    tensor = to_half_split(tensor, args.head_size)
                part[their_name(name)] = scratch.keep(tensor, dtype)
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
            part.clear()
    if count > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / CONFIG, config)


def their_name(name: str) -> str:
    """A parameter's name there, from its name in our network."""
    match = re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", name)
    return f"{LAYER}{match[1]}.{THEIR_NAMES[match[2]]}.weight" if match else f"{THEIR_NAMES[name[:-7]]}.weight"


def even_parts(sizes: dict[str, int], count: int) -> list[list[str]]:
    """Names in `count` runs, none of them empty, of about the same size."""
    names, left = list(sizes), sum(sizes.values())
    parts: list[list[str]] = []
    if count > len(names):
        raise InputError(f"shards={count}: this model has only {len(names)} tensors")
    for remaining in range(count, 0, -1):
        part: list[str] = []
        size = 0
        while names and (not part or (size < left / remaining and len(names) >= remaining)):
            part.append(names.pop(0))
            size += sizes[part[-1]]
        left -= size
        parts.append(part)
    return parts
