"""What drawing a token costs, beside the step it follows: python benchmarks/sampling.py

The logits are real ones, of the default model on a text that it continues; since it knows only 49,152 words, its
unlikely ones are repeated up to Llama 3's 128,256. The step is one of a random network of Llama 3.2 1B's shape, after
512 tokens. Medians, at temperature 0.6 and top-p 0.9.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from weights import LARGE

from llama import Llama, ModelArgs, Transformer
from llama.default_model import default_checkpoint
from llama.sampling import sample

TEXT = "The history of the steam engine begins long before the railway. Its first use was to pump water out of mines."
WORDS = LARGE["vocab_size"]


def by_sorting(logits: torch.Tensor) -> torch.Tensor:
    """The plain way: sort all words."""
    probs, ids = torch.softmax(logits / 0.6, dim=-1).sort(dim=-1, descending=True)
    probs[probs.cumsum(dim=-1) - probs > 0.9] = 0
    return ids.gather(-1, torch.multinomial(probs / probs.sum(dim=-1, keepdim=True), 1))


@torch.inference_mode()
def real_logits() -> torch.Tensor:
    """(tokens, 128,256), of every token of a text."""
    llama = Llama.build(default_checkpoint(), None, 256, 1, device="cpu", dtype=torch.float32)
    prompt = llama.tokenizer.encode(TEXT, bos=False, eos=False)
    (tokens,), _ = llama.generate([prompt], 150, echo=True, seed=1)
    logits = llama.model(torch.tensor([tokens]))[0]  # (tokens, 49,152)
    unlikely = logits.sort(dim=-1).values[:, : logits.shape[-1] // 2]
    more = [unlikely[:, torch.randperm(unlikely.shape[-1])] for _ in range(4)]
    return torch.cat([logits, *more], dim=-1)[:, :WORDS]


@torch.inference_mode()
def step_of_1b(dtype: torch.dtype) -> Callable[[], Any]:
    """A step of a random network of Llama 3.2 1B's shape."""
    with torch.device("meta"):
        model = Transformer(ModelArgs(**LARGE, max_batch_size=1, max_seq_len=1024)).to(dtype)
    model.to_empty(device="cpu")
    for weight in model.parameters():
        weight.uniform_(-0.02, 0.02)
    model.setup_cache()
    return lambda: model(torch.tensor([[5]]), 512)


@torch.inference_mode()
def milliseconds(works: list[Callable[[], Any]]) -> float:
    times = []
    for work in works:
        start = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    rows = real_logits().split(1)
    ours = milliseconds([lambda row=row: sample(row, 0.6, 0.9) for row in rows])  # type: ignore[misc]
    plain = milliseconds([lambda row=row: by_sorting(row) for row in rows])  # type: ignore[misc]
    print(f"drawing one of {WORDS:,} words: {ours:.2f} ms; by sorting all of them, {plain:.2f} ms")
    for dtype in (torch.bfloat16, torch.float32):
        step = step_of_1b(dtype)
        took = milliseconds([step] * 15)
        print(
            f"a step of a 1B-shaped network in {dtype}: {took:.1f} ms, of which drawing is {ours / (took + ours):.1%}"
        )
        del step


if __name__ == "__main__":
    main()
