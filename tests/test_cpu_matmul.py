"""Matrix products on a CPU: the same result from whichever library."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model

from llama.cpu_matmul import linear
from llama.fast_kernels import fast_kernels

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("out_features", [1, 7, 48, 320])
@pytest.mark.parametrize("leading", [(1, 1), (1, 2), (3, 1), (8,), (2, 5), (1, 40), (0, 3)])
@pytest.mark.parametrize("gradients", [True, False])
def test_every_number_of_rows(dtype, out_features, leading, gradients):
    torch.manual_seed(0)
    x, weight = torch.randn(*leading, 24, dtype=dtype), torch.randn(out_features, 24, dtype=dtype)
    expected = x.double() @ weight.double().T
    with torch.set_grad_enabled(gradients), fast_kernels(x[..., 0].numel(), weight):
        y = linear(x, weight)
    assert (y.shape, y.dtype) == (expected.shape, dtype)
    assert y.is_contiguous()
    torch.testing.assert_close(y.double(), expected, rtol=TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


def test_input_and_weight_that_are_views():
    x, weight = torch.randn(24, 3).t(), torch.randn(24, 48).t()
    torch.testing.assert_close(linear(x, weight), x @ weight.t())
    for rows in (2, 40):
        wide = torch.randn(rows, 1, 50)[..., 10:34]
        with torch.no_grad():
            torch.testing.assert_close(linear(wide, weight), wide @ weight.t())
            expected = (wide[:1] @ weight.t()).expand(rows, -1, -1)
            torch.testing.assert_close(linear(wide[:1].expand(rows, -1, -1), weight), expected)


@pytest.mark.parametrize("rows", [1, 4, 40])
def test_gradients(rows):
    x, weight = torch.randn(rows, 24, requires_grad=True), torch.randn(48, 24, requires_grad=True)
    factors = torch.randn(rows, 48)
    gradients = torch.autograd.grad((linear(x, weight) * factors).sum(), (x, weight))
    expected = torch.autograd.grad((F.linear(x, weight) * factors).sum(), (x, weight))
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradients", [True, False])
def test_the_network_compiles_without_a_graph_break(dtype, gradients):
    model = tiny_model().to(dtype)
    tokens = torch.randint(320, (1, 2))
    with torch.set_grad_enabled(gradients):
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(tokens), model(tokens), rtol=1e-3, atol=TOLERANCE[dtype])


@torch.no_grad()
def test_autocast_decides_the_dtype():
    x, weight = torch.randn(6, 24), torch.randn(48, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert [linear(x[:rows], weight).dtype for rows in (1, 6)] == [torch.bfloat16] * 2
