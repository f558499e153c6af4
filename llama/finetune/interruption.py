"""Ctrl-C, or the signal by which schedulers end a program, while a model is trained."""

import logging
import signal
import threading
from types import FrameType
from typing import Any

import torch

from llama.distributed import (
    data_parallel_size,
    model_parallel_size,
    sum_over_data_parallel,
    sum_over_model_parallel,
)

logger = logging.getLogger("llama")

DEFAULT_HANDLERS: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
NAMES: dict[int, str] = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Interruption:
    """While the block runs, the first Ctrl-C or SIGTERM is only remembered, so that the step at work is saved first.

    The second one ends the program at once. Outside the main thread, and for a signal that the program handles in a way
    of its own, this does nothing.
    """

    def __init__(self) -> None:
        self._received: set[int] = set()
        self._handled: list[int] = []

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._handled = [n for n, default in DEFAULT_HANDLERS.items() if signal.getsignal(n) is default]
        for number in self._handled:
            signal.signal(number, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore_handlers()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._received.add(number)
        self._restore_handlers()
        name = NAMES[number]
        logger.warning("%s: this step is finished and its state saved; another %s stops at once", name, name)

    def _restore_handlers(self) -> None:
        for number in self._handled:
            signal.signal(number, DEFAULT_HANDLERS[number])

    def requested(self, device: torch.device) -> BaseException | None:
        """What to raise if any process got one of the signals; None if none did. All must call this.

        Args:
            device: the model's.
        """
        received = [number in self._received for number in (signal.SIGINT, signal.SIGTERM)]
        if model_parallel_size() * data_parallel_size() > 1:  # one process doesn't wait for its GPU here
            counts = torch.tensor(received, dtype=torch.float32, device=device)
            received = (sum_over_data_parallel(sum_over_model_parallel(counts)) > 0).tolist()
        was_interrupted, was_terminated = received
        if was_terminated:
            return SystemExit(128 + signal.SIGTERM)  # the exit code that a shell shows for a program that it ends
        return KeyboardInterrupt() if was_interrupted else None
