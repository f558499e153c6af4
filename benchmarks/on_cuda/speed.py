"""`cuda_acceptance.py speed`: how long things take on a GPU, and how much of its memory.

Times are those of the whole thing, host and GPU, from when the GPU has nothing to do until it has finished; medians.
Decoding is the library's own loop, which looks at each token before the next step.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from llama import Llama, ModelArgs, Transformer
from llama.checkpoint import load_model, open_checkpoint, parameter_count, save_checkpoint
from llama.decoding import decode, prefill
from llama.sampling import sample, token_logprobs
from on_cuda.count import BANDWIDTHS, count_step
from on_cuda.models import (
    DRY_SIZES,
    SIZES,
    RandomCheckpoint,
    capture_steps,
    prepare,
    random_prompts,
    without_end,
)
from on_cuda.report import Check, Context, require

SHARE_OF_LIMIT = 0.75  # of the bandwidth, that a captured step of 8B reaches at batch 1 and context 128
SECONDS_FOR_COMPILING = 60  # that transformers may need for one more shape


def contexts(context: Context) -> tuple[int, ...]:
    """The tokens in the cache before a step."""
    return (8, 16, 32) if context.dry else (128, 2048, 8192)


def batches(context: Context) -> tuple[int, ...]:
    return (1, 2) if context.dry else (1, 8)


def build(name: str, context: Context, quantize: str | None = None) -> Llama:
    """A `Llama` with random weights of this shape, in bfloat16, and a cache for all that is measured."""
    device = prepare(context)
    checkpoint, max_seq_len = RandomCheckpoint(name, context.dry, device), max(contexts(context)) + 256
    options: dict[str, Any] = {"device": device.type, "dtype": torch.bfloat16, "quantize": quantize}
    return Llama.build(checkpoint, None, max_seq_len, max(batches(context)), **options)


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_memory() -> int:
    """The most memory in bytes that torch's tensors have taken on the GPU since `reset_peak_memory`; 0 on the CPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0


def reset_peak_memory() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def seconds_of(run: Callable[[], object], repeats: int) -> float:
    """The median time of calls, after one that isn't measured."""
    times = []
    for _ in range(1 + repeats):
        synchronize()
        begin = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def bandwidth(device: torch.device, dry: bool) -> float:
    """Bytes a second that the device's memory gives: the data sheet's, or for unknown devices those of a copy."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = next((value for gpu, value in BANDWIDTHS.items() if gpu in name), None)
    return copy_bandwidth(device, dry) if known is None else known


def copy_bandwidth(device: torch.device, dry: bool) -> float:
    """Bytes a second that a copy within the device's memory reads and writes."""
    source = torch.ones(2**20 if dry else 2**32, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), 10)


def needed_bytes(model: Transformer, batch: int, context_tokens: int) -> int:
    """Bytes of weights, and of the keys and values of earlier tokens, that no step can do without."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if not model.params.tie_embeddings:
        del tensors["tok_embeddings.weight"]
    keys = model.setup_cache().keys[:, :batch, :, : context_tokens + 1]
    return sum(tensor.nbytes for tensor in tensors.values()) + 2 * keys.numel() * keys.element_size()


def greedy(logits: torch.Tensor) -> torch.Tensor:
    return sample(logits, 0, 1.0)


def steps_of(model: Transformer, batch: int, context_tokens: int) -> Iterator[list[int]]:
    """Greedy decoding steps after so many tokens, whose keys and values are random."""
    with torch.inference_mode():
        cache = model.setup_cache()
        for layer in (*cache.keys, *cache.values):
            layer[:batch].normal_()
        logits = torch.zeros(batch, model.params.vocab_size, device=model.norm.weight.device)
    for tokens, _ in decode(model, logits, [context_tokens] * batch, greedy):
        yield tokens.tolist()


def seconds_of_step(model: Transformer, batch: int, context_tokens: int, n_steps: int) -> float:
    """The median time of a decoding step, from one list of tokens to the next."""
    times = []
    for i, _ in enumerate(steps_of(model, batch, context_tokens)):
        times.append(time.perf_counter())
        if i == n_steps + 3:  # in the first three, libraries prepare themselves, and steps are captured
            break
    return statistics.median(b - a for a, b in itertools.pairwise(times[3:]))


def kernels_of_step(model: Transformer, batch: int, context_tokens: int) -> int | str:
    """How many kernels a step starts, as torch's profiler counts them; on the CPU operators."""
    steps = steps_of(model, batch, context_tokens)
    for _ in range(3):
        next(steps)
    try:
        with torch.profiler.profile() as profile:
            next(steps)
            synchronize()
    except RuntimeError as error:  # some machines keep the profiler from the GPU's counters
        return f"unknown: {error}"
    on_gpu = [event for event in profile.events() or () if event.device_type.name == "CUDA"]
    copies = [event for event in on_gpu if event.name.startswith("Mem")]
    return len(on_gpu) - len(copies) if on_gpu else len(profile.events() or ())


def measure_memory_of_gpu(context: Context) -> None:
    device = prepare(context)
    context.record(
        "GPU", torch.cuda.get_device_name(device) if device.type == "cuda" else "none", torch=torch.__version__
    )
    context.record("bandwidth that the limits are computed with", bandwidth(device, context.dry) / 1e12, "TB/s")
    context.record("bandwidth of a copy", copy_bandwidth(device, context.dry) / 1e12, "TB/s")


def measure_decoding(name: str, quantize: str | None, context: Context) -> None:
    """Loading, and decoding steps at each context and batch, captured and not."""
    reset_peak_memory()
    begin = time.perf_counter()
    llama = build(name, context, quantize)
    synchronize()
    model: Any = llama.model
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    context.record(
        "random weights made", time.perf_counter() - begin, "s", GB=weights / 1e9, peak_GB=peak_memory() / 1e9
    )
    rate, n_steps = bandwidth(model.norm.weight.device, context.dry), 4 if context.dry else 40
    sizes = (DRY_SIZES if context.dry else SIZES)[name]
    for captured in (False, True):
        if captured:
            capture_steps(model)
        for batch, n_tokens in itertools.product(batches(context), contexts(context)):
            seconds = seconds_of_step(model, batch, n_tokens, n_steps)
            limit = needed_bytes(model, batch, n_tokens) / rate
            details: dict[str, float | str] = {"limit": 1e3 * limit, "share": limit / seconds}
            if quantize is None:
                counts = count_step(sizes, batch, n_tokens)
                details["expected"] = 1e3 * (counts.captured(rate) if captured else counts.uncaptured(rate))
            if n_tokens == min(contexts(context)):
                details["kernels"] = kernels_of_step(model, batch, n_tokens)
            what = f"{'captured' if captured else 'not captured'}, batch {batch}, context {n_tokens}"
            context.record(what, 1e3 * seconds, "ms a step", **details)
            if captured and (name, quantize, batch) == ("8B", None, 1) and n_tokens == 128:
                share = limit / seconds
    if name == "8B" and quantize is None and not context.dry:
        require(share >= SHARE_OF_LIMIT, f"captured, batch 1, context 128: {share:.3f} of the bandwidth limit")
    context.record("peak memory", peak_memory() / 1e9, "GB")


def measure_calls(name: str, context: Context) -> None:
    """Prefill, sampling, and whole calls."""
    llama = build(name, context)
    model: Any = llama.model
    vocab_size, n_parameters = model.params.vocab_size, parameter_count(model.params)
    for length in (8, 32) if context.dry else (512, 8192):
        prompt = random_prompts([length], vocab_size)
        reset_peak_memory()
        before = peak_memory()
        seconds = seconds_of(lambda prompt=prompt: prefill(model, prompt), 5)  # type: ignore[misc]
        context.record(
            f"prefill of {length}",
            1e3 * seconds,
            "ms",
            tokens_per_s=length / seconds,
            TFLOP_per_s=2 * n_parameters * length / seconds / 1e12,
            more_GB=(peak_memory() - before) / 1e9,
        )
    for batch in batches(context):
        logits = torch.randn(batch, vocab_size, device=model.norm.weight.device)
        for what, run in {
            "sampling at top-p 0.9": lambda logits=logits: sample(logits, 0.6, 0.9),
            "sampling at top-p 1": lambda logits=logits: sample(logits, 0.6, 1.0),
            "greedy": lambda logits=logits: sample(logits, 0, 1.0),
            "logprobs": lambda logits=logits: token_logprobs(logits, logits.argmax(-1)),
        }.items():
            context.record(f"{what}, {batch} x {vocab_size}", 1e6 * seconds_of(run, 20), "µs")
    n_tokens = 8 if context.dry else 64
    prompt = random_prompts([min(contexts(context))], vocab_size)
    for captured in (False, True):
        if captured:
            capture_steps(model)
        calls: dict[str, dict[str, Any]] = {"sampled": {}, "with logprobs": {"logprobs": True}}
        if max(batches(context)) >= 4 or context.dry:
            calls["beams"] = {"num_beams": 2 if context.dry else 4}
        for what, options in calls.items():
            longer, shorter = (
                seconds_of(lambda n=n, options=options: llama.generate(prompt, n, **options), 3)  # type: ignore[misc]
                for n in (n_tokens + 1, 1)
            )
            ms = 1e3 * (longer - shorter) / n_tokens
            context.record(f"{what}, {'captured' if captured else 'not captured'}", ms, "ms a token in a whole call")


def measure_loading(context: Context) -> None:
    """A checkpoint of 1B from files in Meta's layout, which the system has cached, with each quantization."""
    device = prepare(context)
    random = RandomCheckpoint("1B", context.dry, device)
    args = random.settings.model_args(random.settings.params["vocab_size"], 128, 1)
    written = load_model(random, args, device=device, dtype=torch.bfloat16)
    save_checkpoint(context.folder / "1B", written)
    del written
    for quantize in (None, "int8", "int4"):
        reset_peak_memory()
        synchronize()
        begin = time.perf_counter()
        model = load_model(
            open_checkpoint(context.folder / "1B"), args, device=device, dtype=torch.bfloat16, quantize=quantize
        )
        synchronize()
        seconds = time.perf_counter() - begin
        size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        context.record(f"from files, quantize={quantize}", seconds, "s", GB=size / 1e9, peak_GB=peak_memory() / 1e9)
        del model


def measure_training(name: str, train: str, context: Context) -> None:
    """Steps of fine-tuning on 4 examples of 512 tokens."""
    from llama.finetune.data import Example
    from llama.finetune.optimizer import Optimizer
    from llama.finetune.training import checkpoint_activations, select_trainable, train_step
    from llama.finetune.training_params import TrainingParams

    device = prepare(context)
    reset_peak_memory()
    random, length = RandomCheckpoint(name, context.dry, device), 32 if context.dry else 512
    args = random.settings.model_args(random.settings.params["vocab_size"], length, 1)
    model = load_model(random, args, device=device, dtype=torch.bfloat16)
    params = TrainingParams(
        format="plain",
        train=train,
        lr=None,
        epochs=1,
        batch_size=4,
        grad_accum=1,
        max_seq_len=length,
        warmup=0.1,
        weight_decay=0.01,
        clip=1.0,
        val_fraction=0.0,
        save_every=100,
        seed=1,
        lora_rank=16,
        activation_checkpointing=name == "8B",
    )
    select_trainable(model, params)
    if params.activation_checkpointing:
        checkpoint_activations(model)
    optimizer = Optimizer(model, params.weight_decay)
    texts = random_prompts([length] * 4, args.vocab_size)
    examples = [Example(i, text, [j > 0 for j in range(length)]) for i, text in enumerate(texts)]
    seconds = seconds_of(lambda: train_step(model, optimizer, examples, 1e-5, params), 2 if context.dry else 5)
    rate = 4 * length / seconds
    context.record(f"a step of 4 x {length}", 1e3 * seconds, "ms", tokens_per_s=rate, peak_GB=peak_memory() / 1e9)


def random_transformers(name: str, context: Context) -> Any:
    """A network of transformers of this shape, with random weights in bfloat16."""
    import transformers

    device, sizes = prepare(context), (DRY_SIZES if context.dry else SIZES)[name]
    args = ModelArgs(**sizes)
    config = transformers.LlamaConfig(
        hidden_size=args.dim,
        intermediate_size=args.ffn_size,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_size,
        vocab_size=args.vocab_size,
        max_position_embeddings=131072,
        tie_word_embeddings=args.tie_embeddings,
    )
    with device:
        auto_model: Any = transformers.AutoModelForCausalLM
        return without_end(auto_model.from_config(config, dtype=torch.bfloat16).eval())


def measure_transformers(name: str, cache: str, context: Context) -> None:
    """transformers' own greedy loop.

    Args:
        cache: "dynamic", its default; or "static", with which it compiles the network on a GPU by itself.
    """
    network = random_transformers(name, context)
    shapes: Sequence[tuple[int, int]] = list(itertools.product(batches(context), contexts(context)))
    begin = time.time()
    for batch, n_tokens in shapes:
        if cache == "static" and context.seconds_left() < SECONDS_FOR_COMPILING:
            context.record(f"batch {batch}, context {n_tokens}", "left out: too little time is left to compile it")
            continue
        tokens = torch.tensor(random_prompts([n_tokens] * batch, network.config.vocab_size), device=network.device)
        times = seconds_of_tokens(network, tokens, cache, 6 if context.dry else 24)
        seconds = statistics.median(times[len(times) // 2 :])  # the first ones compile
        longest = max(times)
        context.record(f"batch {batch}, context {n_tokens}", 1e3 * seconds, "ms a step", slowest_s=longest)
    context.record("all of it", time.time() - begin, "s")


def seconds_of_tokens(network: Any, tokens: torch.Tensor, cache: str, n_new: int) -> list[float]:
    """The time of each token but the first."""
    times: list[float] = []

    def note_time(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        synchronize()
        times.append(time.perf_counter())
        return scores

    options: dict[str, Any] = {"max_new_tokens": n_new, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    options |= {"cache_implementation": "static"} if cache == "static" else {}
    network.generate(tokens, logits_processor=[note_time], **options)
    return [b - a for a, b in itertools.pairwise(times)]


CHECKS = [
    Check("memory bandwidth", measure_memory_of_gpu, 60),
    Check("8B, bfloat16", lambda context: measure_decoding("8B", None, context), 90),
    Check("1B, bfloat16", lambda context: measure_decoding("1B", None, context), 60),
    Check("8B, calls", lambda context: measure_calls("8B", context), 60),
    Check("1B, calls", lambda context: measure_calls("1B", context), 60),
    Check("8B, int8", lambda context: measure_decoding("8B", "int8", context), 90),
    Check("8B, int4", lambda context: measure_decoding("8B", "int4", context), 90),
    Check("1B, int8", lambda context: measure_decoding("1B", "int8", context), 60),
    Check("1B, int4", lambda context: measure_decoding("1B", "int4", context), 60),
    Check("1B, loading", measure_loading, 90),
    Check("1B, fine-tuning, LoRA", lambda context: measure_training("1B", "lora", context), 60),
    Check("1B, fine-tuning, all weights", lambda context: measure_training("1B", "all", context), 60),
    Check("8B, fine-tuning, LoRA", lambda context: measure_training("8B", "lora", context), 60, optional=True),
    Check("transformers 8B", lambda context: measure_transformers("8B", "dynamic", context), 90, optional=True),
    Check("transformers 1B", lambda context: measure_transformers("1B", "dynamic", context), 60, optional=True),
    Check(
        "transformers 8B, static cache, compiled",
        lambda context: measure_transformers("8B", "static", context),
        120,
        optional=True,
        alone=True,
    ),
    Check(
        "transformers 1B, static cache, compiled",
        lambda context: measure_transformers("1B", "static", context),
        120,
        optional=True,
        alone=True,
    ),
]
