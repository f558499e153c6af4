"""A GPU that doesn't exist. Its tensors are fake: they have a shape, a dtype and a device, but no values.

The tensors of the CPU are real. So the library runs as it would with a GPU, and what it asks of it can be watched.
"""

import contextlib
import ctypes
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from llama import Transformer
from llama.checkpoint import load_model

GPU = torch.device("cuda", 0)
TOKEN, NUMBER = 7, -0.5  # every integer that the host asks the GPU for, and every other number
N_TRUE = 3  # elements of any mask

aten = torch.ops.aten
# How often the host waits, within an operation, for the GPU to have come to it. Fake tensors refuse all others whose
# results it would have to wait for.
WAITS = {
    aten._local_scalar_dense.default: 1,  # item(), int(), float(), bool()
    aten.nonzero.default: 1,
    aten.repeat_interleave.Tensor: 1,
    aten.multinomial.default: 2,  # whether all probabilities are numbers, and whether some are above 0
}
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


class FakeGPU(TorchDispatchMode):
    """Has the operations of the GPU done by fake tensors, and keeps account of them.

    Attributes:
        operations: how often each ran. Views are none: they have the GPU do nothing.
        waits: how often the host waited in each for the GPU.
        uploads, downloads: dtype and number of elements of each copy to the GPU, and from it.
    """

    def __init__(self):
        super().__init__()
        self.operations, self.waits = Counter(), Counter()
        self.uploads, self.downloads = [], []
        self.fake_tensors = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_gpu = [x for x in tensors if isinstance(x, FakeTensor)]
        device = torch.device(kwargs.get("device") or (GPU if on_gpu else "cpu"))  # of the result
        if not on_gpu and device.type != "cuda":
            with unset_fake_temporarily():
                return operation(*args, **kwargs)
        if operation is torch.ops.prim.device.default:
            return operation(*args, **kwargs)
        with self:
            result = operation.decompose(*args, **kwargs)  # in inference mode, composite operations come whole
        if result is not NotImplemented:
            return result
        self.operations[operation] += not operation.is_view
        if operation in (aten._to_copy.default, aten.copy_.default) and (
            device.type != "cuda" or len(on_gpu) < len(tensors)
        ):
            return self.copy_between_devices(operation, args, kwargs)
        # A tensor without dimensions is a number, which needs no copy.
        assert all(isinstance(x, FakeTensor) or x.dim() == 0 for x in tensors), f"{operation} mixes devices: {args}"
        return self.run(operation, args, kwargs)

    def copy_between_devices(self, operation, args, kwargs):
        source = args[1] if operation is aten.copy_.default else args[0]
        is_upload = not isinstance(source, FakeTensor)
        (self.uploads if is_upload else self.downloads).append((source.dtype, source.numel()))
        non_blocking = kwargs.get("non_blocking") or args[2:3] == (True,)
        if not (is_upload and non_blocking):  # what comes down is looked at next
            self.waits[operation] += 1
        if not is_upload:
            values = known_values(source)
            return values if operation is aten._to_copy.default else args[0].copy_(values)
        kwargs = {name: value for name, value in kwargs.items() if name != "device"}
        uploaded = torch.empty(source.shape, dtype=source.dtype, device=GPU)
        return operation(*(uploaded if x is source else x for x in args), **kwargs)

    def run(self, operation, args, kwargs):
        self.waits[operation] += WAITS.get(operation, 0)
        if operation is aten._local_scalar_dense.default:
            self.downloads.append((args[0].dtype, 1))
            return known_value(args[0].dtype)
        if operation is aten.nonzero.default:
            return args[0].new_empty(N_TRUE, args[0].dim(), dtype=torch.long)
        if operation is aten.repeat_interleave.Tensor:
            return args[0].new_empty(N_TRUE)
        if operation in INDEXING:
            indices = []
            for index in args[1]:
                is_mask = index is not None and index.dtype == torch.bool
                self.waits[operation] += is_mask
                indices += index.new_empty(index.dim(), N_TRUE, dtype=torch.long).unbind(0) if is_mask else [index]
            expanded = torch.broadcast_tensors(*(index for index in indices if index is not None))
            self.operations["indices copied"] += len({index.stride() for index in expanded}) > 1  # by torch, within it
            args = (args[0], indices, *args[2:])
        return operation(*args, **kwargs)

    def attention(self, query, key, value, attn_mask=None, **options):
        """`F.scaled_dot_product_attention`: one kernel. Older torch would ask the driver which."""
        tensors = [x for x in (query, key, value, attn_mask) if x is not None]
        assert all(isinstance(x, FakeTensor) for x in tensors), f"attention mixes devices: {tensors}"
        self.operations["attention"] += 1
        if attn_mask is not None:
            is_aligned = attn_mask.stride(-1) == 1 and not any(stride % 8 for stride in attn_mask.stride()[:-1])
            self.operations["mask copied"] += attn_mask.dtype != query.dtype or not is_aligned  # by torch, within it
        return query.new_empty(*query.shape[:-1], value.shape[-1])

    def tolist(self, x):
        """`x.tolist()`, for which fake tensors would ask for one element after the other."""
        self.waits["tolist"] += 1
        self.downloads.append((x.dtype, x.numel()))
        return known_values(x).tolist()

    @contextlib.contextmanager
    def in_this_thread(self):
        """Within the block, the thread that runs it has the GPU too."""
        with self.fake_tensors, self:
            yield

    def clear(self):
        """Forget what has been."""
        for account in (self.operations, self.waits, self.uploads, self.downloads):
            account.clear()


def known_value(dtype: torch.dtype) -> float | int | bool:
    """What every element of a tensor of the GPU is said to be."""
    return True if dtype == torch.bool else NUMBER if dtype.is_floating_point else TOKEN


def known_values(x: torch.Tensor) -> torch.Tensor:
    """What a tensor of the GPU is said to hold, on the CPU."""
    with unset_fake_temporarily():
        return torch.full(x.shape, known_value(x.dtype), dtype=x.dtype)


@contextlib.contextmanager
def fake_gpu():
    """Within the block, torch has a GPU in this thread: `GPU`."""
    gpu = FakeGPU()
    with contextlib.ExitStack() as stack:
        stack.enter_context(device_bookkeeping())
        stack.enter_context(mock.patch.object(torch.cuda, "is_available", return_value=False))  # of a real one
        stack.enter_context(mock.patch.object(FakeTensor, "tolist", lambda x: gpu.tolist(x)))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", gpu.attention))
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)))
        stack.enter_context(gpu.in_this_thread())
        yield gpu


@contextlib.contextmanager
def device_bookkeeping():
    """Have torch ask its "meta" device for the current stream and the current device of a GPU.

    Fake tensors use neither, but operations ask for them before they look at their tensors. Without this they fail in
    torch that is built without CUDA, and in older versions where there is no driver. torch has a table for this, with
    an entry for each kind of device, and no function that changes it.
    """
    if sys.platform != "linux":
        pytest.skip("torch's table of devices is looked for where Linux has it")
    cuda, meta = int(torch.autograd.DeviceType.CUDA), int(torch.autograd.DeviceType.Meta)
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    table = (ctypes.c_void_p * (meta + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before, table[cuda] = table[cuda], table[meta]
    try:
        yield
    finally:
        table[cuda] = before


def on_gpu(dtype: torch.dtype = torch.bfloat16, quantize: str | None = None, **sizes) -> Transformer:
    """A tiny network on the GPU, loaded as `Llama.build` does. To be called within `fake_gpu`."""
    model = tiny_model(**sizes)
    weights = dict(model.named_parameters())

    def read(name, axis, start, stop):
        return weights[name] if axis is None else weights[name].narrow(axis, start, stop - start)

    checkpoint = SimpleNamespace(read=read, read_int4=lambda name, start, stop: None, release=lambda name: None)
    return load_model(checkpoint, model.params, device=GPU, dtype=dtype, quantize=quantize)
