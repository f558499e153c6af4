"""Measures what is lost in 16, 8 and 4 bits: python benchmarks/quality.py

Prints the perplexity of the default model on a text, and the mean Kullback-Leibler divergence per token of its next
token's probabilities from those that it computes in float32. The text is English that comes with Python: the pages of
`help()` on the language. It takes two minutes.
"""

import argparse
import tempfile
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F

from llama import Transformer
from llama.checkpoint import Checkpoint, check_tensors, load_model, open_checkpoint, save_checkpoint
from llama.default_model import default_checkpoint

PAGES = ("execmodel", "naming", "objects", "exceptions", "customization")
WINDOW = 500  # tokens that are computed at once, without what comes before
N_WINDOWS = 4

Logits = list[torch.Tensor]  # of each window, (WINDOW, vocab_size)


def load(checkpoint: Checkpoint, dtype: torch.dtype, quantize: str | None = None) -> Transformer:
    args = checkpoint.settings.model_args(checkpoint.tokenizer().n_words, WINDOW, 1)
    check_tensors(checkpoint, args)
    return load_model(checkpoint, args, device=torch.device("cpu"), dtype=dtype, quantize=quantize)


@torch.inference_mode()
def compute_logits(model: Transformer, windows: torch.Tensor) -> Logits:
    """The logits after each token of each row."""
    return [model(window[None])[0] for window in windows]


@torch.no_grad()
def reorder_features(model: Transformer) -> None:
    """Put the inputs of all matrices into another order, which changes no logit.

    The weights of the default model lie on the 16 values of their groups in its file, which rounding would find again.
    In another order they come into groups with others.
    """
    args, generator = model.params, torch.Generator().manual_seed(0)

    def reorder(names: Iterable[str], axis: int, order: torch.Tensor) -> None:
        for name in names:
            weight = model.get_parameter(f"{name}.weight")
            weight.data = weight.index_select(axis, order)  # in place it would change the open file's

    features = torch.randperm(args.dim, generator=generator)
    reorder(["tok_embeddings"], 1, features)
    reorder(["norm"], 0, features)
    for i in range(args.n_layers):
        attention, feed_forward = f"layers.{i}.attention", f"layers.{i}.feed_forward"
        reorder([f"{attention}_norm", f"layers.{i}.ffn_norm", f"{attention}.wo", f"{feed_forward}.w2"], 0, features)
        reorder([f"{attention}.{name}" for name in ("wq", "wk", "wv")], 1, features)
        reorder([f"{feed_forward}.{name}" for name in ("w1", "w3")], 1, features)
        hidden = torch.randperm(args.ffn_size, generator=generator)
        reorder([f"{feed_forward}.{name}" for name in ("w1", "w3")], 0, hidden)
        reorder([f"{feed_forward}.w2"], 1, hidden)
        in_head = torch.randperm(args.head_size, generator=generator)
        in_heads = (in_head + args.head_size * torch.arange(args.n_heads)[:, None]).flatten()
        reorder([f"{attention}.wv"], 0, in_heads[: args.kv_heads * args.head_size])
        reorder([f"{attention}.wo"], 1, in_heads)


def perplexity(windows: torch.Tensor, logits: Logits) -> float:
    losses = [F.cross_entropy(rows[:-1], window[1:]) for window, rows in zip(windows, logits, strict=True)]
    return float(torch.stack(losses).mean().exp())


def mean_divergence(logits: Logits, exact: Logits) -> float:
    """The mean over all tokens of the divergence of the probabilities from the exact ones, in nats."""
    divergences = [
        F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean")
        for ours, theirs in zip(logits, exact, strict=True)
    ]
    return float(torch.stack(divergences).mean())


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    original = open_checkpoint(default_checkpoint())
    model, tokenizer = load(original, torch.float32), original.tokenizer()
    text = "\n".join(topics[page] for page in PAGES)
    tokens = tokenizer.encode(text, bos=False, eos=False)[: WINDOW * N_WINDOWS]
    windows = torch.tensor(tokens).view(N_WINDOWS, WINDOW)
    exact = compute_logits(model, windows)
    print(f"{windows.numel()} tokens; float32: perplexity {perplexity(windows, exact):.3f}")
    with tempfile.TemporaryDirectory() as folder:
        reorder_features(model)
        save_checkpoint(Path(folder, "reordered"), model, tokenizer)
        reordered = open_checkpoint(Path(folder, "reordered"))
        for name, checkpoint, quantize in (
            ("bfloat16", original, None),
            ("int8, of the Q4_1 file", original, "int8"),
            ("int8, of float32 weights", reordered, "int8"),
            ("int4, the blocks of the Q4_1 file", original, "int4"),
            ("int4, of float32 weights", reordered, "int4"),
        ):
            logits = compute_logits(load(checkpoint, torch.bfloat16, quantize), windows)
            divergence = mean_divergence(logits, exact)
            print(f"{name}: perplexity {perplexity(windows, logits):.3f}, divergence {divergence:.4f}")


if __name__ == "__main__":
    main()
