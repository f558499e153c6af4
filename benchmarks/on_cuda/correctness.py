"""`cuda_acceptance.py correctness`: whether a GPU computes what the CPU and transformers compute."""

import itertools
import sys
from typing import Any

import torch

from llama import Llama, Transformer
from llama.checkpoint import load_model, open_checkpoint, save_checkpoint
from llama.decoding import prefill
from llama.quantized import QuantizedWeight
from llama.sampling import sample, sample_top_p
from on_cuda.models import (
    TOLERANCE,
    RandomCheckpoint,
    answering,
    capture_steps,
    close,
    copy_to,
    hugging_face,
    logits_of_steps,
    prepare,
    prompts_for,
    random_model,
    random_prompts,
    same,
    within,
)
from on_cuda.report import Check, Context, require
from on_cuda.steps import CHECKS_OF_STEPS, SANITIZER, compare_captured


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


def check_logits_processor(context: Context) -> None:
    device = prepare(context)
    model = random_model("tiny", context, device)
    prompts = prompts_for(model)
    (first, *_), _ = answering(model).generate(prompts, 10, 0)
    banned = first[0]

    def ban(input_ids: object, scores: torch.Tensor) -> torch.Tensor:
        same("device of the scores", scores.device.type, model.norm.weight.device.type)
        scores[:, banned] = -torch.inf
        return scores

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


CHECKS = [
    Check("machine", describe_machine, 120),
    Check("logits, tiny", lambda context: compare_logits("tiny", context)),
    Check("logits, 1B-shaped", lambda context: compare_logits("1B", context), 120),
    Check("greedy tokens, tiny", lambda context: compare_greedy("tiny", context)),
    Check("greedy tokens, 1B-shaped", lambda context: compare_greedy("1B", context), 120),
    Check("seeds", check_seeds),
    Check("sampled tokens beside torch.multinomial's", check_sampling),
    *CHECKS_OF_STEPS,
    Check("stop tokens and strings", check_stops),
    Check("streams", check_streams),
    Check("beams", check_beams),
    Check("cache reuse and prefill in chunks", check_cache_reuse),
    Check("logits_processor", check_logits_processor),
    Check("training", check_training),
    Check("int8, tiny", lambda context: check_quantized("tiny", "int8", context)),
    Check("int4, tiny", lambda context: check_quantized("tiny", "int4", context)),
    Check("int8, 1B-shaped", lambda context: check_quantized("1B", "int8", context), 120),
    Check("int4, 1B-shaped", lambda context: check_quantized("1B", "int4", context), 120),
    SANITIZER,
]
