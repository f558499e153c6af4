"""`cuda_acceptance.py count`: what a decoding step does, counted without a GPU, and how long it should take.

The step of fixed shape, which runs on GPUs, is run on meta tensors: they have sizes, but no values. Its operators are
counted on the way, and the bytes that they read and write.
"""

import itertools
from collections import Counter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llama import ModelArgs, Transformer
from llama.positions import fixed_end
from llama.sampling import sample
from on_cuda.models import SIZES, use_fixed_steps

# Bytes a second, by the data sheets, for what the GPUs call themselves.
BANDWIDTHS = {"H200": 4.8e12, "H100 80GB HBM3": 3.35e12, "A100-SXM4-80GB": 2.0e12}

# What the expected times rest on. These are assumptions: none of them was measured.
REACHED = 0.9  # of the bandwidth, by the product of a large matrix with few rows
BLOCK_BANDWIDTH = 50e9  # bytes a second that one block of attention reads; there is one for each row and kv head
KERNEL_SECONDS = 1.5e-6  # of any other kernel in a CUDA graph: they are so small that this is all latency
LAUNCH_SECONDS = 7e-6  # of the host, for an operator that starts a kernel, and the Python around it
VIEW_SECONDS = 1e-6  # of the host, for one that doesn't

VIEWS = {"view", "_unsafe_view", "transpose", "t", "unsqueeze", "squeeze", "expand", "slice", "select", "unbind"}
VIEWS |= {"alias", "detach", "permute", "view_as_complex", "view_as_real"}
ATTENTION = F.scaled_dot_product_attention.__name__


class Counts(NamedTuple):
    """What a step does.

    Attributes:
        kernels: operators that start a kernel, by name.
        views: operators that only look at a tensor in another way, by name.
        moved: bytes that kernels read and write, by name.
        needed: bytes of the weights, and of the keys and values of the context, which no step can do without.
        blocks: of one call of attention, that run at the same time.
    """

    kernels: Counter[str]
    views: Counter[str]
    moved: Counter[str]
    needed: int
    blocks: int

    @property
    def n_kernels(self) -> int:
        return sum(self.kernels.values())

    @property
    def n_views(self) -> int:
        return sum(self.views.values())

    def floor(self, bandwidth: float) -> float:
        """Seconds in which the bytes that are needed can be read."""
        return self.needed / bandwidth

    def captured(self, bandwidth: float) -> float:
        """Seconds of a step in a CUDA graph, as expected: products, attention, and the small kernels between them."""
        reached = REACHED * bandwidth
        others = sum(self.moved.values()) - self.moved[ATTENTION]
        n_small = self.n_kernels - self.kernels["mm"]
        attention = self.moved[ATTENTION] / min(self.blocks * BLOCK_BANDWIDTH, reached)
        return others / reached + attention + n_small * KERNEL_SECONDS

    def host(self) -> float:
        """Seconds in which the host starts a step that isn't captured, as expected."""
        return self.n_kernels * LAUNCH_SECONDS + self.n_views * VIEW_SECONDS

    def uncaptured(self, bandwidth: float) -> float:
        """Seconds of a step that isn't captured, as expected: those of the GPU or of the host, whichever are more."""
        return max(self.host(), self.captured(bandwidth))


class OperatorCounter(TorchDispatchMode):
    """Counts the operators in its block."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: Counter[str] = Counter()
        self.views: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        name, inputs = function.overloadpacket.__name__, [*args, kwargs]
        if name in ("embedding", "index"):  # reads only what it returns
            inputs = [output]
        elif name == "index_put_":  # writes only what it is given
            inputs, output = inputs[2:], args[2]
        self.count(name, inputs, output)
        return output

    def count(self, name: str, inputs: Any, output: Any) -> None:
        if name in VIEWS:
            self.views[name] += 1
        else:
            self.kernels[name] += 1
            self.moved[name] += sum(bytes_of(x) for x in tree_leaves((inputs, output)) if isinstance(x, torch.Tensor))


class KernelsOfCUDA(TorchFunctionMode):
    """Counts as one kernel what is one on CUDA, where other devices take several.

    Args:
        counter: where to count it.
    """

    def __init__(self, counter: OperatorCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function not in (F.rms_norm, F.scaled_dot_product_attention):
            return function(*args, **(kwargs or {}))
        output = torch.empty(args[0].shape, dtype=args[0].dtype, device="meta")
        self.counter.kernels["empty"] -= 1
        self.counter.moved["empty"] -= bytes_of(output)
        self.counter.count(function.__name__, (args, kwargs), output)
        return output


def bytes_of(tensor: torch.Tensor) -> int:
    """The bytes of a tensor in memory; a dimension along which it only repeats itself counts once."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0]
    return torch.Size(sizes).numel() * tensor.element_size()


@torch.no_grad()
def count_step(sizes: dict[str, Any], batch: int = 1, context: int = 128, temperature: float | None = None) -> Counts:
    """Count a step in bfloat16, and the choice of a token after it.

    Args:
        sizes: of the network, as `ModelArgs` takes them.
        batch: rows.
        context: tokens of each row that are in the cache.
        temperature: of sampling, at top-p 0.9; None leaves sampling out.
    """
    use_fixed_steps()
    args = ModelArgs(**sizes, max_seq_len=2 * context, max_batch_size=batch)
    with torch.device("meta"):
        model = Transformer(args).to(torch.bfloat16)
        tokens = torch.zeros(batch, 1, dtype=torch.long)
        positions = torch.zeros(batch, dtype=torch.long)
    model.freqs_cis = model.freqs_cis.to("meta")
    cache = model.setup_cache()
    with OperatorCounter() as counter, KernelsOfCUDA(counter):
        hidden = model.run_layers(tokens, positions, fixed_end(context + 1, args.max_seq_len), model.layers)
        logits = model.logits(hidden)[:, -1]
        if temperature is not None:
            sample(logits, temperature, 0.9)
    weights = [p for name, p in model.named_parameters() if name != "tok_embeddings.weight" or args.tie_embeddings]
    filled = cache.keys[:, :, :, : context + 1]
    needed = sum(weight.nbytes for weight in weights) + 2 * filled.numel() * filled.element_size()
    return Counts(+counter.kernels, counter.views, counter.moved, needed, batch * args.kv_heads)


def print_counts() -> None:
    """Print the counts and the expected times of both shapes, in Markdown."""
    gpus = " | ".join(f"{gpu[:4]}: floor, captured, not" for gpu in BANDWIDTHS)
    print(f"| model | batch | context | kernels | views | GB needed, moved | {gpus} |")
    print("|---|---|---|---|---|---|" + "---|" * len(BANDWIDTHS))
    for name, batch, context in itertools.product(("1B", "8B"), (1, 8), (128, 2048, 8192)):
        step = count_step(SIZES[name], batch, context)
        cells = [
            str(step.n_kernels),
            str(step.n_views),
            f"{step.needed / 1e9:.2f}, {sum(step.moved.values()) / 1e9:.2f}",
        ]
        for bandwidth in BANDWIDTHS.values():
            times = (step.floor(bandwidth), step.captured(bandwidth), step.uncaptured(bandwidth))
            cells.append(", ".join(f"{1e3 * time:.1f}" for time in times) + " ms")
        print(f"| {name} | {batch} | {context} | {' | '.join(cells)} |")
    alone = count_step(SIZES["8B"])
    for what, temperature in (("greedy", 0.0), ("sampling at top-p 0.9", 0.6)):
        n_kernels = count_step(SIZES["8B"], temperature=temperature).n_kernels - alone.n_kernels
        print(f"\n{what}: {n_kernels} more kernels")
