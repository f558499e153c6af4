"""Which device a model runs on, and in which dtype."""

import os

import torch

from llama.errors import InputError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def choose_device(device: str | torch.device | None) -> torch.device:
    """This process's device, with its index on CUDA.

    Args:
        device: "cuda", "cpu" or "mps"; None takes CUDA if there is one, else the CPU. "cuda" without an index is the
            GPU of `LOCAL_RANK` under torchrun, else the current one.

    Raises:
        InputError: it isn't available here.
    """
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if chosen.type == "cuda" and chosen.index is None:
            local_rank = os.environ.get("LOCAL_RANK")
            chosen = torch.device("cuda", torch.cuda.current_device() if local_rank is None else int(local_rank))
        if chosen.type not in ("cuda", "cpu", "mps"):
            raise RuntimeError("only cuda, cpu and mps can")
        if chosen.type == "cuda" and torch.cuda.is_available() and chosen.index >= torch.cuda.device_count():
            raise RuntimeError(f"this process has {torch.cuda.device_count()} GPU(s), and no {chosen}")
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # AssertionError: this torch is built without CUDA
        raise InputError(f"device={device!r} can't be used here: {error}") from error
    return chosen


def device_of(model: object) -> torch.device:
    """Where a network takes its tokens: the device of its parameters, or the CPU if it isn't an `nn.Module`."""
    weight = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
    return torch.device("cpu") if weight is None else weight.device


def gpu_identity(device: torch.device) -> str:
    """Which GPU a CUDA device is: its number alone says that to no other process. "" for other devices."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def choose_dtype(dtype: torch.dtype | None, device: torch.device, quantize: str | None = None) -> torch.dtype:
    """The dtype of a model's weights and cache: `dtype`, or `default_dtype` for None.

    Raises:
        InputError: weights have no such dtype, or the device doesn't.
    """
    if dtype not in (None, torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise InputError(f"dtype={dtype!r} must be torch.bfloat16, float16, float32 or float64")
    if dtype == torch.float64 and device.type == "mps":
        raise InputError("dtype=torch.float64 can't be used on mps, which has no float64: use torch.float32")
    return default_dtype(device, quantize) if dtype is None else dtype


def default_dtype(device: torch.device, quantize: str | None = None) -> torch.dtype:
    """bfloat16 where the device computes in it, else float16 on CUDA and float32 on the CPU.

    With weights of few bits (`quantize`) it is bfloat16 on every CPU: torch's products of them are several times slower
    with activations in float32.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):  # the function below asks the current one
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "mps":
        return torch.bfloat16 if torch.backends.mps.is_macos_or_newer(14, 0) else torch.float32
    if quantize is not None:
        return torch.bfloat16
    features: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch can't tell
    in_hardware = any(features.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))
    return torch.bfloat16 if in_hardware else torch.float32


def dtype_named(name: str | None) -> torch.dtype | None:
    """The dtype of this name; None stays None.

    Raises:
        InputError: it is not one of `DTYPES`.
    """
    if name is not None and name not in DTYPES:
        raise InputError(f"dtype={name!r} must be one of {list(DTYPES)}")
    return None if name is None else DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype's name as a user writes it: "bfloat16", not "torch.bfloat16"."""
    return str(dtype).removeprefix("torch.")


def copy_without_wait(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on this device; if it is CUDA, the host doesn't wait until the device gets to the copy.

    CUDA keeps a copy of a small tensor until then. Other devices, such as MPS, would read the host's memory later, when
    it may hold something else: there the host waits.
    """
    return tensor.to(device, non_blocking=device.type == "cuda")
