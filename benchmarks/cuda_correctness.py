"""`cuda_acceptance.py correctness`: whether a GPU computes what the CPU and transformers compute."""

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from cuda_models import (
    RandomCheckpoint,
    answering,
    capture_steps,
    copy_to,
    count_replays,
    count_waits,
    hugging_face,
    logits_of_steps,
    no_waits,
    prepare,
    random_model,
    random_prompts,
)
from cuda_report import Check, Context, Skipped, require
from torch import nn

from llama import Llama, Transformer
from llama.checkpoint import load_model, open_checkpoint, save_checkpoint
from llama.decoding import decode, prefill
from llama.positions import fixed_end
from llama.quantized import QuantizedWeight
from llama.sampling import sample, sample_top_p

TOLERANCE = 1e-4  # of logits and logprobs in float32
ROUNDING = 0.02  # of a vector in bfloat16, as a fraction of its length


def close(name: str, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = TOLERANCE) -> float:
    """The largest difference of two tensors; AssertionError if it is larger than the tolerance."""
    error = float((ours.detach().cpu().double() - theirs.detach().cpu().double()).abs().max())
    require(error <= tolerance, f"{name}: {error} is more than {tolerance}")  # nor is NaN accepted
    return error


def within(name: str, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = ROUNDING) -> float:
    """How far two tensors are apart, as a fraction of their size; AssertionError if it is more than the tolerance."""
    error = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
    require(error <= tolerance, f"{name}: {error} of its size is more than {tolerance}")
    return error


def same(name: str, ours: object, theirs: object) -> None:
    """Raise AssertionError unless both are the same."""
    require(ours == theirs, f"{name}: {ours!r:.200} is not {theirs!r:.200}")


def prompts_for(model: Transformer, lengths: Sequence[int] = (40, 5, 17)) -> list[list[int]]:
    """Prompts of different lengths."""
    return random_prompts(lengths, model.params.vocab_size)


def describe_machine(context: Context) -> None:
    device = prepare(context)
    context.record("torch", torch.__version__)
    context.record("Python", sys.version.split()[0])
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        context.record("GPU", properties.name)
        context.record("memory", properties.total_memory / 1e9, "GB")
        context.record("multiprocessors", properties.multi_processor_count)
        context.record("compute capability", f"{properties.major}.{properties.minor}")
        context.record("CUDA", str(torch.version.cuda))
    llama = Llama.build(RandomCheckpoint("tiny", context.dry, device), None, 64, 2, compile=device.type == "cuda")
    model: Any = llama.model
    if device.type == "cuda":
        same("default device", model.norm.weight.device, device)
        same("default dtype", model.norm.weight.dtype, torch.bfloat16)
        same("compile=True", type(model.compiled).__name__, "CapturedModel")
    (tokens,), _ = llama.generate([[1, 2, 3]], 5)
    same("number of tokens", len(tokens), 5)


def compare_logits(name: str, context: Context) -> None:
    """The logits of prompts of unequal length and of the tokens after them, on the GPU, the CPU and in transformers."""
    device = prepare(context)
    model = random_model(name, context, device)
    twin = hugging_face(model, context.folder / "twin", device)
    prompts, n_steps = prompts_for(model), 6
    answers = random_prompts([n_steps] * len(prompts), model.params.vocab_size, seed=1)
    chunk, positions = torch.tensor(random_prompts([4, 4, 4], model.params.vocab_size, seed=2)), torch.tensor([9, 0, 5])
    ours = logits_of_steps(model, prompts, answers)  # (steps, batch, vocab_size)
    ours_of_chunk = model.forward(chunk.to(device), positions)
    beside_twin, beside_whole = [], []
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        with torch.no_grad():
            text = torch.tensor([prompt + answer[:-1]], device=device)
            theirs = twin(text, use_cache=False).logits[0, len(prompt) - 1 :]
            whole = model.forward(text)[0, len(prompt) - 1 :]
        beside_twin.append(close(f"row {row}, beside transformers", ours[:, row], theirs))
        beside_whole.append(close(f"row {row}, beside the same text without a cache", ours[:, row], whole))
    context.record("beside transformers", max(beside_twin), "largest difference")
    context.record("beside the same text without a cache", max(beside_whole), "largest difference")
    del twin
    on_cpu = copy_to(model, "cpu")
    error = close("beside the CPU", ours, logits_of_steps(on_cpu, prompts, answers))
    error = max(error, close("several tokens a row", ours_of_chunk, on_cpu.forward(chunk, positions)))
    context.record("beside the CPU", error, "largest difference")


def same_greedy(name: str, ours: list[int], theirs: list[int], prompt: list[int], model: Transformer) -> None:
    """Raise AssertionError unless two greedy answers are the same, up to a step where two tokens are equally likely."""
    different = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
    if different:
        i = different[0]
        text = torch.tensor([prompt + ours[:i]], device=model.norm.weight.device)
        logits = model.forward(text)[0, -1]
        gap = float((logits[ours[i]] - logits[theirs[i]]).abs())
        require(gap <= 2 * TOLERANCE, f"{name}: token {i} is {ours[i]}, not {theirs[i]}, whose logit differs by {gap}")


def compare_greedy(name: str, context: Context) -> None:
    """Greedy tokens and their logprobs, on the GPU, captured and not, the CPU and in transformers."""
    device = prepare(context)
    model = random_model(name, context, device)
    prompts, n_tokens = prompts_for(model), 16 if context.dry else 32
    ours, logprobs = answering(model).generate(prompts, n_tokens, 0, logprobs=True)
    _, scores = answering(model).generate(prompts, 0, echo=True, logprobs=True)
    capture_steps(model)
    same("captured", answering(model).generate(prompts, n_tokens, 0)[0], ours)
    model.compiled = None
    twin = hugging_face(model, context.folder / "twin", device)
    on_cpu = copy_to(model, "cpu")
    for prompt, answer in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt], device=device)
        theirs = twin.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_tokens, do_sample=False)
        same_greedy("transformers", answer, theirs[0, len(prompt) :].tolist(), prompt, on_cpu)
    del twin
    tokens, cpu_logprobs = answering(on_cpu).generate(prompts, n_tokens, 0, logprobs=True)
    for row in range(len(prompts)):
        same_greedy("CPU", ours[row], tokens[row], prompts[row], on_cpu)
    if tokens == ours:
        error = close("logprobs", torch.tensor(logprobs), torch.tensor(cpu_logprobs))
        context.record("logprobs, beside the CPU", error, "largest difference")
    _, cpu_scores = answering(on_cpu).generate(prompts, 0, echo=True, logprobs=True)
    for score, cpu_score in zip(scores or [], cpu_scores or [], strict=True):
        close("logprobs of a prompt", torch.tensor(score), torch.tensor(cpu_score))
    context.record("tokens", sum(map(len, ours)))


def check_seeds(context: Context) -> None:
    device = prepare(context)
    model = random_model("tiny", context, device)
    llama = answering(model)
    prompts = prompts_for(model, (5, 5, 5))
    for captured in (False, True):
        if captured:
            capture_steps(model)
        first, again, other = (llama.generate(prompts, 30, 1.0, 1.0, seed=seed)[0] for seed in (5, 5, 6))
        same(f"the same seed again, captured: {captured}", again, first)
        require(other != first, "another seed gives the same tokens")
        same("global seed", *(torch.manual_seed(7) and llama.generate(prompts, 30)[0] for _ in range(2)))
        if not captured:
            uncaptured = first
    same("captured", first, uncaptured)


def multinomial_reference(probs: torch.Tensor, p: float, generator: torch.Generator) -> torch.Tensor:
    """Sampling from the nucleus by sorting and `torch.multinomial`, in the fewest words."""
    probs, ids = probs.sort(dim=-1, descending=True)
    probs[probs.cumsum(dim=-1) - probs > p] = 0
    return ids.gather(-1, torch.multinomial(probs / probs.sum(dim=-1, keepdim=True), 1, generator=generator))


def check_sampling(context: Context) -> None:
    """Sampled tokens are those that `torch.multinomial` samples, and leave the generator where it leaves it."""
    device = prepare(context)
    generators = [torch.Generator(device) for _ in range(2)]
    mismatches = count = 0
    for vocab_size in (320, 1000) if context.dry else (320, 32000, 128256):
        for batch, temperature, p, trial in itertools.product((1, 3, 8), (0.6, 1.0), (0.1, 0.9, 1.0), range(5)):
            logits = torch.randn(batch, vocab_size, device=device) * 3
            for generator in generators:
                generator.manual_seed(trial)
            ours = sample(logits, temperature, p, generator=generators[0])
            theirs = multinomial_reference(torch.softmax(logits / temperature, dim=-1), p, generators[1]).squeeze(-1)
            same("random state", generators[0].get_state().tolist(), generators[1].get_state().tolist())
            mismatches, count = mismatches + int((ours != theirs).sum()), count + batch
            probs = torch.softmax(logits, dim=-1)
            again = [f(probs, p, g) for f, g in zip((plain_top_p, multinomial_reference), generators, strict=True)]
            mismatches, count = mismatches + int((again[0] != again[1]).sum()), count + batch
    context.record("sampled tokens", count)
    context.record("mismatches", mismatches)
    same("mismatches", mismatches, 0)
    bad = torch.tensor([[0.0, torch.nan], [0.0, torch.inf], [-torch.inf, -torch.inf], [0.0, 9.0]], device=device)
    same("logits that are no numbers", sample(bad, 0.6, 0.0).tolist(), [-1, -1, -1, 1])
    same("the same, greedy", sample(bad, 0, 1.0).tolist(), [-1, -1, -1, 1])


def plain_top_p(probs: torch.Tensor, p: float, generator: torch.Generator) -> torch.Tensor:
    return sample_top_p(probs, p, generator=generator)


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
    model = random_model(name, context, device, dtype, max_seq_len=600)
    capture_steps(model)
    edge = next(end for end in range(2, 600) if fixed_end(end + 1, 600) > fixed_end(end, 600))
    context.record("first edge", edge)
    n_steps, n_equal = 8, 0
    for last in (edge + 4, 599):  # the greatest position
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


def check_stops(context: Context) -> None:
    device = prepare(context)
    model = random_model("tiny", context, device)
    prompts = prompts_for(model, (9, 4))
    for captured in (False, True):
        if captured:
            capture_steps(model)
        (first, second), _ = answering(model).generate(prompts, 20, 0)
        stop = first[6]
        expected = [row[: row.index(stop)] if stop in row else row for row in (first, second)]
        same("stop token", answering(model, {stop}).generate(prompts, 20, 0)[0], expected)
        predictions = answering(model).text_completion(
            [" ".join(map(str, prompt)) for prompt in prompts], 0, max_gen_len=20, stop=[f" {stop} "]
        )
        text = "".join(f"{token} " for token in first)
        end = text.find(f" {stop} ")
        same("stop string", predictions[0]["generation"], text if end < 0 else text[:end])


def check_streams(context: Context) -> None:
    device = prepare(context)
    model = random_model("tiny", context, device)
    llama, prompts = answering(model), prompts_for(model)
    for captured in (False, True):
        if captured:
            capture_steps(model)
        expected, _ = llama.generate(prompts, 20, seed=3)
        left = llama.generate_stream(prompts, 500, seed=3)
        pieces = [next(left) for _ in range(7)]
        left.close()
        for piece in pieces:
            require(piece.token in expected[piece.row], "a stream yields another token")
        same("after a stream that was left", llama.generate(prompts, 20, seed=3)[0], expected)
        rows: list[list[int]] = [[] for _ in prompts]
        for piece in llama.generate_stream(prompts, 20, seed=3):
            rows[piece.row] += [] if piece.token is None else [piece.token]
        same("stream", rows, expected)


def check_beams(context: Context) -> None:
    device = prepare(context)
    model = random_model("tiny", context, device, max_batch_size=8)
    prompts = prompts_for(model, (9, 4))
    ours, _ = answering(model).generate(prompts, 12, num_beams=4, num_return_sequences=2)
    capture_steps(model)
    same("captured", answering(model).generate(prompts, 12, num_beams=4, num_return_sequences=2)[0], ours)
    model.compiled = None
    on_cpu = answering(copy_to(model, "cpu"))
    same("CPU", ours, on_cpu.generate(prompts, 12, num_beams=4, num_return_sequences=2)[0])
    twin = hugging_face(model, context.folder / "twin", device)
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt], device=device)
        options = {"max_new_tokens": 12, "num_beams": 4, "num_return_sequences": 2, "do_sample": False}
        theirs = twin.generate(ids, attention_mask=torch.ones_like(ids), **options)
        same("transformers", ours[2 * i : 2 * i + 2], theirs[:, len(prompt) :].tolist())


def check_cache_reuse(context: Context) -> None:
    """A prompt in chunks, and calls that reuse the cache, give what whole prompts give."""
    device = prepare(context)
    model = random_model("tiny", context, device)
    prompts = prompts_for(model, (90, 90, 90))
    whole, _ = prefill(model, prompts)
    for start, stop in ((0, 30), (30, 31), (31, 90)):
        parts, _ = prefill(model, [prompt[:stop] for prompt in prompts], start)
    context.record("a prompt in three chunks", close("chunks", parts, whole), "largest difference")
    llama = answering(model)
    for captured in (False, True):
        if captured:
            capture_steps(model)
        expected, _ = llama.generate(prompts, 20, 0)
        for stop in (30, 60, 90):
            actual, _ = llama.generate([prompt[:stop] for prompt in prompts], 20, 0, reuse_cache=True)
        same("with the cache of the last call", actual, expected)
        longer = [prompt + answer + [5, 6] for prompt, answer in zip(prompts, expected, strict=True)]
        actual, _ = llama.generate(longer, 20, 0, reuse_cache=True)
        same("a conversation that goes on", actual, llama.generate(longer, 20, 0)[0])


def check_quantized(name: str, quantize: str, context: Context) -> None:
    """Products with few bits are those of the dequantized weights, whose values are the CPU's; so is a generation."""
    device = prepare(context)
    original = random_model(name, context, device, torch.bfloat16)
    save_checkpoint(context.folder / "original", original)
    del original

    def load(folder: str, device: torch.device, quantize: str | None = None) -> Transformer:
        checkpoint = open_checkpoint(context.folder / folder)
        args = checkpoint.settings.model_args(checkpoint.settings.params["vocab_size"], 600, 4)
        return load_model(checkpoint, args, device=device, dtype=torch.bfloat16, quantize=quantize)

    model, on_cpu = load("original", device, quantize), load("original", torch.device("cpu"), quantize)
    cpu_weights: dict[str, Any] = dict(on_cpu.named_modules())
    on_devices, of_products = [], []
    for path, weight in model.named_modules():
        if not isinstance(weight, QuantizedWeight) or not path.startswith(("layers.0.", "output")):
            continue
        matrix, cpu_weight = weight.dequantize().float(), cpu_weights[path]
        on_devices.append(within(f"{path} on the CPU", matrix, cpu_weight.dequantize().to(device)))
        for rows in (1, 3, 16, 64):
            x = torch.randn(rows, weight.in_features, device=device, dtype=torch.bfloat16)
            of_products.append(within(f"{path}, {rows} rows", weight(x), x.float() @ matrix.T))
    context.record("weights, beside the CPU's", max(on_devices), "of their size")
    context.record("products, beside those of dequantized weights", max(of_products), "of their size")
    del on_cpu
    save_checkpoint(context.folder / "dequantized", model)
    plain = load("dequantized", device)
    prompts = random_prompts((40, 5, 17), model.params.vocab_size)
    answers = random_prompts([6] * 3, model.params.vocab_size, seed=1)
    ours, theirs = (logits_of_steps(network, prompts, answers) for network in (model, plain))
    context.record("logits, beside those of dequantized weights", within("logits", ours, theirs, 0.1), "of their size")
    capture_steps(model)
    compare_captured(model, random_prompts([250] * 2, model.params.vocab_size), 10, "captured")
    tokens, _ = answering(model).generate(prompts, 30, seed=1)
    same("numbers of tokens", list(map(len, tokens)), [30] * 3)


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

                steps = decode(model, logits, list(lengths), select, logprobs=logprobs)
                for _ in range(4):
                    with no_waits(device) if attempt else contextlib.nullcontext():
                        tokens, _ = next(steps)
                    tokens.tolist()


def count_waits_of_calls(context: Context) -> None:
    """How often the host waits in each step of a whole call."""
    device = prepare(context)
    model = random_model("tiny", context, device, max_batch_size=8)
    llama, n = answering(model), 20
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


def check_logits_processor(context: Context) -> None:
    device = prepare(context)
    model = random_model("tiny", context, device)
    prompts = prompts_for(model)
    (first, *_), _ = answering(model).generate(prompts, 10, 0)
    banned = first[0]

    def ban(tokens: object, logits: torch.Tensor) -> torch.Tensor:
        same("device of the logits", logits.device.type, model.norm.weight.device.type)
        logits[:, banned] = -torch.inf
        return logits

    ours, _ = answering(model).generate(prompts, 10, 0, logits_processor=ban)
    require(not any(banned in row for row in ours), "a banned token was taken")
    capture_steps(model)
    same("captured", answering(model).generate(prompts, 10, 0, logits_processor=ban)[0], ours)
    model = copy_to(model, "cpu")
    model.compiled = None
    same("CPU", answering(model).generate(prompts, 10, 0, logits_processor=ban)[0], ours)


def check_training(context: Context) -> None:
    """The losses of a few steps are those of the CPU."""
    from llama.finetune.data import Example
    from llama.finetune.optimizer import Optimizer
    from llama.finetune.training import select_trainable, train_step
    from llama.finetune.training_params import TrainingParams

    device = prepare(context)
    original = random_model("tiny", context, device)
    texts = random_prompts((30, 12, 25, 8), original.params.vocab_size)
    examples = [Example(i, text, [j > 4 for j in range(len(text))]) for i, text in enumerate(texts)]
    for train in ("all", "lora"):
        params = TrainingParams(
            format="plain",
            train=train,
            lr=None,
            epochs=1,
            batch_size=2,
            grad_accum=2,
            max_seq_len=64,
            warmup=0.1,
            weight_decay=0.01,
            clip=1.0,
            val_fraction=0.0,
            save_every=100,
            seed=1,
            lora_rank=8,
            activation_checkpointing=False,
        )
        losses = []
        for target in (device, torch.device("cpu")):
            model = copy_to(original, target)
            select_trainable(model, params)
            optimizer = Optimizer(model, params.weight_decay)
            losses.append([train_step(model, optimizer, examples, 1e-3, params) for _ in range(4)])
        ratios = torch.tensor(losses[0]) / torch.tensor(losses[1])
        error = close(f"losses and gradient norms, {train}", ratios, torch.ones_like(ratios), 1e-3)
        context.record(f"losses and gradient norms, {train}", error, "largest difference, as a fraction")


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


CHECKS = [
    Check("machine", describe_machine, 120),
    Check("logits, tiny", lambda context: compare_logits("tiny", context)),
    Check("logits, 1B-shaped", lambda context: compare_logits("1B", context), 120),
    Check("greedy tokens, tiny", lambda context: compare_greedy("tiny", context)),
    Check("greedy tokens, 1B-shaped", lambda context: compare_greedy("1B", context), 120),
    Check("seeds", check_seeds),
    Check("sampled tokens beside torch.multinomial's", check_sampling),
    Check("captured steps, tiny, float32", lambda context: check_captured("tiny", torch.float32, context)),
    Check("captured steps, tiny, bfloat16", lambda context: check_captured("tiny", torch.bfloat16, context)),
    Check("captured steps, tiny, float16", lambda context: check_captured("tiny", torch.float16, context)),
    Check("captured steps, 1B-shaped, bfloat16", lambda context: check_captured("1B", torch.bfloat16, context)),
    Check("captured steps follow changes", check_captures_follow_changes),
    Check("stop tokens and strings", check_stops),
    Check("streams", check_streams),
    Check("beams", check_beams),
    Check("cache reuse and prefill in chunks", check_cache_reuse),
    Check("int8, tiny", lambda context: check_quantized("tiny", "int8", context)),
    Check("int4, tiny", lambda context: check_quantized("tiny", "int4", context)),
    Check("int8, 1B-shaped", lambda context: check_quantized("1B", "int8", context), 120),
    Check("int4, 1B-shaped", lambda context: check_quantized("1B", "int4", context), 120),
    Check("no wait within a step", check_no_wait_within_a_step),
    Check("waits of whole calls", count_waits_of_calls),
    Check("memory stays", check_memory_stays),
    Check("logits_processor", check_logits_processor),
    Check("training", check_training),
    Check("compute-sanitizer", run_sanitizer, 300, optional=True),
]

if __name__ == "__main__":  # under compute-sanitizer
    sanitize_this(Context(False, Path(), 0, lambda **event: None), capture=sys.argv[1] == "captured")
