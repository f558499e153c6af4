"""Files that a user, or a folder of weights, names: only ordinary ones are opened, and none fills the memory."""

import json
import os
import socket
import stat
import tracemalloc
from pathlib import Path

import pytest

from llama import files
from llama.errors import CheckpointError, InputError, MissingFileError
from llama.files import first_bytes, read_json, read_whole, require_file

OTHERS = {
    "a folder": lambda path: path.mkdir(),
    "a pipe": lambda path: os.mkfifo(path),
    "a socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX") or not hasattr(os, "mkfifo"), reason="Windows has no such files")
@pytest.mark.timeout(20)  # opening a pipe waits for ever
@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("linked", [False, True])
def test_what_is_no_ordinary_file_is_not_opened(tmp_path, monkeypatch, kind, linked):
    path = tmp_path / "name"
    OTHERS[kind](path)
    if linked:
        path = tmp_path / "link"
        path.symlink_to("name")
    monkeypatch.setattr("pathlib.Path.open", lambda *_, **__: pytest.fail("it was opened"))
    for read in (first_bytes, read_json, lambda path: read_whole(path, 10)):
        with pytest.raises(CheckpointError, match=rf"{path} is {kind}, not a file"):
            read(path)
    with pytest.raises(InputError, match=rf"data='{path}' is {kind}, not an ordinary file"):
        require_file(path, "data")


def test_links_to_files_are_files(tmp_path):
    (tmp_path / "file").write_text('{"a": 1}')
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "second").symlink_to("link")
    assert read_json(tmp_path / "second") == {"a": 1}
    assert require_file(tmp_path / "second", "data") == tmp_path / "second"


@pytest.mark.parametrize("target", ["gone", "link"])
def test_links_to_nothing(tmp_path, target):
    path = tmp_path / "link"
    path.symlink_to(target)
    with pytest.raises(CheckpointError, match=r"link can't be read"):
        first_bytes(path)
    with pytest.raises(MissingFileError, match="does not exist"):
        require_file(path, "data")


@pytest.mark.skipif(not os.path.exists("/proc/self/environ"), reason="there is no such file system")
def test_files_that_the_system_makes_up_are_not_read():
    """Their size is 0, and to read some of them waits for what is still to come."""
    with pytest.raises(CheckpointError, match="/proc/self/environ is empty"):
        first_bytes(Path("/proc/self/environ"))


def test_longer_files_than_any_of_their_kind(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    assert read_whole(path, 10) == b"0123456789"
    with pytest.raises(CheckpointError, match="file has 10 bytes, too many for a file of settings or of tokens"):
        read_whole(path, 9)


@pytest.mark.parametrize("item", ["[]", "{}", '{"":0}', '{"":[]}', '""', "0.5"])
def test_json_that_would_fill_the_memory(tmp_path, monkeypatch, item):
    """An empty list takes three bytes in a file, and twenty times as many in memory."""
    monkeypatch.setattr(files, "MAX_JSON_ITEMS", 10_000)
    path = tmp_path / "file"
    path.write_text('{"a": [' + ",".join([item] * 3000) + "]}")
    assert len(read_json(path)["a"]) == 3000
    path.write_text('{"a": [' + ",".join([item] * 10_001) + "]}")
    with pytest.raises(CheckpointError, match="file has over 10000 items, too many for a file of settings"):
        read_json(path)
    path.write_text('{"a": [' + ",".join([item] * 3_000) + "]}")
    tracemalloc.start()
    read_json(path)
    assert tracemalloc.get_traced_memory()[1] < 150 * files.MAX_JSON_ITEMS
    tracemalloc.stop()


@pytest.mark.parametrize("depth", [2, 100, 101, 500, 900, 5000, 100_000])
@pytest.mark.parametrize("brackets", [("[", "]"), ('{"a": ', "}")], ids=["lists", "objects"])
def test_deeply_nested_json(tmp_path, depth, brackets):
    """What json reads may still be too deep to be shown in an error message."""
    path = tmp_path / "config.json"
    path.write_text('{"dim": ' + brackets[0] * (depth - 1) + "0" + brackets[1] * (depth - 1) + "}")
    if depth <= files.MAX_JSON_DEPTH:
        assert len(json.dumps(read_json(path))) >= 2 * depth
    else:
        with pytest.raises(CheckpointError, match=r"config\.json is not JSON \((it is nested|maximum recursion|Stack)"):
            read_json(path)
