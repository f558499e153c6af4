"""Which of torch's libraries compute a call of the network, where torch by itself doesn't take the quickest.

They can only be chosen by switches of the whole process. Each is put back when the last call that needs it off ends.
"""

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator

import torch

NATIVE_ROWS = 2  # in 16 bits: up to this many rows torch's own products are faster on a CPU than oneDNN's
NATIVE_IS_FAST = torch.__version__ >= "2.7"  # (compared as a version) before, they were slower than oneDNN


class Switch:
    """A switch of the whole process, which several threads may need off at the same time.

    Args:
        is_on, set_on: read it, and set it.
    """

    def __init__(self, is_on: Callable[[], bool], set_on: Callable[[bool], None]) -> None:
        self._is_on, self._set_on = is_on, set_on
        self._lock = threading.Lock()
        self._n_blocks = 0  # that need it off, in all threads
        self._was_on = True  # what the program had chosen before the first of them
        _switches.add(self)

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Keep it off within the block."""
        with self._lock:
            if self._n_blocks == 0:
                self._was_on = self._is_on()
                self._set_on(False)
            self._n_blocks += 1
        try:
            yield
        finally:
            with self._lock:
                self._n_blocks -= 1
                if self._n_blocks == 0:
                    self._set_on(self._was_on)

    def after_fork(self) -> None:
        """Put it back in a forked process, where no other thread runs, and so no block of one."""
        self._lock = threading.Lock()
        if self._n_blocks > 0:
            self._n_blocks = 0
            self._set_on(self._was_on)


_switches: "weakref.WeakSet[Switch]" = weakref.WeakSet()
# Without it, products in 16 bits are torch's own: for one or two rows three times as fast.
ONEDNN_SWITCH = Switch(torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled)
# On Hopper and later GPUs torch prefers its attention, which makes a plan for each new length: 20 to 40 ms a token.
CUDNN_ATTENTION_SWITCH = Switch(torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp)


def fast_kernels(rows: int, weight: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """Within the block, take the fastest libraries for `rows` rows and weights of this dtype and device."""
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    if weight.is_cuda:
        return CUDNN_ATTENTION_SWITCH.off()
    in_16_bits = weight.dtype in (torch.bfloat16, torch.float16)
    if NATIVE_IS_FAST and rows <= NATIVE_ROWS and in_16_bits and weight.device.type == "cpu":
        return ONEDNN_SWITCH.off()
    return contextlib.nullcontext()


def _after_fork() -> None:
    for switch in _switches:
        switch.after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)
