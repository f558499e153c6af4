"""Any number of files on any number of processes gives the logits of one file on one process."""

import json

import pytest
import torch
from conftest import Ranks, load, tiny_model, write_llama3_tokenizer, write_meta_checkpoint
from forked import fork_python

from llama import Transformer
from llama.checkpoint import check_tensors, load_model, open_checkpoint

COUNTS = [1, 2, 3, 4, 6, 8]

# Number of kv heads -> the possible numbers of files and processes. All other sizes are multiples of 24.
POSSIBLE_COUNTS = {24: COUNTS, 8: [1, 2, 4, 8], 6: [1, 2, 3, 6], 2: [1, 2, 4, 6, 8], 1: COUNTS}
TOKENS = torch.randint(528, (2, 24), generator=torch.Generator().manual_seed(1))


def model_of(n_kv_heads: int) -> Transformer:
    return tiny_model(dim=192, n_heads=24, n_kv_heads=n_kv_heads, vocab_size=528, multiple_of=48)


def size_and_logits(model: Transformer) -> tuple[int, torch.Tensor]:
    """The number of parameters that this rank holds, and the logits."""
    return sum(weight.numel() for weight in model.parameters()), model(TOKENS)


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    return write_llama3_tokenizer(tmp_path_factory.mktemp("ranks") / "ranks", (b"is", b"it", b"or", b"at"))


PAIRS = [(n_kv_heads, n_files) for n_kv_heads, counts in POSSIBLE_COUNTS.items() for n_files in counts]
FAST_PAIRS = [(8, 1), (6, 3)]


@pytest.mark.parametrize(
    ("n_kv_heads", "n_files"),
    [pytest.param(*pair, marks=[pytest.mark.slow] * (pair not in FAST_PAIRS)) for pair in PAIRS],
)
def test_every_number_of_files_on_every_number_of_processes(tmp_path, monkeypatch, tokenizer_path, n_kv_heads, n_files):
    model = model_of(n_kv_heads)
    with torch.no_grad():
        whole, expected = size_and_logits(model)
    write_meta_checkpoint(tmp_path, model, tokenizer_path, n_files, columns=n_files % 2 == 0)
    checkpoint = open_checkpoint(tmp_path)
    args = checkpoint.settings.model_args(model.vocab_size, max_seq_len=96, max_batch_size=2)
    check_tensors(checkpoint, args)

    def load_share() -> Transformer:
        return load_model(checkpoint, args, device=torch.device("cpu"), dtype=torch.float32)

    for size in COUNTS:
        with monkeypatch.context() as patch:
            ranks = Ranks(patch, size)
            if size not in POSSIBLE_COUNTS[n_kv_heads]:
                with pytest.raises(ValueError, match=f"can't be split over {size} processes, only over one of"):
                    ranks.run(load_share)
                continue
            for count, logits in ranks.run(lambda: size_and_logits(load_share())):
                assert torch.allclose(logits, expected, atol=1e-4), size
                assert count < 1.4 * whole / size


@pytest.mark.parametrize("n_kv_heads", [2, 1])
def test_files_that_each_hold_a_part_of_a_kv_head(tmp_path, monkeypatch, tokenizer_path, n_kv_heads):
    """As when wk and wv are split evenly over more files than there are kv heads."""
    model = model_of(n_kv_heads)
    with torch.no_grad():
        expected = model(TOKENS)
    write_meta_checkpoint(tmp_path, model, tokenizer_path, 4)
    for i in range(4):
        path = tmp_path / f"consolidated.{i:02d}.pth"
        tensors = torch.load(path)
        for name in tensors:
            if name.endswith(("wk.weight", "wv.weight")):
                tensors[name] = model.state_dict()[name].chunk(4)[i].clone()
        torch.save(tensors, path)
    for size in (1, 2, 4, 8):
        with monkeypatch.context() as patch:
            for logits in Ranks(patch, size).run(lambda: load(tmp_path)(TOKENS)):
                assert torch.allclose(logits, expected, atol=1e-4)


SCRIPT = """
import json, os, sys, torch
from llama import Llama
root, out = sys.argv[1:]
tokens = torch.load(f"{root}/tokens.pt")
errors = {}
for folder in sorted(os.listdir(root)):
    if os.path.isdir(f"{root}/{folder}"):
        model = Llama.build(f"{root}/{folder}", None, 32, 2, device="cpu", dtype=torch.float32).model
        with torch.no_grad():
            errors[folder] = (model(tokens, 0) - torch.load(f"{root}/logits.pt")).abs().max().item()
json.dump(errors, open(f"{out}.{os.environ['RANK']}", "w"))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer_path):
    """The same weights in different numbers of files, and tokens with their logits."""
    root = tmp_path_factory.mktemp("folders")
    model = model_of(24)
    with torch.no_grad():
        torch.save(model(TOKENS), root / "logits.pt")
    torch.save(TOKENS, root / "tokens.pt")
    for n_files in COUNTS:
        write_meta_checkpoint(root / f"{n_files}", model, tokenizer_path, n_files)
    write_meta_checkpoint(root / "6-columns", model, tokenizer_path, 6, columns=True)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_in_real_processes(folders, tmp_path, n):
    (tmp_path / "script.py").write_text(SCRIPT)
    run = fork_python(tmp_path / "script.py", folders, tmp_path / "errors", ranks=n)
    assert run.returncode == 0, run.stderr
    for rank in range(n):
        errors = json.loads((tmp_path / f"errors.{rank}").read_text())
        assert set(errors) == {"1", "2", "3", "4", "6", "8", "6-columns"}
        assert max(errors.values()) < 1e-4, errors
