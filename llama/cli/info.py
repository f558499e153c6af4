"""`llama info`: describes a checkpoint, and says whether it fits into memory."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from llama.chat_format import ChatFormat, TemplateFormat
from llama.checkpoint import Checkpoint, open_checkpoint, parameter_count, read_settings
from llama.checkpoint.base import MAX_SIZE
from llama.checkpoint.gguf import open_parts
from llama.checkpoint.memory import LLAMA2_VOCAB_SIZE, cache_bytes, free_memory, weight_bytes
from llama.cli.terminal import require_stdout, to_json
from llama.default_model import default_checkpoint
from llama.device import default_dtype, dtype_name, dtype_named
from llama.errors import CheckpointError, InputError, MissingFileError
from llama.files import require_path
from llama.gguf_file import GGUFFile
from llama.log import escape_control_characters
from llama.model_args import ModelArgs
from llama.quantized import check_quantize
from llama.sampling_params import check_number
from llama.tokenizer import Tokenizer

LLAMA3_VOCAB_SIZE = 128256


def info(
    ckpt_dir: str | None = None,
    *,
    tokenizer_path: str | None = None,
    nproc: int = 1,
    max_seq_len: int | None = None,
    max_batch_size: int = 1,
    dtype: str | None = None,
    quantize: str | None = None,
    json: bool = False,
) -> None:
    """Describe a checkpoint, the memory that it takes, and whether it fits this machine.

    A folder with params.json or config.json is enough: the weights are not needed.

    Args:
        ckpt_dir: a folder in Meta's or Hugging Face's layout, or a GGUF file; by default SmolLM2-135M-Instruct, which
            is downloaded once
        tokenizer_path: the tokenizer file; by default the one that comes with the checkpoint
        nproc: number of processes that share the model
        max_seq_len: size of the KV cache in tokens of each row, prompt and answer together; by default 4096, or the
            model's own maximum if that is smaller
        max_batch_size: size of the KV cache in rows
        dtype: float32, float16 or bfloat16, of weights and KV cache; by default this machine's default
        quantize: int8 or int4: the memory with the weights in 8 or 4 bits
        json: print one JSON object instead, with sizes in bytes
    """
    require_stdout()
    path = require_path(default_checkpoint() if ckpt_dir is None else ckpt_dir, "ckpt_dir")
    if path.name in ("params.json", "config.json"):
        path = path.parent
    for name, count in (("nproc", nproc), ("max_seq_len", max_seq_len), ("max_batch_size", max_batch_size)):
        if count is not None:
            check_number(name, count, 1, MAX_SIZE, integer=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch_dtype = dtype_named(dtype) or default_dtype(device, quantize)
    check_quantize(quantize, torch_dtype)
    # Layouts other than GGUF have their settings in a small file, and their weights may be missing.
    has_settings_file = any((path / name).is_file() for name in ("params.json", "config.json"))
    checkpoint = None if has_settings_file else open_checkpoint(path)
    settings = read_settings(path) if checkpoint is None else checkpoint.settings
    vocab_size = settings.params.get("vocab_size", -1)
    args = settings.model_args(LLAMA2_VOCAB_SIZE if vocab_size == -1 else vocab_size, max_seq_len, max_batch_size)
    args.check(nproc)
    try:
        described_tokenizer = describe_tokenizer(find_tokenizer(path, checkpoint, tokenizer_path))
    except CheckpointError as error:  # the rest may still be of use
        described_tokenizer = describe_tokenizer(None) | {"tokenizer_error": str(error)}
    weights, cache = weight_bytes(args, torch_dtype, nproc, quantize), cache_bytes(args, torch_dtype, nproc)
    description = {
        "checkpoint": str(path),
        **describe_layout(path),
        **describe_model(args, settings.advised_seq_len),
        **described_tokenizer,
        "dtype": dtype_name(torch_dtype),
        "quantize": quantize,
        "max_seq_len": args.max_seq_len,
        "max_batch_size": max_batch_size,
        "nproc": nproc,
        "weight_bytes": weights,
        "cache_bytes": cache,
        "total_bytes": weights + cache,
        **describe_machine(device, weights + cache, nproc),
    }
    if json:
        print(to_json(description))
        return
    for name, value in to_lines(description).items():
        print(escape_control_characters(f"{name:14}{value}".rstrip()))


def describe_layout(path: Path) -> dict[str, Any]:
    """Describe how a checkpoint is written: its layout, its files of weights, and in a GGUF file its tensors' types.

    Of each type, such as Q4_K, the result has the fraction of the weights.
    """
    for file, layout, patterns in (
        ("params.json", "Meta", ("*.pth",)),
        ("config.json", "Hugging Face", ("*.safetensors", "pytorch_model*.bin")),
    ):
        if (path / file).is_file():
            counts = [len(list(path.glob(pattern))) for pattern in patterns]
            return {"layout": layout, "weight_files": next(filter(None, counts), 0), "tensor_types": None}
    parts = open_parts(GGUFFile(path if path.is_file() else min(path.glob("*.gguf"))))
    n_weights = Counter[str]()
    for tensor in (tensor for part in parts for tensor in part.tensors.values()):
        n_weights[tensor.kind.name] += math.prod(tensor.shape)
    fractions = {kind: count / n_weights.total() for kind, count in n_weights.most_common()}
    return {"layout": "GGUF", "weight_files": len(parts), "tensor_types": fractions}


def describe_model(args: ModelArgs, advised_seq_len: int | None) -> dict[str, Any]:
    """Describe a network: its family, and its sizes by the names of `ModelArgs`."""
    family = {LLAMA2_VOCAB_SIZE: "Llama 2", LLAMA3_VOCAB_SIZE: "Llama 3"}.get(args.vocab_size, "Llama architecture")
    if args.use_scaled_rope and args.vocab_size == LLAMA3_VOCAB_SIZE:
        family = "Llama 3.1 or later"
    return {
        "family": family,
        "dim": args.dim,
        "n_layers": args.n_layers,
        "n_heads": args.n_heads,
        "head_dim": args.head_size,
        "n_kv_heads": args.kv_heads,
        "ffn_dim": args.ffn_size,
        "vocab_size": args.vocab_size,
        "tie_embeddings": args.tie_embeddings,
        "max_position_embeddings": args.max_position_embeddings or advised_seq_len,
        "rope_theta": args.rope_theta,
        "rope_scaling_factor": args.rope_scaling_factor if args.use_scaled_rope else None,
        "parameters": parameter_count(args),
    }


def find_tokenizer(path: Path, checkpoint: Checkpoint | None, tokenizer_path: str | None) -> Tokenizer | None:
    """Return the tokenizer at `tokenizer_path`, or else the checkpoint's own, or None where there is none.

    Args:
        path: the checkpoint's folder or file.
        checkpoint: the checkpoint, if it is already open.
        tokenizer_path: the tokenizer file, if one was given.
    """
    try:
        return (checkpoint or open_checkpoint(path)).tokenizer(tokenizer_path)
    except MissingFileError:  # of the tokenizer; or of the weights, and then there may still be a tokenizer
        if tokenizer_path is not None:
            return Tokenizer(tokenizer_path)
        files = [path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()]
        return Tokenizer(files[0]) if files else None


def describe_tokenizer(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Describe a tokenizer, with the ids of its stop tokens, and its chat format. What isn't known is None."""
    description: dict[str, Any] = dict.fromkeys(
        ("tokenizer", "tokenizer_error", "n_words", "stop_tokens", "chat_format", "chat_format_error")
    )
    if tokenizer is None:
        return description
    try:
        formatter = ChatFormat(tokenizer)
        from_tokens = "" if isinstance(formatter, TemplateFormat) else ", as its tokens tell: it comes with no template"
        description["chat_format"] = formatter.description + from_tokens
    except CheckpointError as error:
        description["chat_format_error"] = str(error)
    except InputError:  # the tokens tell none
        pass
    return description | {
        "tokenizer": "sentencepiece" if tokenizer.vocabulary is None else "byte-level BPE",
        "n_words": tokenizer.n_words,
        "stop_tokens": {tokenizer.token_text(token): token for token in sorted(tokenizer.stop_tokens)},
    }


def describe_machine(device: torch.device, process_bytes: int, nproc: int) -> dict[str, Any]:
    """Compare this machine's free memory with what the model takes.

    Args:
        device: where the model would run.
        process_bytes: bytes that each process needs.
        nproc: number of processes.

    Returns:
        The free bytes of each GPU, or without GPUs of the machine; and whether the model fits. None if that is unknown.
    """
    if device.type == "cuda":
        free = [free_memory(torch.device("cuda", i)) or 0 for i in range(torch.cuda.device_count())]
        fits = nproc <= len(free) and all(process_bytes <= free_bytes for free_bytes in free[:nproc])
        return {"device": "cuda", "free_bytes": free, "fits": fits}
    free_bytes = free_memory(device)
    if free_bytes is None:
        return {"device": device.type, "free_bytes": None, "fits": None}
    return {"device": device.type, "free_bytes": [free_bytes], "fits": process_bytes * nproc <= free_bytes}


def to_lines(d: dict[str, Any]) -> dict[str, str]:
    """Return the lines to print of a description, by what stands in their first column."""
    return {
        "checkpoint": d["checkpoint"],
        "layout": format_layout(d),
        "family": d["family"],
        "shape": f"dim {d['dim']:,}, {d['n_layers']} layers, {d['n_heads']} heads of {d['head_dim']} over "
        f"{d['n_kv_heads']} kv heads, feed-forward width {d['ffn_dim']:,}, vocab_size {d['vocab_size']:,}"
        + (", tied embeddings" if d["tie_embeddings"] else ""),
        "context": (f"{d['max_position_embeddings']:,} tokens" if d["max_position_embeddings"] else "not specified")
        + f"; rotary base {d['rope_theta']:,.0f}"
        + (f", scaled by {d['rope_scaling_factor']:g}" if d["rope_scaling_factor"] else ""),
        "parameters": f"{d['parameters']:,}",
        **format_tokenizer(d),
        "": "",
        "memory": d["dtype"]
        + (f", quantize={d['quantize']}" if d["quantize"] else "")
        + f", max_seq_len={d['max_seq_len']}, max_batch_size={d['max_batch_size']}"
        + (f", on each of {d['nproc']} processes" if d["nproc"] > 1 else ""),
        "  weights": format_bytes(d["weight_bytes"]),
        "  KV cache": format_bytes(d["cache_bytes"]),
        "  total": format_bytes(d["total_bytes"]),
        "this machine": format_machine(d),
    }


def format_layout(d: dict[str, Any]) -> str:
    count = d["weight_files"]
    files = f"{count} file{'s' * (count != 1)} of weights" if count else "without weights"
    if d["tensor_types"] is None:
        return f"{d['layout']}, {files}"
    kinds = [f"{kind} {fraction:.0%}" for kind, fraction in d["tensor_types"].items()]
    parts = [d["layout"], *([files] if count > 1 else []), *(kind for kind in kinds if not kind.endswith(" 0%"))]
    return ", ".join(parts)


def format_tokenizer(d: dict[str, Any]) -> dict[str, str]:
    if d["tokenizer_error"] is not None:
        return {"tokenizer": f"unusable: {d['tokenizer_error']}"}
    if d["tokenizer"] is None:
        return {"tokenizer": "not found", "chat format": "unknown without a tokenizer"}
    unknown = "none known" if d["chat_format_error"] is None else f"unusable: {d['chat_format_error']}"
    return {
        "tokenizer": f"{d['tokenizer']}, {d['n_words']:,} tokens",
        "stop tokens": ", ".join(f"{text} ({token})" for text, token in d["stop_tokens"].items()),
        "chat format": d["chat_format"] or unknown,
    }


def format_bytes(count: int) -> str:
    return f"{count:>17,} bytes ({count / 1e9:.2f} GB)"


def format_machine(d: dict[str, Any]) -> str:
    if d["free_bytes"] is None:
        return "its free memory is unknown"
    free = ", ".join(f"{free_bytes / 1e9:.2f}" for free_bytes in d["free_bytes"])
    where = f"{free} GB free on its GPUs" if d["device"] == "cuda" else f"{free} GB free, no GPU"
    needed = f": {d['nproc'] * d['total_bytes'] / 1e9:.2f} GB are needed" if d["device"] != "cuda" else ""
    return f"{where}: it fits" if d["fits"] else f"{where}: it does not fit{needed}"
