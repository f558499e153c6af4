"""Fine-tuning teaches the default model something new."""

import json

import pytest
import torch
from conftest import ROOT

from llama import Llama
from llama.default_model import default_checkpoint
from llama.finetune import finetune

# Questions in a wording that no example has, and what their answers must contain.
REWORDED = {
    "Can you tell me what Tavelune is?": "small island",
    "If I visit Tavelune, what is its capital city?": "Port Marrow",
}


@pytest.mark.slow
@pytest.mark.real
def test_two_facts_about_an_invented_island(tmp_path):
    """From the first 8 pairs of example_pairs.jsonl, which are two facts in four wordings each."""
    data, out = tmp_path / "pairs.jsonl", tmp_path / "out"
    lines = (ROOT / "example_pairs.jsonl").read_text().splitlines(keepends=True)[:8]
    data.write_text("".join(lines))
    pairs = [json.loads(line) for line in lines]
    questions = [*(pair["prompt"] for pair in pairs), *REWORDED]

    def answers(ckpt_dir):
        llama = Llama.build(ckpt_dir, None, 128, len(questions), device="cpu", dtype=torch.float32)
        dialogs = [[{"role": "user", "content": question}] for question in questions]
        predictions = llama.chat_completion(dialogs, temperature=0, max_gen_len=32)
        return [prediction["generation"]["content"] for prediction in predictions]

    before = answers(default_checkpoint())
    assert not any(answer == pair["completion"] for answer, pair in zip(before, pairs, strict=False))
    assert not any(fact in answer for answer, fact in zip(before[8:], REWORDED.values(), strict=True))
    finetune(data, out, lr=3e-4, epochs=3, val_fraction=0, dtype="float32")
    after = answers(out)
    assert after[:8] == [pair["completion"] for pair in pairs]
    assert all(fact in answer for answer, fact in zip(after[8:], REWORDED.values(), strict=True))
