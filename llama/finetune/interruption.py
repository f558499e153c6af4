"""Ctrl-C while a model is trained."""

import logging
import signal
import threading
from types import FrameType

import torch

from llama.distributed import (
    data_parallel_size,
    model_parallel_size,
    sum_over_data_parallel,
    sum_over_model_parallel,
)

logger = logging.getLogger("llama")


class Interruption:
    """While the block runs, the first Ctrl-C is only remembered, so that the step at work can be finished and saved.

    The second one raises KeyboardInterrupt at once. Outside the main thread, and in programs that handle Ctrl-C in a
    way of their own, this does nothing.
    """

    def __init__(self) -> None:
        self._requested = False
        self._handles = False

    def __enter__(self) -> "Interruption":
        is_main_thread = threading.current_thread() is threading.main_thread()
        self._handles = is_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._handles:
            signal.signal(signal.SIGINT, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        if self._handles:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        logger.warning("Ctrl-C: this step is finished and its state saved; another Ctrl-C stops at once")

    def is_requested(self, device: torch.device) -> bool:
        """Whether there was a Ctrl-C in any process; all must call this.

        Args:
            device: the model's.
        """
        if model_parallel_size() * data_parallel_size() == 1:  # on a GPU, asking would wait for it
            return self._requested
        count = torch.tensor(float(self._requested), device=device)
        return bool(sum_over_data_parallel(sum_over_model_parallel(count)).item() > 0)
