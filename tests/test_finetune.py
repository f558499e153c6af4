"""The command: what it writes, what it refuses, and how it goes on after it was killed."""

import functools
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, load, run_python, same_weights, strong, torchrun
from test_finetune_parallel import write_pairs

from llama import Llama
from llama.checkpoint import save_checkpoint
from llama.errors import InputError
from llama.finetune import finetune, metrics, training
from llama.finetune.run_folder import RunFolder

QUICK = {"dtype": "float32", "max_seq_len": 96, "lr": 1e-2, "epochs": 2}  # 20 pairs, 18 of them to learn from: 10 steps


@pytest.fixture
def data(tmp_path):
    return write_pairs(tmp_path / "data.jsonl")


def losses(folder):
    return [(entry["step"], entry[key]) for entry in course(folder) for key in entry if key.endswith("loss")]


def course(folder):
    return metrics.read(folder / "metrics.jsonl")


def build(folder):
    return Llama.build(folder, None, 96, 4, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("train", ["all", "lora"])
def test_a_model_learns_its_pairs(tiny_checkpoint, tmp_path, train):
    """And what is written is a checkpoint like any other, for `Llama.build` and for both examples."""
    pairs = {"the user": "in there", "in": "the other house"}
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    lines = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs.items()]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    how = QUICK | {"lr": 3e-3, "epochs": 60, "val_fraction": 0, "train": train}
    finetune(data, out, tiny_checkpoint, **how)
    assert sorted(path.name for path in out.iterdir()) == [
        "consolidated.00.pth",
        "loss.png",
        "metrics.jsonl",
        "params.json",
        "tokenizer.model",
    ]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "out"]
    llama = build(out)
    for prompt, completion in pairs.items():
        (answer,) = llama.chat_completion([[{"role": "user", "content": prompt}]], temperature=0)
        assert answer["generation"]["content"] == completion  # and there its turn ends
    for example in ("example_text_completion.py", "example_chat_completion.py"):
        run = run_python(example, "--ckpt_dir", out, "--max_gen_len", "4", PYTHONPATH=str(ROOT))
        assert run.returncode == 0, run.stderr
        assert run.stdout.count("=====\n") == 4


def test_plain_texts(tiny_checkpoint, tmp_path):
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text(json.dumps({"prompt": "the user", "completion": " in there"}) + "\n")
    finetune(data, out, tiny_checkpoint, format="plain", **QUICK | {"lr": 3e-3, "epochs": 40, "val_fraction": 0})
    (answer,) = build(out).text_completion(["the user"], temperature=0)
    assert answer["generation"] == " in there"


def test_the_course(tiny_checkpoint, tmp_path, data):
    """The validation loss before the first epoch and after each, and the loss of every step."""
    finetune(data, tmp_path / "out", tiny_checkpoint, **QUICK)
    found = course(tmp_path / "out")
    validated = [(entry["step"], i) for i, entry in enumerate(found) if "validation_loss" in entry]
    assert validated == [(0, 0), (5, 6), (10, 12)]
    assert [entry["step"] for entry in found if "loss" in entry] == list(range(1, 11))
    assert set(found[1]) == {"step", "loss", "learning_rate", "gradient_norm", "tokens_per_second"}
    rates = [entry["learning_rate"] for entry in found if "loss" in entry]
    assert rates[0] == max(rates) == 1e-2 > rates[-1] > 0
    assert found[-1]["validation_loss"] < found[0]["validation_loss"]


def test_the_other_layouts_and_formats_of_numbers(tiny_checkpoint, tmp_path, data):
    """A mapped file's weights are never written to."""
    llama = build(tiny_checkpoint)
    for layout, dtype in (("hf", "float32"), ("meta", "bfloat16")):
        folder = tmp_path / layout
        save_checkpoint(folder, llama.model.to(getattr(torch, dtype)), llama.tokenizer, layout=layout)
        before = {path: path.read_bytes() for path in folder.iterdir()}
        finetune(data, tmp_path / f"{layout}-out", folder, **QUICK | {"dtype": dtype, "weight_decay": 0.5})
        assert {path: path.read_bytes() for path in folder.iterdir()} == before
        weights = torch.load(tmp_path / f"{layout}-out" / "consolidated.00.pth", weights_only=True)
        assert {weight.dtype for weight in weights.values()} == {getattr(torch, dtype)}
        assert losses(tmp_path / f"{layout}-out")[-1][1] < losses(tmp_path / f"{layout}-out")[0][1]


def command(tiny_checkpoint, data, out):
    options = ["--lr", "1e-3", "--epochs", "20", "--save_every", "7", "--dtype", "float32", "--max_seq_len", "96"]
    return ["-m", "llama.finetune", "--data", data, "--out_dir", out, "--ckpt_dir", tiny_checkpoint, *options]


def kill_at(step, processes, arguments, path):
    """Start a run, as torchrun would, and kill all its processes as soon as it has made so many steps."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | (world | {"RANK": str(rank)} if processes > 1 else {}),
            stderr=subprocess.DEVNULL,
        )
        for rank in range(processes)
    ]
    try:
        while not path.exists() or path.read_bytes().count(b'"loss"') < step:
            assert all(process.poll() is None for process in started)
            time.sleep(0.002)
    finally:
        for process in started:
            process.kill()  # as kill -9 does
            process.wait()


@pytest.mark.parametrize(("processes", "kills"), [(1, 2), (2, 1)])
def test_killed_at_random_steps_it_goes_on_to_the_same_losses(tiny_checkpoint, tmp_path, data, processes, kills):
    """To the last bit."""
    out, unfinished = tmp_path / "out", tmp_path / "out.training"
    steps = sorted(random.sample(range(1, 95), kills))
    print(f"killed at {steps}")  # shown if this fails
    for step in steps:
        kill_at(step, processes, command(tiny_checkpoint, data, out), unfinished / "metrics.jsonl")
        assert unfinished.exists()
        assert not out.exists()
        assert not list(unfinished.glob("*.pth"))
    launch = functools.partial(torchrun, processes) if processes > 1 else run_python
    run = launch(*command(tiny_checkpoint, data, out))
    assert run.returncode == 0, run.stderr
    if steps[-1] > 8:
        resumed = int(re.search(r"going on after step (\d+)", run.stderr)[1])
        assert resumed % 7 == 0
        assert steps[-1] - 8 <= resumed <= 100
    whole = launch(*command(tiny_checkpoint, data, tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    assert len(losses(out)) == 100 + 21
    assert losses(out) == losses(tmp_path / "whole")
    assert same_weights(load(out), load(tmp_path / "whole"))
    assert not unfinished.exists()


class Killed(BaseException):
    """What no code expects."""


def interrupt(monkeypatch, owner, name, call):
    """Let the `call`-th call of a function leave half of its work, as a kill would."""
    calls, function = [], getattr(owner, name)

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == call:
            if name == "save" and owner is torch:
                args[1].write_bytes(b"half")
            raise Killed
        return function(*args, **options)

    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (training, "learn", 1),
        (training, "learn", 6),
        (torch, "save", 1),  # the first state
        (torch, "save", 4),
        (torch, "save", 6),  # the checkpoint's file of weights: five states went before
        (shutil, "rmtree", 4),  # an older state
        (metrics, "append", 3),
        (metrics, "append", 13),  # the last validation
        (shutil, "copy", 1),  # into the finished checkpoint
        (metrics, "draw", 1),
    ],
)
def test_interrupted_anywhere_nothing_looks_finished(tiny_checkpoint, tmp_path, data, monkeypatch, owner, name, call):
    plain, out = tmp_path / "plain", tmp_path / "out"
    how = QUICK | {"save_every": 2}
    finetune(data, plain, tiny_checkpoint, **how)
    with monkeypatch.context() as patched:
        interrupt(patched, owner, name, call)
        with pytest.raises(Killed):
            finetune(data, out, tiny_checkpoint, **how)
    assert not out.exists()
    finetune(data, out, tiny_checkpoint, **how)
    assert losses(out) == losses(plain)
    assert same_weights(build(out).model, build(plain).model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "out", "plain"]


def test_only_the_newest_state_is_kept(tiny_checkpoint, tmp_path, data, monkeypatch):
    interrupt(monkeypatch, training, "learn", 9)
    with pytest.raises(Killed):
        finetune(data, tmp_path / "out", tiny_checkpoint, **QUICK | {"save_every": 3})
    assert sorted(path.name for path in (tmp_path / "out.training").iterdir()) == [
        "metrics.jsonl",
        "settings.json",
        "step-000006",
    ]


def test_a_line_that_was_cut_in_two_is_no_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 1, "validation_loss": 2.5}\n{"step": 2, "loss": 1.5}\n{"ste')
    assert [entry["step"] for entry in metrics.read(path)] == [1, 1, 2]
    metrics.cut_back(path, 1)
    assert metrics.read(path) == [{"step": 1, "loss": 2.0}]


def test_other_settings_are_refused_where_a_run_was_interrupted(tiny_checkpoint, tmp_path, data, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        interrupt(patched, training, "learn", 5)
        with pytest.raises(Killed):
            finetune(data, out, tiny_checkpoint, **QUICK)
    with pytest.raises(InputError, match=r"out\.training holds a run .* seed=1 \(now 2\): give the same to go on"):
        finetune(data, out, tiny_checkpoint, **QUICK, seed=2)
    data.write_text(data.read_text() + '{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(InputError, match=r"out\.training holds a run .* data='"):
        finetune(data, out, tiny_checkpoint, **QUICK)


def test_a_damaged_state(tmp_path):
    folder = RunFolder(tmp_path / "out", {"seed": 1})
    folder.save(3, {"masters": {}})
    assert folder.newest()["step"] == 3
    (tmp_path / "out.training" / "step-000003" / "part-00.pt").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"part-00\.pt can't be read: remove .*out\.training to begin anew"):
        folder.newest()


def test_without_matplotlib_there_is_no_picture(tiny_checkpoint, tmp_path, data, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with caplog.at_level("INFO", logger="llama"):
        finetune(data, tmp_path / "out", tiny_checkpoint, **QUICK)
    assert (tmp_path / "out" / "metrics.jsonl").exists()
    assert not (tmp_path / "out" / "loss.png").exists()
    assert "no picture of the loss: it needs matplotlib" in caplog.text


def test_a_loss_that_is_no_number(tiny_checkpoint, tmp_path, data):
    llama = build(tiny_checkpoint)
    strong(llama.model)
    with torch.no_grad():
        llama.model.norm.weight.fill_(float("nan"))
    save_checkpoint(tmp_path / "nan", llama.model, llama.tokenizer)
    with pytest.raises(ArithmeticError, match="step 1: the loss is nan"):
        finetune(data, tmp_path / "out", tmp_path / "nan", **QUICK)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": "head"}, r"train='head' must be one of \['all', 'attention', 'norms', 'lora'\]"),
        ({"format": "chatml"}, "format='chatml' must be one of"),
        ({"lr": 0}, "lr=0 must be a number above 0"),
        ({"lr": "fast"}, "lr='fast' must be a number"),
        ({"epochs": 0}, "epochs=0 must be a whole number of at least 1"),
        ({"batch_size": 1.5}, "batch_size=1.5 must be a whole number"),
        ({"grad_accum": True}, "grad_accum=True must be a whole number"),
        ({"save_every": 0}, "save_every=0 must be"),
        ({"lora_rank": 0}, "lora_rank=0 must be"),
        ({"warmup": 2}, "warmup=2 must be a part of the steps, from 0 to 1"),
        ({"clip": -1}, "clip=-1 must be a number of at least 0"),
        ({"weight_decay": float("nan")}, "weight_decay=nan must be"),
        ({"val_fraction": 1}, "val_fraction=1 must be a part of the examples"),
        ({"seed": None}, "seed=None must be a whole number"),
        ({"activation_checkpointing": 1}, "activation_checkpointing=1 must be True or False"),
        ({"dtype": "float16"}, "dtype='float16' must be 'bfloat16' or 'float32'"),
        ({"dtype": "int8"}, "dtype='int8' must be one of"),
        ({"max_seq_len": 9000}, "max_seq_len=9000 is over this model's limit of 8192"),
        ({"max_seq_len": 20}, "line 1: from the first to the last word"),
        ({"model_parallel_size": 2}, "model_parallel_size=2 doesn't divide the 1 process"),
        ({"out_dir": "."}, "is there already; give the name of a new folder"),
        ({"ckpt_dir": "nowhere"}, "ckpt_dir='nowhere' does not exist"),
        ({"data": "nowhere.jsonl"}, "data='nowhere.jsonl' does not exist"),
    ],
)
def test_what_is_refused(tiny_checkpoint, tmp_path, changes, message):
    pairs = write_pairs(tmp_path / "data.jsonl")
    pairs.write_text(json.dumps({"prompt": "a", "completion": "in " * 30}) + "\n" + pairs.read_text())
    how = (
        QUICK | {"data": pairs, "out_dir": tmp_path / "out", "ckpt_dir": tiny_checkpoint, "max_seq_len": 256} | changes
    )
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        finetune(**how)
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_prompts_that_were_cut_are_told(tiny_checkpoint, tmp_path, caplog):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": "0" * n, "completion": "in"}) + "\n" for n in (9, 99, 9, 99)))
    with caplog.at_level("WARNING", logger="llama"):
        finetune(data, tmp_path / "out", tiny_checkpoint, **QUICK | {"epochs": 1})
    assert "max_seq_len=96: the prompts of 2 examples were cut, of line 2 first" in caplog.text


def test_on_the_command_line(tiny_checkpoint, tmp_path, data):
    shown = run_python("-m", "llama.finetune", "--help")
    assert shown.returncode == 0
    assert "DATA OUT_DIR <flags>" in shown.stdout
    for option in ("ckpt_dir", "train", "lr", "epochs", "batch_size", "grad_accum", "max_seq_len"):
        assert f"--{option}=" in shown.stdout
    for option in ("warmup", "weight_decay", "clip", "val_fraction", "save_every", "seed", "activation_checkpointing"):
        assert f"--{option}=" in shown.stdout
    data.write_text(data.read_text() + '{"prompt": 1}\n')
    wrong = run_python(*command(tiny_checkpoint, data, tmp_path / "out"))
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr.splitlines()[-1].startswith("  line 21: it must be an object with prompt and completion")
    assert "Traceback" not in wrong.stderr
    assert not (tmp_path / "out.training").exists()
