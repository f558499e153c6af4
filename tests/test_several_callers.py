"""Several callers of one model: threads, thread pools, event loops, streams that are left, forks."""

import asyncio
import copy
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ROOT, ScriptedModel, ScriptedTokenizer, tiny_model
from forked import fork_python

from llama import Llama
from llama.model_lock import ModelLock, lock_of

PATIENCE = 10.0  # seconds within which everything must go on, whoever else waits for whom


@pytest.fixture(scope="module")
def llama():
    return Llama(tiny_model(max_batch_size=4, max_seq_len=96), ScriptedTokenizer(()))


def prompt_of(i: int) -> str:
    return f"{i + 3} {2 * i + 5} 7"


def alone(llama: Llama, i: int) -> str:
    return llama.text_completion([prompt_of(i)], 1.1, 1.0, 30, seed=i)[0]["generation"]


def stream_of(llama: Llama, i: int):
    return llama.text_completion_stream([prompt_of(i)], 1.1, 1.0, 30, seed=i)


class Slow(ScriptedModel):
    """A model that takes its time, and notes what it is doing."""

    def __init__(self, seconds: float = 0.02, **sizes):
        super().__init__(**sizes)
        self.seconds = seconds

    def forward(self, tokens, start_pos):
        time.sleep(self.seconds)
        return super().forward(tokens, start_pos)


@pytest.mark.parametrize(("streams", "threads"), [(3, 2), (8, 4), (20, 8)])
def test_more_streams_than_threads(llama, streams, threads):
    """Each `next` on whatever thread of a pool is free, as web frameworks do it."""
    want = [alone(llama, i) for i in range(streams)]
    end = object()

    async def consume(i: int) -> str:
        loop, stream, text = asyncio.get_running_loop(), stream_of(llama, i), ""
        while (piece := await asyncio.wait_for(loop.run_in_executor(pool, next, stream, end), PATIENCE)) is not end:
            text += piece.text
        return text

    async def consume_all() -> list[str]:
        return await asyncio.gather(*(consume(i) for i in range(streams)))

    with ThreadPoolExecutor(threads) as pool:
        assert asyncio.run(consume_all()) == want


def test_a_call_on_the_event_loop_while_a_stream_is_open(llama):
    want, other = alone(llama, 1), alone(llama, 2)

    async def main() -> tuple[str, str]:
        stream = stream_of(llama, 1)
        text = (await asyncio.to_thread(next, stream)).text
        called = alone(llama, 2)  # on the loop's thread, with the stream in the middle
        return text + "".join([piece.text for piece in stream]), called

    assert asyncio.run(main()) == (want, other)


def test_a_call_within_a_loop_over_a_stream(llama):
    want, other = alone(llama, 1), alone(llama, 2)
    text = ""
    for piece in stream_of(llama, 1):
        text += piece.text
        assert alone(llama, 2) == other
    assert text == want


def test_streams_within_streams(llama):
    want = [alone(llama, i) for i in range(3)]
    streams = [stream_of(llama, i) for i in range(3)]
    texts = ["", "", ""]
    while any(pieces := [next(stream, None) for stream in streams]):
        for i, piece in enumerate(pieces):
            texts[i] += piece.text if piece is not None else ""
    assert texts == want


def test_a_thread_that_starts_a_stream_and_ends(llama):
    want = [alone(llama, i) for i in (4, 5)]
    streams: list = []

    def start() -> None:
        streams.append(stream_of(llama, 4))
        streams.append(next(streams[0]).text)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join(PATIENCE)
    assert alone(llama, 5) == want[1]
    stream, first = streams
    assert first + "".join(piece.text for piece in stream) == want[0]


def test_two_llamas_over_one_model(llama):
    other = Llama(llama.model, llama.tokenizer)
    assert lock_of(other.model) is lock_of(llama.model)
    want = [alone(llama, i) for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda i: alone((llama, other)[i % 2], i), range(8)))
    assert answers == want


def test_calls_and_streams_at_once(llama):
    """Threads that call, stream to the end, and leave streams, all at the same time."""
    want = [alone(llama, i) for i in range(24)]

    def use(i: int) -> str:
        if i % 3 == 0:
            return "".join(piece.text for piece in stream_of(llama, i))
        if i % 3 == 1:
            next(stream_of(llama, i + 1))  # and is dropped
        return alone(llama, i)

    with ThreadPoolExecutor(8) as pool:
        assert [future.result(30) for future in [pool.submit(use, i) for i in range(24)]] == want


def test_nobody_waits_for_a_slow_consumer():
    llama = Llama(Slow(max_seq_len=64), ScriptedTokenizer(()))
    stream = llama.generate_stream([[5]], 20, 0)
    next(stream)
    begin = time.monotonic()
    assert llama.generate([[7, 8]], 3, 0)[0] == [[9, 10, 11]]  # waits for the production, not for the consumer
    assert time.monotonic() - begin < PATIENCE
    assert [piece.token for piece in stream] == list(range(7, 26))


def test_production_stops_when_the_consumer_leaves():
    model = Slow(max_seq_len=2000)
    llama = Llama(model, ScriptedTokenizer(()))
    stream = llama.generate_stream([[5]], 1900, 0)
    next(stream)
    stream.close()
    passes = len(model.calls)
    assert passes < 20
    assert llama.generate([[7]], 2, 0)[0] == [[8, 9]]
    assert len(model.calls) <= passes + 3

    def leave() -> None:
        for _ in llama.generate_stream([[5]], 1900, 0):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        leave()
    assert llama.generate([[7]], 2, 0)[0] == [[8, 9]]
    stream = llama.generate_stream([[5]], 1900, 0)
    next(stream)
    del stream
    gc.collect()
    assert llama.generate([[7]], 2, 0)[0] == [[8, 9]]
    assert len(model.calls) < 100
    assert not [thread for thread in threading.enumerate() if thread.name == "llama stream"]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs an alarm")
def test_a_stream_left_before_its_turn_is_never_produced():
    """As by Ctrl-C while it waits for another stream's production."""
    model = Slow(max_seq_len=64)
    llama = Llama(model, ScriptedTokenizer(()))
    first = llama.generate_stream([[5]], 40, 0)
    next(first)

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            next(llama.generate_stream([[11, 12]], 40, 0))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert len(list(first)) == 39
    assert llama.generate([[7]], 1, 0)[0] == [[8]]
    assert ((1, 2), 0) not in model.calls


def test_an_unstarted_stream_costs_nothing():
    model = ScriptedModel()
    llama = Llama(model, ScriptedTokenizer(()))
    stream = llama.generate_stream([[5]], 10, 0)
    assert llama.generate([[7]], 1, 0)[0] == [[8]]
    assert len(model.calls) == 1
    stream.close()
    assert len(model.calls) == 1


def test_errors_of_the_producer_reach_the_consumer():
    llama = Llama(tiny_model(), ScriptedTokenizer(()))

    def fail(input_ids, scores):
        if len(input_ids[0]) == 4:
            raise KeyError("no such grammar")
        return scores

    stream = llama.generate_stream([[5, 6]], 10, logits_processor=fail)
    assert next(stream).token is not None
    assert next(stream).token is not None
    with pytest.raises(KeyError, match="no such grammar"):
        next(stream)
    assert llama.generate([[5]], 2, 0)[0]


def test_a_logits_processor_that_uses_its_llama(llama):
    """It would wait for itself: by a call, by a stream, or by way of another model."""
    message = "a logits_processor can't use the Llama that it is called by"
    other = Llama(tiny_model(seed=1), ScriptedTokenizer(()))

    def calls(input_ids, scores):
        llama.generate([[5]], 1)
        return scores

    def streams(input_ids, scores):
        next(llama.generate_stream([[5]], 1))
        return scores

    def through_another(input_ids, scores):
        next(other.generate_stream([[5]], 1, logits_processor=calls))
        return scores

    def uses_another(input_ids, scores):
        other.generate([[5]], 1)
        return scores

    for processor in (calls, streams, through_another):
        with pytest.raises(RuntimeError, match=message):
            llama.generate([[5]], 3, logits_processor=processor)
        with pytest.raises(RuntimeError, match=message):
            list(llama.generate_stream([[5]], 3, logits_processor=processor))
    assert llama.generate([[5]], 3, 0, logits_processor=uses_another) == llama.generate([[5]], 3, 0)
    for piece in llama.generate_stream([[5]], 3, logits_processor=uses_another):
        assert other.generate([[5]], 1, 0)[0]  # by the consumer, which is no logits_processor
        assert piece.row == 0


def test_calls_have_their_turns_in_order():
    lock, order, threads = ModelLock(), [], []
    with lock.turn():
        for i in range(6):

            def wait(i: int = i) -> None:
                with lock.turn():
                    order.append(i)

            threads.append(threading.Thread(target=wait))
            threads[-1].start()
            while len(lock.queue.calls) < i + 2:
                time.sleep(0.001)
    for thread in threads:
        thread.join(PATIENCE)
    assert order == list(range(6))
    assert lock.queue.calls == []


def test_a_model_that_takes_no_attributes():
    class Closed:
        __slots__ = ("forward", "params")

    models = [Closed(), Closed()]
    for model in models:
        script = ScriptedModel()
        model.forward, model.params = script.forward, script.params
    llamas = [Llama(model, ScriptedTokenizer(())) for model in models]
    assert [piece.token for piece in llamas[0].generate_stream([[5]], 3, 0)] == [6, 7, 8]
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda llama: llama.generate([[5]], 3, 0)[0], llamas))
    assert answers == [[[6, 7, 8]]] * 2


def test_copies_have_locks_of_their_own(llama):
    lock = lock_of(llama.model)
    with lock.turn():
        for model in (copy.deepcopy(llama.model), pickle.loads(pickle.dumps(llama.model))):
            assert lock_of(model) is not lock
            assert Llama(model, llama.tokenizer).generate([[5]], 2, 0)[0]
    assert "generation_lock" not in llama.model.state_dict()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_fork_while_a_stream_is_open():
    """The child has no producer, and doesn't wait for it."""
    model = Slow(max_seq_len=64)
    llama = Llama(model, ScriptedTokenizer(()))
    stream = llama.generate_stream([[5]], 30, 0)
    next(stream)
    child = os.fork()
    if child == 0:
        os._exit(0 if llama.generate([[7]], 2, 0)[0] == [[8, 9]] else 1)
    deadline = time.monotonic() + PATIENCE
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(child, 9)
    assert ended == (child, 0)
    assert [piece.token for piece in stream] == list(range(7, 36))


SCRIPT = """
import sys, time
sys.path.insert(0, "tests")
from test_several_callers import Slow, ScriptedTokenizer
from llama import Llama
stream = Llama(Slow(max_seq_len=4000), ScriptedTokenizer(())).generate_stream([[5]], 3900, 0)
next(stream)
{after}
"""


@pytest.mark.parametrize("moment", ["start", "join"])
def test_an_interrupt_while_a_stream_starts(monkeypatch, moment):
    """Nothing is left that later calls would wait for."""
    model = ScriptedModel()
    llama = Llama(model, ScriptedTokenizer(()))
    lock = lock_of(model)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "start":
            patch.setattr(threading.Thread, "start", interrupted)
        else:
            patch.setattr(lock.queue, "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(llama.generate_stream([[5]], 10, 0))
    assert lock.queue.calls == []
    assert llama.generate([[7]], 2, 0)[0] == [[8, 9]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("after", "code"), [("", 0), ("raise SystemExit(3)", 3), ("import signal; signal.raise_signal(2)", -2)]
)
def test_a_program_that_ends_with_an_open_stream(after, code):
    """Production of 3,900 tokens would take over a minute; the program doesn't wait for it."""
    begin = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(after=after)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == code, ended.stderr
    assert "Exception ignored" not in ended.stderr
    assert time.monotonic() - begin < 30


@pytest.mark.slow
def test_clients_of_a_web_server():
    """20 clients of a FastAPI StreamingResponse on a pool of 4 threads."""
    import anyio
    import fastapi
    import httpx
    from fastapi import responses

    llama = Llama(tiny_model(max_seq_len=96), ScriptedTokenizer(()))
    want = [alone(llama, i) for i in range(20)]
    app = fastapi.FastAPI()

    @app.get("/{i}")
    def complete(i: int):
        return responses.StreamingResponse(piece.text for piece in stream_of(llama, i))

    async def main() -> list[str]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = 4
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=PATIENCE * 3) as client:
            answers = await asyncio.gather(*(client.get(f"/{i}") for i in range(20)))
        return [answer.text for answer in answers]

    assert asyncio.run(main()) == want


def test_a_stream_computes_as_its_consumer_would(llama):
    """Autocast is a setting of one thread."""
    with torch.autocast("cpu", torch.bfloat16):
        _, (expected,) = llama.generate([[5, 6, 7]], 5, 0, logprobs=True)
        assert [piece.logprob for piece in llama.generate_stream([[5, 6, 7]], 5, 0, logprobs=True)] == expected
    assert llama.generate([[5, 6, 7]], 5, 0, logprobs=True)[1] != [expected]


def test_a_stream_leaves_torch_as_it_is(llama):
    for _ in stream_of(llama, 1):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


ON_RANKS = """
import os, sys, time, torch
from llama import Llama
llama = Llama.build(sys.argv[1], None, 96, 2, device="cpu", dtype=torch.float32)
rank, want = int(os.environ["RANK"]), llama.generate([[5, 6], [7]], 8, 1.0, 1.0, seed=1)
for _ in range(3):  # left after two pieces: by all ranks, or by one and consumed by the others
    for leaves in (True, rank == 0, rank == 1):
        stream = llama.generate_stream([[5, 6]], 30, 1.0, 1.0, seed=2)
        pieces = [next(stream), next(stream)]
        if not leaves:
            pieces += stream
        stream.close()
        assert llama.generate([[5, 6], [7]], 8, 1.0, 1.0, seed=1) == want
other = Llama.build(sys.argv[1], None, 96, 2, device="cpu", dtype=torch.float32)
for _ in range(2):  # a stream of one model while another is used, and a consumer that is slow on one rank
    stream = llama.generate_stream([[5, 6]], 30, 1.0, 1.0, seed=2)
    next(stream)
    assert other.generate([[5, 6], [7]], 8, 1.0, 1.0, seed=1) == want
    for piece in stream:
        time.sleep(0.5 * (rank == 0))
        break
    stream.close()
    with torch.no_grad():
        llama.model.forward(torch.tensor([[5, 6]]), 0)
one, two = llama.generate_stream([[5]], 12, 0), llama.generate_stream([[8, 9]], 12, 0)
pairs = list(zip(one, two))
assert len(pairs) == 12
torch.save([want, pairs], f"{sys.argv[2]}/{rank}")
"""


@pytest.mark.slow
def test_streams_on_several_ranks(tiny_checkpoint, tmp_path):
    """The ranks make the same steps, whichever of their consumers leave, and produce streams in the same order."""
    script = tmp_path / "script.py"
    script.write_text(ON_RANKS)
    n = 2
    ended = fork_python(script, tiny_checkpoint, tmp_path, ranks=n)
    assert ended.returncode == 0, ended.stderr
    outputs = [torch.load(tmp_path / str(rank), weights_only=False) for rank in range(n)]
    assert all(output == outputs[0] for output in outputs)
