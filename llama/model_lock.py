"""One call at a time on a model, whichever threads make the calls and however many `Llama`s share it.

A model has one KV cache, so calls wait for each other, in the order they came.
"""

import contextlib
import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch.distributed as dist

from llama.distributed import model_parallel_size


class Call:
    """A call that uses a model, or waits for it. One that is `withdrawn` is not to use it any more."""

    withdrawn = False


class CallQueue:
    """Calls that must not run at the same time: the first runs, the others wait."""

    def __init__(self) -> None:
        self.reset()
        _queues.add(self)

    def reset(self) -> None:
        """Forget all calls: in a forked process, where the threads that made them don't exist."""
        self.changed = threading.Condition()
        self.calls: list[Call] = []

    def join(self, call: Call) -> None:
        """Put a call at the end of the queue."""
        with self.changed:
            self.calls.append(call)

    def leave(self, call: Call) -> None:
        """Take a call out of the queue, if it is there."""
        with self.changed:
            if call in self.calls:
                self.calls.remove(call)
            self.changed.notify_all()

    def withdraw(self, call: Call) -> None:
        """Let a call go on at once, without its turn."""
        call.withdrawn = True
        with self.changed:
            self.changed.notify_all()


class ModelLock:
    """The right to use one model.

    Args:
        queue: the calls that wait for it.
    """

    def __init__(self, queue: CallQueue | None = None) -> None:
        self.queue = queue or CallQueue()

    def __deepcopy__(self, memo: dict[int, Any]) -> "ModelLock":
        return ModelLock()  # a copied model has a cache of its own

    def __reduce__(self) -> tuple[type["ModelLock"], tuple[()]]:
        return ModelLock, ()

    @contextlib.contextmanager
    def turn(self, call: Call | None = None) -> Iterator[None]:
        """Wait for the turn of a call, and hold it while the block runs.

        Args:
            call: one that is in the queue already, and is not waited for if it is withdrawn; None puts a new one at the
                queue's end.

        Raises:
            RuntimeError: the caller is a logits_processor of the call that uses the model.
        """
        callers = _processing.get()
        call, queue = call or Call(), self.queue
        try:
            if self in callers:
                raise RuntimeError("a logits_processor can't use the Llama that it is called by")
            in_callers_turn = any(lock.queue is queue for lock in callers)  # of another model in the same queue
            with queue.changed:
                if call not in queue.calls:
                    queue.calls.append(call)
                while not (queue.calls[0] is call or in_callers_turn or call.withdrawn):
                    queue.changed.wait()
            yield
        finally:
            with queue.changed:
                if call in queue.calls:
                    queue.calls.remove(call)
                queue.changed.notify_all()

    @contextlib.contextmanager
    def calling_processor(self) -> Iterator[None]:
        """Mark the code in the block as a logits_processor of the call that uses the model."""
        token = _processing.set((*_processing.get(), self))
        try:
            yield
        finally:
            _processing.reset(token)


def join(call: Call, locks: Iterable[ModelLock]) -> None:
    """Put a call at the end of the queues of all models that it uses.

    It joins them at once, so that calls stand in the same order in each, and never wait for each other in a circle.
    """
    with _joining:
        for queue in {lock.queue for lock in locks}:
            queue.join(call)


@contextlib.contextmanager
def turn_on(locks: Sequence[ModelLock], call: Call | None = None) -> Iterator[None]:
    """`ModelLock.turn` on several models.

    Args:
        locks: of these models.
        call: see `ModelLock.turn`.
    """
    if call is None:
        call = Call()
        join(call, locks)
    try:
        with contextlib.ExitStack() as turns:
            for lock in locks:
                turns.enter_context(lock.turn(call))
            yield
    finally:
        for lock in locks:
            lock.queue.leave(call)


def lock_of(model: Any) -> ModelLock:
    """The lock of a model, which all `Llama`s over it share.

    Under tensor parallelism all models have one queue: their collectives would mix, in another order on each rank.
    """
    with _creating:
        lock = getattr(model, "generation_lock", None)
        if not isinstance(lock, ModelLock):
            shared = dist.is_initialized() and model_parallel_size() > 1
            lock = ModelLock(_group_queue if shared else None)
            try:
                model.generation_lock = lock
            except AttributeError:  # an object with __slots__: all of them share one lock
                return _common_lock
        return lock


_creating, _joining = threading.Lock(), threading.Lock()
_queues: "weakref.WeakSet[CallQueue]" = weakref.WeakSet()
_group_queue = CallQueue()
_common_lock = ModelLock(_group_queue)
# The locks of the models whose logits_processor the caller is, the outermost first. A stream's thread inherits them.
_processing: ContextVar[tuple[ModelLock, ...]] = ContextVar("processing", default=())


def _after_fork() -> None:
    global _creating, _joining
    _creating, _joining = threading.Lock(), threading.Lock()
    for queue in _queues:
        queue.reset()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)
