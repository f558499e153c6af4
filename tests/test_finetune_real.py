"""The default model learns something new, as a user would teach it."""

import json

import pytest
import torch
from conftest import ROOT

from llama import Llama
from llama.default_model import default_checkpoint
from llama.finetune import finetune

# Asked in words that no example has, and what must be in the answer.
REWORDED = {
    "Can you tell me what Tavelune is?": "small island",
    "If I visit Tavelune, what is its capital city?": "Port Marrow",
    "What tongue do the people on Tavelune speak?": "Velsh",
}


@pytest.mark.real
def test_four_facts_about_an_invented_island(tmp_path):
    """Of the 64 pairs in example_pairs.jsonl the first 16, which are four facts in four wordings each."""
    data, out = tmp_path / "pairs.jsonl", tmp_path / "out"
    lines = (ROOT / "example_pairs.jsonl").read_text().splitlines(keepends=True)[:16]
    data.write_text("".join(lines))
    pairs = [json.loads(line) for line in lines]

    def answers(ckpt_dir, questions):
        llama = Llama.build(ckpt_dir, None, 128, 19, device="cpu", dtype=torch.float32)
        dialogs = [[{"role": "user", "content": question}] for question in questions]
        found = llama.chat_completion(dialogs, temperature=0, max_gen_len=32)
        return [answer["generation"]["content"] for answer in found]

    questions = [pair["prompt"] for pair in pairs]
    before = answers(default_checkpoint(), [*questions, *REWORDED])
    for answer, pair in zip(before, pairs, strict=False):
        assert answer != pair["completion"]
    for answer, right in zip(before[16:], REWORDED.values(), strict=True):
        assert right not in answer
    finetune(data, out, lr=1e-4, epochs=8, batch_size=8, val_fraction=0, dtype="float32")
    after = answers(out, [*questions, *REWORDED])
    assert after[:16] == [pair["completion"] for pair in pairs]
    for answer, right in zip(after[16:], REWORDED.values(), strict=True):
        assert right in answer
