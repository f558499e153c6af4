"""Weights that are used where their files are mapped: what is noticed when a file changes."""

import copy
import os
import shutil
import sys

import pytest
import torch

from llama import Llama
from llama.errors import CheckpointError

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux says which files are mapped")


@pytest.fixture
def folder(tmp_path, tiny_checkpoint):
    return shutil.copytree(tiny_checkpoint, tmp_path / "model")


def build(folder, **options) -> Llama:
    return Llama.build(folder, None, 64, 1, device="cpu", **options)


def stored_dtype(folder) -> torch.dtype:
    (path,) = folder.glob("*.pth")
    return next(iter(torch.load(path, mmap=True).values())).dtype


def weights_file(folder):
    (path,) = folder.glob("*.pth")
    return path


def test_a_file_that_was_cut_is_an_error(folder):
    llama = build(folder, dtype=stored_dtype(folder))
    expected = llama.generate([[5, 6, 7]], 5, 0)
    assert llama.generate([[5, 6, 7]], 5, 0) == expected
    path = weights_file(folder)
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(CheckpointError, match=f"{path} has been cut since the model was loaded"):
        llama.generate([[5, 6, 7]], 5, 0)


def test_a_file_that_was_written_to_is_warned_of(folder, caplog):
    llama = build(folder, dtype=stored_dtype(folder))
    path = weights_file(folder)
    os.utime(path, ns=(1, 1))
    for _ in range(2):
        llama.generate([[5, 6, 7]], 5, 0)
    assert caplog.text.count("has been written to since the model was loaded") == 1
    assert "mmap=False" in caplog.text


def test_a_file_that_was_replaced_or_removed_does_not_matter(folder, caplog):
    llama = build(folder, dtype=stored_dtype(folder))
    expected = llama.generate([[5, 6, 7]], 5, 0)
    path = weights_file(folder)
    (folder / "new").write_bytes(b"another file")
    (folder / "new").replace(path)
    assert llama.generate([[5, 6, 7]], 5, 0) == expected
    path.unlink()
    assert llama.generate([[5, 6, 7]], 5, 0) == expected
    assert "has been" not in caplog.text


def test_a_copy_in_memory_does_not_depend_on_the_file(folder, caplog):
    in_memory = build(folder, dtype=stored_dtype(folder), mmap=False)
    mapped = build(folder, dtype=stored_dtype(folder))
    copied = Llama(copy.deepcopy(mapped.model), mapped.tokenizer)
    expected = mapped.generate([[5, 6, 7]], 5, 0)
    path = weights_file(folder)
    path.write_bytes(bytes(path.stat().st_size))
    for llama in (in_memory, copied):
        assert llama.generate([[5, 6, 7]], 5, 0) == expected
    assert "has been" not in caplog.text
