"""The switches of the whole process are off where that is faster, and are put back."""

import os
import signal
import threading

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from fake_gpu import fake_gpu, on_gpu

from llama.fast_kernels import CUDNN_ATTENTION_SWITCH, NATIVE_IS_FAST, ONEDNN_SWITCH, Switch, fast_kernels


class OnOff:
    """A switch that can be on or off, on any machine."""

    def __init__(self, on: bool) -> None:
        self.on = on
        self.switch = Switch(lambda: self.on, lambda on: setattr(self, "on", on))


@pytest.mark.parametrize("before", [True, False])
def test_it_is_put_back(before):
    state = OnOff(before)
    entered, may_leave = threading.Barrier(2), threading.Barrier(2)

    def work():
        with state.switch.off():
            entered.wait()
            may_leave.wait()  # this block ends after that of the main thread, which began before it

    with pytest.raises(KeyError), state.switch.off(), state.switch.off():
        raise KeyError
    assert state.on == before
    thread = threading.Thread(target=work, daemon=True)
    with state.switch.off():
        thread.start()
        entered.wait()
        assert not state.on
    assert not state.on
    may_leave.wait()
    thread.join()
    assert state.on == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on Windows")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_process_forked_within_a_block():
    """The child has no thread that would leave the block, or that would release the lock."""
    state = OnOff(True)
    entered, may_leave = threading.Event(), threading.Event()

    def work():
        with state.switch.off():
            entered.set()
            may_leave.wait()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    entered.wait()
    state.switch._lock.acquire()  # as another thread might have done
    child = os.fork()
    if child == 0:
        exit_code = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(10)  # ends the child if it waits for ever
            assert state.on
            with state.switch.off():
                assert not state.on
            assert state.on
            exit_code = 0
        finally:
            os._exit(exit_code)
    state.switch._lock.release()
    may_leave.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert state.on


def test_one_or_two_rows_in_16_bits_are_multiplied_without_onednn():
    is_on, chosen = torch._C._get_mkldnn_enabled, torch._C._get_mkldnn_enabled()
    for rows, dtype in ((1, torch.bfloat16), (2, torch.float16), (3, torch.bfloat16), (1, torch.float32)):
        with fast_kernels(rows, torch.zeros(2, 2, dtype=dtype)):
            faster_without = NATIVE_IS_FAST and rows < 3 and dtype != torch.float32
            assert is_on() == (chosen and not faster_without)
        assert is_on() == chosen
    assert ONEDNN_SWITCH is not CUDNN_ATTENTION_SWITCH


@torch.no_grad()
def test_attention_on_a_gpu_is_never_that_of_cudnn(monkeypatch):
    seen = []

    def look(function):
        def attention(*arguments, **options):
            seen.append(torch.backends.cuda.cudnn_sdp_enabled())
            return function(*arguments, **options)

        return attention

    assert torch.backends.cuda.cudnn_sdp_enabled()
    with fake_gpu(), monkeypatch.context() as patch:
        model = on_gpu(torch.bfloat16)
        patch.setattr(F, "scaled_dot_product_attention", look(F.scaled_dot_product_attention))
        tokens = torch.zeros(2, 12, dtype=torch.long, device="cuda")
        for call in ((tokens, 0), (tokens[:, :1], 12), (tokens[:, :4], 13), (tokens, None)):
            model.forward(*call)
    assert seen == [False] * 4 * model.n_layers
    assert torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(F, "scaled_dot_product_attention", look(F.scaled_dot_product_attention))
    tiny_model().forward(torch.zeros(1, 4, dtype=torch.long))
    assert seen[4 * model.n_layers :] == [True] * model.n_layers
