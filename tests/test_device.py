"""Which device is chosen, and which dtype."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

import llama.generation
from llama import Llama
from llama.device import (
    DTYPES,
    choose_device,
    choose_dtype,
    default_dtype,
    dtype_name,
    dtype_named,
    gpu_identity,
)


def test_the_device_that_is_asked_for():
    assert choose_device("cpu") == choose_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="None is CUDA here")
def test_without_cuda_it_is_the_cpu():
    assert choose_device(None) == torch.device("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_cuda_device_has_an_index(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    current = torch.device("cuda", torch.cuda.current_device())
    assert choose_device(None) == choose_device("cuda") == current
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert choose_device("cuda") == torch.device("cuda", 0)


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine with two GPUs, as far as `choose_device` can see."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "empty", lambda size, device: None)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


def test_the_gpu_of_local_rank(two_gpus, monkeypatch):
    assert choose_device(None) == choose_device("cuda") == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device(None) == choose_device("cuda") == torch.device("cuda", 1)
    assert choose_device("cuda:0") == torch.device("cuda", 0)  # asked for
    assert choose_device("cpu") == torch.device("cpu")


def test_a_gpu_that_is_not_there(two_gpus, monkeypatch):
    """As with more processes than GPUs."""
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"device=None can't be used here: this process has 2 GPU\(s\), and no cuda:2"):
        choose_device(None)


def test_gpus_are_told_apart_by_more_than_their_numbers(monkeypatch):
    """Each process may see another GPU as its number 0."""
    for uuid in ("1", "2"):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, uuid=uuid: SimpleNamespace(uuid=uuid))
        assert gpu_identity(torch.device("cuda:0")) == uuid
    assert gpu_identity(torch.device("cpu")) == gpu_identity(torch.device("mps")) == ""


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:99", "cpu:x"])
def test_a_device_that_can_t_be_used(device):
    with pytest.raises(ValueError, match=f"device='{device}' can't be used here: ") as error:
        choose_device(device)
    assert isinstance(error.value, AssertionError)


def test_build_refuses_it(tiny_checkpoint):
    with pytest.raises(ValueError, match="device='nonsense' can't be used here"):
        Llama.build(tiny_checkpoint, None, 32, 1, device="nonsense")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device='cuda' can't be used here"):
            Llama.build(tiny_checkpoint, None, 32, 1, device="cuda")


def test_the_default_dtype(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 1)
    for features, dtype in (({}, torch.float32), ({"avx512_bf16": True}, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda features=features: features, raising=False)
        assert default_dtype(cpu) == dtype
        assert default_dtype(cpu, "int8") == default_dtype(cpu, "int4") == torch.bfloat16
    asked = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: asked.append(device) or contextlib.nullcontext())
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, supported=supported: supported)
        assert default_dtype(cuda) == default_dtype(cuda, "int4") == dtype
    assert asked == [cuda] * 4  # not whichever GPU is the current one


def test_mps_has_no_float64(monkeypatch, tiny_checkpoint):
    mps, cpu = torch.device("mps"), torch.device("cpu")
    assert choose_dtype(torch.float64, cpu) == torch.float64
    assert choose_dtype(torch.float32, mps) == torch.float32
    assert choose_dtype(None, cpu, "int4") == torch.bfloat16
    with pytest.raises(ValueError, match=r"dtype=torch.float64 can't be used on mps.*: use torch.float32"):
        choose_dtype(torch.float64, mps)
    monkeypatch.setattr(llama.generation.distributed, "setup", lambda device, size: mps)
    monkeypatch.setattr(llama.generation, "load_model", None)  # which is not reached
    with pytest.raises(ValueError, match=r"dtype=torch.float64 can't be used on mps"):
        Llama.build(tiny_checkpoint, None, 32, 1, device="mps", dtype=torch.float64)


def test_names_of_dtypes():
    for name, dtype in DTYPES.items():
        assert dtype_named(name) == dtype
        assert dtype_name(dtype) == name
    assert dtype_named(None) is None
    with pytest.raises(ValueError, match=r"dtype='float8' must be one of \['float32', 'float16', 'bfloat16'\]"):
        dtype_named("float8")
