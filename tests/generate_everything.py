"""Builds a checkpoint and saves all that it generates: run by test_parallel.py in several processes."""

import json
import logging
import os
import sys
from pathlib import Path

import torch

from llama import Llama


def generate_everything(folder: Path) -> dict:
    """What each kind of call returns, and the number of elements in this process's parameters and in its cache."""
    llama = Llama.build(folder, None, 96, 4, device="cpu", dtype=torch.float32)
    draft = Llama.build(folder, None, 96, 4, device="cpu", dtype=torch.float32)
    draft.model.norm.weight.data.mul_(1.5)  # it is more certain than the model
    if int(os.environ.get("RANK", "0")):
        torch.rand(1000)  # the tokens are those of rank 0, though the other ranks have another random state
    prompts = [[7, 8, 9], [100] * 40, [5, 6, 5, 6, 5], [300, 301]]
    results = {
        "greedy": llama.generate(prompts, 20, 0, logprobs=True, echo=True),
        "sampled": llama.generate(prompts[:1] * 4, 20, 0.8, 0.95, logprobs=True),
        "chat": llama.chat_completion([[{"role": "user", "content": "the user in there"}]], 0.6, 0.9, 12),
        "beams": llama.generate(prompts[:2], 15, num_beams=2, num_return_sequences=2, logprobs=True),
        "stream": [list(piece) for piece in llama.generate_stream(prompts, 12, 1.2, 1.0, seed=3, top_k=40)],
        "text stream": [piece.text for piece in llama.text_completion_stream(["the user"], 1.2, 1.0, 30, seed=5)],
        "lookup": llama.generate(prompts, 20, 0, logprobs=True, prompt_lookup_num_tokens=3),
        "draft": llama.generate(prompts[:2], 12, 0.9, 1.0, seed=4, draft_model=draft)[0],
        "draft's stream": [p.token for p in llama.generate_stream(prompts[3:], 12, 1.2, 1.0, draft_model=draft)],
        "stop": llama.text_completion(["the user"], 0, max_gen_len=20, stop=["e", "t"]),
        "reused cache": llama.generate([[*prompts[0], 5]], 5, 0, reuse_cache=True)[0],
        "parameters": sum(weight.numel() for weight in llama.model.parameters()),
        "cache": llama.model.cache.keys.numel(),
    }
    return json.loads(json.dumps(results))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    folder, path = map(Path, sys.argv[1:])
    results = generate_everything(folder) | {"backend": torch.distributed.get_backend()}
    rank = os.environ["RANK"]
    path.with_name(f"{path.name}.{rank}").write_text(json.dumps(results))
    print("done")
    sys.stderr.write(f"rank {rank} can write to standard error\n")
