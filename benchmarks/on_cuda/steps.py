"""The part of `cuda_acceptance.py correctness` on decoding steps: captured in CUDA graphs, without waits, in bounds."""

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llama import Transformer
from llama.decoding import decode, prefill
from llama.positions import fixed_end
from llama.sampling import sample, token_logprobs
from on_cuda.models import (
    answering,
    capture_steps,
    copy_to,
    logits_of_steps,
    prepare,
    prompts_for,
    random_model,
    random_prompts,
    same,
)
from on_cuda.report import Check, Context, Skipped, require


@contextlib.contextmanager
def count_replays() -> Iterator[list[int]]:
    """A list to which each replay of a CUDA graph is added within the block."""
    replays: list[int] = []
    graph: Any = torch.cuda.CUDAGraph
    replay = graph.replay

    def count(self: Any) -> None:
        replays.append(1)
        replay(self)

    graph.replay = count
    try:
        yield replays
    finally:
        graph.replay = replay


@contextlib.contextmanager
def no_waits(device: torch.device) -> Iterator[None]:
    """Within the block, an operation for which the host waits for the GPU raises an error."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def count_waits(device: torch.device) -> Iterator[list[str]]:
    """A list to which each operation is added, within the block, for which the host waits for the GPU."""
    waits: list[str] = []
    if device.type != "cuda":
        yield waits
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits += [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]


def compare_captured(model: Transformer, prompts: list[list[int]], n_steps: int, name: str) -> None:
    """Captured steps, twice, are the uncaptured ones to the bit."""
    answers = random_prompts([n_steps] * len(prompts), model.params.vocab_size, seed=1)
    captured, model.compiled = model.compiled, None
    expected = logits_of_steps(model, prompts, answers)
    model.compiled = captured
    for attempt in ("captured", "replayed"):
        with count_replays() as replays:
            actual = logits_of_steps(model, prompts, answers)
        if actual.is_cuda:
            same(f"{name}: replays", len(replays), n_steps - 1)
        different = (actual != expected).flatten(1).any(1).nonzero().flatten().tolist()
        same(f"{name}, {attempt}: steps whose logits are not the same to the bit", different, [])
    require(bool(expected.isfinite().all()), f"{name}: not finite")


def check_captured(name: str, dtype: torch.dtype, context: Context) -> None:
    """Over the edge of what a captured step attends to, for several batches, and to the end of the context."""
    device = prepare(context)
    max_seq_len = 300 if context.dry else 600
    model = random_model(name, context, device, dtype, max_seq_len=max_seq_len)
    capture_steps(model)
    edge = next(end for end in range(2, max_seq_len) if fixed_end(end + 1, max_seq_len) > fixed_end(end, max_seq_len))
    context.record("first edge", edge)
    n_steps, n_equal = 3 if context.dry else 8, 0
    for last in (edge, max_seq_len - 1):  # the position of the last step
        longest = last - n_steps + 2
        for lengths in ([longest], [longest] * 3, [longest, longest - 3, 20]):
            compare_captured(model, random_prompts(lengths, model.params.vocab_size), n_steps, f"{lengths}")
            n_equal += n_steps * len(lengths)
    context.record("the same to the bit", n_equal, "vectors of logits")


def check_captures_follow_changes(context: Context) -> None:
    """Whatever changes in the network, its captured steps are those of the network as it is."""
    device = prepare(context)
    model = random_model("tiny", context, device)
    capture_steps(model)
    prompts = prompts_for(model, (9, 9))

    def compare(name: str) -> torch.Tensor:
        compare_captured(model, prompts, 4, name)
        return logits_of_steps(model, prompts, [[1, 2], [3, 4]])

    before = compare("at first")
    layer: Any = model.get_submodule("layers.0.feed_forward.w1")
    layer.weight = nn.Parameter(layer.weight * 0.5, requires_grad=False)
    replaced = compare("a weight replaced")
    require(not torch.equal(before, replaced), "a replaced weight changes nothing")
    with torch.no_grad():
        layer.weight.mul_(2)
    require(torch.equal(compare("a weight changed in place"), before), "the old weight doesn't give the old logits")
    model.cache = None
    require(torch.equal(compare("another cache"), before), "another cache gives other logits")
    calls: list[int] = []
    hook = model.layers[1].register_forward_hook(lambda *_: calls.append(1))
    require(torch.equal(logits_of_steps(model, prompts, [[1, 2], [3, 4]]), before), "a hook changes the logits")
    require(len(calls) >= 2, "a hook was not called in each step")
    hook.remove()
    compare("the hook removed")
    twin = copy_to(model, device)
    require(torch.equal(logits_of_steps(twin, prompts, [[1, 2], [3, 4]]), before), "a copy gives other logits")
    model.to(torch.bfloat16)
    compare("another dtype")


def check_no_wait_within_a_step(context: Context) -> None:
    """The host never waits for the GPU within a step, only afterwards, to see the tokens."""
    device = prepare(context)
    for dtype, captured in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        model = random_model("tiny", context, device, dtype)
        if captured:
            capture_steps(model)
        for lengths, temperature, logprobs in itertools.product(((9,), (9, 9), (40, 5, 17)), (0.0, 0.6), (False, True)):
            prompts = prompts_for(model, lengths)
            for attempt in range(2):  # in the first, libraries prepare themselves, and steps are captured
                logits, _ = prefill(model, prompts)

                def select(logits: torch.Tensor, temperature: float = temperature) -> torch.Tensor:
                    return sample(logits, temperature, 0.9)

                score_tokens = token_logprobs if logprobs else None
                steps = decode(model, logits, list(lengths), select, score_tokens=score_tokens)
                for _ in range(4):
                    with no_waits(device) if attempt else contextlib.nullcontext():
                        tokens, _ = next(steps)
                    tokens.tolist()


def count_waits_of_calls(context: Context) -> None:
    """How often the host waits in each step of a whole call."""
    device = prepare(context)
    model = random_model("tiny", context, device, max_batch_size=8)
    llama, n = answering(model), 5 if context.dry else 20
    for captured in (False, True):
        if captured:
            capture_steps(model)
        cases = {
            "sampled": ((9,), {}, 1),
            "sampled, unequal prompts": ((40, 5, 17), {}, 1),
            "with logprobs": ((9, 9), {"logprobs": True}, 2),
            "4 beams": ((9, 4), {"num_beams": 4}, 1),
        }
        for name, (lengths, options, most) in cases.items():
            prompts = prompts_for(model, lengths)
            waits: list[int] = []
            for length in (n, n, 2 * n):  # the first prepares
                with count_waits(device) as seen:
                    llama.generate(prompts, length, **options)  # type: ignore[arg-type]
                waits.append(len(seen))
            per_step = (waits[2] - waits[1]) / n
            context.record(f"{name}, captured: {captured}", per_step, "waits a step")
            require(per_step <= most, f"{name}: {per_step} waits a step, more than {most}; the last: {seen[-3:]}")


def check_memory_stays(context: Context) -> None:
    device = prepare(context)
    model = random_model("tiny", context, device, torch.bfloat16)
    capture_steps(model)
    llama, n_calls = answering(model), 10 if context.dry else 200
    used = []
    for call in range(n_calls + 20):
        lengths = ((9,), (40, 5, 17), (3, 3))[call % 3]  # with and without logprobs: six kinds of calls
        llama.generate(prompts_for(model, lengths), 4, logprobs=call % 2 == 0)
        if call >= 20 and device.type == "cuda":
            used.append(torch.cuda.memory_allocated(device))
    growth = max(used[-6:]) - max(used[:6]) if used else 0
    context.record(f"growth over {n_calls} calls", growth, "bytes")
    require(growth <= 0, f"{growth} bytes more are in use than {n_calls} calls before")


def run_sanitizer(context: Context) -> None:
    """NVIDIA's compute-sanitizer finds no wrong access to memory, with and without captured steps."""
    sanitizer = shutil.which("compute-sanitizer")
    if context.dry:
        sanitize_this(context, capture=True)
        return
    if sanitizer is None:
        raise Skipped("compute-sanitizer is not installed")
    for mode in ("uncaptured", "captured"):
        # Without torch's own reuse of memory, an access behind a tensor is one behind an allocation. Captured steps
        # can't do without it.
        environment = os.environ | ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if mode == "uncaptured" else {})
        # Libraries try out calls that may fail: only wrong accesses count.
        command = [sanitizer, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "99"]
        command += [sys.executable, __file__, mode]
        try:
            result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=140)
        except subprocess.TimeoutExpired as error:
            raise Skipped(f"{mode}: it has not ended in {error.timeout:.0f} s") from error
        end = "\n".join((result.stdout + result.stderr).splitlines()[-30:])
        context.record(mode, result.returncode, "exit status")
        if "Device not supported" in end:
            raise Skipped("compute-sanitizer does not support this device")
        require(result.returncode == 0, f"{mode}: exit status {result.returncode}: {end}")


def sanitize_this(context: Context, capture: bool) -> None:
    """What the sanitizer looks at: every kind of step of the tiny model."""
    device = prepare(context)
    for dtype in (torch.float32, torch.bfloat16):
        model = random_model("tiny", context, device, dtype, max_seq_len=300)
        if capture:
            capture_steps(model)
        llama = answering(model)
        llama.generate(random_prompts((253, 5, 17), model.params.vocab_size), 6, logprobs=True)
        llama.generate(random_prompts((4,), model.params.vocab_size), 4, 0, num_beams=3)


CHECKS_OF_STEPS = [
    Check("captured steps, tiny, float32", lambda context: check_captured("tiny", torch.float32, context)),
    Check("captured steps, tiny, bfloat16", lambda context: check_captured("tiny", torch.bfloat16, context)),
    Check("captured steps, tiny, float16", lambda context: check_captured("tiny", torch.float16, context)),
    Check("captured steps, 1B-shaped, bfloat16", lambda context: check_captured("1B", torch.bfloat16, context)),
    Check("captured steps follow changes", check_captures_follow_changes),
    Check("no wait within a step", check_no_wait_within_a_step),
    Check("waits of whole calls", count_waits_of_calls),
    Check("memory stays", check_memory_stays),
]
SANITIZER = Check("compute-sanitizer", run_sanitizer, 300, optional=True)

if __name__ == "__main__":  # under compute-sanitizer
    sanitize_this(Context(False, Path(), 0, lambda **event: None), capture=sys.argv[1] == "captured")
