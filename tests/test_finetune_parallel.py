"""Fine-tuning in several processes gives the results of one, whether they share a model, hold copies of it, or both."""

import functools
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, load, tiny_model, write_llama3_tokenizer, write_meta_checkpoint
from forked import fork_python
from train_everything import train_everything

from llama import Tokenizer
from llama.checkpoint import parameter_shapes, share
from llama.finetune import metrics

pytestmark = pytest.mark.slow


def write_pairs(path, count=20):
    """Write data of prompts and completions of different lengths."""
    pairs = [{"prompt": "the " * (i % 5 + 1), "completion": "in there " * (i % 3 + 1) + str(i)} for i in range(count)]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """A function that makes a checkpoint and data, and the results of one process.

    The model has two kv heads, so that of four processes each head is held by two.
    """

    @functools.cache
    def train(tie_embeddings):
        folder = tmp_path_factory.mktemp("one-process")
        tokenizer_path = write_llama3_tokenizer(folder / "ranks")
        vocab_size = Tokenizer(tokenizer_path).n_words
        model = tiny_model(vocab_size=vocab_size, n_kv_heads=2, tie_embeddings=tie_embeddings)
        ckpt_dir = write_meta_checkpoint(folder / "checkpoint", model, tokenizer_path)
        data = write_pairs(folder / "data.jsonl")
        results = train_everything(ckpt_dir, data, folder / "out", 1, 4)
        return SimpleNamespace(folder=folder, ckpt_dir=ckpt_dir, data=data, results=results, model=model)

    return train


RUNS = {  # processes, model-parallel size, batch size, tied embeddings
    "two share": (2, 2, 4, True),
    "four share": (4, 4, 8, False),
    "two copies": (2, 1, 2, True),
    "two copies on two each": (4, 2, 4, False),
}


@pytest.mark.parametrize("run", RUNS)
def test_the_same_as_one_process(one_process, tmp_path, run):
    n, model_parallel_size, batch_size, tie_embeddings = RUNS[run]
    expected = one_process(tie_embeddings)
    script = ROOT / "tests" / "train_everything.py"
    arguments = (expected.ckpt_dir, expected.data, tmp_path, model_parallel_size, batch_size)
    finished = fork_python(script, *arguments, ranks=n)
    assert finished.returncode == 0, finished.stderr
    model, gradients = expected.model, expected.results["gradients"]
    shapes = parameter_shapes(model.params)
    for rank in range(n):
        results = torch.load(tmp_path / f"rank-{rank}")
        for name in ("loss", "step loss", "norm", "loss of one example", "norm of one example"):
            assert results[name] == pytest.approx(expected.results[name], rel=1e-4), name
        assert results["gradients"].keys() == gradients.keys()
        for name, gradient in gradients.items():
            axis, start, stop = share(name, shapes[name], model.params, results["part"], model_parallel_size)
            part = gradient if axis is None else gradient.narrow(axis, start, stop - start)
            torch.testing.assert_close(results["gradients"][name], part, rtol=1e-3, atol=1e-5, msg=name)
    for train in ("all", "lora"):
        one, several = expected.folder / "out" / train, tmp_path / train
        expected_metrics, actual_metrics = (metrics.read(folder / "metrics.jsonl") for folder in (one, several))
        assert len(actual_metrics) == len(expected_metrics) == 2 * 2 + 3
        assert any(entry.get("gradient_norm", 0) > 2.0 for entry in expected_metrics)  # which is clipped
        for actual, wanted in zip(actual_metrics, expected_metrics, strict=True):
            actual.pop("tokens_per_second", None)
            wanted.pop("tokens_per_second", None)
            assert actual == pytest.approx(wanted, rel=2e-3)
        losses = [entry["loss"] for entry in actual_metrics if "loss" in entry]
        assert losses[-1] < losses[0] - 0.1
        trained_by_one, trained_by_several = load(one), load(several)
        assert trained_by_several.params.tie_embeddings == trained_by_one.params.tie_embeddings == tie_embeddings
        tokens = torch.arange(300, 360)[None]
        with torch.no_grad():
            logits = trained_by_one(tokens)
            assert (logits - model(tokens)).abs().max() > 1
            assert (logits - trained_by_several(tokens)).abs().max() < 0.05
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all", "lora", *(f"rank-{rank}" for rank in range(n))]
