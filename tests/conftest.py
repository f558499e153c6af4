"""What the tests share: tiny models with strong random weights, tiny real tokenizer files, and checkpoints of them."""

import base64
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from sentencepiece import SentencePieceTrainer

from llama import ModelArgs, Tokenizer, Transformer
from llama.checkpoint import split_axis
from llama.default_model import default_checkpoint, fetch
from llama.gguf_file import GGUFFile

ROOT = Path(__file__).parent.parent


def tiny_args(**changes) -> ModelArgs:
    """Four heads of size 32 over two kv heads, two layers; a feed-forward width of 192."""
    sizes = {"dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 320, "multiple_of": 64}
    sizes |= {"ffn_dim_multiplier": 0.5, "max_batch_size": 4, "max_seq_len": 96}
    return ModelArgs(**(sizes | changes))


def strong(model: Transformer, seed: int = 0) -> Transformer:
    """Give a model weights so large that every part of it matters to the logits.

    At a deviation of 0.3 the rounding of float32 alone moves the logits of these sizes by 2e-4, in any implementation.
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
    return strong(Transformer(tiny_args(**changes)), seed)


class ScriptedTokenizer:
    """The least a tokenizer can be: words of a text are its tokens' numbers."""

    pad_id = -1
    eos_id = 2

    def __init__(self, stop_tokens=(2,)):
        self.stop_tokens = set(stop_tokens)

    def encode(self, s, bos, eos):
        return [1] * bos + [int(word) for word in s.split()] + [2] * eos

    def decode(self, t):
        return " ".join(str(token) for token in t)


class ScriptedModel:
    """A model that always continues token n with n + 1; it counts its calls."""

    def __init__(self, vocab_size=50, max_batch_size=4, max_seq_len=32):
        self.params = SimpleNamespace(max_batch_size=max_batch_size, max_seq_len=max_seq_len)
        self.vocab_size = vocab_size
        self.calls = []

    def forward(self, tokens, start_pos):
        self.calls.append((tuple(tokens.shape), start_pos))
        return 20.0 * torch.nn.functional.one_hot((tokens + 1) % self.vocab_size, self.vocab_size).float()


def write_llama3_tokenizer(path: Path) -> Path:
    """A tokenizer.model of Llama 3's kind: the 256 bytes and a few merges."""
    merges = [b"th", b"he", b" t", b"in", b" the", b"er", b"an", b"ou", b"\n\n", b"ing", b"user", b"us"]
    tokens = [bytes([byte]) for byte in range(256)] + merges
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % rank for rank, t in enumerate(tokens)))
    return path


def write_llama2_tokenizer(path: Path) -> Path:
    """A tokenizer.model of Llama 2's kind: byte-pair sentencepiece with bytes to fall back on."""
    text = path.with_suffix(".txt")
    text.write_text("".join(f"the {w} is in the other {w}, and the user asks\n" for w in ["house", "world", "river"]))
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
    """Hugging Face's engine over the same vocabulary."""
    file = GGUFFile(default_checkpoint())
    vocabulary = {token: i for i, token in enumerate(file.get("tokenizer.ggml.tokens", list))}
    merges = [tuple(merge.split(" ")) for merge in file.get("tokenizer.ggml.merges", list)]
    engine = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    engine.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(True), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return engine


def write_meta_checkpoint(folder: Path, model: Transformer, tokenizer_path: Path, n_files: int = 1, **params) -> Path:
    """A folder in Meta's layout, the weights cut over `n_files` files the way Meta cuts them."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n_files):
        part = {}
        for name, weight in model.state_dict().items():
            axis = split_axis(name)
            part[name] = (weight if axis is None else weight.chunk(n_files, dim=axis)[i]).clone()
        torch.save(part, folder / f"consolidated.{i:02d}.pth")
    reference_keys = list(asdict(ModelArgs()))[:9]
    kept = {key: value for key, value in asdict(model.params).items() if key in reference_keys}
    (folder / "params.json").write_text(json.dumps(kept | params))
    (folder / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory, llama3_path) -> Path:
    """A one-file checkpoint whose vocabulary is the tiny Llama 3 tokenizer's."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return write_meta_checkpoint(folder, tiny_model(vocab_size=Tokenizer(llama3_path).n_words), llama3_path)


def run_python(*command: str | Path, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
    """Run Python in a fresh process with little but the given environment variables, and wait for it."""
    kept = {key: value for key, value in os.environ.items() if key not in {"RANK", "WORLD_SIZE", "LOCAL_RANK"}}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env=kept | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
    )


def torchrun(n: int, *command: str | Path, timeout: float = 300) -> subprocess.CompletedProcess:
    """Run a script under torchrun with n processes, on a free port."""
    return run_python(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n), *command, timeout=timeout
    )
