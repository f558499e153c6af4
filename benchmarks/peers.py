"""The libraries that are measured, each behind the same few methods, each in a process of its own.

    python benchmarks/peers.py NAME FOLDER DTYPE THREADS ROWS LENGTH

reads requests from standard input, a JSON object a line, such as `{"do": "decode", "batch": 1, "context": 512, "steps":
16}`, and answers each with a line. Times are taken here, around the work alone. FOLDER is in the library's layout; the
cache has room for ROWS of LENGTH tokens.
"""

import ctypes
import importlib
import json
import os
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def memory(kind: str = "VmHWM") -> int:
    """Most bytes of memory that this process has held so far; or holds now, "VmRSS"."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(kind)).split()[1])


def random_prompt(length: int, words: int, seed: int = 0) -> list[int]:
    """The same ids in every process."""
    return torch.randint(words, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


class Peer:
    """A loaded model. `vocab_size` is the number of its words."""

    vocab_size: int

    def fill(self, batch: int, context: int) -> None:
        """Have `context` tokens in the cache of `batch` rows, before time is taken."""
        raise NotImplementedError

    def step(self, tokens: list[int], context: int) -> list[int]:
        """Pass a token a row through the network, which `context` tokens went before; return each row's likeliest."""
        raise NotImplementedError

    def read(self, tokens: list[int]) -> int:
        """Read a prompt into an empty cache; return the likeliest next token."""
        raise NotImplementedError

    def generate(self, prompts: list[list[int]], new: int, temperature: float, top_p: float) -> None:
        """What the library's users call: `new` tokens a row."""
        raise NotImplementedError

    def decode(self, batch: int, context: int, steps: int) -> float:
        """Seconds a step."""
        self.fill(batch, context)
        tokens = self.step([1] * batch, context)  # what is done once is done now
        start = time.perf_counter()
        for i in range(1, steps + 1):
            tokens = self.step(tokens, context + i)
        return (time.perf_counter() - start) / steps


class Ours(Peer):
    """This library: what `Llama.build` does, but for the tokenizer, which no other loads here either."""

    layout = "ours"

    def __init__(self, folder: Path, dtype: torch.dtype, rows: int, length: int) -> None:
        from llama import Llama
        from llama.checkpoint import check_tensors, load_model, open_checkpoint

        checkpoint = open_checkpoint(folder)
        args = checkpoint.settings.model_args(checkpoint.settings.params["vocab_size"], length, rows)
        check_tensors(checkpoint, args)
        self.model = load_model(checkpoint, args, device=torch.device("cpu"), dtype=dtype)
        self.model.setup_cache()
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
    def read(self, tokens: list[int]) -> int:
        hidden = self.model.hidden_states(torch.tensor([tokens]), 0)
        return int(self.model.logits(hidden[:, -1]).argmax())

    def generate(self, prompts: list[list[int]], new: int, temperature: float, top_p: float) -> None:
        self.llama.generate(prompts, new, temperature, top_p)


class Original(Peer):
    """The package llama-models, which the original's authors publish."""

    layout = "meta"

    def __init__(self, folder: Path, dtype: torch.dtype, rows: int, length: int) -> None:
        # Its generation imports its vision model, and that torchvision; text needs neither.
        vision: Any = types.ModuleType("llama_models.llama3.multimodal.model")
        vision.CrossAttentionTransformer = type("CrossAttentionTransformer", (), {})
        sys.modules[vision.__name__] = vision
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
        from fairscale.nn.model_parallel import initialize as groups
        from llama_models.llama3.args import ModelArgs
        from llama_models.llama3.chat_format import LLMInput
        from llama_models.llama3.generation import Llama3
        from llama_models.llama3.model import Transformer

        # What its `build` does, but for the tokenizer, which is always Llama 3's there.
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        groups.initialize_model_parallel(1)
        params = json.loads((folder / "params.json").read_text())
        args = ModelArgs(max_seq_len=length, max_batch_size=rows, **params)
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
        return self.model.forward(torch.tensor(tokens)[:, None], context)[:, -1].argmax(-1).tolist()

    @torch.inference_mode()
    def read(self, tokens: list[int]) -> int:
        return int(self.model.forward(torch.tensor([tokens]), 0)[0, -1].argmax())

    def generate(self, prompts: list[list[int]], new: int, temperature: float, top_p: float) -> None:
        for _ in self.llama.generate([self.input(tokens) for tokens in prompts], temperature, top_p, max_gen_len=new):
            pass


class HuggingFace(Peer):
    """The package transformers, with the attention and the cache that it takes by itself."""

    layout = "hf"

    def __init__(self, folder: Path, dtype: torch.dtype, rows: int, length: int) -> None:
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
        out = self.model(torch.tensor(tokens)[:, None], past_key_values=self.cache, use_cache=True)
        return out.logits[:, -1].argmax(-1).tolist()

    @torch.inference_mode()
    def read(self, tokens: list[int]) -> int:
        self.cache = self.new_cache()
        ids = torch.tensor([tokens])
        out = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return int(out.logits[0, -1].argmax())

    def generate(self, prompts: list[list[int]], new: int, temperature: float, top_p: float) -> None:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(tokens)) + tokens for tokens in prompts])
        mask = torch.tensor([[0] * (longest - len(tokens)) + [1] * len(tokens) for tokens in prompts])
        how: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            how = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        self.model.generate(ids, attention_mask=mask, min_new_tokens=new, max_new_tokens=new, **how)


class LlamaCpp(Peer):
    """llama.cpp, through llama-cpp-python; built for the machine it runs on."""

    layout = "gguf"

    def __init__(self, folder: Path, dtype: torch.dtype, rows: int, length: int) -> None:
        import llama_cpp

        self.lib: Any = llama_cpp
        threads = torch.get_num_threads()
        path = str(next(folder.glob("*.gguf"))).encode()
        self.lib.llama_backend_init()
        self.model = self.lib.llama_model_load_from_file(path, self.lib.llama_model_default_params())
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = length * rows, rows, False
        params.n_batch, params.n_ubatch = length, 512
        params.n_threads = params.n_threads_batch = threads
        if dtype == torch.float32:  # its own choice for the cache is float16
            params.type_k = params.type_v = self.lib.GGML_TYPE_F32
        self.context = self.lib.llama_init_from_model(self.model, params)
        self.memory = self.lib.llama_get_memory(self.context)
        self.vocab_size = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))

    def _decode(self, rows: list[list[int]], start: int) -> list[int]:
        """Pass tokens through the network; the likeliest after each row's last."""
        total = sum(map(len, rows))
        batch = self.lib.llama_batch_init(total, 0, 1)
        ends = []
        batch.n_tokens = total
        i = 0
        for row, tokens in enumerate(rows):
            for position, token in enumerate(tokens, start):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, row
                batch.logits[i] = position == start + len(tokens) - 1
                i += 1
            ends.append(i - 1)
        if self.lib.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        chosen = []
        for end in ends:
            logits = self.lib.llama_get_logits_ith(self.context, end)
            row_logits = torch.frombuffer(
                (ctypes.c_float * self.vocab_size).from_address(ctypes.addressof(logits.contents)), dtype=torch.float32
            )
            chosen.append(int(row_logits.argmax()))
        self.lib.llama_batch_free(batch)
        return chosen

    def fill(self, batch: int, context: int) -> None:
        self.read(random_prompt(context, self.vocab_size))
        for row in range(1, batch):
            self.lib.llama_memory_seq_cp(self.memory, 0, row, -1, -1)

    def step(self, tokens: list[int], context: int) -> list[int]:
        return self._decode([[token] for token in tokens], context)

    def read(self, tokens: list[int]) -> int:
        self.lib.llama_memory_clear(self.memory, True)
        return self._decode([tokens], 0)[0]

    def generate(self, prompts: list[list[int]], new: int, temperature: float, top_p: float) -> None:
        chain = self.lib.llama_sampler_chain_init(self.lib.llama_sampler_chain_default_params())
        if temperature > 0:  # its own order would cut the nucleus before the temperature
            self.lib.llama_sampler_chain_add(chain, self.lib.llama_sampler_init_temp(temperature))
            self.lib.llama_sampler_chain_add(chain, self.lib.llama_sampler_init_top_p(top_p, 1))
            self.lib.llama_sampler_chain_add(chain, self.lib.llama_sampler_init_dist(1))
        else:
            self.lib.llama_sampler_chain_add(chain, self.lib.llama_sampler_init_greedy())
        (tokens,) = prompts
        self.read(tokens)
        for i in range(new):
            token = self.lib.llama_sampler_sample(chain, self.context, -1)
            if i < new - 1:
                self._decode([[token]], len(tokens) + i)
        self.lib.llama_sampler_free(chain)


PEERS: dict[str, Any] = {
    "ours": Ours,
    "llama-models": Original,
    "transformers": HuggingFace,
    "llama.cpp": LlamaCpp,
}


MODULES = {
    "ours": "llama",
    "llama-models": "llama_models.llama3.model",
    "transformers": "transformers.models.llama.modeling_llama",
    "llama.cpp": "llama_cpp",
}


def serve(name: str, folder: Path, dtype: torch.dtype, rows: int, length: int, answer: Callable[[Any], None]) -> None:
    """Load a model and do what standard input asks for."""
    importlib.import_module(MODULES[name])  # so that neither the time nor the memory that this takes is counted
    before, start = memory(), time.perf_counter()
    peer: Peer = PEERS[name](folder, dtype, rows, length)
    loaded = time.perf_counter() - start
    peer.read([1])  # weights that are mapped from a file come into memory with their first use
    answer({"load": loaded, "load + 1 token": time.perf_counter() - start, "memory": memory() - before})
    for line in sys.stdin:
        request = json.loads(line)
        do = request.pop("do")
        if do == "decode":
            answer(peer.decode(**request))
        elif do == "greedy":  # the same tokens from every library, or they don't compute the same
            prompt = random_prompt(request["context"], peer.vocab_size)
            tokens = [peer.read(prompt)]
            for i in range(request["steps"]):
                tokens += peer.step(tokens[-1:], len(prompt) + i)
            answer(tokens)
        else:
            lengths = request["lengths"]
            prompts = [random_prompt(length, peer.vocab_size, seed) for seed, length in enumerate(lengths)]
            start = time.perf_counter()
            if do == "memory":
                ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system
                Path("/proc/self/clear_refs").write_text("5")  # from here on, the most is counted anew
                before = memory("VmRSS")
                peer.read(prompts[0])
                answer(memory() - before)
                continue
            if do == "read":
                peer.read(prompts[0])
            else:
                peer.generate(prompts, request["new"], request["temperature"], 0.9)
            answer(time.perf_counter() - start)


if __name__ == "__main__":
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print goes elsewhere

    def answer(value: Any) -> None:
        print(json.dumps(value), file=out, flush=True)

    torch.set_num_threads(int(sys.argv[4]))
    rows, length = int(sys.argv[5]), int(sys.argv[6])
    serve(sys.argv[1], Path(sys.argv[2]), getattr(torch, sys.argv[3]), rows, length, answer)
