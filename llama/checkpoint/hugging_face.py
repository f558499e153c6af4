"""Hugging Face's layout: `config.json`, and a file of weights or several and their index, as safetensors or pickled."""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llama.checkpoint.base import Checkpoint, Settings, check_dtypes
from llama.checkpoint.parameters import network_name, parameter_shapes
from llama.checkpoint.pickled_weights import open_pickled_weights
from llama.checkpoint.staging import Staging
from llama.device import dtype_name
from llama.errors import CheckpointError, InputError
from llama.files import Metadata, first_bytes, raise_if_unmappable, read_json, release_pages, require_path, write_json
from llama.model_args import ModelArgs
from llama.tokenizer import Tokenizer
from llama.vocab.tiktoken_file import is_tiktoken_file
from llama.vocab.tokenizer_config import read_eos_ids

# Names of tensors in the files, without layer and ".weight" -> names in our network.
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
NAMES_IN_FILES = {ours: theirs for theirs, ours in NAMES.items()}
LAYER_PREFIX = "model.layers."

# Their rows are in another order, since Hugging Face's network rotates other pairs of features of a head.
ROTARY_WEIGHTS = ("attention.wq.weight", "attention.wk.weight")

CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
BIN_INDEX, BIN_WEIGHTS = "pytorch_model.bin.index.json", "pytorch_model.bin"

# The file of all weights or the index of several, in the order in which they are looked for.
WEIGHT_FILES = (WEIGHTS, INDEX, BIN_WEIGHTS, BIN_INDEX)

# Further keys of a Llama's config.json -> the values that our network supports; where there are none, only null.
SUPPORTED_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "sliding_window": (),
    "quantization_config": (),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
}

MAX_PADDING = 1024  # rows of an embedding beyond the tokenizer's tokens; with more, it is another model's tokenizer

MAX_HEADER_BYTES = 2**23  # of a safetensors file, which lists its tensors: some 120 for each

MAX_SHARD_BYTES = 5_000_000_000  # of a file of weights, unless the number of files is given


class HuggingFaceCheckpoint(Checkpoint):
    """A folder in Hugging Face's layout. Its weights are memory-mapped."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.settings = read_config_json(folder / CONFIG)
        self._tensors: dict[str, torch.Tensor] = {}
        for path, names in self._files().items():
            tensors = open_weights(path)
            for name in tensors if names is None else names:
                if name not in tensors:
                    raise CheckpointError(f"{find_weights(folder)}: {name} should be in {path}, but isn't")
                if not name.endswith(".rotary_emb.inv_freq"):  # a table in old files, which our network computes
                    self._tensors[network_name(name, LAYER_PREFIX, NAMES)] = tensors[name]
        params = self.settings.params
        if params["tie_embeddings"] is None:  # config.json doesn't say
            params["tie_embeddings"] = "output.weight" not in self._tensors
        if params["tie_embeddings"]:
            self._tensors.pop("output.weight", None)

    def _files(self) -> dict[Path, list[str] | None]:
        """The files of weights, each with the names of its tensors to use; None for all that are in it."""
        path = find_weights(self.path) or require_path(self.path / WEIGHTS, "the file of weights")
        if path.suffix != ".json":
            return {path: None}
        index = Metadata(path, read_json(path))
        suffix = Path(path.name.removesuffix(".index.json")).suffix
        files: dict[Path, list[str] | None] = {}
        for name, file in index.get("weight_map", dict).items():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(suffix):
                raise CheckpointError(f"{path}: {name} is in {file!r:.80}, which can't be a file of this folder")
            names = files.setdefault(self.path / file, [])
            if names is not None:
                names.append(name)
        return files

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def dtypes(self) -> Iterable[torch.dtype]:
        return (tensor.dtype for tensor in self._tensors.values())

    def read(self, name: str, axis: int | None, start: int, stop: int) -> torch.Tensor:
        tensor = self._tensors[name]
        if axis is None:
            return tensor
        if axis == 0 and name.endswith(ROTARY_WEIGHTS):
            head_size = ModelArgs(**self.settings.params).head_size
            first = start // head_size * head_size  # the rows of a head are reordered together
            heads = to_adjacent_pairs(tensor[first : -(-stop // head_size) * head_size], head_size)
            return heads[start - first : stop - first]
        return tensor.narrow(axis, start, stop - start)

    def release(self, name: str) -> None:
        release_pages(self._tensors[name].data_ptr(), self._tensors[name].nbytes)

    def tokenizer(self, path: str | Path | None = None) -> Tokenizer:
        tokenizer = Tokenizer(self._tokenizer_file() if path is None else path)
        tokenizer.stop_tokens |= read_eos_ids(self.path)
        # Embeddings are often padded to a round number of rows.
        padding = self.settings.params["vocab_size"] - tokenizer.n_words
        if 0 < padding < MAX_PADDING:
            tokenizer.n_words += padding
            tokenizer.n_padding = padding
        return tokenizer

    def _tokenizer_file(self) -> Path:
        json_path, path = self.path / "tokenizer.json", self.path / "tokenizer.model"
        # Folders with a sentencepiece model may have it as JSON too, which is read where it is alone.
        if json_path.exists() and not (path.exists() and not is_tiktoken_file(first_bytes(path))):
            return json_path
        return path


def to_adjacent_pairs(weight: torch.Tensor, head_size: int) -> torch.Tensor:
    """Reorder the rows of each head from rotary pairs (j, j + head_size / 2), Hugging Face's, to (2j, 2j + 1), ours."""
    return weight.reshape(-1, 2, head_size // 2, weight.shape[-1]).transpose(1, 2).flatten(0, 2)


def to_half_split(weight: torch.Tensor, head_size: int) -> torch.Tensor:
    """The inverse of `to_adjacent_pairs`."""
    return weight.reshape(-1, head_size // 2, 2, weight.shape[-1]).transpose(1, 2).flatten(0, 2)


def find_weights(folder: Path) -> Path | None:
    """The file of weights in a folder, or the index of several; safetensors first. None if there are none."""
    return next((folder / name for name in WEIGHT_FILES if (folder / name).exists()), None)


def open_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.safetensors` file, or else of a pickled one, by their names in the file; memory-mapped.

    Raises:
        MissingFileError: no such file.
        CheckpointError: a damaged or hostile file, or one with tensors of another dtype than weights have.
        MemoryError: the system refuses to map so large a file.
    """
    head = first_bytes(require_path(path, "the file of weights"))
    if path.suffix != ".safetensors":
        return open_pickled_weights(path)
    try:
        if int.from_bytes(head[:8], "little") > MAX_HEADER_BYTES:
            raise ValueError(f"its list of tensors is said to have over {MAX_HEADER_BYTES} bytes")
        with safe_open(path, framework="pt", device="cpu") as file:  # checks its header against its size
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise_if_unmappable(path, error)
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is damaged or cut short, or not a safetensors file: {error}; it "
            f"begins with {head[:16]!r}"
        ) from error
    check_dtypes(path, tensors)
    return tensors


def read_config_json(path: Path) -> Settings:
    """The settings in a `config.json`.

    Raises:
        MissingFileError: no such file.
        CheckpointError: it is damaged, or asks for a feature that our network lacks; the message names it.
    """
    config = Metadata(path, read_json(require_path(path, CONFIG)))
    get = config.get
    if get("model_type", str, "missing") != "llama":
        raise CheckpointError(f"{path}: model_type is {config.values.get('model_type')!r}; only 'llama' can be run")
    rope_values: dict[str, Any] | None = get("rope_parameters", dict, None) or get("rope_scaling", dict, None)
    rope = Metadata(path, rope_values or {})
    for key, supported in SUPPORTED_VALUES.items():
        value = config.values.get(key, rope.values.get(key))
        if value is not None and value not in supported:
            raise CheckpointError(
                f"{path}: {key} is {value!r:.80}, and this network knows only {list(supported) or None}"
            )
    other_layers = set(map(str, get("layer_types", list, []))) - {"full_attention"}
    if other_layers:
        raise CheckpointError(
            f"{path}: layer_types has {other_layers!s:.80}, and this network knows only full_attention"
        )

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
    scaling = read_rope_scaling(rope)
    if "rope_divisors" in scaling and params["max_position_embeddings"] is not None:
        # Linear scaling stretches the context. Some files say how far, others only what it was before.
        stretched = scaling["rope_divisors"][0] * params["max_position_embeddings"]
        if 1 <= stretched < 2**63:  # if not, the factor is one that ModelArgs refuses
            params["max_position_embeddings"] = get("max_sequence_length", int, int(stretched))
    return Settings(path, params | scaling)


def read_rope_scaling(rope: Metadata) -> dict[str, Any]:
    """The `ModelArgs` fields of the `rope_parameters` or `rope_scaling` in a `config.json`.

    Raises:
        CheckpointError: a kind of scaling that our network lacks.
    """
    kind = rope.get("rope_type", str, rope.get("type", str, "default"))
    if kind == "default":
        return {}
    if kind == "linear":
        return {"rope_divisors": (rope.get("factor", float),)}
    if kind == "llama3":
        return {
            "use_scaled_rope": True,
            "rope_scaling_factor": rope.get("factor", float),
            "rope_low_freq_factor": rope.get("low_freq_factor", float),
            "rope_high_freq_factor": rope.get("high_freq_factor", float),
            "rope_original_max_seq_len": rope.get("original_max_position_embeddings", int),
        }
    raise CheckpointError(
        f"{rope.path}: rope scaling of type {kind!r}; only 'default', 'linear' and 'llama3' are supported"
    )


def to_config_json(args: ModelArgs, dtype: torch.dtype) -> dict[str, Any]:
    """The content of `config.json` for a model of these sizes.

    Raises:
        InputError: the layout can't express this model's rotary embedding.
    """
    scaling: dict[str, Any] | None = None
    limits = {"max_position_embeddings": args.max_position_embeddings}
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
        if args.max_position_embeddings is not None:  # here it is the context before scaling
            limits = {"max_position_embeddings": max(1, int(args.max_position_embeddings / args.rope_divisors[0]))}
            limits["max_sequence_length"] = args.max_position_embeddings
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
        **limits,
        "tie_word_embeddings": args.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": dtype_name(dtype),
    }
    return {key: value for key, value in config.items() if value is not None}


def write_hugging_face(
    folder: Path,
    args: ModelArgs,
    tensors: Iterable[tuple[str, torch.Tensor]],
    dtype: torch.dtype,
    shards: int | None,
) -> None:
    """Write a model in Hugging Face's layout.

    Args:
        folder: an empty folder.
        args: the model's sizes.
        tensors: every parameter of the network, whole, in the order of `parameter_shapes`.
        dtype: of the written weights.
        shards: number of files of weights; None for files of at most about 5 GB.
    """
    write_json(folder / CONFIG, to_config_json(args, dtype))
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in parameter_shapes(args).items()}
    total = sum(sizes.values())
    count = shards or -(-total // MAX_SHARD_BYTES)
    remaining = iter(tensors)
    weight_map: dict[str, str] = {}
    for i, names in enumerate(split_evenly(sizes, count)):
        file = WEIGHTS if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        shard = {}
        with Staging(folder) as staging:
            for name in names:
                _, tensor = next(remaining)
                if name.endswith(ROTARY_WEIGHTS):
                    tensor = to_half_split(tensor, args.head_size)
                shard[name_in_files(name)] = staging.add(tensor, dtype)
            save_file(shard, folder / file, metadata={"format": "pt"})
            # safetensors makes files that only their owner may read; others get the permissions that the umask gives.
            (folder / file).chmod((folder / CONFIG).stat().st_mode)
            weight_map |= dict.fromkeys(shard, file)
            shard.clear()  # before their mappings' files are removed
    if count > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def name_in_files(name: str) -> str:
    """A parameter's name in Hugging Face's layout, from its name in our network."""
    match = re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", name)
    if match:
        return f"{LAYER_PREFIX}{match[1]}.{NAMES_IN_FILES[match[2]]}.weight"
    return f"{NAMES_IN_FILES[name.removesuffix('.weight')]}.weight"


def split_evenly(sizes: dict[str, int], count: int) -> list[list[str]]:
    """Divide a sequence of tensors into shards of about the same size, none of them empty.

    Args:
        sizes: the name of each tensor -> its size.
        count: number of shards.

    Returns:
        The names in each shard, in their order.

    Raises:
        InputError: there are fewer tensors than shards.
    """
    names, bytes_left = list(sizes), sum(sizes.values())
    shards: list[list[str]] = []
    if count > len(names):
        raise InputError(f"shards={count}: this model has only {len(names)} tensors")
    for shards_left in range(count, 0, -1):
        shard: list[str] = []
        size = 0
        while names and (not shard or (size < bytes_left / shards_left and len(names) >= shards_left)):
            shard.append(names.pop(0))
            size += sizes[shard[-1]]
        bytes_left -= size
        shards.append(shard)
    return shards
