"""Process groups: what the ranks share, and that a single process makes no group."""

import atexit
import itertools
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import torchrun
from forked import fork_python

from llama import distributed
from llama.errors import InputError


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
    assert distributed.broadcast_flag(True) is True
    assert distributed.broadcast_flag(False) is False
    value = object()
    assert distributed.broadcast_object(value) is value
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
    with pytest.raises(ZeroDivisionError), distributed.raising_on_all_ranks():
        1 / 0  # noqa: B018


def test_the_first_rank_is_known_before_there_is_a_process_group(monkeypatch):
    """As while torchrun starts a program."""
    monkeypatch.setenv("RANK", "1")
    assert not distributed.is_first_rank()
    monkeypatch.setenv("RANK", "0")
    assert distributed.is_first_rank()


@pytest.fixture
def gpus(monkeypatch):
    """A machine with four GPUs, as far as `setup` can see. Returns a list of the calls by which it uses them."""
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"uuid {device}"))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(f"set_device {device}"))
    monkeypatch.setattr(torch, "empty", lambda size, device: None)
    return calls


def launch(monkeypatch, calls, devices):
    """What `setup` returns or raises on each rank of a program that torchrun has started; the ranks are threads."""
    local, store = threading.local(), dist.HashStore()
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)

    def init_process_group(backend, *, store, rank, world_size, timeout, device_id):
        assert (rank, world_size) == (local.rank, len(devices))
        assert timeout == distributed.TIMEOUT >= timedelta(minutes=10)
        calls.append(f"{backend} {device_id}")

    monkeypatch.setattr(dist, "init_process_group", init_process_group)
    monkeypatch.setattr(distributed, "rendezvous", lambda url, timeout: iter([(store, local.rank, len(devices))]))
    monkeypatch.setattr(distributed, "_n_joined", itertools.repeat(0))  # not counted by each thread
    monkeypatch.setattr(distributed, "waiting_group", lambda: None)
    monkeypatch.setattr(atexit, "register", lambda function: None)

    def setup(rank):
        local.rank = rank
        try:
            return distributed.setup(devices[rank], None)
        except InputError as error:
            return str(error)

    with ThreadPoolExecutor(len(devices)) as pool:
        return list(pool.map(setup, range(len(devices))))


def test_one_process_keeps_its_current_gpu(gpus):
    assert distributed.setup("cuda:1", None) == torch.device("cuda:1")
    assert gpus == []
    assert not dist.is_initialized()


def test_under_torchrun_nccl_gets_the_gpu_and_a_timeout(gpus, monkeypatch):
    assert launch(monkeypatch, gpus, ["cuda:3"]) == [torch.device("cuda:3")]
    assert gpus == ["set_device cuda:3", "nccl cuda:3"]  # in this order
    gpus.clear()
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert launch(monkeypatch, gpus, [None]) == [torch.device("cuda:2")]
    assert gpus == ["set_device cuda:2", "nccl cuda:2"]
    gpus.clear()
    assert launch(monkeypatch, gpus, ["cuda:1", "cuda:0"]) == [torch.device("cuda:1"), torch.device("cuda:0")]
    assert sorted(gpus) == ["nccl cuda:0", "nccl cuda:1", "set_device cuda:0", "set_device cuda:1"]
    gpus.clear()
    assert launch(monkeypatch, gpus, ["cpu", "cpu"]) == [torch.device("cpu")] * 2
    assert gpus == ["gloo None"] * 2


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (["cuda:0", "cuda:0"], "device='cuda:0': ranks 0 and 1 have the same GPU, cuda:0 of "),
        (["cuda:1", "cuda:2", "cuda:1"], "device='cuda:.': ranks 0 and 2 have the same GPU, cuda:1 of "),
        (["cuda:3", "cuda:4"], r"rank 1: device='cuda:4' can't be used here: this process has 4 GPU\(s\)"),
        (["cpu", "cuda"], r"device='.*': the processes have different kinds of devices, \['cpu', 'cuda:0'\]"),
    ],
)
def test_devices_that_do_not_work_together_are_refused_on_all_ranks(gpus, monkeypatch, devices, message):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    errors = launch(monkeypatch, gpus, devices)
    assert all(re.match(message, error) for error in errors), errors
    assert gpus == []  # NCCL hasn't begun


def test_processes_may_have_the_same_number_for_different_gpus(gpus, monkeypatch):
    """Where each process sees only its own."""
    uuids = itertools.count()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=str(next(uuids))))
    assert launch(monkeypatch, gpus, ["cuda:0", "cuda:0"]) == [torch.device("cuda:0")] * 2


SCRIPT = """
import os, sys, time, torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as groups
from pathlib import Path
from llama import distributed
from llama.errors import InputError

def refusal(device):
    try:
        distributed.setup(device, 2)
    except InputError as error:
        return str(error)

class Unpicklable(Exception):
    def __init__(self, message):
        super().__init__(message)
        self.function = lambda: None

calls = []
choose_device = distributed.choose_device
distributed.choose_device = lambda device: torch.device(device) if device.startswith("cuda") else choose_device(device)
distributed.gpu_identity = lambda device: "host (uuid)"
torch.cuda.set_device = calls.append
same_gpu = "ranks 0 and 1 have the same GPU, cuda:0 of host (uuid), and NCCL needs one for each"
assert same_gpu in refusal("cuda:0"), refusal("cuda:0")  # under torchrun
rank = int(os.environ["RANK"])
if sys.argv[2] == "caller":
    dist.init_process_group("cuda:gloo")  # there are no collectives on the CPU, as with NCCL
    assert "rank 1: device='wrong' can't be used here" in refusal("wrong" if rank == 1 else "cpu")
distributed.setup("cpu", 2)
assert distributed.setup("cuda:0", 2) == torch.device("cuda:0")  # with gloo two processes may share a GPU
assert calls == [torch.device("cuda:0")]
backend_config = dist.get_backend_config
dist.get_backend_config = lambda group: "cuda:nccl"
assert same_gpu in refusal("cuda:0")
dist.get_backend_config = backend_config
assert len(calls) == 1

def use_waits():
    torch.set_default_device("meta")  # which must not matter
    group = distributed.waiting_group()
    assert group is distributed.waiting_group() is not dist.group.WORLD
    assert dist.get_backend(group) == "gloo"
    assert (distributed.model_parallel_size(), distributed.data_parallel_size()) == (2, 1)
    assert distributed.model_parallel_rank() == rank
    assert distributed.is_first_rank() == (rank == 0)
    assert [distributed.broadcast_flag(rank == first) for first in (0, 1)] == [True, False]
    parts = distributed.gather(torch.tensor([rank, 7], device="cpu").flip(0))
    assert [part.tolist() for part in parts] == ([[7, 0], [7, 1]] if rank == 0 else [])
    assert distributed.broadcast_object({"rank": rank}) == {"rank": 0}
    assert distributed.broadcast_object(rank) == 0

    def raised_by(error):
        try:
            distributed.raise_on_all_ranks(error)
        except (KeyError, RuntimeError, Unpicklable) as raised:
            return raised.args[0]

    assert raised_by(None) is None
    assert raised_by(KeyError("first") if rank == 0 else None) == "first"
    assert raised_by(KeyError("second") if rank == 1 else None) == "second"
    assert raised_by(KeyError(rank)) == rank
    assert raised_by(Unpicklable("x") if rank == 0 else None) == ("x", "Unpicklable: x")[rank]
    done = []
    distributed.on_first_rank(lambda: done.append(True))
    assert done == [True] * (rank == 0)
    try:
        distributed.on_first_rank(lambda: 1 / 0)
    except ZeroDivisionError:
        pass
    else:
        raise SystemExit("no error on rank", rank)
    torch.set_default_device(None)
    return group

first_group = use_waits()
if sys.argv[2] == "torchrun":
    assert distributed.broadcast(torch.tensor([rank, 5 + rank])).tolist() == [0, 5]
    assert distributed.sum_over_model_parallel(torch.tensor([rank, 5 + rank])).tolist() == [1, 11]
    assert distributed.sum_over_data_parallel(torch.tensor([rank])).tolist() == [rank]
    groups.destroy_model_parallel()
    dist.destroy_process_group()
    distributed.setup("cpu", 2)
    assert use_waits() is not first_group

# Rank 0 dies while rank 1 waits for it.
begin = time.monotonic()
try:
    distributed.on_first_rank(lambda: os._exit(0))
except RuntimeError as error:
    assert time.monotonic() - begin < 10
Path(sys.argv[1], sys.argv[2]).touch()
os._exit(0)  # the groups can't be destroyed in order any more
"""


@pytest.mark.slow
@pytest.mark.parametrize("group_of", ["torchrun", "caller"])
def test_two_processes(tmp_path, group_of):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = (tmp_path / "script.py", tmp_path, group_of)
    process = torchrun(2, *command) if group_of == "torchrun" else fork_python(*command, ranks=2)
    assert process.returncode == 0, process.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"script.py", group_of}
