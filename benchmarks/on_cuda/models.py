"""What the checks of `cuda_acceptance.py` share: random models, of published shapes or tiny, and comparisons."""

import base64
import copy
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import llama.positions
from llama import Llama, ModelArgs, Transformer
from llama.checkpoint import Checkpoint, Settings, parameter_shapes, save_checkpoint
from llama.decoding import decode, prefill
from on_cuda.report import Context, require

TINY: dict[str, Any] = {"dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 192, "vocab_size": 512}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": TINY,
    "1B": {  # Llama 3.2
        **{"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "ffn_dim": 8192, "vocab_size": 128256},
        **{"tie_embeddings": True, "use_scaled_rope": True, "rope_scaling_factor": 32.0},
    },
    "8B": {  # Llama 3.1
        **{"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "ffn_dim": 14336, "vocab_size": 128256},
        **{"use_scaled_rope": True},
    },
}
DRY_SIZES: dict[str, dict[str, Any]] = {  # what takes their place on a CPU
    "tiny": TINY,
    "1B": TINY | {"n_layers": 3, "tie_embeddings": True, "use_scaled_rope": True, "rope_scaling_factor": 32.0},
    "8B": TINY | {"n_layers": 3, "n_kv_heads": 1, "use_scaled_rope": True},
}
# Standard deviations of the weights. Those of the tiny model are so large that every part of it matters.
STD = {"tiny": 0.2, "1B": 0.02, "8B": 0.02}

TOLERANCE = 1e-4  # of logits and logprobs in float32
ROUNDING = 0.02  # of a vector in bfloat16, as a fraction of its length


class IdTokenizer:
    """A tokenizer whose texts are token ids, separated by spaces.

    Args:
        vocab_size: how many tokens there are.
        stop_tokens: those that end an answer.
    """

    pad_id = -1

    def __init__(self, vocab_size: int, stop_tokens: Iterable[int] = ()) -> None:
        self.n_words, self.stop_tokens = vocab_size, set(stop_tokens)

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        return list(map(int, s.split()))

    def decode(self, t: list[int]) -> str:
        return "".join(f"{token} " for token in t)


class RandomCheckpoint(Checkpoint):
    """A checkpoint that has no files: its weights are random numbers, made on the device when they are read.

    Args:
        name: of `SIZES`.
        dry: take the small sizes of that name.
        device: where the weights are made.
    """

    def __init__(self, name: str, dry: bool, device: torch.device) -> None:
        sizes = (DRY_SIZES if dry else SIZES)[name]
        self.path, self.device, self.std = Path(f"random-{name}"), device, STD["tiny" if dry else name]
        self.settings = Settings(self.path, sizes)
        self._shapes = parameter_shapes(ModelArgs(**sizes))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def dtypes(self) -> Iterable[torch.dtype]:
        return [torch.bfloat16]

    def read(self, name: str, axis: int | None, start: int, stop: int) -> torch.Tensor:
        shape = list(self._shapes[name])
        if axis is not None:
            shape[axis] = stop - start
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16, device=self.device)
        return torch.empty(shape, dtype=torch.bfloat16, device=self.device).normal_(0, self.std)

    def release(self, name: str) -> None:
        pass

    def tokenizer(self, path: str | Path | None = None) -> Any:
        return IdTokenizer(self.settings.params["vocab_size"])


def prepare(context: Context) -> torch.device:
    """The device to check, with torch set up for it.

    On the CPU, decoding steps and sampling are made to do what they do on a GPU.
    """
    torch.manual_seed(0)
    if context.dry:
        use_fixed_steps()
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError("torch finds no GPU; --dry tries the script out on the CPU")
    # float32 is to be float32, so that results can be compared to 1e-4.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    return torch.device("cuda", torch.cuda.current_device())


def use_fixed_steps() -> None:
    """Have decoding steps and sampling do on every device what they do on a GPU."""
    positions: Any = llama.positions
    positions.FIXED_STEPS_ON = ("cuda", "cpu", "meta")


def random_model(
    name: str, context: Context, device: torch.device, dtype: torch.dtype = torch.float32, **cache: int
) -> Transformer:
    """A network of one of `SIZES`, always with the same weights.

    Args:
        cache: `max_seq_len` and `max_batch_size`; left out, 1024 and 4.
    """
    sizes = (DRY_SIZES if context.dry else SIZES)[name]
    args = ModelArgs(**{"max_seq_len": 1024, "max_batch_size": 4} | sizes | cache)
    with torch.device("meta"):
        model = Transformer(args)
    model = model.to_empty(device=device).to(dtype)
    if args.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight
    generator = torch.Generator(device).manual_seed(0)
    std = STD["tiny" if context.dry else name]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0, std, generator=generator)
    return model.requires_grad_(False)


def answering(model: Transformer, stop_tokens: Iterable[int] = ()) -> Llama:
    """A `Llama` over a network, whose texts are token ids."""
    return Llama(model, IdTokenizer(model.params.vocab_size, stop_tokens))


def copy_to(model: Transformer, device: str | torch.device) -> Transformer:
    """A copy of a network on another device."""
    model.cache = None
    return copy.deepcopy(model).to(device)


def hugging_face(model: Transformer, folder: Path, device: torch.device) -> Any:
    """The same network in transformers, by way of files in its layout."""
    import transformers

    save_checkpoint(folder, model, layout="hf")
    twin: Any = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=model.norm.weight.dtype)
    return without_end(twin.to(device).eval())


def without_end(network: Any) -> Any:
    """Let a network of transformers generate until it has made as many tokens as it is to."""
    network.generation_config.eos_token_id, network.generation_config.pad_token_id = None, 0
    return network


def capture_steps(model: Transformer) -> None:
    """Have the decoding steps of a network captured in CUDA graphs; on the CPU they stay as they are."""
    if model.norm.weight.is_cuda:
        from llama.captured import CapturedModel
        from llama.compiled import compile_model

        compile_model(model)
        if not isinstance(model.compiled, CapturedModel):
            raise AssertionError(f"steps on {model.norm.weight.device} are not captured, but {model.compiled!r}")


def random_prompts(lengths: Iterable[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]


def prompts_for(model: Transformer, lengths: Sequence[int] = (40, 5, 17)) -> list[list[int]]:
    """Prompts of different lengths."""
    return random_prompts(lengths, model.params.vocab_size)


def logits_of_steps(model: Transformer, prompts: list[list[int]], answers: list[list[int]]) -> torch.Tensor:
    """The logits of each next token, in the decode loop, where the tokens are given.

    Args:
        answers: of each row, the tokens after its prompt; as many for each.

    Returns:
        (steps, batch, vocab_size): the first follow the prompts, the last the last but one token of the answers.
    """
    logits, _ = prefill(model, prompts)
    tokens = iter(torch.tensor(answers, device=logits.device).T.contiguous())
    seen = []

    def select(logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits.clone())
        return next(tokens)

    steps = decode(model, logits, list(map(len, prompts)), select)
    for _ in itertools.islice(steps, len(answers[0])):
        pass
    return torch.stack(seen)


def same(name: str, ours: object, theirs: object) -> None:
    """Raise AssertionError unless both are the same."""
    require(ours == theirs, f"{name}: {ours!r:.200} is not {theirs!r:.200}")


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


def write_tokenizer(path: Path) -> None:
    """Write a tokenizer.model of Llama 3's kind whose tokens are the 256 bytes; with the special tokens, 512."""
    path.write_bytes(b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256)))
