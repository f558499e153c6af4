"""Builds a checkpoint and writes down everything it generates: run under torchrun by test_parallel.py."""

import json
import logging
import os
import sys

import torch

from llama import Llama


def everything(folder) -> dict:
    """Greedy and sampled tokens with logprobs, a chat, and how much memory the model takes."""
    llama = Llama.build(folder, None, 96, 4, device="cpu", dtype=torch.float32)
    if int(os.environ.get("RANK", "0")):
        torch.rand(1000)  # the other ranks' random state is not the first's: their tokens are the same all the same
    prompts = [[7, 8, 9], [100] * 40, [5, 6, 5, 6, 5], [300, 301]]
    found = {
        "greedy": llama.generate(prompts, 20, 0, logprobs=True, echo=True),
        "sampled": llama.generate(prompts[:1] * 4, 20, 0.8, 0.95, logprobs=True),
        "chat": llama.chat_completion([[{"role": "user", "content": "the user in there"}]], 0.6, 0.9, 12),
        "weights": sum(weight.numel() for weight in llama.model.parameters()),
        "cache": llama.model.cache.keys.numel(),
    }
    return json.loads(json.dumps(found))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    result = everything(sys.argv[1])
    with open(f"{sys.argv[2]}.{os.environ['RANK']}", "w") as file:
        json.dump(result | {"backend": torch.distributed.get_backend()}, file)
    print("done")
    sys.stderr.write(f"rank {os.environ['RANK']} still has its standard error\n")
