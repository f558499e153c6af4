"""Matrix products on a CPU: the same result from whichever library, and the program's settings stay as they are."""

import os
import signal
import threading

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model

from llama import cpu_matmul
from llama.cpu_matmul import NATIVE_IS_FAST, fast_products, linear

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("out_features", [1, 7, 48, 320])
@pytest.mark.parametrize("leading", [(1, 1), (1, 2), (3, 1), (8,), (2, 5), (1, 40), (0, 3)])
@pytest.mark.parametrize("gradients", [True, False])
def test_every_number_of_rows(dtype, out_features, leading, gradients):
    torch.manual_seed(0)
    x, weight = torch.randn(*leading, 24, dtype=dtype), torch.randn(out_features, 24, dtype=dtype)
    expected = x.double() @ weight.double().T
    with torch.set_grad_enabled(gradients), fast_products(x[..., 0].numel(), weight):
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


@pytest.mark.parametrize("before", [True, False])
def test_the_switch_of_onednn_is_put_back(before):
    weight = torch.zeros(2, 2, dtype=torch.bfloat16)
    within = before and not NATIVE_IS_FAST  # the switch in the block
    entered, may_leave = threading.Barrier(2), threading.Barrier(2)

    def work():
        with fast_products(1, weight):
            entered.wait()
            may_leave.wait()  # this block ends after that of the main thread, which began before it

    chosen = torch._C._get_mkldnn_enabled()
    try:
        torch._C._set_mkldnn_enabled(before)
        with pytest.raises(KeyError), fast_products(1, weight), fast_products(1, weight):
            raise KeyError
        assert torch._C._get_mkldnn_enabled() == before
        thread = threading.Thread(target=work, daemon=True)
        with fast_products(1, weight):
            thread.start()
            entered.wait()
            assert torch._C._get_mkldnn_enabled() == within
        assert torch._C._get_mkldnn_enabled() == within
        may_leave.wait()
        thread.join()
        assert torch._C._get_mkldnn_enabled() == before
        for rows, other in ((100, weight), (1, weight.float())):
            with fast_products(rows, other):
                assert torch._C._get_mkldnn_enabled() == before
    finally:
        torch._C._set_mkldnn_enabled(chosen)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on Windows")
def test_a_process_forked_within_a_block():
    """The child has no thread that would leave the block, or that would release the lock."""
    weight = torch.zeros(2, 2, dtype=torch.bfloat16)
    entered, may_leave = threading.Event(), threading.Event()

    def work():
        with fast_products(1, weight):
            entered.set()
            may_leave.wait()

    before = torch._C._get_mkldnn_enabled()
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    entered.wait()
    cpu_matmul._lock.acquire()  # as another thread might have done
    child = os.fork()
    if child == 0:
        exit_code = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(10)  # ends the child if it waits for ever
            assert torch._C._get_mkldnn_enabled() == before
            with fast_products(1, weight):
                pass
            assert torch._C._get_mkldnn_enabled() == before
            exit_code = 0
        finally:
            os._exit(exit_code)
    cpu_matmul._lock.release()
    may_leave.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch._C._get_mkldnn_enabled() == before


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
