"""Process groups: what the ranks share, and that a single process makes no group."""

import pytest
import torch
import torch.distributed as dist
from conftest import torchrun

from llama import distributed


def test_a_single_process():
    assert distributed.model_parallel_size() == distributed.data_parallel_size() == 1
    assert distributed.model_parallel_rank() == distributed.data_parallel_rank() == 0
    assert distributed.is_first_rank()
    tensor = torch.ones(3)
    for function in (
        distributed.broadcast,
        distributed.sum_over_model_parallel,
        distributed.sum_over_data_parallel,
    ):
        assert function(tensor) is tensor
    assert torch.equal(tensor, torch.ones(3))
    assert distributed.broadcast_flag(True, torch.device("cpu")) is True
    assert distributed.broadcast_flag(False, torch.device("cpu")) is False
    value = object()
    assert distributed.object_broadcaster()(value) is value
    assert not dist.is_initialized()


def test_errors_in_a_single_process():
    distributed.raise_on_all_ranks(None)
    error = KeyError("x")
    with pytest.raises(KeyError) as raised:
        distributed.raise_on_all_ranks(error)
    assert raised.value is error
    done = []
    distributed.on_first_rank(lambda: done.append(True))
    assert done == [True]
    with pytest.raises(ZeroDivisionError):
        distributed.on_first_rank(lambda: 1 / 0)


def test_the_first_rank_is_known_before_there_is_a_process_group(monkeypatch):
    """As while torchrun starts a program."""
    monkeypatch.setenv("RANK", "1")
    assert not distributed.is_first_rank()
    monkeypatch.setenv("RANK", "0")
    assert distributed.is_first_rank()


SCRIPT = """
import sys, torch
from pathlib import Path
from llama import distributed
distributed.setup("cpu", 2)
rank = distributed.model_parallel_rank()
assert (distributed.model_parallel_size(), distributed.data_parallel_size()) == (2, 1)
assert distributed.is_first_rank() == (rank == 0)
assert [distributed.broadcast_flag(rank == first, torch.device("cpu")) for first in (0, 1)] == [True, False]
assert distributed.broadcast(torch.tensor([rank, 5 + rank])).tolist() == [0, 5]
assert distributed.sum_over_model_parallel(torch.tensor([rank, 5 + rank])).tolist() == [1, 11]
assert distributed.sum_over_data_parallel(torch.tensor([rank])).tolist() == [rank]
parts = distributed.gather(torch.tensor([rank, 7]).flip(0))
assert [part.tolist() for part in parts] == ([[7, 0], [7, 1]] if rank == 0 else [])
broadcast_object = distributed.object_broadcaster()
assert broadcast_object({"rank": rank}) == {"rank": 0}
assert broadcast_object(rank) == 0

def raised_by(error):
    try:
        distributed.raise_on_all_ranks(error)
    except KeyError as raised:
        return raised.args[0]

assert raised_by(None) is None
assert raised_by(KeyError("first") if rank == 0 else None) == "first"
assert raised_by(KeyError("second") if rank == 1 else None) == (None, "second")[rank]
done = []
distributed.on_first_rank(lambda: done.append(True))
assert done == [True] * (rank == 0)
try:
    distributed.on_first_rank(lambda: 1 / 0)
except ZeroDivisionError:
    pass
else:
    raise SystemExit("no error on rank", rank)
Path(sys.argv[1], str(rank)).touch()
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    process = torchrun(2, tmp_path / "script.py", tmp_path)
    assert process.returncode == 0, process.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"script.py", "0", "1"}
