"""Fine-tuning in real processes: the same as in one, whether they share a model, hold copies of it, or both."""

import functools
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, load, tiny_model, torchrun, write_llama3_tokenizer, write_meta_checkpoint
from train_everything import everything

from llama import Tokenizer
from llama.checkpoint import parameter_shapes, share
from llama.finetune import metrics


def write_pairs(path, count=20):
    lines = [{"prompt": "the " * (i % 5 + 1), "completion": "in there " * (i % 3 + 1) + str(i)} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A checkpoint, its data, and what one process makes of them. With 2 kv heads, 4 ranks hold each twice."""

    @functools.cache
    def made(tied):
        folder = tmp_path_factory.mktemp("alone")
        tokenizer_path = write_llama3_tokenizer(folder / "ranks")
        model = tiny_model(vocab_size=Tokenizer(tokenizer_path).n_words, n_kv_heads=2, tie_embeddings=tied)
        ckpt_dir = write_meta_checkpoint(folder / "checkpoint", model, tokenizer_path)
        data = write_pairs(folder / "data.jsonl")
        found = everything(ckpt_dir, data, folder / "out", 1, 4)
        return SimpleNamespace(folder=folder, ckpt_dir=ckpt_dir, data=data, found=found, model=model)

    return made


RUNS = {  # processes, those that share a model, batch size, tied embeddings
    "two share": (2, 2, 4, True),
    "four share": (4, 4, 8, False),
    "two copies": (2, 1, 2, True),
    "two copies on two each": (4, 2, 4, False),
}


@pytest.mark.parametrize("run", RUNS)
def test_the_same_as_one_process(alone, tmp_path, run):
    n, model_parallel_size, batch_size, tied = RUNS[run]
    alone = alone(tied)
    script = ROOT / "tests" / "train_everything.py"
    result = torchrun(n, script, alone.ckpt_dir, alone.data, tmp_path, model_parallel_size, batch_size)
    assert result.returncode == 0, result.stderr
    want = alone.found
    for rank in range(n):
        found = torch.load(tmp_path / f"rank-{rank}")
        for name in ("loss", "step loss", "norm", "loss of one", "norm of one"):
            assert found[name] == pytest.approx(want[name], rel=1e-4), name
        assert found["gradients"].keys() == want["gradients"].keys()
        shapes = parameter_shapes(alone.model.params)
        for name, gradient in want["gradients"].items():
            axis, start, stop = share(name, shapes[name], alone.model.params, found["part"], model_parallel_size)
            part = gradient if axis is None else gradient.narrow(axis, start, stop - start)
            torch.testing.assert_close(found["gradients"][name], part, rtol=1e-3, atol=1e-5, msg=name)
    for train in ("all", "lora"):
        ours, theirs = (metrics.read(folder / train / "metrics.jsonl") for folder in (tmp_path, alone.folder / "out"))
        assert len(ours) == len(theirs) == 2 * 2 + 3
        assert any(entry.get("gradient_norm", 0) > 2.0 for entry in theirs)  # and so clipped
        for entry, other in zip(ours, theirs, strict=True):
            entry.pop("tokens_per_second", None)
            other.pop("tokens_per_second", None)
            assert entry == pytest.approx(other, rel=2e-3)
        losses = [entry["loss"] for entry in ours if "loss" in entry]
        assert losses[-1] < losses[0] - 0.1
        ours, theirs = load(tmp_path / train), load(alone.folder / "out" / train)
        assert ours.params.tie_embeddings == theirs.params.tie_embeddings == tied
        tokens = torch.arange(300, 360)[None]
        with torch.no_grad():
            start = alone.model(tokens)
            assert (theirs(tokens) - start).abs().max() > 1
            assert (ours(tokens) - theirs(tokens)).abs().max() < 0.05
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all", "lora", *(f"rank-{rank}" for rank in range(n))]
