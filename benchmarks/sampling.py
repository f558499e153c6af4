"""Measures how long sampling a token takes, beside the step of the network before it: python benchmarks/sampling.py

The logits are those of the default model on a text that it continues. Its vocabulary has only 49,152 tokens, so the
logits of unlikely tokens are repeated, up to Llama 3's vocabulary of 128,256. The step is that of a random network of
the sizes of Llama 3.2 1B, after 512 tokens. Medians are printed, at temperature 0.6 and top-p 0.9.
"""

import functools
import statistics
import time
from collections.abc import Callable

import torch
from weights import SIZES_OF_1B

from llama import Llama, ModelArgs, Transformer
from llama.default_model import default_checkpoint
from llama.sampling import sample

TEXT = "The history of the steam engine begins long before the railway. Its first use was to pump water out of mines."
VOCAB_SIZE: int = SIZES_OF_1B["vocab_size"]


def sample_by_sorting(logits: torch.Tensor) -> torch.Tensor:
    """Sample in the simplest way: by sorting the whole vocabulary."""
    probs, ids = torch.softmax(logits / 0.6, dim=-1).sort(dim=-1, descending=True)
    probs[probs.cumsum(dim=-1) - probs > 0.9] = 0
    return ids.gather(-1, torch.multinomial(probs / probs.sum(dim=-1, keepdim=True), 1))


@torch.inference_mode()
def real_logits() -> torch.Tensor:
    """Return the logits of every token of a text, (tokens, VOCAB_SIZE)."""
    llama = Llama.build(default_checkpoint(), None, 256, 1, device="cpu", dtype=torch.float32)
    prompt = llama.tokenizer.encode(TEXT, bos=False, eos=False)
    (tokens,), _ = llama.generate([prompt], 150, echo=True, seed=1)
    logits = llama.model.forward(torch.tensor([tokens]), 0)[0]  # (tokens, 49,152)
    unlikely = logits.sort(dim=-1).values[:, : logits.shape[-1] // 2]
    repeated = [unlikely[:, torch.randperm(unlikely.shape[-1])] for _ in range(4)]
    return torch.cat([logits, *repeated], dim=-1)[:, :VOCAB_SIZE]


@torch.inference_mode()
def step_of_1b(dtype: torch.dtype) -> Callable[[], object]:
    """Return a function that makes a step of a random network of the sizes of Llama 3.2 1B."""
    with torch.device("meta"):
        model = Transformer(ModelArgs(**SIZES_OF_1B, max_batch_size=1, max_seq_len=1024)).to(dtype)
    model.to_empty(device="cpu")
    for weight in model.parameters():
        weight.uniform_(-0.02, 0.02)
    model.setup_cache()
    return lambda: model(torch.tensor([[5]]), 512)


@torch.inference_mode()
def median_milliseconds(works: list[Callable[[], object]]) -> float:
    """Run each function once; return the median of their times."""
    times = []
    for work in works:
        start = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    rows = real_logits().split(1)
    ours = median_milliseconds([functools.partial(sample, row, 0.6, 0.9) for row in rows])
    by_sorting = median_milliseconds([functools.partial(sample_by_sorting, row) for row in rows])
    print(f"sampling from {VOCAB_SIZE:,} tokens: {ours:.2f} ms; by sorting all of them, {by_sorting:.2f} ms")
    for dtype in (torch.bfloat16, torch.float32):
        step = step_of_1b(dtype)
        network = median_milliseconds([step] * 15)
        share = ours / (network + ours)
        print(
            f"a step of a 1B network in {dtype}: {network:.1f} ms; sampling takes {share:.1%} of network and sampling"
        )
        del step


if __name__ == "__main__":
    main()
