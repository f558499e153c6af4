"""Products with weights: whichever library makes them, and however many at once, they are the same."""

import threading

import gguf
import pytest
import torch
import torch.nn.functional as F
from conftest import load, same_weights, tiny_model, write_gguf
from torch import nn

from llama import Transformer
from llama.checkpoint import open_checkpoint, save_checkpoint
from llama.cpu_matmul import linear, native_products
from llama.parallel import lay_side_by_side, together

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("out_features", [1, 7, 48, 320])
@pytest.mark.parametrize("leading", [(1, 1), (1, 2), (3, 1), (8,), (2, 5), (1, 40), (0, 3)])
@pytest.mark.parametrize("gradients", [True, False])
def test_every_number_of_rows(dtype, out_features, leading, gradients):
    torch.manual_seed(0)
    x, weight = torch.randn(*leading, 24, dtype=dtype), torch.randn(out_features, 24, dtype=dtype)
    want = x.double() @ weight.double().T
    with torch.set_grad_enabled(gradients), native_products(x[..., 0].numel(), weight):
        found = linear(x, weight)
    assert (found.shape, found.dtype) == (want.shape, dtype)
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), want, rtol=TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


def test_input_and_weight_that_are_views():
    x, weight = torch.randn(24, 3).t(), torch.randn(24, 48).t()
    torch.testing.assert_close(linear(x, weight), x @ weight.t())
    for rows in (2, 40):
        wide = torch.randn(rows, 1, 50)[..., 10:34]
        with torch.no_grad():
            torch.testing.assert_close(linear(wide, weight), wide @ weight.t())
            one = wide[:1]
            want = (one @ weight.t()).expand(rows, -1, -1)
            torch.testing.assert_close(linear(one.expand(rows, -1, -1), weight), want)


@pytest.mark.parametrize("rows", [1, 4, 40])
def test_gradients(rows):
    x, weight = torch.randn(rows, 24, requires_grad=True), torch.randn(48, 24, requires_grad=True)
    mark = torch.randn(rows, 48)
    found = torch.autograd.grad((linear(x, weight) * mark).sum(), (x, weight))
    want = torch.autograd.grad((F.linear(x, weight) * mark).sum(), (x, weight))
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("before", [True, False])
def test_what_the_program_chose_for_onednn_comes_back(before):
    weight = torch.zeros(2, 2, dtype=torch.bfloat16)
    first, last = threading.Barrier(2), threading.Barrier(2)

    def work():
        with native_products(1, weight):
            first.wait()
            last.wait()  # so that this one ends after the other, which began before it

    chosen = torch._C._get_mkldnn_enabled()
    try:
        torch._C._set_mkldnn_enabled(before)
        with pytest.raises(KeyError), native_products(1, weight), native_products(1, weight):
            raise KeyError
        assert torch._C._get_mkldnn_enabled() == before
        thread = threading.Thread(target=work)
        with native_products(1, weight):
            thread.start()
            first.wait()
        last.wait()
        thread.join()
        assert torch._C._get_mkldnn_enabled() == before
        for rows, other in ((100, weight), (1, weight.float())):
            with native_products(rows, other):
                assert torch._C._get_mkldnn_enabled() == before
    finally:
        torch._C._set_mkldnn_enabled(chosen)


def side_by_side(model: Transformer) -> Transformer:
    """The same weights, laid as loading lays those that it makes anew."""
    for layer in model.layers:
        attention, feed_forward = layer.attention, layer.feed_forward
        for group in ([attention.wq, attention.wk, attention.wv], [feed_forward.w1, feed_forward.w3]):
            for one, weight in zip(group, lay_side_by_side([one.weight.detach() for one in group]), strict=True):
                one.weight = nn.Parameter(weight)
    return model


def products(monkeypatch) -> list[int]:
    """The output features of every product that is made from now on."""
    made = []

    def counting(x, weight):
        made.append(weight.shape[0])
        return F.linear(x, weight)

    monkeypatch.setattr("llama.cpu_matmul.linear", counting)
    monkeypatch.setattr("llama.parallel.linear", counting)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seq", [1, 3, 12])
@torch.no_grad()
def test_one_product_for_several_weights(dtype, seq, monkeypatch):
    tokens = torch.randint(320, (2, seq))
    apart, joined = tiny_model().to(dtype), side_by_side(tiny_model().to(dtype))
    torch.testing.assert_close(joined(tokens, 0), apart(tokens, 0), rtol=1e-4, atol=TOLERANCE[dtype])
    torch.testing.assert_close(joined(tokens), apart(tokens), rtol=1e-4, atol=TOLERANCE[dtype])
    layers = apart.n_layers
    for model, a_layer in ((apart, 7), (joined, 4)):
        made = products(monkeypatch)
        model(tokens, 0)
        assert len(made) == a_layer * layers + 1


def test_layers_that_are_changed_or_watched_make_their_own_products():
    torch.manual_seed(0)
    model = side_by_side(tiny_model())
    attention, x = model.layers[0].attention, torch.randn(1, 2, model.params.dim)
    want = [layer(x) for layer in (attention.wq, attention.wk, attention.wv)]

    def found():
        return together(x, attention.wq, attention.wk, attention.wv)

    with torch.no_grad():
        torch.testing.assert_close(found(), [one.detach() for one in want])
        seen = []
        hook = attention.wk.register_forward_hook(lambda layer, inputs, output: seen.append(output))
        found()
        hook.remove()
        assert len(seen) == 1

        class Doubled(nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.inner, self.weight = inner, inner.weight

            def forward(self, x):
                return 2 * self.inner(x)

        plain, attention.wv = attention.wv, Doubled(attention.wv)
        torch.testing.assert_close(found()[2], 2 * want[2].detach())
        attention.wv = plain
        attention.wk.weight.data = attention.wk.weight.data + 1  # elsewhere in memory now
        torch.testing.assert_close(found()[1], attention.wk(x))
    q, k, v = found()
    (q.sum() + 2 * k.sum() + 3 * v.sum()).backward()
    inputs = x.sum(dim=(0, 1))
    for times, layer in enumerate((attention.wq, attention.wk, attention.wv), 1):
        torch.testing.assert_close(layer.weight.grad, (times * inputs).expand_as(layer.weight))


def test_a_forward_of_the_caller_s_own_is_called(monkeypatch):
    model = side_by_side(tiny_model())
    attention, x = model.layers[0].attention, torch.randn(1, 2, model.params.dim)
    with torch.no_grad():
        want = together(x, attention.wq, attention.wk)
        plain = attention.wk.forward
        monkeypatch.setattr(attention.wk, "forward", lambda x: 2 * plain(x))
        torch.testing.assert_close(together(x, attention.wq, attention.wk)[1], 2 * want[1])
        seen = []
        hook = nn.modules.module.register_module_forward_hook(lambda layer, inputs, output: seen.append(layer))
        together(x, attention.wq, attention.wv)
        hook.remove()
        assert seen == [attention.wq, attention.wv]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradients", [True, False])
def test_the_network_compiles_without_a_break(dtype, gradients):
    model = side_by_side(tiny_model()).to(dtype)
    tokens = torch.randint(320, (1, 2))
    with torch.set_grad_enabled(gradients):
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(tokens), model(tokens), rtol=1e-3, atol=TOLERANCE[dtype])


@torch.no_grad()
def test_autocast():
    x, weight = torch.randn(6, 24), torch.randn(48, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert [linear(x[:rows], weight).dtype for rows in (1, 6)] == [torch.bfloat16] * 2


def test_weights_that_loading_makes_lie_side_by_side(tmp_path):
    """Dequantized or cast, yes; as they are mapped, no, since that would be a copy."""

    def joined(model):
        q, k = model.layers[0].attention.wq.weight, model.layers[0].attention.wk.weight
        return q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() and k.storage_offset() == q.numel()

    plain, quantized = tmp_path / "plain.gguf", tmp_path / "quantized.gguf"
    write_gguf(plain, tiny_model())
    write_gguf(quantized, tiny_model(), gguf.GGMLQuantizationType.Q8_0)
    assert not joined(load(plain))
    assert joined(load(quantized))
    cast = load(plain, dtype=torch.bfloat16)
    assert joined(cast)
    save_checkpoint(tmp_path / "meta", cast, open_checkpoint(plain).tokenizer())
    again = load(tmp_path / "meta", dtype=torch.bfloat16)
    assert same_weights(again, cast)
    assert not joined(again)
    size = sum(weight.nbytes for weight in cast.parameters())
    assert (tmp_path / "meta" / "consolidated.00.pth").stat().st_size < 1.3 * size + 20000  # no weight three times
