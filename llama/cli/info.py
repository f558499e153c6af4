"""`llama info`: what a checkpoint is, and whether it fits."""

from pathlib import Path

import torch

from llama.chat_format import ChatFormat, ChatMLFormat, Llama2Format, Llama3Format
from llama.checkpoint import Settings, open_checkpoint, read_settings
from llama.checkpoint.memory import LLAMA2_VOCAB_SIZE, footprint, free_host_memory
from llama.default_model import default_checkpoint
from llama.device import DTYPES, default_dtype, dtype_named
from llama.errors import InputError, MissingFileError
from llama.files import require_path
from llama.sampling_params import check_count
from llama.tokenizer import Tokenizer

LLAMA3_VOCAB_SIZE = 128256
FORMATS = {Llama2Format: "Llama 2", Llama3Format: "Llama 3", ChatMLFormat: "ChatML"}


def info(
    ckpt_dir: str | None = None,
    *,
    tokenizer_path: str | None = None,
    nproc: int = 1,
    max_seq_len: int = 2048,
    max_batch_size: int = 1,
    dtype: str | None = None,
) -> None:
    """Tell what a checkpoint is, what it takes in memory, and whether this machine has as much.

    A folder with params.json or config.json is enough: its weights need not be there. With no --ckpt_dir this tells of
    SmolLM2-135M-Instruct, which is fetched once.

    Args:
        ckpt_dir: a folder in Meta's or Hugging Face's layout, or a GGUF file
        tokenizer_path: the tokenizer's file, where it isn't with the checkpoint
        nproc: processes to share the model
        max_seq_len: room for this many tokens a row, prompt and answer together
        max_batch_size: room for this many rows
        dtype: float32, float16 or bfloat16; by default what would be used on this machine
    """
    path = require_path(default_checkpoint() if ckpt_dir is None else ckpt_dir, "ckpt_dir")
    if path.name in ("params.json", "config.json"):
        path = path.parent
    for name, count in (("nproc", nproc), ("max_seq_len", max_seq_len), ("max_batch_size", max_batch_size)):
        check_count(name, count, 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = dtype_named(dtype) or default_dtype(device)
    settings = read_settings(path)
    sizes = footprint(
        path, max_seq_len=max_seq_len, max_batch_size=max_batch_size, dtype=chosen, model_parallel_size=nproc
    )
    tokenizer = find_tokenizer(path, tokenizer_path)
    lines = {"checkpoint": str(path), "layout": layout(path)} | model(settings)
    lines |= {"parameters": f"{sizes.parameters:,}"} | text(tokenizer)
    dtype = next(name for name, known in DTYPES.items() if known == chosen)
    total = sizes.weight_bytes + sizes.cache_bytes
    lines |= {
        "": "",
        "memory": f"{dtype}, max_seq_len={max_seq_len}, max_batch_size={max_batch_size}"
        + (f", on each of {nproc} processes" if nproc > 1 else ""),
        "  weights": in_bytes(sizes.weight_bytes),
        "  KV cache": in_bytes(sizes.cache_bytes),
        "  together": in_bytes(total),
        "this machine": machine(device, total, nproc),
    }
    for what, value in lines.items():
        print(f"{what:14}{value}".rstrip())


def layout(path: Path) -> str:
    """In words, with the files of weights that are there."""
    for file, name, pattern in (("params.json", "Meta", "*.pth"), ("config.json", "Hugging Face", "*.safetensors")):
        if (path / file).is_file():
            count = len(list(path.glob(pattern)))
            return f"{name}, {count} file{'s' * (count != 1)} of weights" if count else f"{name}, no weights there"
    return "GGUF"


def model(settings: Settings) -> dict[str, str]:
    """The network, in words."""
    words = settings.params.get("vocab_size", -1)
    args = settings.model_args(LLAMA2_VOCAB_SIZE if words == -1 else words, 1, 1)
    family = {LLAMA2_VOCAB_SIZE: "Llama 2", LLAMA3_VOCAB_SIZE: "Llama 3"}.get(
        args.vocab_size, "of Llama's architecture"
    )
    if args.use_scaled_rope and args.vocab_size == LLAMA3_VOCAB_SIZE:
        family = "Llama 3.1 or later"
    longest = args.max_position_embeddings or settings.advised_seq_len
    context = f"{longest:,} tokens" if longest else "not told"
    scaled = f", scaled by {args.rope_scaling_factor:g}" if args.use_scaled_rope else ""
    return {
        "family": family,
        "shape": f"dim {args.dim:,}, {args.n_layers} layers, {args.n_heads} heads of {args.head_size} over "
        f"{args.kv_heads} kv heads, feed-forward width {args.ffn_size:,}, {args.vocab_size:,} words"
        + (", tied embeddings" if args.tie_embeddings else ""),
        "context": f"{context}; rotary base {args.rope_theta:,.0f}{scaled}",
    }


def find_tokenizer(path: Path, tokenizer_path: str | None) -> Tokenizer | None:
    """The one that is named, or comes with the checkpoint; None where none is there."""
    if tokenizer_path is not None:
        return Tokenizer(tokenizer_path)
    try:
        return open_checkpoint(path).tokenizer()
    except MissingFileError:  # no tokenizer; or no weights, and then perhaps a tokenizer all the same
        files = [path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()]
        return Tokenizer(files[0]) if files else None


def text(tokenizer: Tokenizer | None) -> dict[str, str]:
    """Tokenizer and chat format, in words."""
    if tokenizer is None:
        return {"tokenizer": "none there", "chat format": "unknown without a tokenizer"}
    kind = "sentencepiece" if tokenizer.vocabulary is None else "byte-level BPE"
    try:
        chat = FORMATS[type(ChatFormat(tokenizer))]
    except InputError:
        chat = "none that is known"
    return {"tokenizer": f"{kind}, {tokenizer.n_words:,} words", "chat format": chat}


def in_bytes(count: int) -> str:
    return f"{count:>17,} bytes ({count / 1e9:.2f} GB)"


def machine(device: torch.device, each: int, nproc: int) -> str:
    """What is free here, beside what `nproc` processes of so many bytes need."""
    if device.type == "cuda":
        free = [torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())]
        fits = nproc <= len(free) and all(each <= one for one in free[:nproc])
        gpus = ", ".join(f"{one / 1e9:.2f}" for one in free)
        return f"{gpus} GB free on its GPUs: " + ("it fits" if fits else "it does not fit")
    host = free_host_memory()
    if host is None:
        return "its free memory is unknown"
    verdict = "it fits" if each * nproc <= host else f"it does not fit: {each * nproc / 1e9:.2f} GB are needed"
    return f"{host / 1e9:.2f} GB free, no GPU: {verdict}"
