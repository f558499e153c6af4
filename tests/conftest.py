"""What tests share: tiny models with large random weights, tiny tokenizer files, checkpoints of them, processes.

Hypothesis tries few examples, and new ones each time, unless the environment variable CI is set: then it tries many,
always the same. `transformers` is imported only where it is used, since that takes seconds.
"""

import base64
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import settings
from sentencepiece import SentencePieceTrainer

import llama.distributed
import llama.parallel
from llama import ModelArgs, Tokenizer, Transformer
from llama.checkpoint import check_tensors, load_model, open_checkpoint, split_axis
from llama.checkpoint import save as save_module
from llama.default_model import default_checkpoint, fetch
from llama.gguf_file import GGUFFile
from llama.vocab.split_steps import LLAMA3_PATTERN
from llama.vocab.tiktoken_file import LLAMA3_SPECIAL_TOKENS
from llama.vocab.vocabulary import gpt2_characters

ROOT = Path(__file__).parent.parent
IN_CI = bool(os.environ.get("CI"))

settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("desk", max_examples=15, deadline=None)
settings.load_profile("ci" if IN_CI else "desk")

# A shell has what it starts in the background ignore Ctrl-C, and so what that starts, such as these tests' programs.
signal.signal(signal.SIGINT, signal.default_int_handler)

if "PYTEST_XDIST_WORKER" in os.environ:  # the other cores run other tests
    torch.set_num_threads(1)


def examples(count: int) -> settings:
    """Hypothesis settings, to decorate a test with: `count` examples in CI, elsewhere as few as for any test."""
    return settings(max_examples=count) if IN_CI else settings()


def pytest_terminal_summary(terminalreporter):
    """Print what tests recorded as their "summary", whichever process they ran in."""
    for report in [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]:
        for name, value in report.user_properties:
            if name == "summary":
                terminalreporter.write_line(value)


def tiny_args(**changes) -> ModelArgs:
    """Two layers; four heads of size 32 that share two kv heads; a feed-forward width of 192."""
    sizes = {"dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 320, "multiple_of": 64}
    sizes |= {"ffn_dim_multiplier": 0.5, "max_batch_size": 4, "max_seq_len": 96}
    return ModelArgs(**(sizes | changes))


def strong(model: Transformer, seed: int = 0) -> Transformer:
    """Give a model random weights so large that every part of it matters to the logits.

    Their standard deviation is 0.2. At 0.3, rounding in float32 alone changes the logits of the tiny model by 2e-4, in
    any implementation, which is more than the tests tolerate.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.uniform_(0.5, 1.5, generator=generator)
            else:
                weight.normal_(0, 0.2, generator=generator)
    return model


def tiny_model(seed: int = 0, **changes) -> Transformer:
    """A network of the sizes of `tiny_args` with the weights of `strong`."""
    return strong(Transformer(tiny_args(**changes)), seed)


class ScriptedTokenizer:
    """The smallest possible tokenizer: a text is a list of token ids, separated by spaces."""

    pad_id = -1
    eos_id = 2

    def __init__(self, stop_tokens=(2,)):
        self.stop_tokens = set(stop_tokens)

    def encode(self, s, bos, eos):
        return [1] * bos + [int(number) for number in s.split()] + [2] * eos

    def decode(self, t):
        return " ".join(str(token) for token in t)


class ScriptedModel:
    """A model that always continues token n with n + 1.

    `calls` has the shape of the tokens and the start position of each call.
    """

    def __init__(self, vocab_size=50, max_batch_size=4, max_seq_len=32):
        self.params = SimpleNamespace(max_batch_size=max_batch_size, max_seq_len=max_seq_len)
        self.vocab_size = vocab_size
        self.calls = []

    def forward(self, tokens, start_pos):
        self.calls.append((tuple(tokens.shape), start_pos))
        return 20.0 * torch.nn.functional.one_hot((tokens + 1) % self.vocab_size, self.vocab_size).float()


class CachelessBeams(ScriptedModel):
    """The same, for beam search: it remembers nothing, so there is nothing to reorder."""

    def setup_cache(self):
        return SimpleNamespace(tokens=[], reorder=lambda rows, end: None, clear=lambda start, end: None)


MERGED_TOKENS = [b"th", b"he", b" t", b"in", b" the", b"er", b"an", b"ou", b"\n\n", b"ing", b"user", b"us"]


def write_llama3_tokenizer(path: Path, more: tuple[bytes, ...] = ()) -> Path:
    """Write a tokenizer.model of Llama 3's kind: the 256 bytes, a few merged tokens, and `more` of them."""
    tokens = [bytes([byte]) for byte in range(256)] + MERGED_TOKENS + list(more)
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % rank for rank, t in enumerate(tokens)))
    return path


def write_tokenizer_json(folder: Path, ends: tuple[str, ...] = ("end_of_text", "eom_id", "eot_id")) -> None:
    """Write the same tokenizer as Hugging Face's tokenizer.json, with the files beside it in Llama 3's folders.

    Args:
        folder: where to write them.
        ends: the special tokens that generation_config.json lists as ends of a text.
    """
    characters = gpt2_characters()
    names = [
        "".join(characters[byte] for byte in token) for token in [*(bytes([b]) for b in range(256)), *MERGED_TOKENS]
    ]
    vocabulary = {name: i for i, name in enumerate(names)}
    merges = [
        (name[:cut], name[cut:])
        for name in names
        for cut in range(1, len(name))
        if name[:cut] in vocabulary and name[cut:] in vocabulary
    ]
    engine = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, ignore_merges=True))
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(LLAMA3_PATTERN), "isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    engine.decoder = tokenizers.decoders.ByteLevel()
    special = [name if i != 8 else "<|eom_id|>" for i, name in enumerate(LLAMA3_SPECIAL_TOKENS)]
    engine.add_special_tokens(special)
    template = "<|begin_of_text|> $A"
    engine.post_processor = tokenizers.processors.Sequence(
        [
            tokenizers.processors.ByteLevel(trim_offsets=True, use_regex=False),
            tokenizers.processors.TemplateProcessing(template, None, [("<|begin_of_text|>", len(vocabulary))]),
        ]
    )
    engine.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|begin_of_text|>", "eos_token": {"__type": "AddedToken", "content": "<|eot_id|>"}}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ bos_token }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ids = [engine.token_to_id(f"<|{end}|>") for end in ends]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids, "do_sample": False}))


def write_llama2_tokenizer(path: Path) -> Path:
    """Write a tokenizer.model of Llama 2's kind: byte-pair sentencepiece with byte fallback, 320 tokens."""
    text = path.with_suffix(".txt")
    nouns = ["house", "world", "river"]
    text.write_text("".join(f"the {noun} is in the other {noun}, and the user asks\n" for noun in nouns))
    SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(path.with_suffix("")),
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return path


@pytest.fixture(scope="session")
def llama3_path(tmp_path_factory) -> Path:
    return write_llama3_tokenizer(tmp_path_factory.mktemp("llama3") / "tokenizer.model")


@pytest.fixture(scope="session")
def llama2_path(tmp_path_factory) -> Path:
    return write_llama2_tokenizer(tmp_path_factory.mktemp("llama2") / "tokenizer.model")


@pytest.fixture(scope="session")
def llama3(llama3_path):
    return Tokenizer(llama3_path)


@pytest.fixture(scope="session")
def llama2(llama2_path):
    return Tokenizer(llama2_path)


@pytest.fixture(scope="session")
def real_llama3_path():
    digest = "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55"
    return fetch("llama-models==0.3.0", "llama_models/llama3/tokenizer.model", digest)


@pytest.fixture(scope="session")
def real_llama3(real_llama3_path):
    return Tokenizer(real_llama3_path)


@pytest.fixture(scope="session")
def smollm():
    return Tokenizer(default_checkpoint())


@pytest.fixture(scope="session")
def hugging_face_smollm():
    """Hugging Face's own tokenizer with the default model's vocabulary."""
    file = GGUFFile(default_checkpoint())
    vocabulary = {token: i for i, token in enumerate(file.get("tokenizer.ggml.tokens", list))}
    merges = [tuple(merge.split(" ")) for merge in file.get("tokenizer.ggml.merges", list)]
    engine = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    engine.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(True), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return engine


def load(folder, dtype=torch.float32, **sizes) -> Transformer:
    """The network of a checkpoint of any layout, on the CPU; `sizes` are those of its cache."""
    checkpoint = open_checkpoint(folder)
    sizes = {"max_seq_len": 96, "max_batch_size": 2} | sizes
    args = checkpoint.settings.model_args(checkpoint.tokenizer().n_words, **sizes)
    check_tensors(checkpoint, args)
    return load_model(checkpoint, args, device=torch.device("cpu"), dtype=dtype)


def same_weights(a: Transformer, b: Transformer) -> bool:
    """Whether two networks have exactly the same parameters."""
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def cut(path: Path, keep: float = 0.6) -> None:
    """Cut off the end of a file, so that the fraction `keep` of it is left."""
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def write_meta_checkpoint(
    folder: Path, model: Transformer, tokenizer_path: Path, n_files: int = 1, columns: bool = False, **params
) -> Path:
    """Write a folder in Meta's layout, the weights split over the files as Meta splits them.

    With more files than kv heads, several hold the same head.

    Args:
        folder: where to write it.
        model: the weights.
        tokenizer_path: the tokenizer.model to copy into it.
        n_files: number of files of weights.
        columns: split the embedding along dim, as Llama 2's files do, not along the vocabulary.
        params: additions to params.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n_files):
        tensors = {}
        for name, weight in model.state_dict().items():
            count, axis = n_files, split_axis(name)
            if name.endswith(("wk.weight", "wv.weight")):
                count = min(n_files, model.params.kv_heads)
            if name == "tok_embeddings.weight" and columns:
                axis = 1
            tensors[name] = (weight if axis is None else weight.chunk(count, dim=axis)[i * count // n_files]).clone()
        torch.save(tensors, folder / f"consolidated.{i:02d}.pth")
    reference_keys = list(asdict(ModelArgs()))[:9]
    sizes = {key: value for key, value in asdict(model.params).items() if key in reference_keys}
    (folder / "params.json").write_text(json.dumps(sizes | params))
    (folder / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    return folder


class Ranks:
    """Simulates model-parallel processes by threads, to test more of them than this machine could start.

    `run` calls a function on every rank. The groups and collectives that loading, saving and the network use are
    replaced until `monkeypatch` is undone.
    """

    def __init__(self, monkeypatch, size: int):
        self.size = size
        self.local = threading.local()
        self.barrier = threading.Barrier(size, timeout=60)
        self.slots = [None] * size
        group = SimpleNamespace(
            model_parallel_is_initialized=lambda: True,
            get_model_parallel_world_size=lambda: size,
            get_model_parallel_rank=lambda: self.local.rank,
        )
        monkeypatch.setattr(llama.distributed, "groups", group)
        monkeypatch.setattr(llama.parallel, "copy_to_model_parallel_region", lambda x: x)
        monkeypatch.setattr(llama.parallel, "reduce_from_model_parallel_region", lambda x: sum(self.exchange(x)))
        monkeypatch.setattr(
            llama.parallel, "gather_from_model_parallel_region", lambda x: torch.cat(self.exchange(x), dim=-1)
        )
        monkeypatch.setattr(save_module, "gather", self.exchange)
        monkeypatch.setattr(save_module, "is_first_rank", lambda: self.local.rank == 0)

    def exchange(self, x) -> list:
        """Every rank's `x`, in rank order."""
        self.slots[self.local.rank] = x
        self.barrier.wait()
        values = list(self.slots)
        self.barrier.wait()  # no rank may replace its value before all have taken it
        return values

    def run(self, function) -> list:
        """The results of `function()` on every rank, in rank order."""

        def on_rank(rank):
            self.local.rank = rank
            try:
                with torch.no_grad():
                    return function()
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(on_rank, range(self.size)))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory, llama3_path) -> Path:
    """A checkpoint in Meta's layout, in one file, with the tiny Llama 3 tokenizer. Tests must not change it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return write_meta_checkpoint(folder, tiny_model(vocab_size=Tokenizer(llama3_path).n_words), llama3_path)


def run_python(*command: str | Path, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
    """Run Python in a new process, outside torchrun and with one thread, and wait for it.

    Args:
        command: its arguments.
        timeout: in seconds.
        environment: further environment variables.
    """
    inherited = {key: value for key, value in os.environ.items() if key not in {"RANK", "WORLD_SIZE", "LOCAL_RANK"}}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env=inherited | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
    )


def torchrun(n: int, *command: str | Path, timeout: float = 300) -> subprocess.CompletedProcess:
    """Run a script under torchrun with `n` processes, on a free port."""
    return run_python(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n), *command, timeout=timeout
    )


def write_gguf(path, model, quantization=gguf.GGMLQuantizationType.F32, rope_divisors=None, **changes):
    """Write a GGUF file of a tiny model with a byte-level vocabulary, using the gguf package.

    Args:
        path: the file.
        model: the weights.
        quantization: the type that matrices are stored as; norms are stored in float32.
        rope_divisors: the numbers by which the rotary frequencies are divided, if any.
        changes: changes of the metadata by key; `...` removes one. `architecture` is the file's.
    """
    args = model.params
    writer = gguf.GGUFWriter(path, changes.pop("architecture", "llama"))
    tokens = ["<|im_start|>", "<|im_end|>", *gpt2_characters(), "th", "he"]
    tokens += [f"<|reserved_{i}|>" for i in range(args.vocab_size - len(tokens))]
    metadata = {
        "llama.block_count": args.n_layers,
        "llama.context_length": 128,
        "llama.embedding_length": args.dim,
        "llama.feed_forward_length": args.ffn_size,
        "llama.attention.head_count": args.n_heads,
        "llama.attention.head_count_kv": args.kv_heads,
        "llama.attention.layer_norm_rms_epsilon": args.norm_eps,
        "llama.rope.freq_base": float(args.rope_theta),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token.startswith("<|") else 1 for token in tokens],
        "tokenizer.ggml.merges": ["t h", "h e"],
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
    }
    add_value = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    add_value[bool] = writer.add_bool
    for key, value in (metadata | changes).items():
        if value is not ...:
            add_value[type(value)](key, value)
    if rope_divisors is not None:
        writer.add_tensor("rope_freqs.weight", np.array(rope_divisors, dtype=np.float32))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, args.n_layers)
    for name, weight in model.named_parameters():
        array = weight.detach().numpy()
        kind = quantization if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(names.get_name(name, [".weight"]), gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def hugging_face_twin(model: Transformer) -> torch.nn.Module:
    """Hugging Face's LlamaForCausalLM with the same weights."""
    import transformers

    args = model.params
    rope = {"rope_type": "default", "rope_theta": args.rope_theta}
    if args.use_scaled_rope:
        rope |= {
            "rope_type": "llama3",
            "factor": args.rope_scaling_factor,
            "low_freq_factor": args.rope_low_freq_factor,
            "high_freq_factor": args.rope_high_freq_factor,
            "original_max_position_embeddings": args.rope_original_max_seq_len,
        }
    config = transformers.LlamaConfig(
        hidden_size=args.dim,
        intermediate_size=args.ffn_size,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_size,
        vocab_size=args.vocab_size,
        rms_norm_eps=args.norm_eps,
        max_position_embeddings=131072,
        rope_parameters=rope,
        tie_word_embeddings=args.tie_embeddings,
        attn_implementation="eager",
    )
    twin = transformers.LlamaForCausalLM(config).eval()
    ours = model.state_dict()

    def half_split(weight: torch.Tensor) -> torch.Tensor:
        return weight.unflatten(0, (-1, args.head_size // 2, 2)).transpose(1, 2).flatten(0, 2)

    theirs = {"model.embed_tokens.weight": ours["tok_embeddings.weight"], "model.norm.weight": ours["norm.weight"]}
    theirs["lm_head.weight"] = ours["output.weight"]
    for i in range(args.n_layers):
        our_layer, their_layer = f"layers.{i}.", f"model.layers.{i}."
        theirs[their_layer + "self_attn.q_proj.weight"] = half_split(ours[our_layer + "attention.wq.weight"])
        theirs[their_layer + "self_attn.k_proj.weight"] = half_split(ours[our_layer + "attention.wk.weight"])
        theirs[their_layer + "self_attn.v_proj.weight"] = ours[our_layer + "attention.wv.weight"]
        theirs[their_layer + "self_attn.o_proj.weight"] = ours[our_layer + "attention.wo.weight"]
        theirs[their_layer + "mlp.gate_proj.weight"] = ours[our_layer + "feed_forward.w1.weight"]
        theirs[their_layer + "mlp.down_proj.weight"] = ours[our_layer + "feed_forward.w2.weight"]
        theirs[their_layer + "mlp.up_proj.weight"] = ours[our_layer + "feed_forward.w3.weight"]
        theirs[their_layer + "input_layernorm.weight"] = ours[our_layer + "attention_norm.weight"]
        theirs[their_layer + "post_attention_layernorm.weight"] = ours[our_layer + "ffn_norm.weight"]
    twin.load_state_dict(theirs)
    return twin


def hugging_face_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """The logits that transformers computes for the model in a folder."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        return model(tokens).logits
