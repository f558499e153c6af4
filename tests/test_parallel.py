"""Tensor parallelism in real processes, and what happens without any."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_python, tiny_model, torchrun, write_llama3_tokenizer, write_meta_checkpoint
from generate_everything import everything

from llama import Llama, Tokenizer

SCRIPT = ROOT / "tests" / "generate_everything.py"


def checkpoint(folder: Path, n_files: int, n_kv_heads: int) -> Path:
    """The same weights for every number of files."""
    tokenizer_path = write_llama3_tokenizer(folder / "ranks")
    model = tiny_model(vocab_size=Tokenizer(tokenizer_path).n_words, n_kv_heads=n_kv_heads)
    return write_meta_checkpoint(folder / f"{n_files}-files", model, tokenizer_path, n_files)


# the last has fewer kv heads than ranks: each is held by two
@pytest.mark.parametrize(("n", "n_files", "n_kv_heads"), [(1, 1, 2), (2, 2, 2), (4, 4, 4), (4, 1, 2)])
def test_same_tokens_and_logprobs_as_one_process(tmp_path, n, n_files, n_kv_heads):
    alone = everything(checkpoint(tmp_path, 1, n_kv_heads))
    folder = checkpoint(tmp_path, n_files, n_kv_heads)
    assert len(list(folder.glob("*.pth"))) == n_files
    run = torchrun(n, SCRIPT, folder, tmp_path / "found")
    assert run.returncode == 0, run.stderr
    assert run.stdout == "done\n"  # once, and nothing else: no rank above 0, no fairscale
    assert all(f"rank {rank} still has" in run.stderr for rank in range(n))
    assert run.stderr.count("GB of KV cache") == 1  # the log, too, once
    for rank in range(n):
        found = json.loads((tmp_path / f"found.{rank}").read_text())
        for kind in ("stream", "text stream", "stop", "again"):
            assert found[kind] == alone[kind], kind
        for kind in ("greedy", "sampled", "beams"):
            assert found[kind][0] == alone[kind][0]
            for ours, theirs in zip(found[kind][1], alone[kind][1], strict=True):
                assert ours == pytest.approx(theirs, abs=1e-4)
        assert found["chat"] == alone["chat"]
        assert found["backend"] == "gloo"
        assert found["weights"] < alone["weights"] / n * 1.15
        assert found["cache"] == alone["cache"] // min(n, n_kv_heads)


def test_a_world_size_that_doesn_t_divide_the_model(tmp_path):
    run = torchrun(3, SCRIPT, checkpoint(tmp_path, 1, 2), tmp_path / "found")
    assert run.returncode != 0
    assert "can't be split over 3 processes, only over one of [1, 2, 4]" in run.stderr
    assert "n_heads=4, n_kv_heads=2" in run.stderr


GROUPS = """
import os, sys, torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as groups
from llama import Llama
dist.init_process_group("gloo")
groups.initialize_model_parallel(2)
before = groups.get_model_parallel_group()
llama = Llama.build(sys.argv[1], None, 96, 4, device="cpu")
assert groups.get_model_parallel_group() is before
assert llama.model.layers[0].attention.n_local_heads == 2
llama.generate([[5, 6]], 3)
try:
    Llama.build(sys.argv[1], None, 96, 4, model_parallel_size=4, device="cpu")
except AssertionError as error:
    assert "model_parallel_size=4, but this program's model-parallel group has 2" in str(error)
else:
    raise SystemExit("not refused")
from llama.distributed import restore_stdout
restore_stdout()
print(f"hello from {dist.get_rank()};", end="")
dist.destroy_process_group()  # whoever makes the groups ends them
"""


def test_groups_the_caller_made_are_used(tmp_path):
    """Four processes, two copies of the model on two processes each; and standard output put back on request."""
    folder = checkpoint(tmp_path, 1, 2)
    (tmp_path / "groups.py").write_text(GROUPS)
    run = torchrun(4, tmp_path / "groups.py", folder)
    assert run.returncode == 0, run.stderr
    assert all(f"hello from {rank};" in run.stdout for rank in range(4))


GRADIENTS = """
import sys, torch
from llama import Llama
from llama.checkpoint import parameter_shapes, share
from llama.distributed import model_parallel_rank, model_parallel_size
model = Llama.build(sys.argv[1], None, 96, 4, device="cpu", dtype=torch.float32).model
whole = torch.load(sys.argv[2])
tokens = whole.pop("tokens")
torch.nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
shapes = parameter_shapes(model.params)
for name, weight in model.named_parameters():
    axis, start, stop = share(name, shapes[name], model.params, model_parallel_rank(), model_parallel_size())
    want = whole[name] if axis is None else whole[name].narrow(axis, start, stop - start)
    torch.testing.assert_close(weight.grad, want, rtol=1e-3, atol=1e-5)
"""


@pytest.mark.parametrize("n", [2, 4])
def test_gradients_are_those_of_one_process(tmp_path, n):
    """With 2 kv heads: on 4 ranks, each is held by two."""
    folder = checkpoint(tmp_path, 1, 2)
    model = Llama.build(folder, None, 96, 4, device="cpu", dtype=torch.float32).model
    tokens = torch.randint(500, (2, 40))
    torch.nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    torch.save({name: w.grad for name, w in model.named_parameters()} | {"tokens": tokens}, tmp_path / "gradients")
    (tmp_path / "gradients.py").write_text(GRADIENTS)
    run = torchrun(n, tmp_path / "gradients.py", folder, tmp_path / "gradients")
    assert run.returncode == 0, run.stderr


def test_half_of_a_launch_is_refused(tiny_checkpoint, tmp_path):
    (tmp_path / "build.py").write_text("import sys; from llama import Llama; Llama.build(sys.argv[1], None, 8, 1)")
    assert run_python(tmp_path / "build.py", tiny_checkpoint, RANK="0", WORLD_SIZE="1").returncode == 0
    run = run_python(tmp_path / "build.py", tiny_checkpoint, RANK="0", WORLD_SIZE="2")
    assert "WORLD_SIZE=2, but ['MASTER_ADDR', 'MASTER_PORT'] are not set: start with torchrun" in run.stderr


def test_model_parallel_size_without_the_processes(tiny_checkpoint):
    with pytest.raises(ValueError, match=r"model_parallel_size=2 doesn't divide the 1 process.*--nproc_per_node 2"):
        Llama.build(tiny_checkpoint, None, 32, 1, model_parallel_size=2)


ALONE = """
import os, sys
events = []
sys.addaudithook(lambda event, args: events.append(event))
import torch
from llama import Llama
llama = Llama.build(sys.argv[1], None, 32, 2, device="cpu")
llama.generate([[5, 6]], 3)
assert not torch.distributed.is_initialized()
assert "open" in events and not [event for event in events if event.startswith("socket.")]
links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
assert not [link for link in links if os.path.islink(link) and os.readlink(link).startswith("socket:")]
print("no socket")
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="lists open files through /proc")
def test_one_process_opens_no_socket(tiny_checkpoint, tmp_path):
    (tmp_path / "alone.py").write_text(ALONE)
    run = run_python(tmp_path / "alone.py", tiny_checkpoint, PYTHONPATH=str(ROOT))
    assert run.stdout.split("\n")[0] == "no socket", run.stderr


def test_a_device_that_is_not_there(tiny_checkpoint):
    with pytest.raises(ValueError, match="device='nonsense' can't be used here"):
        Llama.build(tiny_checkpoint, None, 32, 1, device="nonsense")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device='cuda' can't be used here") as error:
            Llama.build(tiny_checkpoint, None, 32, 1, device="cuda")
        assert isinstance(error.value, AssertionError)
