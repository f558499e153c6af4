"""Nothing mixes tensors of two devices. Shown without a GPU, by fake tensors: they have a device, but no values."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from conftest import ScriptedModel, ScriptedTokenizer, tiny_args
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from llama import Llama, Transformer
from llama.kv_cache import KVCache
from llama.sampling import sample, token_logprobs

BATCH, SEQ = 3, 12
aten = torch.ops.aten


class WithoutCUDABuild(TorchFunctionMode):
    """Replaces `x[...]`, `x[...] = y` and `x.to(device)` by other functions that do the same.

    A torch that is built without CUDA has fake CUDA tensors, but can't run these three on them.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__getitem__:
            return self.get_item(*args)
        if function is torch.Tensor.__setitem__:
            return self.set_item(*args)
        if function is torch.Tensor.to and isinstance(args[1], torch.device):
            return args[0] if args[0].device == args[1] else aten._to_copy.default(args[0], device=args[1])
        return function(*args, **(kwargs or {}))

    @staticmethod
    def get_item(x, index):
        index = index if isinstance(index, tuple) else (index,)
        if Ellipsis in [i for i in index if not isinstance(i, torch.Tensor)]:
            n_left_out = x.dim() - sum(i is not Ellipsis and i is not None for i in index)
            ellipsis = index.index(Ellipsis)
            index = (*index[:ellipsis], *[slice(None)] * n_left_out, *index[ellipsis + 1 :])
        if any(isinstance(i, torch.Tensor) for i in index):
            return aten.index.Tensor(x, list(index))
        dim = 0
        for i in index:
            if isinstance(i, int):
                x = x.select(dim, i)
                continue
            x = x.unsqueeze(dim) if i is None else aten.slice.Tensor(x, dim, i.start, i.stop)
            dim += 1
        return x

    def set_item(self, x, index, value):
        if isinstance(index[0], torch.Tensor):
            aten.index_put_.default(x, list(index), value)
        else:
            aten.copy_.default(self.get_item(x, index), value)


class KnownValues(TorchFunctionMode):
    """Gives the host the values that it asks for, where it should ask: fake tensors have none.

    And refuses an index on another device, which PyTorch accepts, but has to copy.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert all(i.device == args[0].device for i in index if isinstance(i, torch.Tensor))
        if function in (torch.Tensor.max, torch.Tensor.min) and args[0].device.type == "cpu":
            return SEQ  # of the rows' positions
        if function is torch.Tensor.item:  # which `tolist` calls on a fake tensor
            return -1.5 if args[0].is_floating_point() else 7  # logprobs or ids
        return function(*args, **(kwargs or {}))


def on_cuda(dtype: torch.dtype) -> Transformer:
    """A network on a CUDA device that doesn't exist, made as `load_model` makes it."""
    with torch.device("meta"):
        model = Transformer(tiny_args(use_scaled_rope=True))
    weights = {
        name: torch.nn.Parameter(torch.empty(weight.shape, device="cuda", dtype=dtype))
        for name, weight in model.named_parameters()
    }
    model.load_state_dict(weights, assign=True)
    return model


@contextlib.contextmanager
def fake_cuda():
    built = torch.backends.cuda.is_built()
    if built and not torch.cuda.is_available() and torch.__version__ < "2.14":
        pytest.skip("this CUDA build of torch needs a driver even for fake tensors; its CPU build and newer ones don't")
    with FakeTensorMode(), contextlib.nullcontext() if built else WithoutCUDABuild(), KnownValues():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_prefill_and_decoding_mix_no_devices(dtype):
    with fake_cuda():
        positions = torch.full((BATCH,), SEQ)  # the decode loop keeps the rows' positions on the CPU
        model = on_cuda(dtype)
        tokens = torch.zeros(BATCH, SEQ, dtype=torch.long, device="cuda")
        hidden = model.hidden_states(tokens, 0)
        rows = torch.arange(BATCH, device="cuda")
        logits = model.logits(hidden[rows, torch.full((BATCH,), SEQ - 1, device="cuda")])
        for temperature, start_pos in ((0, SEQ), (0.6, SEQ + 1), (0.6, positions)):
            next_token = sample(logits, temperature, 0.9)
            logprobs = token_logprobs(logits, next_token)
            logits = model(next_token[:, None], start_pos)[:, -1]
            assert {tensor.device.type for tensor in (next_token, logprobs, logits)} == {"cuda"}
            assert (logits.shape, logits.dtype) == ((BATCH, 320), torch.float32)
        assert model(tokens[:, :4], 6).device.type == "cuda"  # a later chunk
        assert model(tokens).device.type == "cuda"  # without a cache
        assert (model.cache.keys.device.type, model.cache.values.dtype) == ("cuda", dtype)
        assert model.freqs_cis.device.type == "cuda"


# With one row there would be tensors of one element, which a torch without CUDA can't make in inference mode.
@pytest.mark.parametrize("prompts", [[[5, 6, 7], [4, 4, 4]], [[5, 6, 7], [8], [9] * SEQ]])
def test_the_decode_loop_mixes_no_devices(prompts):
    with fake_cuda():
        llama = Llama(on_cuda(torch.bfloat16), ScriptedTokenizer())
        for temperature in (0, 0.6):
            tokens, logprobs = llama.generate(prompts, 4, temperature, logprobs=True, echo=True)
            assert tokens == [prompt + [7] * 4 for prompt in prompts]
            assert logprobs[0] == [0.0] + [-1.5] * 6


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 5, "reuse_cache": True},
        {"num_return_sequences": 2},
        {"num_beams": 2, "num_return_sequences": 2},
        {"logits_processor": lambda tokens, logits: logits * 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_the_options_of_a_call_mix_no_devices(options):
    with fake_cuda():
        llama = Llama(on_cuda(torch.bfloat16), ScriptedTokenizer())
        for _ in range(2):
            tokens, _ = llama.generate([[5, 6, 7], [8, 9]], 4, logprobs=True, **options)
            assert tokens == [[7] * 4] * (2 * options.get("num_return_sequences", 1))


def test_decoding_continues_on_the_device_of_the_logits():
    """A network of another kind may have no parameters, or have them on several devices."""

    class OnCUDA(ScriptedModel):
        def forward(self, tokens, start_pos):
            return torch.zeros(*tokens.shape, self.vocab_size, device="cuda")

    with fake_cuda():
        llama = Llama(OnCUDA(), ScriptedTokenizer())
        tokens, logprobs = llama.generate([[5, 6, 7], [4, 4]], 3, 0.6, logprobs=True, echo=True)
        assert tokens == [[5, 6, 7, 7, 7, 7], [4, 4, 7, 7, 7]]
        assert logprobs[1] == [0.0] + [-1.5] * 4


@torch.no_grad()
def test_rows_of_the_cache_are_reordered_where_they_are():
    """The rows' numbers come from the CPU."""
    with fake_cuda():
        cache = KVCache((2, 3, 2, 5, 4), device=torch.device("cuda"), dtype=torch.float32)
        cache.reorder(torch.tensor([1, 0, 0]), 4)
        assert cache.keys.device.type == "cuda"


def test_the_generator_of_a_seed_is_made_where_the_logits_are(monkeypatch):
    devices = []

    def generator(device):  # without CUDA, torch.Generator can't be made there
        devices.append(device.type)
        return SimpleNamespace(manual_seed=lambda seed: None)

    monkeypatch.setattr(torch, "Generator", generator)
    with fake_cuda():
        Llama(on_cuda(torch.bfloat16), ScriptedTokenizer()).generate([[5, 6], [8, 9]], 2, seed=1)
    assert devices == ["cuda"]


@torch.no_grad()
def test_fake_tensors_refuse_to_be_mixed():
    with fake_cuda():
        model = on_cuda(torch.float32)
        with pytest.raises(Exception, match="on the same device, but found at least two devices"):
            model(torch.zeros(1, 4, dtype=torch.long), 0)
