"""The libraries that are measured. Each has a class with the same few methods, and runs in a process of its own.

    python benchmarks/peers.py '{"peer": "ours", "folder": "…", "dtype": "float32", "threads": 2, "max_batch_size": 8,
        "max_seq_len": 2112, "options": {"compile": true}}'

reads requests from standard input, one JSON object a line, such as `{"request": "decode", "batch": 1, "context": 512,
"steps": 16}`, and prints one line for each. Times are measured here, around the work alone. The folder holds the
checkpoint in the library's layout; the KV cache has `max_batch_size` rows of `max_seq_len` tokens.
"""

import ctypes
import importlib
import json
import os
import sys
import time
import types
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

WARM_UP = 2  # decode steps before the measured ones: they include what is done only once, such as compiling


def memory(field: str = "VmHWM") -> int:
    """Return the most memory that this process has held so far, in bytes; or what it holds now ("VmRSS")."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def random_prompt(length: int, vocab_size: int, seed: int = 0) -> list[int]:
    """Return random token ids, the same in every process."""
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


class Peer(ABC):
    """A library with a loaded model.

    Attributes:
        vocab_size: the number of tokens of the model's vocabulary.
    """

    vocab_size: int

    @abstractmethod
    def __init__(self, folder: Path, dtype: torch.dtype, max_batch_size: int, max_seq_len: int) -> None:
        """Load the checkpoint in `folder`, with a KV cache of this size."""

    @abstractmethod
    def fill(self, batch: int, context: int) -> None:
        """Fill the cache of `batch` rows with `context` tokens, before times are measured."""

    @abstractmethod
    def step(self, tokens: list[int], context: int) -> list[int]:
        """Pass one token of each row, after `context` cached tokens, through the network; return the likeliest ones."""

    @abstractmethod
    def prefill(self, tokens: list[int]) -> int:
        """Pass a prompt through the network, starting with an empty cache; return the most likely next token."""

    @abstractmethod
    def generate(self, prompts: list[list[int]], max_new_tokens: int, temperature: float, top_p: float) -> None:
        """Make the call that the library's users make, for this many tokens of each row."""

    def decode(self, batch: int, context: int, steps: int) -> float:
        """Return the seconds of one step."""
        self.fill(batch, context)
        tokens = [1] * batch
        for i in range(WARM_UP):
            tokens = self.step(tokens, context + i)
        start = time.perf_counter()
        for i in range(WARM_UP, WARM_UP + steps):
            tokens = self.step(tokens, context + i)
        return (time.perf_counter() - start) / steps


class Ours(Peer):
    """This library: what `Llama.build` makes, but without a tokenizer, which the others don't load here either."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        max_batch_size: int,
        max_seq_len: int,
        *,
        quantize: str | None = None,
        compile: bool = False,
    ) -> None:
        from llama import Llama
        from llama.checkpoint import check_tensors, load_model, open_checkpoint

        checkpoint = open_checkpoint(folder)
        args = checkpoint.settings.model_args(checkpoint.settings.params["vocab_size"], max_seq_len, max_batch_size)
        check_tensors(checkpoint, args)
        self.model = load_model(checkpoint, args, device=torch.device("cpu"), dtype=dtype, quantize=quantize)
        self.model.setup_cache()
        if compile:
            from llama.compiled import compile_model

            compile_model(self.model)
            if not getattr(self.model.compiled, "layers", []):  # its warning is in the log
                raise RuntimeError("the network could not be compiled")
        self.llama = Llama(self.model, types.SimpleNamespace(stop_tokens=set()))
        self.vocab_size = args.vocab_size

    def fill(self, batch: int, context: int) -> None:
        cache = self.model.setup_cache()
        for tensor in (cache.keys, cache.values):
            for layer in tensor:
                layer.normal_()

    @torch.inference_mode()
    def step(self, tokens: list[int], context: int) -> list[int]:
        return self.model.forward(torch.tensor(tokens)[:, None], context)[:, -1].argmax(-1).tolist()

    @torch.inference_mode()
    def prefill(self, tokens: list[int]) -> int:
        hidden = self.model.hidden_states(torch.tensor([tokens]), 0)
        return int(self.model.logits(hidden[:, -1]).argmax())

    def generate(self, prompts: list[list[int]], max_new_tokens: int, temperature: float, top_p: float) -> None:
        self.llama.generate(prompts, max_new_tokens, temperature, top_p)


class Original(Peer):
    """The package llama-models, by the authors of the original."""

    def __init__(self, folder: Path, dtype: torch.dtype, max_batch_size: int, max_seq_len: int) -> None:
        # Its generation imports its vision model, and that one torchvision; text generation needs neither.
        vision: Any = types.ModuleType("llama_models.llama3.multimodal.model")
        vision.CrossAttentionTransformer = type("CrossAttentionTransformer", (), {})
        sys.modules[vision.__name__] = vision
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
        from fairscale.nn.model_parallel import initialize as groups
        from llama_models.llama3.args import ModelArgs
        from llama_models.llama3.chat_format import LLMInput
        from llama_models.llama3.generation import Llama3
        from llama_models.llama3.model import Transformer

        # What its `build` does, but for the tokenizer, which is always that of Llama 3 there.
        store: Any = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        groups.initialize_model_parallel(1)
        params = json.loads((folder / "params.json").read_text())
        args = ModelArgs(max_seq_len=max_seq_len, max_batch_size=max_batch_size, **params)
        weights = torch.load(folder / "consolidated.00.pth", map_location="cpu", mmap=True)
        torch.set_default_dtype(dtype)
        self.model = Transformer(args)
        self.model.load_state_dict(weights, strict=True)
        self.vocab_size = args.vocab_size
        tokenizer = types.SimpleNamespace(pad_id=-1, stop_tokens=[-2], decode=lambda ids: "", special_tokens={})
        self.llama = Llama3.__new__(Llama3)
        self.llama.args, self.llama.model, self.llama.tokenizer = args, self.model, tokenizer
        self.llama.formatter = None
        self.input = LLMInput

    def fill(self, batch: int, context: int) -> None:
        for layer in self.model.layers:
            layer.attention.cache_k.normal_()
            layer.attention.cache_v.normal_()

    @torch.inference_mode()
    def step(self, tokens: list[int], context: int) -> list[int]:
        logits: torch.Tensor = self.model.forward(torch.tensor(tokens)[:, None], context)
        return logits[:, -1].argmax(-1).tolist()

    @torch.inference_mode()
    def prefill(self, tokens: list[int]) -> int:
        return int(self.model.forward(torch.tensor([tokens]), 0)[0, -1].argmax())

    def generate(self, prompts: list[list[int]], max_new_tokens: int, temperature: float, top_p: float) -> None:
        inputs = [self.input(tokens) for tokens in prompts]
        for _ in self.llama.generate(inputs, temperature, top_p, max_gen_len=max_new_tokens):
            pass


class HuggingFace(Peer):
    """The package transformers, with its default attention and cache."""

    def __init__(self, folder: Path, dtype: torch.dtype, max_batch_size: int, max_seq_len: int) -> None:
        import transformers

        self.model: Any = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0
        self.new_cache: Callable[[], Any] = lambda: transformers.DynamicCache(config=self.model.config)
        self.vocab_size = self.model.config.vocab_size

    def fill(self, batch: int, context: int) -> None:
        config = self.model.config
        self.cache = self.new_cache()
        shape = (batch, config.num_key_value_heads, context, config.head_dim)
        for layer in range(config.num_hidden_layers):
            keys, values = (torch.randn(shape, dtype=self.model.dtype) for _ in range(2))
            self.cache.update(keys, values, layer)

    @torch.inference_mode()
    def step(self, tokens: list[int], context: int) -> list[int]:
        logits: torch.Tensor = self.model(
            torch.tensor(tokens)[:, None], past_key_values=self.cache, use_cache=True
        ).logits
        return logits[:, -1].argmax(-1).tolist()

    @torch.inference_mode()
    def prefill(self, tokens: list[int]) -> int:
        self.cache = self.new_cache()
        ids = torch.tensor([tokens])
        output = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return int(output.logits[0, -1].argmax())

    def generate(self, prompts: list[list[int]], max_new_tokens: int, temperature: float, top_p: float) -> None:
        length = max(map(len, prompts))
        ids = torch.tensor([[0] * (length - len(tokens)) + tokens for tokens in prompts])
        mask = torch.tensor([[0] * (length - len(tokens)) + [1] * len(tokens) for tokens in prompts])
        options: dict[str, Any] = {"min_new_tokens": max_new_tokens, "max_new_tokens": max_new_tokens}
        options |= {"do_sample": temperature > 0}
        if temperature > 0:
            options |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
        self.model.generate(ids, attention_mask=mask, **options)


class LlamaCpp(Peer):
    """llama.cpp, through the package llama-cpp-python, compiled for this machine."""

    def __init__(self, folder: Path, dtype: torch.dtype, max_batch_size: int, max_seq_len: int) -> None:
        import llama_cpp

        self.lib: Any = llama_cpp
        threads = torch.get_num_threads()
        path = str(next(folder.glob("*.gguf"))).encode()
        self.lib.llama_backend_init()
        self.model = self.lib.llama_model_load_from_file(path, self.lib.llama_model_default_params())
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = max_seq_len * max_batch_size, max_batch_size, False
        params.n_batch, params.n_ubatch = max_seq_len, 512
        params.n_threads = params.n_threads_batch = threads
        if dtype == torch.float32:  # the default dtype of its cache is float16
            params.type_k = params.type_v = self.lib.GGML_TYPE_F32
        self.context = self.lib.llama_init_from_model(self.model, params)
        self.memory = self.lib.llama_get_memory(self.context)
        self.vocab_size = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))

    def _forward(self, rows: list[list[int]], start_pos: int) -> list[int]:
        """Pass tokens through the network; return the most likely token after the last one of each row."""
        n_tokens = sum(map(len, rows))
        batch = self.lib.llama_batch_init(n_tokens, 0, 1)
        batch.n_tokens = n_tokens
        last = []  # the index of each row's last token
        i = 0
        for row, tokens in enumerate(rows):
            for position, token in enumerate(tokens, start_pos):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, row
                batch.logits[i] = position == start_pos + len(tokens) - 1
                i += 1
            last.append(i - 1)
        if self.lib.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        next_tokens = []
        for index in last:
            pointer = self.lib.llama_get_logits_ith(self.context, index)
            array = (ctypes.c_float * self.vocab_size).from_address(ctypes.addressof(pointer.contents))
            next_tokens.append(int(torch.frombuffer(array, dtype=torch.float32).argmax()))
        self.lib.llama_batch_free(batch)
        return next_tokens

    def fill(self, batch: int, context: int) -> None:
        self.prefill(random_prompt(context, self.vocab_size))
        for row in range(1, batch):
            self.lib.llama_memory_seq_cp(self.memory, 0, row, -1, -1)

    def step(self, tokens: list[int], context: int) -> list[int]:
        return self._forward([[token] for token in tokens], context)

    def prefill(self, tokens: list[int]) -> int:
        self.lib.llama_memory_clear(self.memory, True)
        return self._forward([tokens], 0)[0]

    def generate(self, prompts: list[list[int]], max_new_tokens: int, temperature: float, top_p: float) -> None:
        sampler = self.lib.llama_sampler_chain_init(self.lib.llama_sampler_chain_default_params())
        if temperature > 0:  # its default order would apply top-p before the temperature
            self.lib.llama_sampler_chain_add(sampler, self.lib.llama_sampler_init_temp(temperature))
            self.lib.llama_sampler_chain_add(sampler, self.lib.llama_sampler_init_top_p(top_p, 1))
            self.lib.llama_sampler_chain_add(sampler, self.lib.llama_sampler_init_dist(1))
        else:
            self.lib.llama_sampler_chain_add(sampler, self.lib.llama_sampler_init_greedy())
        (tokens,) = prompts
        self.prefill(tokens)
        for i in range(max_new_tokens):
            token = self.lib.llama_sampler_sample(sampler, self.context, -1)
            if i < max_new_tokens - 1:
                self._forward([[token]], len(tokens) + i)
        self.lib.llama_sampler_free(sampler)


PEERS: dict[str, Callable[..., Peer]] = {
    "ours": Ours,
    "llama-models": Original,
    "transformers": HuggingFace,
    "llama.cpp": LlamaCpp,
}
MODULES = {  # what each of them imports, before time and memory are measured
    "ours": "llama",
    "llama-models": "llama_models.llama3.model",
    "transformers": "transformers.models.llama.modeling_llama",
    "llama.cpp": "llama_cpp",
}


def start(
    peer: str, folder: str, dtype: str, max_batch_size: int, max_seq_len: int, options: dict[str, Any]
) -> tuple[Peer, dict[str, float]]:
    """Load a model, and generate two tokens.

    Returns:
        The library with the model; and what it took: the seconds to load it; the seconds until the first token, which
        brings weights that are mapped from a file into memory; until the second, the first one of the decode loop; and
        the bytes of memory, at most and afterwards.
    """
    importlib.import_module(MODULES[peer])
    peak_before, held_before, begin = memory(), memory("VmRSS"), time.perf_counter()
    library = PEERS[peer](Path(folder), getattr(torch, dtype), max_batch_size, max_seq_len, **options)
    loaded = time.perf_counter() - begin
    prompt = random_prompt(8, library.vocab_size)
    token = library.prefill(prompt)
    first = time.perf_counter() - begin
    library.step([token], len(prompt))
    second = time.perf_counter() - begin
    return library, {
        "load": loaded,
        "load + 1 token": first,
        "load + 2 tokens": second,
        "memory": memory() - peak_before,
        "memory afterwards": memory("VmRSS") - held_before,
    }


def handle(peer: Peer, request: str, arguments: dict[str, Any]) -> object:
    """Return the response to a request: seconds, bytes, or token ids."""
    if request == "decode":
        return peer.decode(**arguments)
    if request == "greedy":  # these tokens must be the same from every library
        prompt = random_prompt(arguments["context"], peer.vocab_size)
        tokens = [peer.prefill(prompt)]
        for i in range(arguments["steps"]):
            tokens += peer.step(tokens[-1:], len(prompt) + i)
        return tokens
    prompts = [random_prompt(length, peer.vocab_size, seed) for seed, length in enumerate(arguments["lengths"])]
    if request == "prefill memory":
        ctypes.CDLL(None).malloc_trim(0)  # returns free memory to the system
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        memory_before = memory("VmRSS")
        peer.prefill(prompts[0])
        return memory() - memory_before
    begin = time.perf_counter()
    if request == "prefill":
        peer.prefill(prompts[0])
    else:
        peer.generate(prompts, arguments["max_new_tokens"], arguments["temperature"], 0.9)
    return time.perf_counter() - begin


if __name__ == "__main__":
    responses = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print must not get between the responses

    def respond(value: object) -> None:
        print(json.dumps(value), file=responses, flush=True)

    arguments = json.loads(sys.argv[1])
    torch.set_num_threads(arguments.pop("threads"))
    peer, measured = start(**arguments)
    respond(measured)
    for line in sys.stdin:
        request = json.loads(line)
        respond(handle(peer, request.pop("request"), request))
