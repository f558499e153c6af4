"""One call at a time on a model, whichever threads make the calls and however many `Llama`s share it.

A model has one KV cache, so calls wait for each other, in the order they came. A stream is produced by a thread of its
own into a queue: it never waits for its consumer, and so nobody else does.
"""

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeVar

from llama.distributed import model_parallel_size

Item = TypeVar("Item")

LEAVE_TIMEOUT = 1.0  # seconds that a consumer that leaves a stream waits for the step under way to end


@dataclass(eq=False)
class Call:
    """A call that uses a model, or waits for it."""

    abandoned: bool = False  # its consumer has left
    skipped: bool = False  # it must not wait for its turn any more


@dataclass
class StreamEnd:
    """The last thing in a stream's queue."""

    error: BaseException | None = None


class ModelLock:
    """The calls on one model: the first of the queue uses it, the others wait."""

    def __init__(self) -> None:
        self.reset()
        _locks.add(self)

    def reset(self) -> None:
        """Forget all calls: in a forked process, where the threads that made them don't exist."""
        self._condition = threading.Condition()
        self._queue: list[Call] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "ModelLock":
        return ModelLock()  # a copied model has a cache of its own

    def __reduce__(self) -> tuple[type["ModelLock"], tuple[()]]:
        return ModelLock, ()

    @contextlib.contextmanager
    def turn(self, call: Call | None = None) -> Iterator[None]:
        """Wait for the turn of a call, and hold it while the block runs.

        Args:
            call: one that is in the queue already; None puts a new one at its end.

        Raises:
            RuntimeError: the caller is a logits_processor of the call that uses the model.
        """
        if self in _calling_processor.get():
            raise RuntimeError("a logits_processor can't use the Llama that it is called by")
        call = call or Call()
        try:
            with self._condition:
                if call not in self._queue:
                    self._queue.append(call)
                while self._queue[0] is not call and not call.skipped:
                    self._condition.wait()
            yield
        finally:
            with self._condition:
                if call in self._queue:
                    self._queue.remove(call)
                self._condition.notify_all()

    @contextlib.contextmanager
    def calling_processor(self) -> Iterator[None]:
        """Mark the code in the block as a logits_processor of the call that uses the model."""
        token = _calling_processor.set((*_calling_processor.get(), self))
        try:
            yield
        finally:
            _calling_processor.reset(token)

    def stream(self, produce: Callable[..., Iterator[Item]]) -> Iterator[Item]:
        """Yield what `produce` yields, produced by a thread of its own, in its turn, as fast as that goes.

        Production begins when the first item is asked for, and stops soon after the consumer has left.

        Args:
            produce: its keyword argument `should_stop` is a function that says whether the consumer has left.
        """
        if self in _calling_processor.get():
            raise RuntimeError("a logits_processor can't use the Llama that it is called by")
        items: SimpleQueue[Item | StreamEnd] = SimpleQueue()
        call = Call()

        def should_stop() -> bool:
            return call.abandoned or not threading.main_thread().is_alive()

        def run() -> None:
            end = StreamEnd()
            try:
                with self.turn(call):
                    for item in () if call.skipped else produce(should_stop=should_stop):
                        items.put(item)
            except BaseException as error:
                end.error = error  # raised where the stream is consumed
            items.put(end)

        producer = threading.Thread(target=copy_context().run, args=(run,), name="llama stream")
        with self._condition:
            self._queue.append(call)  # now, so that calls have the same order on every rank
        try:
            producer.start()
        except RuntimeError:  # the system allows no more threads
            call.skipped = True
            with self.turn(call):  # which takes it out of the queue
                raise
        try:
            while not isinstance(item := items.get(), StreamEnd):
                yield item
            if item.error is not None:
                raise item.error
        finally:
            call.abandoned = True
            if model_parallel_size() == 1:  # else the ranks have to agree on it in its turn
                call.skipped = True
                with self._condition:
                    self._condition.notify_all()
            # Whoever leaves finds the model idle. With a timeout, since the garbage collector may run this anywhere.
            if threading.current_thread() is not producer:
                producer.join(LEAVE_TIMEOUT)


def lock_of(model: Any) -> ModelLock:
    """The lock of a model, which all `Llama`s over it share."""
    with _creating:
        lock = getattr(model, "generation_lock", None)
        if not isinstance(lock, ModelLock):
            lock = model.generation_lock = ModelLock()
        return lock


_creating = threading.Lock()
_locks: "weakref.WeakSet[ModelLock]" = weakref.WeakSet()
_calling_processor: ContextVar[tuple[ModelLock, ...]] = ContextVar("calling_processor", default=())


def _after_fork() -> None:
    global _creating
    _creating = threading.Lock()
    for lock in _locks:
        lock.reset()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)
