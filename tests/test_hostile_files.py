"""Damaged and hostile files of every layout: only this library's exceptions are raised, and no code in them runs."""

import functools
import json
import os
import shutil
import stat
import struct
import time
import zipfile
from collections import Counter
from pathlib import Path

import gguf
import pytest
import torch
from chat_templates import ALPACA, gguf_metadata, write_folder
from conftest import (
    load,
    tiny_args,
    tiny_model,
    write_gguf,
    write_llama2_tokenizer,
    write_llama3_tokenizer,
    write_meta_checkpoint,
    write_tokenizer_json,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_hugging_face import random_hugging_face_model
from test_lora_adapter import write_adapter

from llama import Llama, Tokenizer
from llama.checkpoint import save_checkpoint
from llama.checkpoint.hugging_face import name_in_files, open_weights
from llama.checkpoint.lora_adapter import LoRAAdapter
from llama.convert import convert
from llama.errors import CheckpointError, InputError, MissingFileError
from llama.output_folder import new_folder

SMALL = {"dim": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "multiple_of": 8}


def llama_3(folder: Path) -> None:
    tokenizer = Tokenizer(write_llama3_tokenizer(folder / "ranks"))
    write_meta_checkpoint(folder, tiny_model(vocab_size=tokenizer.n_words, **SMALL), folder / "ranks", 2)
    (folder / "ranks").unlink()


def llama_2(folder: Path) -> None:
    path = write_llama2_tokenizer(folder / "spm.model")
    write_meta_checkpoint(folder, tiny_model(**SMALL), path, 1, vocab_size=-1)
    for leftover in ("spm.model", "spm.txt", "spm.vocab"):
        (folder / leftover).unlink()


def hugging_face(folder: Path, shards: int = 1) -> None:
    ranks = folder / "ranks"
    tokenizer = Tokenizer(write_llama3_tokenizer(ranks))
    model = tiny_model(vocab_size=tokenizer.n_words, tie_embeddings=True, use_scaled_rope=True, **SMALL)
    ranks.unlink()
    folder.rmdir()
    save_checkpoint(folder, model, layout="hf", shards=shards)
    write_tokenizer_json(folder)


def pickled(folder: Path, shards: int = 1) -> None:
    """Hugging Face's layout with pickled weights instead of safetensors."""
    hugging_face(folder, shards)
    for path in folder.glob("*.safetensors"):
        name = path.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        torch.save({name: weight.clone() for name, weight in load_file(path).items()}, folder / name)
        path.unlink()
    for path in folder.glob("*.index.json"):
        index = path.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        (folder / "pytorch_model.bin.index.json").write_text(index)
        path.unlink()


def gguf_file(folder: Path) -> None:
    write_gguf(folder / "model.gguf", tiny_model(**SMALL))


def sentencepiece_gguf(folder: Path) -> None:
    """A GGUF file of the Llama 2 family, with added tokens and a chat template."""
    path = write_folder(folder / "tokenizer", ALPACA)
    model = tiny_model(vocab_size=Tokenizer(path).n_words, **SMALL)
    write_gguf(folder / "model.gguf", model, **gguf_metadata(path, ALPACA))
    shutil.rmtree(folder / "tokenizer")


def split_gguf(folder: Path) -> None:
    """A GGUF model split over files, the first of which holds metadata only."""
    with pytest.MonkeyPatch.context() as patch:
        writer = functools.partial(gguf.GGUFWriter, split_max_tensors=4, small_first_shard=True)
        patch.setattr(gguf, "GGUFWriter", writer)
        write_gguf(folder / "model.gguf", tiny_model(**SMALL))


LAYOUTS = {
    "Meta, Llama 3": llama_3,
    "Meta, Llama 2": llama_2,
    "Hugging Face": hugging_face,
    "Hugging Face, with an index": lambda folder: hugging_face(folder, 3),
    "Hugging Face, pickled": pickled,
    "Hugging Face, pickled, with an index": lambda folder: pickled(folder, 3),
    "GGUF": gguf_file,
    "GGUF, sentencepiece": sentencepiece_gguf,
    "GGUF, split": split_gguf,
}


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request, tmp_path_factory):
    """A layout's name, a folder of that layout, and the content of its files."""
    folder = tmp_path_factory.mktemp("intact")
    LAYOUTS[request.param](folder)
    assert load(folder)
    return request.param, folder, {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@st.composite
def damage(draw, content: bytes) -> bytes:
    """The content with bytes flipped, overwritten by extreme numbers or by JSON, removed, repeated, or cut off."""
    damaged = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(damaged) - 1, 0)))
        kind = draw(st.sampled_from(["flip", "number", "remove", "repeat", "cut", "json"]))
        if kind == "flip" and damaged:
            damaged[at] ^= draw(st.integers(1, 255))
        elif kind == "number":
            number = draw(st.sampled_from([0, 1, 2**31 - 1, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]))
            damaged[at : at + 8] = struct.pack("<Q", number)
        elif kind == "remove":
            del damaged[at : at + draw(st.integers(1, 64))]
        elif kind == "repeat":
            damaged[at:at] = damaged[at : at + draw(st.integers(1, 64))]
        elif kind == "cut":
            del damaged[at:]
        else:
            value = draw(st.sampled_from([b"null", b"-1", b"[]", b"{}", b'"', b"1e999", b"NaN", b"true", b"9" * 30]))
            damaged[at : at + draw(st.integers(0, 8))] = value
    return bytes(damaged)


# What a damaged file may take.
MAX_SECONDS, MAX_MEMORY = 10, 500e6


def peak_memory() -> int:
    """The most memory that this process has had so far, in bytes; 0 where the system doesn't say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


@pytest.mark.slow
def test_damaged_files_are_refused_with_our_own_exceptions(layout, record_property):
    name, folder, files = layout
    outcomes: Counter[str] = Counter()

    @settings(max_examples=150, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def build_from_damaged_file(data):
        file = data.draw(st.sampled_from(sorted(files)))
        (folder / file).write_bytes(data.draw(damage(files[file])))
        begin = time.process_time()
        try:
            outcomes[build_and_generate(folder)] += 1
        finally:
            (folder / file).write_bytes(files[file])
        assert time.process_time() - begin < MAX_SECONDS

    before = peak_memory()
    build_from_damaged_file()
    assert peak_memory() - before < MAX_MEMORY
    counts = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
    record_property("summary", f"damaged files, {name}: {outcomes.total()} tried: {counts}")
    assert outcomes.total() >= 150
    assert outcomes["CheckpointError"] > 50
    assert outcomes["loaded"] > 0  # where only a weight or a token has changed


@pytest.mark.slow
@pytest.mark.parametrize("pickled", [False, True])
def test_damaged_adapters_are_refused_with_our_own_exceptions(tmp_path_factory, pickled, record_property):
    model = random_hugging_face_model(num_key_value_heads=2, num_hidden_layers=1)
    base, merged = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("merged") / "model"
    model.save_pretrained(base)
    modules = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
    options = {"target_modules": r".*\.(q|down)_proj", "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"mlp.*": 2}}
    folder = write_adapter(merged.parent / "adapter", model, modules, pickled=pickled, **options)
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    outcomes: Counter[str] = Counter()

    @settings(max_examples=150, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def merge_a_damaged_adapter(data):
        file = data.draw(st.sampled_from(sorted(files)))
        (folder / file).write_bytes(data.draw(damage(files[file])))
        try:
            convert(base, merged, adapter=folder)
            outcomes["merged"] += 1
            shutil.rmtree(merged)
        except (InputError, MissingFileError) as error:
            outcomes[type(error).__name__] += 1
            if str(folder) not in str(error):
                raise ValueError("the message doesn't name the file") from error
        finally:
            (folder / file).write_bytes(files[file])

    merge_a_damaged_adapter()
    counts = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
    record_property("summary", f"damaged adapters: {outcomes.total()} tried: {counts}")
    assert outcomes["CheckpointError"] > 50
    assert outcomes["merged"] > 0


def build_and_generate(folder: Path) -> str:
    """What comes of it: the name of the exception that was raised, or whether it loaded."""
    try:
        built = Llama.build(folder, None, 16, 1, device="cpu", dtype=torch.float32)
    except (InputError, MissingFileError) as error:
        if str(folder) not in str(error) and "is over this model's limit" not in str(error):
            raise ValueError("the message doesn't name the file") from error
        return type(error).__name__
    try:
        built.generate([[5, 6]], 3, 0)
        built.text_completion(["the user"], max_gen_len=2)
    except ArithmeticError:  # a weight has become NaN or infinite
        return "NaN or infinity"
    return "loaded"


NOT_FILES = {
    "a pipe": os.mkfifo if hasattr(os, "mkfifo") else None,
    "a link to an endless device": lambda path: path.symlink_to("/dev/zero"),
    "a link to an empty device": lambda path: path.symlink_to("/dev/null"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a broken link": lambda path: path.symlink_to(path.with_name("gone")),
    "a folder": lambda path: path.mkdir(),
    "a socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has neither pipes nor devices among its files")
@pytest.mark.timeout(60)  # opening a pipe waits for ever
@pytest.mark.parametrize("put", NOT_FILES.values(), ids=NOT_FILES)
def test_what_is_no_file_is_refused_without_waiting(layout, put, tmp_path):
    """Any file of a checkpoint replaced by a pipe, a device or a folder; and such a thing given as the checkpoint."""
    _, folder, files = layout
    copy = tmp_path / "copy"
    for file in files:
        shutil.copytree(folder, copy)
        (copy / file).unlink()
        put(copy / file)
        outcome = build_and_generate(copy)
        if outcome == "loaded":  # a link that leads nowhere is a file that isn't there, and some need not be
            assert not (copy / file).exists()
            assert file in ("generation_config.json", "tokenizer_config.json")
        shutil.rmtree(copy)
    put(copy)
    with pytest.raises((InputError, MissingFileError), match="copy"):
        Llama.build(copy, None, 16, 1, device="cpu")
    with pytest.raises((InputError, MissingFileError), match="copy"):
        Llama.build(folder, copy, 16, 1, device="cpu")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_a_json_file_that_would_fill_memory_is_not_read(tmp_path, name):
    (tmp_path / "model").mkdir()
    hugging_face(tmp_path / "model")
    with (tmp_path / "model" / name).open("r+b") as file:
        file.truncate(2**27)  # takes no space on the disk
    with pytest.raises(ValueError, match=rf"{name} has 134217728 bytes, too many for a file of settings"):
        load(tmp_path / "model")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes among its files")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_a_pipe_in_an_adapter_is_refused_without_waiting(tmp_path, name):
    config = {"peft_type": "LORA", "target_modules": ["q_proj"], "r": 4, "lora_alpha": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"{name} is a pipe, not a file"):
        LoRAAdapter(tmp_path, tiny_args())


WITHOUT_DIMENSIONS = [
    "tok_embeddings.weight",
    "layers.0.attention.wk.weight",
    "layers.0.ffn_norm.weight",
    "output.weight",
]


@pytest.mark.parametrize("shape", [(), (0,), (0, 16), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("name", WITHOUT_DIMENSIONS)
@pytest.mark.parametrize("write", [llama_3, llama_2, pickled, hugging_face])
def test_weights_without_dimensions_or_elements(tmp_path, write, name, shape):
    """In one file of the model, or in each of them; every one is named."""
    (tmp_path / "model").mkdir()
    write(tmp_path / "model")
    paths = sorted(path for path in (tmp_path / "model").iterdir() if path.suffix in (".pth", ".bin", ".safetensors"))
    for path in reversed(paths):
        is_safe = path.suffix == ".safetensors"
        tensors = load_file(path) if is_safe else torch.load(path)
        key = name if path.suffix == ".pth" else name_in_files(name)
        tensors[key] = torch.zeros(shape)
        (save_file if is_safe else torch.save)(tensors, path)
        if key != "lm_head.weight":  # left out where it is tied to the embedding
            with pytest.raises(InputError, match=rf"{name}|vocab_size=|shape"):
                load(tmp_path / "model")


@pytest.mark.parametrize("size", [2**20, 2**40, 2**62])
def test_a_safetensors_header_longer_than_the_file(tmp_path, size):
    (tmp_path / "model").mkdir()
    hugging_face(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(struct.pack("<Q", size) + path.read_bytes()[8:])
    with pytest.raises(ValueError, match=r"model\.safetensors \(\d+ bytes\) is damaged or cut short"):
        load(tmp_path / "model")


def test_a_safetensors_header_that_would_fill_memory(tmp_path):
    """Each tensor in it takes 50 bytes, and ten times as many in memory."""
    header = "{" + ",".join(f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(180_000)) + "}"
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    with pytest.raises(
        CheckpointError, match=r"safetensors .* is damaged .*list of tensors is said to have over 8388608"
    ):
        open_weights(path)


def test_a_safetensors_tensor_longer_than_the_file(tmp_path):
    (tmp_path / "model").mkdir()
    hugging_face(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    header["model.norm.weight"] |= {"shape": [2**40], "data_offsets": [0, 2**42]}
    changed = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(changed)) + changed + content[8 + length :])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load(tmp_path / "model")


@pytest.mark.slow
def test_a_compressed_file_that_would_fill_memory_is_refused(tmp_path):
    llama_3(tmp_path)
    path = tmp_path / "consolidated.00.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"N0" * 50_000_000 + b".")
        archive.writestr("archive/version", b"3\n")
    assert path.stat().st_size < 10**6
    with pytest.raises(ValueError, match=r"00\.pth .* is damaged.*claims 100000003 bytes"):
        load(tmp_path)


def test_a_failed_build_leaves_nothing_behind(tmp_path):
    """No file and no process group; and the same process can build from the repaired files."""
    llama_3(tmp_path)
    path = tmp_path / "consolidated.01.pth"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    before = sorted(tmp_path.iterdir())
    for _ in range(3):
        with pytest.raises(ValueError, match=r"consolidated\.01\.pth"):
            Llama.build(tmp_path, None, 16, 1, device="cpu")
    assert sorted(tmp_path.iterdir()) == before
    assert not torch.distributed.is_initialized()
    path.write_bytes(content)
    assert Llama.build(tmp_path, None, 16, 1, device="cpu").generate([[5]], 2)


def test_a_new_folder_appears_complete_or_not_at_all(tmp_path):
    target = tmp_path / "a" / "b"

    def interrupted():
        with new_folder(target) as temporary:
            (temporary / "first").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list((tmp_path / "a").iterdir()) == []
    target.mkdir()  # an empty folder may exist
    with new_folder(target) as temporary:
        (temporary / "file").touch()
        assert not (target / "file").exists()
    assert (target / "file").exists()
    with pytest.raises(ValueError, match="is there already"), new_folder(target):
        pass
    shutil.rmtree(target)
