"""`llama info`: describes a checkpoint, and says whether it fits into memory."""

import math
from collections import Counter
from pathlib import Path

import torch

from llama.chat_format import ChatFormat, TemplateFormat
from llama.checkpoint import Checkpoint, Settings, open_checkpoint, parameter_count, read_settings
from llama.checkpoint.gguf import open_parts
from llama.checkpoint.memory import LLAMA2_VOCAB_SIZE, cache_bytes, free_memory, weight_bytes
from llama.cli.terminal import escape_control_characters, require_stdout
from llama.default_model import default_checkpoint
from llama.device import default_dtype, dtype_name, dtype_named
from llama.errors import CheckpointError, InputError, MissingFileError
from llama.files import require_path
from llama.gguf_file import GGUFFile
from llama.model_args import ModelArgs
from llama.quantized import check_quantize
from llama.sampling_params import check_number
from llama.tokenizer import Tokenizer

LLAMA3_VOCAB_SIZE = 128256
DEFAULT_MAX_SEQ_LEN = 2048  # tokens

# Far above the sizes of any model, and low enough to compute with, to list all layers, and to count to n_heads.
MAX_SIZE = 2**31
MAX_SIZES = {"n_layers": 2**12, "n_heads": 2**16}


def info(
    ckpt_dir: str | None = None,
    *,
    tokenizer_path: str | None = None,
    nproc: int = 1,
    max_seq_len: int | None = None,
    max_batch_size: int = 1,
    dtype: str | None = None,
    quantize: str | None = None,
) -> None:
    """Describe a checkpoint, the memory that it takes, and whether it fits this machine.

    A folder with params.json or config.json is enough: the weights are not needed.

    Args:
        ckpt_dir: a folder in Meta's or Hugging Face's layout, or a GGUF file; by default SmolLM2-135M-Instruct, which
            is downloaded once
        tokenizer_path: the tokenizer file; by default the one that comes with the checkpoint
        nproc: number of processes that share the model
        max_seq_len: size of the KV cache in tokens of each row, prompt and answer together; by default 2048, or the
            model's own maximum if that is smaller
        max_batch_size: size of the KV cache in rows
        dtype: float32, float16 or bfloat16, of weights and KV cache; by default this machine's default
        quantize: int8 or int4: the memory with the weights in 8 or 4 bits
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
    check_sizes(settings)
    if max_seq_len is None:
        max_seq_len = min(DEFAULT_MAX_SEQ_LEN, settings.params.get("max_position_embeddings") or DEFAULT_MAX_SEQ_LEN)
    vocab_size = settings.params.get("vocab_size", -1)
    args = settings.model_args(LLAMA2_VOCAB_SIZE if vocab_size == -1 else vocab_size, max_seq_len, max_batch_size)
    args.check(nproc)
    try:
        described_tokenizer = describe_tokenizer(find_tokenizer(path, checkpoint, tokenizer_path))
    except CheckpointError as error:  # the rest may still be of use
        described_tokenizer = {"tokenizer": f"unusable: {error}"}
    weights, cache = weight_bytes(args, torch_dtype, nproc, quantize), cache_bytes(args, torch_dtype, nproc)
    lines = {"checkpoint": str(path), "layout": describe_layout(path)} | describe_model(args, settings.advised_seq_len)
    lines |= {"parameters": f"{parameter_count(args):,}"} | described_tokenizer
    lines |= {
        "": "",
        "memory": f"{dtype_name(torch_dtype)}{f', quantize={quantize}' if quantize else ''}, "
        f"max_seq_len={max_seq_len}, max_batch_size={max_batch_size}"
        + (f", on each of {nproc} processes" if nproc > 1 else ""),
        "  weights": format_bytes(weights),
        "  KV cache": format_bytes(cache),
        "  total": format_bytes(weights + cache),
        "this machine": describe_machine(device, weights + cache, nproc),
    }
    for name, value in lines.items():
        print(escape_control_characters(f"{name:14}{value}".rstrip()))


def check_sizes(settings: Settings) -> None:
    """Raise CheckpointError if a size of a model is absurd: computing with it might never end."""
    for name, size in settings.params.items():
        if isinstance(size, int) and size > MAX_SIZES.get(name, MAX_SIZE):
            raise CheckpointError(f"{settings.path}: {name}={size} is larger than that of any model")


def describe_layout(path: Path) -> str:
    """Name a checkpoint's layout, with the number of its files of weights, and how a GGUF's weights are quantized."""
    for file, name, patterns in (
        ("params.json", "Meta", ("*.pth",)),
        ("config.json", "Hugging Face", ("*.safetensors", "pytorch_model*.bin")),
    ):
        if (path / file).is_file():
            counts = [len(list(path.glob(pattern))) for pattern in patterns]
            count = next(filter(None, counts), 0)
            return f"{name}, {count} file{'s' * (count != 1)} of weights" if count else f"{name}, without weights"
    parts = open_parts(GGUFFile(path if path.is_file() else min(path.glob("*.gguf"))))
    n_weights = Counter[str]()  # by how they are quantized, such as Q4_K
    for tensor in (tensor for part in parts for tensor in part.tensors.values()):
        n_weights[tensor.kind.name] += math.prod(tensor.shape)
    kinds = [f"{kind} {count / n_weights.total():.0%}" for kind, count in n_weights.most_common()]
    described = ", ".join(kind for kind in kinds if not kind.endswith(" 0%"))
    return f"GGUF, {described}" if len(parts) == 1 else f"GGUF, {len(parts)} files of weights, {described}"


def describe_model(args: ModelArgs, advised_seq_len: int | None) -> dict[str, str]:
    """Describe a network: its family, sizes and context, by the names of the output's lines."""
    family = {LLAMA2_VOCAB_SIZE: "Llama 2", LLAMA3_VOCAB_SIZE: "Llama 3"}.get(args.vocab_size, "Llama architecture")
    if args.use_scaled_rope and args.vocab_size == LLAMA3_VOCAB_SIZE:
        family = "Llama 3.1 or later"
    max_seq_len = args.max_position_embeddings or advised_seq_len
    context = f"{max_seq_len:,} tokens" if max_seq_len else "not specified"
    scaling = f", scaled by {args.rope_scaling_factor:g}" if args.use_scaled_rope else ""
    return {
        "family": family,
        "shape": f"dim {args.dim:,}, {args.n_layers} layers, {args.n_heads} heads of {args.head_size} over "
        f"{args.kv_heads} kv heads, feed-forward width {args.ffn_size:,}, vocab_size {args.vocab_size:,}"
        + (", tied embeddings" if args.tie_embeddings else ""),
        "context": f"{context}; rotary base {args.rope_theta:,.0f}{scaling}",
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


def describe_tokenizer(tokenizer: Tokenizer | None) -> dict[str, str]:
    """Describe a tokenizer and its chat format, by the names of the output's lines."""
    if tokenizer is None:
        return {"tokenizer": "not found", "chat format": "unknown without a tokenizer"}
    kind = "sentencepiece" if tokenizer.vocabulary is None else "byte-level BPE"
    try:
        formatter = ChatFormat(tokenizer)
        chat_format = formatter.description
        if not isinstance(formatter, TemplateFormat):
            chat_format += ", as its tokens tell: it comes with no template"
    except CheckpointError as error:
        chat_format = f"unusable: {error}"
    except InputError:
        chat_format = "none known"
    stop_tokens = [f"{tokenizer.token_text(token)} ({token})" for token in sorted(tokenizer.stop_tokens)]
    return {
        "tokenizer": f"{kind}, {tokenizer.n_words:,} tokens",
        "stop tokens": ", ".join(stop_tokens),
        "chat format": chat_format,
    }


def format_bytes(count: int) -> str:
    return f"{count:>17,} bytes ({count / 1e9:.2f} GB)"


def describe_machine(device: torch.device, process_bytes: int, nproc: int) -> str:
    """Compare this machine's free memory with what the model takes.

    Args:
        device: where the model would run.
        process_bytes: bytes that each process needs.
        nproc: number of processes.
    """
    if device.type == "cuda":
        free_bytes = [free_memory(torch.device("cuda", i)) or 0 for i in range(torch.cuda.device_count())]
        fits = nproc <= len(free_bytes) and all(process_bytes <= free for free in free_bytes[:nproc])
        listed = ", ".join(f"{free / 1e9:.2f}" for free in free_bytes)
        return f"{listed} GB free on its GPUs: " + ("it fits" if fits else "it does not fit")
    free = free_memory(device)
    if free is None:
        return "its free memory is unknown"
    needed = process_bytes * nproc
    verdict = "it fits" if needed <= free else f"it does not fit: {needed / 1e9:.2f} GB are needed"
    return f"{free / 1e9:.2f} GB free, no GPU: {verdict}"
