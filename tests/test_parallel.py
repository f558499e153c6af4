"""Tensor parallelism in real processes: the tokens, logprobs and gradients of one process."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_python, tiny_model, torchrun, write_llama3_tokenizer, write_meta_checkpoint
from forked import fork_python
from generate_everything import generate_everything

from llama import Llama, Tokenizer

SCRIPT = ROOT / "tests" / "generate_everything.py"


def write_checkpoint(folder: Path, n_files: int, n_kv_heads: int) -> Path:
    """A checkpoint in this many files; its weights are the same for every number of them."""
    tokenizer_path = write_llama3_tokenizer(folder / "ranks")
    model = tiny_model(vocab_size=Tokenizer(tokenizer_path).n_words, n_kv_heads=n_kv_heads)
    return write_meta_checkpoint(folder / f"{n_files}-files", model, tokenizer_path, n_files)


# In the last, there are fewer kv heads than processes: two hold the same head.
@pytest.mark.slow
@pytest.mark.parametrize(("n", "n_files", "n_kv_heads"), [(1, 1, 2), (2, 2, 2), (4, 4, 4), (4, 1, 2)])
def test_same_tokens_and_logprobs_as_one_process(tmp_path, n, n_files, n_kv_heads):
    expected = generate_everything(write_checkpoint(tmp_path, 1, n_kv_heads))
    folder = write_checkpoint(tmp_path, n_files, n_kv_heads)
    assert len(list(folder.glob("*.pth"))) == n_files
    arguments = (SCRIPT, folder, tmp_path / "results")
    process = torchrun(2, *arguments) if n == 2 else fork_python(*arguments, ranks=n)
    assert process.returncode == 0, process.stderr
    assert process.stdout == "done\n"  # from rank 0 alone, and nothing from fairscale
    assert all(f"rank {rank} can write to standard error" in process.stderr for rank in range(n))
    assert process.stderr.count("GB of KV cache") == 2  # only rank 0 logs, each of two models once
    for rank in range(n):
        results = json.loads((tmp_path / f"results.{rank}").read_text())
        for name in ("stream", "text stream", "stop", "reused cache", "chat", "draft", "draft's stream"):
            assert results[name] == expected[name], name
        for name in ("greedy", "sampled", "beams", "lookup"):
            assert results[name][0] == expected[name][0], name
            for ours, theirs in zip(results[name][1], expected[name][1], strict=True):
                assert ours == pytest.approx(theirs, abs=1e-4)
        assert results["backend"] == "gloo"
        assert results["parameters"] < expected["parameters"] / n * 1.15
        assert results["cache"] == expected["cache"] // min(n, n_kv_heads)


@pytest.mark.slow
def test_a_world_size_that_doesn_t_divide_the_model(tmp_path):
    process = fork_python(SCRIPT, write_checkpoint(tmp_path, 1, 2), tmp_path / "results", ranks=3)
    assert process.returncode != 0
    assert "can't be split over 3 processes, only over one of [1, 2, 4]" in process.stderr
    assert "n_heads=4, n_kv_heads=2" in process.stderr


GROUPS = """
import os, sys, torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as groups
from llama import Llama
from llama.distributed import restore_stdout
dist.init_process_group("gloo")
groups.initialize_model_parallel(2)
group = groups.get_model_parallel_group()
llama = Llama.build(sys.argv[1], None, 96, 4, device="cpu")
assert groups.get_model_parallel_group() is group
assert llama.model.layers[0].attention.n_local_heads == 2
llama.generate([[5, 6]], 3)
try:
    Llama.build(sys.argv[1], None, 96, 4, model_parallel_size=4, device="cpu")
except AssertionError as error:
    assert "model_parallel_size=4, but this program's model-parallel group has 2" in str(error)
else:
    raise SystemExit("not refused")
restore_stdout()
print(f"hello from {dist.get_rank()};", end="")
dist.destroy_process_group()  # the program made the group, so it destroys it
"""


@pytest.mark.slow
def test_groups_that_the_program_made_are_used(tmp_path):
    """Four processes with two copies of the model, each on two processes; `restore_stdout` restores what is printed."""
    folder = write_checkpoint(tmp_path, 1, 2)
    (tmp_path / "groups.py").write_text(GROUPS)
    process = fork_python(tmp_path / "groups.py", folder, ranks=4)
    assert process.returncode == 0, process.stderr
    assert all(f"hello from {rank};" in process.stdout for rank in range(4))


GRADIENTS = """
import sys, torch
from llama import Llama
from llama.checkpoint import parameter_shapes, share
from llama.distributed import model_parallel_rank, model_parallel_size
model = Llama.build(sys.argv[1], None, 96, 4, device="cpu", dtype=torch.float32).model
gradients = torch.load(sys.argv[2])
tokens = gradients.pop("tokens")
torch.nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
shapes = parameter_shapes(model.params)
for name, weight in model.named_parameters():
    axis, start, stop = share(name, shapes[name], model.params, model_parallel_rank(), model_parallel_size())
    expected = gradients[name] if axis is None else gradients[name].narrow(axis, start, stop - start)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-3, atol=1e-5)
"""


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
def test_gradients_are_those_of_one_process(tmp_path, n):
    """There are 2 kv heads: of 4 processes, two hold the same head."""
    folder = write_checkpoint(tmp_path, 1, 2)
    model = Llama.build(folder, None, 96, 4, device="cpu", dtype=torch.float32).model
    tokens = torch.randint(500, (2, 40))
    torch.nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    torch.save(gradients | {"tokens": tokens}, tmp_path / "gradients")
    (tmp_path / "gradients.py").write_text(GRADIENTS)
    process = fork_python(tmp_path / "gradients.py", folder, tmp_path / "gradients", ranks=n)
    assert process.returncode == 0, process.stderr


@pytest.mark.slow
def test_incomplete_variables_of_torchrun_are_refused(tiny_checkpoint, tmp_path, monkeypatch):
    (tmp_path / "build.py").write_text("import sys; from llama import Llama; Llama.build(sys.argv[1], None, 8, 1)")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert fork_python(tmp_path / "build.py", tiny_checkpoint).returncode == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    process = fork_python(tmp_path / "build.py", tiny_checkpoint)
    assert "WORLD_SIZE=2, but ['MASTER_ADDR', 'MASTER_PORT'] are not set: start with torchrun" in process.stderr


def test_model_parallel_size_without_the_processes(tiny_checkpoint):
    with pytest.raises(ValueError, match=r"model_parallel_size=2 doesn't divide the 1 process.*--nproc_per_node 2"):
        Llama.build(tiny_checkpoint, None, 32, 1, model_parallel_size=2)


NO_SOCKET = """
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


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="lists open files through /proc")
def test_one_process_opens_no_socket(tiny_checkpoint, tmp_path):
    (tmp_path / "no_socket.py").write_text(NO_SOCKET)
    process = run_python(tmp_path / "no_socket.py", tiny_checkpoint, PYTHONPATH=str(ROOT))
    assert process.stdout.split("\n")[0] == "no socket", process.stderr
