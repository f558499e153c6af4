"""How often a step has the host wait for the GPU, and how many operations it has. Counted without a GPU.

Each wait leaves the GPU idle until the host has started its next operations. A step takes a few milliseconds.
"""

from collections import Counter

import pytest
import torch
from conftest import ScriptedTokenizer
from fake_gpu import GPU, fake_gpu, on_gpu

from llama import Llama, batch

ONE_ROW, EQUAL, UNEQUAL = [[5, 6, 7]], [[5, 6, 7], [4, 4, 4]], [[5, 6, 7], [8]]
FEW, MANY = 2, 4  # steps


@pytest.fixture(scope="module")
def gpu():
    with fake_gpu() as gpu:
        yield gpu


@pytest.fixture(scope="module")
def llama(gpu):
    return used(Llama(on_gpu(), ScriptedTokenizer()))


def used(llama):
    """The same, after its first call, which copies the rotations to the GPU."""
    llama.generate(ONE_ROW, 1)
    return llama


def cost_of_a_step(gpu, run) -> tuple[Counter, Counter]:
    """The waits and the operations of each step.

    Args:
        run: makes this many steps; what else it does is the same for any number.
    """
    costs = []
    for steps in (FEW, MANY):
        gpu.clear()
        run(steps)
        costs.append((Counter(gpu.waits), Counter(gpu.operations)))
    differences = []
    for few, many in zip(*costs, strict=True):
        many.subtract(few)
        assert all(count % (MANY - FEW) == 0 for count in many.values()), many
        differences.append(Counter({name: count // (MANY - FEW) for name, count in many.items() if count}))
    return differences[0], differences[1]


ONE_WAIT, TWO_WAITS = {"tolist": 1}, {"tolist": 2}
COMMON = {
    "greedy": ({"temperature": 0}, ONE_WAIT),
    "sampled": ({}, ONE_WAIT),
    "logprobs": ({"logprobs": True}, TWO_WAITS),
    "beams": ({"num_beams": 2}, ONE_WAIT),
}
ALL = COMMON | {
    "top_p=1": ({"top_p": 1.0}, ONE_WAIT),
    "top_k": ({"temperature": 1.5, "top_k": 5}, ONE_WAIT),
    "echo": ({"logprobs": True, "echo": True}, TWO_WAITS),
    "several answers": ({"num_return_sequences": 2}, ONE_WAIT),
    "beams with logprobs": ({"num_beams": 2, "logprobs": True}, ONE_WAIT),
    "logits_processor": ({"logits_processor": lambda input_ids, scores: scores * 2}, ONE_WAIT),
    "stop": ({"stop": "no such string"}, ONE_WAIT),
    "reuse_cache": ({"reuse_cache": True}, ONE_WAIT),
}


@pytest.mark.parametrize(
    ("prompts", "options", "expected"),
    [
        pytest.param(prompts, *cases[name], id=f"{rows}, {name}")
        for rows, prompts, cases in (("one row", ONE_ROW, COMMON), ("equal", EQUAL, COMMON), ("unequal", UNEQUAL, ALL))
        for name in cases
    ],
)
def test_waits_of_a_step(gpu, llama, prompts, options, expected):
    waits, _ = cost_of_a_step(gpu, lambda steps: llama.generate(prompts, steps, **options))
    assert waits == expected


@pytest.mark.parametrize("prompts", [ONE_ROW, UNEQUAL], ids=["one row", "unequal"])
def test_waits_of_a_step_of_a_stream(gpu, llama, prompts, monkeypatch):
    def generate_pieces(*args, generate_pieces=batch.generate_pieces, **kwargs):  # it runs in a thread of its own
        with gpu.in_this_thread():
            yield from generate_pieces(*args, **kwargs)

    monkeypatch.setattr(batch, "generate_pieces", generate_pieces)
    waits, operations = cost_of_a_step(gpu, lambda steps: list(llama.generate_stream(prompts, steps)))
    assert waits == ONE_WAIT
    assert operations.total() > 100


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_waits_of_a_step_with_quantized_weights(gpu, quantize):
    llama = used(Llama(on_gpu(quantize=quantize), ScriptedTokenizer()))
    waits, _ = cost_of_a_step(gpu, lambda steps: llama.generate(EQUAL, steps))
    assert waits == ONE_WAIT


def test_waits_of_a_prompt(gpu, llama):
    """For its tokens to be copied, the places of its last ones, and the first new token; then for each row's scores."""
    for prompts in (ONE_ROW, EQUAL, UNEQUAL):
        gpu.clear()
        llama.generate(prompts, 1)
        assert gpu.waits.total() <= 3
        gpu.clear()
        llama.generate(prompts, 0, logprobs=True, echo=True)
        assert gpu.waits.total() <= 2 + len(prompts)


def test_each_layer_has_the_same_operations_for_any_rows(gpu):
    """What the layers need to know of positions is laid out once for all of them."""
    lengths = {"one row": [3], "equal": [3, 3], "unequal": [3, 1, 2]}
    of_a_layer = {}
    for name, rows in lengths.items():
        operations = []
        for n_layers in (2, 4):
            llama = used(Llama(on_gpu(n_layers=n_layers, max_seq_len=91), ScriptedTokenizer()))
            prompts = [list(range(3, 3 + length)) for length in rows]
            operations.append(cost_of_a_step(gpu, lambda steps: llama.generate(prompts, steps))[1])  # noqa: B023
        operations[1].subtract(operations[0])
        of_a_layer[name] = {operation: count / 2 for operation, count in operations[1].items() if count}
        assert of_a_layer[name]["attention"] == 1
        assert not of_a_layer[name].keys() & {"mask copied", "indices copied"}
    assert all(counts == of_a_layer["one row"] for counts in of_a_layer.values()), of_a_layer


@pytest.mark.parametrize("start_pos", [6, torch.tensor([6, 3])], ids=["equal", "unequal"])
@torch.no_grad()
def test_the_mask_of_a_chunk_is_laid_out_once(gpu, start_pos):
    operations = []
    for n_layers in (2, 4):
        model = on_gpu(n_layers=n_layers, max_seq_len=91)
        gpu.clear()
        model(torch.zeros(2, 5, dtype=torch.long, device=GPU), start_pos)
        operations.append(Counter(gpu.operations))
    operations[1].subtract(operations[0])
    of_two_layers = {operation: count for operation, count in operations[1].items() if count}
    assert of_two_layers["attention"] == 2
    laid_out = {"mask copied", "indices copied", torch.ops.aten.repeat.default, torch.ops.aten.masked_fill_.Scalar}
    assert not of_two_layers.keys() & laid_out


WAYS_TO_WAIT = {
    "tolist": (1, lambda x: x.tolist()),
    "item": (1, lambda x: x[0].item()),
    "int": (1, lambda x: int(x[0])),
    "float": (1, lambda x: float(x.float().sum())),
    "bool": (1, lambda x: bool(x.any())),
    "if": (1, lambda x: 1 if x[0] > 1 else 2),
    "range": (1, lambda x: range(x[0])),
    "cpu": (1, lambda x: x.cpu()),
    "to": (1, lambda x: x.to("cpu")),
    "down without blocking": (1, lambda x: x.to("cpu", non_blocking=True)),
    "copy": (1, lambda x: torch.zeros(4, dtype=torch.long).copy_(x)),
    "tensor": (1, lambda x: torch.tensor([1, 2], device=GPU)),
    "up": (1, lambda x: torch.tensor([1, 2]).to(GPU)),
    "up into": (1, lambda x: x.copy_(torch.tensor([1, 2, 3, 4]))),
    "up without blocking": (0, lambda x: torch.tensor([1, 2]).to(GPU, non_blocking=True)),
    "up into without blocking": (0, lambda x: x.copy_(torch.tensor([1, 2, 3, 4]), non_blocking=True)),
    "nonzero": (1, lambda x: x.nonzero()),
    "where": (1, lambda x: torch.where(x > 2)),
    "where with values": (0, lambda x: torch.where(x > 2, x, -1)),
    "mask": (1, lambda x: x[x > 2]),
    "into a mask": (1, lambda x: x.index_put_((x > 2,), x[:1])),
    "masked_fill": (0, lambda x: x.masked_fill(x > 2, 0)),
    "number": (0, lambda x: x * 2 + torch.tensor(3)),
    "multinomial": (2, lambda x: torch.multinomial(x.float(), 1)),
    "repeat": (0, lambda x: x.repeat_interleave(2)),
    "repeat by a tensor": (1, lambda x: x.repeat_interleave(x)),
    "index": (0, lambda x: x[x]),
    "slice": (0, lambda x: x[1:3].fill_(0)),
    "new": (0, lambda x: torch.arange(4, device=GPU) + torch.full((4,), 2, device=GPU)),
}


@pytest.mark.parametrize(("expected", "wait"), WAYS_TO_WAIT.values(), ids=WAYS_TO_WAIT.keys())
def test_what_counts_as_a_wait(gpu, expected, wait):
    """As torch's sources have it, and `torch.cuda.set_sync_debug_mode` would say where there is a GPU."""
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            x = torch.zeros(4, dtype=torch.long, device=GPU)
            gpu.clear()
            wait(x)
        assert gpu.waits.total() == expected, mode


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: torch.equal(x, x),
        lambda x: x.masked_select(x > 2),
        lambda x: x.unique(),
        lambda x: x.bincount(),
    ],
)
def test_other_waits_are_errors(gpu, wait):
    with pytest.raises(Exception, match=r"equal|masked_select|unique|bincount"):
        wait(torch.zeros(4, dtype=torch.long, device=GPU))
