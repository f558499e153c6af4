"""Captured decoding steps. There is no GPU here: a stand-in for CUDA graphs repeats on the CPU what it has captured."""

import copy
import pickle
import re
from typing import ClassVar

import pytest
import torch
from conftest import ScriptedTokenizer, tiny_model
from fake_gpu import fake_gpu, on_gpu

from llama import Llama, Transformer, captured, positions
from llama.captured import CapturedModel
from llama.compiled import compile_model
from llama.errors import InputError

PROMPT = list(range(3, 20))


class Graph:
    """Does at each replay what it has captured, again."""

    graphs: ClassVar[list["Graph"]] = []

    def __init__(self, run, device, pool):
        self.run, self.n_replays = run, 0
        self._pool = object() if pool is None else pool
        run()
        Graph.graphs.append(self)

    def replay(self):
        self.n_replays += 1
        self.run()

    def pool(self):
        return self._pool


@pytest.fixture(autouse=True)
def cuda_on_the_cpu(monkeypatch):
    """Steps have a fixed shape, of 16, 32, ... positions, and are captured by `Graph`."""
    monkeypatch.setattr(Graph, "graphs", [])
    monkeypatch.setattr(captured, "capture", Graph)
    monkeypatch.setattr(positions, "FIXED_STEPS_ON", ("cpu",))
    monkeypatch.setattr(positions, "SHORTEST_END", 16)


def captured_model(**changes) -> Transformer:
    model = tiny_model(**changes)
    model.compiled = CapturedModel()
    return model


def steps(model: Transformer, start: int, end: int, rows: int = 1) -> torch.Tensor:
    """The logits of decoding steps at positions from `start` to `end`, after a prompt."""
    tokens = torch.stack([torch.arange(row, end + row) % model.vocab_size for row in range(rows)])
    with torch.inference_mode():
        model.hidden_states(tokens[:, :start], 0)
        return torch.cat([model.forward(tokens[:, i : i + 1], i) for i in range(start, end)], dim=1)


def llama(model: Transformer) -> Llama:
    return Llama(model, ScriptedTokenizer(stop_tokens=()))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_the_bit_the_steps_that_are_not_captured(rows, dtype):
    model, plain = captured_model().to(dtype), tiny_model().to(dtype)
    assert torch.equal(steps(model, 5, 96, rows), steps(plain, 5, 96, rows))
    # To 16 positions and every 16 more, and from 64 on every 16 still: one graph each.
    assert [graph.n_replays for graph in Graph.graphs] == [11, 16, 16, 16, 16, 16]
    assert len({graph.pool() for graph in Graph.graphs}) == 1
    steps(model, 5, 96, rows)
    assert len(Graph.graphs) == 6


def test_every_way_to_decode():
    captured_llama, plain = llama(captured_model()), llama(tiny_model())
    prompts = [PROMPT, PROMPT[:4], PROMPT[:9]]
    for options in (
        {"temperature": 0, "logprobs": True},
        {"temperature": 0.8, "seed": 3, "top_k": 20},
        {"temperature": 0.8, "seed": 3, "logits_processor": lambda input_ids, scores: scores.roll(1, -1)},
        {"num_beams": 2},
    ):
        for batch in ([PROMPT], [PROMPT, PROMPT[::-1]], prompts[: 2 if "num_beams" in options else 3]):
            assert captured_llama.generate(batch, 40, **options) == plain.generate(batch, 40, **options)
    pieces = captured_llama.generate_stream([PROMPT], 30, temperature=0)
    assert [piece.token for piece in pieces if piece.token is not None] == plain.generate([PROMPT], 30, 0)[0][0]
    captured_llama.generate([PROMPT], 10, 0)
    longer = [[*PROMPT, 9, 8, 7]]
    assert captured_llama.generate(longer, 10, 0, reuse_cache=True) == plain.generate(longer, 10, 0)
    assert captured_llama.generate([[5]], 95, 0) == plain.generate([[5]], 95, 0)  # a full context
    assert sum(graph.n_replays for graph in Graph.graphs) > 400


def test_the_logits_of_a_step_stay():
    model = captured_model()
    with torch.inference_mode():
        model.hidden_states(torch.tensor([[5, 6]]), 0)
        first = model.forward(torch.tensor([[7]]), 2)
        kept = first.clone()
        model.forward(torch.tensor([[8]]), 3)
    assert torch.equal(first, kept)


def n_graphs_and_replays() -> tuple[int, int]:
    return len(Graph.graphs), sum(graph.n_replays for graph in Graph.graphs)


def test_replaced_weights_hooks_and_another_cache_count():
    model, plain, other = captured_model(), tiny_model(), tiny_model(seed=1)
    steps(model, 5, 20)
    assert n_graphs_and_replays() == (2, 15)
    for changed in (model, plain):
        changed.layers[1].attention.wo.weight = other.layers[1].attention.wo.weight
    assert torch.equal(steps(model, 5, 20), steps(plain, 5, 20))
    assert n_graphs_and_replays() == (4, 30)
    with torch.no_grad():  # in place: a graph reads the new values
        for changed in (model, plain):
            changed.layers[0].feed_forward.w1.weight.mul_(0.5)
    assert torch.equal(steps(model, 5, 20), steps(plain, 5, 20))
    assert n_graphs_and_replays() == (4, 45)

    hook = model.layers[0].feed_forward.register_forward_hook(lambda *_: None)
    steps(model, 5, 20)
    assert n_graphs_and_replays() == (4, 45)  # they would not call it
    hook.remove()
    steps(model, 5, 20)
    assert n_graphs_and_replays() == (4, 60)

    before, model.cache = model.cache, None  # (kept, so that the new one can't lie in the same place)
    assert torch.equal(steps(model, 5, 20), steps(plain, 5, 20))
    assert n_graphs_and_replays() == (6, 75)
    assert model.cache is not before
    assert torch.equal(steps(model.bfloat16(), 5, 20), steps(plain.bfloat16(), 5, 20))
    assert n_graphs_and_replays() == (8, 90)


def test_a_step_changes_what_the_cache_holds(monkeypatch):
    """A graph does no more than what the GPU does: what the host keeps of the cache is not part of it."""
    model = captured_model()
    steps(model, 1, 2)
    monkeypatch.setattr(Graph, "replay", lambda graph: None)
    model.cache.tokens = [[5, 6, 7]]
    with torch.inference_mode():
        model.forward(torch.tensor([[9]]), 2)
    assert model.cache.tokens == []


def test_another_cache_within_an_answer_counts():
    model = captured_model()
    steps(model, 5, 10)
    before, model.cache = model.cache, None
    with torch.inference_mode():
        model.forward(torch.tensor([[9]]), 10)
    assert len(Graph.graphs) == 2
    assert model.cache is not before


def test_a_copy_captures_for_itself():
    model = captured_model()
    expected = steps(model, 5, 20)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            clone.layers[0].feed_forward.w1.weight.zero_()
        assert (steps(clone, 5, 20) - expected).abs().max() > 0.1
    assert torch.equal(steps(model, 5, 20), expected)


def test_what_can_not_be_captured_runs_as_it_is(monkeypatch, caplog):
    def fail(*arguments):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(captured, "capture", fail)
    model, plain = captured_model(), tiny_model()
    for _ in range(2):
        assert torch.equal(steps(model, 5, 40), steps(plain, 5, 40))
    assert [record.getMessage() for record in caplog.records] == [
        "decoding steps run without CUDA graphs, more slowly: operation not permitted when stream is capturing"
    ]


def test_prompts_and_autocast_are_not_captured():
    model, plain = captured_model(), tiny_model()
    tokens = torch.tensor([PROMPT])
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.forward(tokens, 0), plain.forward(tokens, 0))
        assert torch.equal(model.forward(tokens[:, :1], 17), plain.forward(tokens[:, :1], 17))
    assert torch.equal(model.forward(tokens), plain.forward(tokens))
    assert not Graph.graphs


def test_the_errors_of_a_call_are_those_of_a_step_that_is_not_captured():
    for shape, start_pos, message in (
        ((1, 1), 96, "position 96 is past the end: max_seq_len=96"),
        ((9, 1), 0, "9 rows are more than max_batch_size=4"),
        ((1,), 0, "tokens must be (batch, seq), not of shape (1,)"),
    ):
        for network in (captured_model(), tiny_model()):
            with pytest.raises(InputError, match=re.escape(message)):
                network.forward(torch.zeros(shape, dtype=torch.long), start_pos)


def test_compile_on_a_gpu_captures():
    with fake_gpu():
        model = on_gpu(torch.bfloat16)
        compile_model(model)
        assert isinstance(model.compiled, CapturedModel)


def test_out_of_memory_gives_the_graphs_back_and_is_raised(monkeypatch):
    model, plain = captured_model(), tiny_model()
    steps(model, 5, 20)

    def fail(run, device, pool):
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")

    with monkeypatch.context() as patch:
        patch.setattr(captured, "capture", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            steps(model, 20, 40)
        with pytest.raises(MemoryError, match="not enough memory to decode"):
            llama(model).generate([PROMPT], 30, 0)
    assert not model.compiled._graphs
    assert torch.equal(steps(model, 20, 40), steps(plain, 20, 40))  # the next time there may be enough


def test_a_step_writes_nowhere_else():
    """The position after it may hold a token: of a program that goes back."""
    model, plain = captured_model(), tiny_model()
    steps(model, 5, 40)
    steps(plain, 5, 40)
    for network in (model, plain):
        with torch.inference_mode():
            network.forward(torch.tensor([[9]]), 3)
    assert torch.equal(model.cache.keys, plain.cache.keys)


def test_prompts_of_one_token():
    """They look like steps, and the network may have been changed before them; what the cache holds may be NaN."""
    model, plain, other = captured_model(), tiny_model(), tiny_model(seed=1)
    for network in (model, plain):
        llama(network).generate([[5]], 5, 0)
        network.layers[1].attention.wo.weight = other.layers[1].attention.wo.weight
    assert llama(model).generate([[5]], 5, 0) == llama(plain).generate([[5]], 5, 0)
    model.cache.keys[:] = torch.nan
    assert llama(model).generate([[5]], 5, 0) == llama(plain).generate([[5]], 5, 0)


def test_off_the_gpu_steps_run_as_they_are(monkeypatch):
    model, plain = captured_model(), tiny_model()
    monkeypatch.setattr(positions, "FIXED_STEPS_ON", ())
    assert torch.equal(steps(model, 5, 40), steps(plain, 5, 40))
    assert not Graph.graphs


def test_steps_look_at_the_network_once_a_prompt(monkeypatch):
    """Also those that can't be captured."""
    looks = []
    look = CapturedModel._forget_if_changed
    monkeypatch.setattr(CapturedModel, "_forget_if_changed", lambda *arguments: looks.append(1) or look(*arguments))
    model = captured_model()
    hook = model.layers[0].register_forward_hook(lambda *_: None)
    steps(model, 5, 40)
    assert len(looks) == 1
    hook.remove()
    steps(model, 5, 40)
    assert len(looks) == 2
