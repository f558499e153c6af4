"""Locks between processes: held by one at a time, and by none that has died."""

import errno
import os
import subprocess
import sys
import threading
import time

import pytest

from llama import file_lock as file_lock_module
from llama.file_lock import file_lock

HOLD = f"""
import runpy, sys, time
from pathlib import Path
with runpy.run_path({str(file_lock_module.__file__)!r})["file_lock"](Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_process_keeps_others_out_until_it_dies(tmp_path):
    path = tmp_path / "lock"
    process = subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "locked\n"
        for timeout in (0, 0.2):
            with pytest.raises(BlockingIOError, match=f"process {process.pid}"), file_lock(path, timeout):
                pass
    finally:
        process.kill()  # as kill -9 does
        process.communicate()
    assert path.exists()
    with file_lock(path) as is_locked:
        assert is_locked
        assert path.read_text() == str(os.getpid())
    assert not path.exists()


def test_one_at_a_time(tmp_path):
    """Also where the file is removed and made anew while others wait for it."""
    inside, most = [], []

    def work():
        for _ in range(20):
            with file_lock(tmp_path / "lock", timeout=30):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.0002)
                inside.pop()

    file_lock_module.POLL_SECONDS, seconds = 0.0005, file_lock_module.POLL_SECONDS
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    file_lock_module.POLL_SECONDS = seconds
    assert most == [1] * 80
    assert list(tmp_path.iterdir()) == []


def test_it_is_unlocked_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), file_lock(tmp_path / "lock"):
        raise ZeroDivisionError
    with file_lock(tmp_path / "lock"):
        pass


def test_where_the_file_system_has_no_locks_a_warning_says_so(tmp_path, monkeypatch, caplog):
    def fail(descriptor):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(file_lock_module, "_lock", fail)
    with file_lock(tmp_path / "lock") as is_locked:
        assert not is_locked
    assert "lock can't be locked (No locks available): start nothing else that writes there" in caplog.text
    assert list(tmp_path.iterdir()) == []
