"""Writes the same weights in the layouts of the libraries."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import gguf
import torch

from llama import ModelArgs, Tokenizer, Transformer
from llama.checkpoint import load_model, open_checkpoint, save_checkpoint
from llama.checkpoint.gguf import NAMES
from llama.default_model import default_checkpoint

# The sizes of Llama 3.2 1B.
SIZES_OF_1B: dict[str, Any] = {
    "dim": 2048,
    "n_layers": 16,
    "n_heads": 32,
    "n_kv_heads": 8,
    "ffn_dim": 8192,
    "vocab_size": 128256,
    "tie_embeddings": True,
    "rope_theta": 500000.0,
}


QUANTIZED = ("Q8_0", "Q4_0", "Q4_K_M")  # llama.cpp's kinds of files that are measured


def write_weights(model: str, dtype: torch.dtype, layouts: Collection[str], folder: Path) -> dict[str, int]:
    """Write a model in several layouts, each into a folder of this name.

    Args:
        model: "smollm2", the default model, or "1b", a random one of the sizes of Llama 3.2 1B.
        dtype: of the weights.
        layouts: some of "meta", "hf", "gguf" and those of `QUANTIZED`, which llama.cpp makes from "gguf".
        folder: where to make the folders.

    Returns:
        "weights" and "cache": the bytes of weights, and of cache for each token, that a decode step reads; and "matrix
        numbers": the number of parameters of the layers.
    """
    network, tokenizer = default_model(dtype) if model == "smollm2" else random_model(dtype)
    if "meta" in layouts:
        save_checkpoint(folder / "meta", network, tokenizer)
    if "hf" in layouts:
        save_checkpoint(folder / "hf", network, layout="hf")
    quantized = [kind for kind in QUANTIZED if kind in layouts]
    if "gguf" in layouts or quantized:
        write_gguf(folder / "gguf", network)
    for kind in quantized:
        quantize_gguf(folder / "gguf", kind, folder / kind)
    params = network.params
    return {
        "weights": sum(weight.nbytes for weight in network.parameters()),
        "cache": 2 * params.n_layers * params.kv_heads * params.head_size * dtype.itemsize,
        "matrix numbers": sum(weight.numel() for name, weight in network.named_parameters() if "layers" in name),
    }


def default_model(dtype: torch.dtype) -> tuple[Transformer, Tokenizer]:
    """The default model, dequantized."""
    checkpoint = open_checkpoint(default_checkpoint())
    tokenizer = checkpoint.tokenizer()
    args = checkpoint.settings.model_args(tokenizer.n_words, 16, 1)
    return load_model(checkpoint, args, device=torch.device("cpu"), dtype=dtype), tokenizer


def random_model(dtype: torch.dtype) -> tuple[Transformer, Tokenizer]:
    """A model of the sizes of Llama 3.2 1B with random weights, and its tokenizer."""
    import llama_models.llama3

    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    network = Transformer(ModelArgs(**SIZES_OF_1B))
    for weight in network.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.02)
    torch.set_default_dtype(torch.float32)
    return network, Tokenizer(Path(llama_models.llama3.__path__[0]) / "tokenizer.model")


def quantize_gguf(source: Path, kind: str, target: Path) -> None:
    """Let llama.cpp quantize the file in the folder `source` into one of this kind in the folder `target`."""
    import llama_cpp

    target.mkdir()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    files = (str(folder / "model.gguf").encode() for folder in (source, target))
    ignore_log = llama_cpp.llama_log_callback(lambda *message: None)  # it has a line for each tensor
    llama_cpp.llama_log_set(ignore_log, None)
    failed = llama_cpp.llama_model_quantize(*files, params)
    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(), None)  # a null pointer: the default again
    if failed:
        raise RuntimeError(f"llama.cpp could not quantize {source} as {kind}")


def write_gguf(folder: Path, network: Transformer) -> None:
    """Write a network as one GGUF file without a tokenizer."""
    folder.mkdir()
    args = network.params
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_context_length(8192)
    writer.add_vocab_size(args.vocab_size)
    writer.add_embedding_length(args.dim)
    writer.add_block_count(args.n_layers)
    writer.add_feed_forward_length(args.ffn_size)
    writer.add_head_count(args.n_heads)
    writer.add_head_count_kv(args.kv_heads)
    writer.add_layer_norm_rms_eps(args.norm_eps)
    writer.add_rope_freq_base(args.rope_theta)
    writer.add_tokenizer_model("none")
    gguf_names = {name: gguf_name for gguf_name, name in NAMES.items()}
    for name, weight in network.state_dict().items():
        if name == "output.weight" and args.tie_embeddings:
            continue
        stem = name.removesuffix(".weight")
        if stem.startswith("layers."):
            _, layer, part = stem.split(".", 2)
            gguf_name = f"blk.{layer}.{gguf_names[part]}.weight"
        else:
            gguf_name = f"{gguf_names[stem]}.weight"
        array = weight.detach().float().numpy()
        if weight.dim() == 2 and weight.dtype == torch.bfloat16:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(gguf_name, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
