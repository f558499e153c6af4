"""The same weights in every library's layout, and number format."""

from pathlib import Path
from typing import Any

import gguf
import torch

from llama import ModelArgs, Transformer
from llama.checkpoint import load_model, open_checkpoint, save_checkpoint
from llama.checkpoint.gguf import NAMES
from llama.default_model import default_checkpoint

# Llama 3.2 1B's sizes.
LARGE: dict[str, Any] = {
    "dim": 2048,
    "n_layers": 16,
    "n_heads": 32,
    "n_kv_heads": 8,
    "ffn_dim": 8192,
    "vocab_size": 128256,
    "tie_embeddings": True,
    "rope_theta": 500000.0,
}


def write_weights(model: str, dtype: torch.dtype, folder: Path) -> dict[str, int]:
    """Write the default model ("smollm2") or a random one of Llama 3.2 1B's shape ("1b") into `folder`: `meta`, `hf`,
    and `gguf`. Returns what a step reads: bytes of weights, and bytes of cache a token.
    """
    if model == "smollm2":
        checkpoint = open_checkpoint(default_checkpoint())
        tokenizer = checkpoint.tokenizer()
        args = checkpoint.settings.model_args(tokenizer.n_words, 16, 1)
        network = load_model(checkpoint, args, device=torch.device("cpu"), dtype=dtype)
        save_checkpoint(folder / "meta", network, tokenizer)
        (folder / "ours").symlink_to(default_checkpoint())  # the same weights, quantized
    else:
        import llama_models.llama3

        from llama import Tokenizer

        torch.set_default_dtype(dtype)
        torch.manual_seed(0)
        network = Transformer(ModelArgs(**LARGE))
        for weight in network.parameters():
            if weight.dim() == 2:
                torch.nn.init.normal_(weight, std=0.02)
        torch.set_default_dtype(torch.float32)
        tokenizer = Tokenizer(Path(llama_models.llama3.__path__[0]) / "tokenizer.model")
        save_checkpoint(folder / "meta", network, tokenizer)
        (folder / "ours").symlink_to(folder / "meta")
    save_checkpoint(folder / "hf", network, layout="hf")
    write_gguf(folder / "gguf", network)
    params = network.params
    numbers = 2 * params.n_layers * params.kv_heads * params.head_size
    return {
        "weights": sum(weight.nbytes for weight in network.parameters()),
        "cache": numbers * dtype.itemsize,
        "matrix numbers": sum(weight.numel() for name, weight in network.named_parameters() if "layers" in name),
    }


def write_gguf(folder: Path, network: Transformer) -> None:
    """As one GGUF file, without a tokenizer."""
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
    theirs = {our: name for name, our in NAMES.items()}
    for name, weight in network.state_dict().items():
        if name == "output.weight" and args.tie_embeddings:
            continue
        layer, _, ours = name.removesuffix(".weight").removeprefix("layers.").partition(".")
        known = f"blk.{layer}.{theirs[ours]}.weight" if ours in theirs else f"{theirs[layer]}.weight"
        numbers = weight.detach().float().numpy()
        if weight.dim() == 2 and weight.dtype == torch.bfloat16:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(known, gguf.quantize(numbers, kind), raw_dtype=kind)
        else:
            writer.add_tensor(known, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
