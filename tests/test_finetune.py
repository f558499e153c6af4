"""Whole fine-tuning runs: what they write, which options are refused, and how an interrupted run is resumed."""

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
from chat_templates import STYLES, write_folder
from conftest import ROOT, load, same_weights, strong, tiny_model
from run_command import Runner, example
from test_finetune_parallel import write_pairs

from llama import ChatFormat, Llama, Tokenizer
from llama.checkpoint import save_checkpoint
from llama.errors import InputError
from llama.finetune import finetune, metrics, training
from llama.finetune.run_folder import RunFolder

OPTIONS = {"dtype": "float32", "max_seq_len": 96, "lr": 1e-2, "epochs": 2}  # 20 pairs, 18 for training: 10 steps


@pytest.fixture
def runner(monkeypatch, capsys):
    return Runner(monkeypatch, capsys)


@pytest.fixture
def data(tmp_path):
    return write_pairs(tmp_path / "data.jsonl")


def read_metrics(folder):
    return metrics.read(folder / "metrics.jsonl")


def losses(folder):
    return [(entry["step"], entry[key]) for entry in read_metrics(folder) for key in entry if key.endswith("loss")]


def build(folder):
    return Llama.build(folder, None, 96, 4, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("train", ["all", "lora"])
def test_a_model_learns_to_answer(tiny_checkpoint, tmp_path, train, runner):
    """And what is written is a checkpoint like any other, for `Llama.build` and for the examples."""
    pairs = {"the user": "in there", "in": "the other house"}
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    lines = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs.items()]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    finetune(data, out, tiny_checkpoint, **OPTIONS | {"epochs": 30, "val_fraction": 0, "train": train})
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
        (prediction,) = llama.chat_completion([[{"role": "user", "content": prompt}]], temperature=0)
        assert prediction["generation"]["content"] == completion  # and it ends there
    for name in ("example_text_completion", "example_chat_completion"):
        result = runner.run(example(name), "--ckpt_dir", out, "--max_gen_len", "4")
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("=====\n") == 4


def test_plain_text(tiny_checkpoint, tmp_path):
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text(json.dumps({"prompt": "the user", "completion": " in there"}) + "\n")
    finetune(data, out, tiny_checkpoint, format="plain", **OPTIONS | {"epochs": 20, "val_fraction": 0})
    (prediction,) = build(out).text_completion(["the user"], temperature=0)
    assert prediction["generation"] == " in there"


def test_metrics(tiny_checkpoint, tmp_path, data):
    """The validation loss before the first epoch and after each, and the loss of every step."""
    finetune(data, tmp_path / "out", tiny_checkpoint, **OPTIONS)
    entries = read_metrics(tmp_path / "out")
    validated = [(entry["step"], i) for i, entry in enumerate(entries) if "validation_loss" in entry]
    assert validated == [(0, 0), (5, 6), (10, 12)]
    assert [entry["step"] for entry in entries if "loss" in entry] == list(range(1, 11))
    assert set(entries[1]) == {"step", "loss", "learning_rate", "gradient_norm", "tokens_per_second"}
    rates = [entry["learning_rate"] for entry in entries if "loss" in entry]
    assert rates[0] == max(rates) == 1e-2 > rates[-1] > 0
    assert entries[-1]["validation_loss"] < entries[0]["validation_loss"]


def test_other_layouts_and_dtypes(tiny_checkpoint, tmp_path, data):
    """The files of the original checkpoint, which are mapped into memory, are not changed."""
    llama = build(tiny_checkpoint)
    for layout, dtype in (("hf", "float32"), ("meta", "bfloat16")):
        folder, out = tmp_path / layout, tmp_path / f"{layout}-out"
        save_checkpoint(folder, llama.model.to(getattr(torch, dtype)), llama.tokenizer, layout=layout)
        before = {path: path.read_bytes() for path in folder.iterdir()}
        finetune(data, out, folder, **OPTIONS | {"dtype": dtype, "weight_decay": 0.5})
        assert {path: path.read_bytes() for path in folder.iterdir()} == before
        weights = torch.load(out / "consolidated.00.pth", weights_only=True)
        assert {weight.dtype for weight in weights.values()} == {getattr(torch, dtype)}
        assert losses(out)[-1][1] < losses(out)[0][1]


def test_the_chat_template_goes_along(tmp_path, data, caplog):
    """A model with a template of its own is trained on it, and what is written in Meta's layout has it too."""
    caplog.set_level("INFO")
    tokenizer = Tokenizer(write_folder(tmp_path / "tokenizer", STYLES["Zephyr"]))
    save_checkpoint(tmp_path / "model", tiny_model(vocab_size=tokenizer.n_words), tokenizer, layout="hf")
    finetune(data, tmp_path / "out", tmp_path / "model", **OPTIONS)
    assert "chat format: the model's own template, from tokenizer_config.json" in caplog.text
    llama = build(tmp_path / "out")
    dialog = [{"role": "user", "content": "the user"}]
    assert llama.formatter.encode_dialog_prompt(dialog) == ChatFormat(tokenizer).encode_dialog_prompt(dialog)
    finetune(data, tmp_path / "llama2", tmp_path / "model", **OPTIONS, chat_format="llama2")
    assert "chat format: Llama 2" in caplog.text
    with pytest.raises(InputError, match=r"chat_format='zephyr' must be one of .*; or train with --format plain"):
        finetune(data, tmp_path / "other", tmp_path / "model", **OPTIONS, chat_format="zephyr")


def start(processes, arguments, **options):
    """Start Python in several processes with the environment that torchrun gives them."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    world = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | (world | {"RANK": str(rank)} if processes > 1 else {}),
            text=True,
            **options,
        )
        for rank in range(processes)
    ]


def kill_at(step, processes, arguments, metrics_path):
    """Start a run, and kill all its processes as soon as it has made so many steps."""
    running = start(processes, arguments, stderr=subprocess.DEVNULL)
    try:
        while not metrics_path.exists() or metrics_path.read_bytes().count(b'"loss"') < step:
            assert all(process.poll() is None for process in running)
            time.sleep(0.002)
    finally:
        for process in running:
            process.kill()  # as kill -9 does
            process.wait()


def run_to_the_end(processes, arguments) -> str:
    """Start a run, and wait until it has finished; return its standard error."""
    running = start(processes, arguments, stderr=subprocess.PIPE)
    errors = [process.communicate(timeout=100)[1] for process in running]
    assert all(process.returncode == 0 for process in running), errors
    return "".join(errors)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "n_kills"), [(1, 2), (2, 1)])
def test_killed_at_random_steps_a_run_resumes_to_the_same_losses(tiny_checkpoint, tmp_path, data, processes, n_kills):
    """They are the same to the last bit."""
    out, whole, unfinished = tmp_path / "out", tmp_path / "whole", tmp_path / "out.training"

    def command(out_dir):
        options = ["--lr", "1e-3", "--epochs", "8", "--save_every", "7", "--dtype", "float32", "--max_seq_len", "96"]
        paths = ["--data", data, "--out_dir", out_dir, "--ckpt_dir", tiny_checkpoint]
        return ["-m", "llama.finetune", *paths, *options]

    steps = sorted(random.sample(range(1, 37), n_kills))  # of 40
    print(f"killed at {steps}")  # shown if the test fails
    for step in steps:
        kill_at(step, processes, command(out), unfinished / "metrics.jsonl")
        assert unfinished.exists()
        assert not out.exists()
        assert not list(unfinished.glob("*.pth"))
    log = run_to_the_end(processes, command(out))
    if steps[-1] > 8:
        resumed = int(re.search(r"resuming after step (\d+)", log)[1])
        assert resumed % 7 == 0
        assert steps[-1] - 8 <= resumed <= 40
    run_to_the_end(processes, command(whole))
    assert len(losses(out)) == 40 + 9
    assert losses(out) == losses(whole)
    assert same_weights(load(out), load(whole))
    assert not unfinished.exists()


class Killed(BaseException):
    """Interrupts a run: an exception that no code handles."""


def interrupt(monkeypatch, owner, name, call):
    """Make the `call`-th call of a function stop half-way, as if the process were killed."""
    calls, function = [], getattr(owner, name)

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == call:
            if name == "save" and owner is torch:
                args[1].write_bytes(b"half")
            raise Killed
        return function(*args, **options)

    monkeypatch.setattr(owner, name, interrupted)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_checkpoint):
    """Data, and the result of a run on them that was not interrupted."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    data = write_pairs(folder / "data.jsonl")
    finetune(data, folder / "out", tiny_checkpoint, **OPTIONS, save_every=2)
    return data, folder / "out"


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (training, "train_step", 1),
        (training, "train_step", 6),
        (torch, "save", 1),  # the first state
        (torch, "save", 4),
        (torch, "save", 6),  # after five states: the weights of the checkpoint
        (shutil, "rmtree", 4),  # of an older state
        (metrics, "append", 3),
        (metrics, "append", 13),  # the last validation loss
        (shutil, "copy", 1),  # of the metrics into the checkpoint
        (metrics, "plot", 1),
    ],
)
def test_interrupted_anywhere_a_run_resumes_to_the_same_losses(
    tiny_checkpoint, tmp_path, uninterrupted, monkeypatch, owner, name, call
):
    """And there is no folder that looks finished before it is."""
    data, expected = uninterrupted
    out = tmp_path / "out"
    if name != "plot":  # which takes half of the time
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with monkeypatch.context() as patched:
        interrupt(patched, owner, name, call)
        with pytest.raises(Killed):
            finetune(data, out, tiny_checkpoint, **OPTIONS, save_every=2)
    assert not out.exists()
    finetune(data, out, tiny_checkpoint, **OPTIONS, save_every=2)
    assert losses(out) == losses(expected)
    assert same_weights(load(out), load(expected))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_only_the_last_state_is_kept(tiny_checkpoint, tmp_path, data, monkeypatch):
    interrupt(monkeypatch, training, "train_step", 9)
    with pytest.raises(Killed):
        finetune(data, tmp_path / "out", tiny_checkpoint, **OPTIONS, save_every=3)
    assert sorted(path.name for path in (tmp_path / "out.training").iterdir()) == [
        "metrics.jsonl",
        "settings.json",
        "step-000006",
    ]


def test_a_half_written_line_of_metrics_is_ignored(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 1, "validation_loss": 2.5}\n{"step": 2, "loss": 1.5}\n{"ste')
    assert [entry["step"] for entry in metrics.read(path)] == [1, 1, 2]
    metrics.truncate(path, 1)
    assert metrics.read(path) == [{"step": 1, "loss": 2.0}]


def test_an_interrupted_run_is_resumed_with_the_same_settings_only(tiny_checkpoint, tmp_path, data, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        interrupt(patched, training, "train_step", 5)
        with pytest.raises(Killed):
            finetune(data, out, tiny_checkpoint, **OPTIONS)
    with pytest.raises(
        InputError, match=r"out\.training holds an interrupted run with seed=1 \(now 2\): give the same"
    ):
        finetune(data, out, tiny_checkpoint, **OPTIONS, seed=2)
    data.write_text(data.read_text() + '{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(InputError, match=r"out\.training holds an interrupted run with data='"):
        finetune(data, out, tiny_checkpoint, **OPTIONS)


def test_a_damaged_state(tmp_path):
    folder = RunFolder(tmp_path / "out", {"seed": 1})
    folder.save_state(3, {"masters": {}})
    assert folder.load_state()["step"] == 3
    (tmp_path / "out.training" / "step-000003" / "part-00.pt").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"part-00\.pt can't be read: remove .*out\.training to start again"):
        folder.load_state()


def test_without_matplotlib_there_is_no_plot(tiny_checkpoint, tmp_path, data, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with caplog.at_level("INFO", logger="llama"):
        finetune(data, tmp_path / "out", tiny_checkpoint, **OPTIONS)
    assert (tmp_path / "out" / "metrics.jsonl").exists()
    assert not (tmp_path / "out" / "loss.png").exists()
    assert "no plot of the loss: it needs matplotlib" in caplog.text


def test_a_loss_that_is_nan(tiny_checkpoint, tmp_path, data):
    llama = build(tiny_checkpoint)
    strong(llama.model)
    with torch.no_grad():
        llama.model.norm.weight.fill_(float("nan"))
    save_checkpoint(tmp_path / "nan", llama.model, llama.tokenizer)
    with pytest.raises(ArithmeticError, match="step 1: the loss is nan"):
        finetune(data, tmp_path / "out", tmp_path / "nan", **OPTIONS)
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
        ({"warmup": 2}, "warmup=2 must be a fraction of at least 0 and at most 1"),
        ({"clip": -1}, "clip=-1 must be a number of at least 0"),
        ({"weight_decay": float("nan")}, "weight_decay=nan must be"),
        ({"val_fraction": 1}, "val_fraction=1 must be a fraction of at least 0 and below 1"),
        ({"seed": None}, "seed=None must be a whole number"),
        ({"activation_checkpointing": 1}, "activation_checkpointing=1 must be True or False"),
        ({"dtype": "float16"}, "dtype='float16' must be 'bfloat16' or 'float32'"),
        ({"dtype": "int8"}, "dtype='int8' must be one of"),
        ({"max_seq_len": 9000}, "max_seq_len=9000 is over this model's limit of 8192"),
        ({"max_seq_len": 20}, "line 1: from the first to the last of the assistant's tokens"),
        ({"model_parallel_size": 2}, "model_parallel_size=2 doesn't divide the 1 process"),
        ({"out_dir": "."}, "is there already; give the name of a new folder"),
        ({"ckpt_dir": "nowhere"}, "ckpt_dir='nowhere' does not exist"),
        ({"data": "nowhere.jsonl"}, "data='nowhere.jsonl' does not exist"),
    ],
)
def test_invalid_options(tiny_checkpoint, tmp_path, changes, message):
    data = write_pairs(tmp_path / "data.jsonl")
    data.write_text(json.dumps({"prompt": "a", "completion": "in " * 30}) + "\n" + data.read_text())
    options = {"data": data, "out_dir": tmp_path / "out", "ckpt_dir": tiny_checkpoint}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        finetune(**OPTIONS | {"max_seq_len": 256} | options | changes)
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_running_out_of_memory_says_what_to_lower(tiny_checkpoint, tmp_path, data, monkeypatch):
    def train_step(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(training, "train_step", train_step)
    message = (
        r"not enough memory to train 'all' with batch_size=4, max_seq_len=96: lower them \(a higher grad_accum .*, "
        "or use activation_checkpointing, train='lora' or more processes"
    )
    with pytest.raises(MemoryError, match=message) as raised:
        finetune(data, tmp_path / "out", tiny_checkpoint, **OPTIONS)
    assert isinstance(raised.value.__cause__, torch.OutOfMemoryError)


def test_truncated_prompts_are_logged(tiny_checkpoint, tmp_path, caplog):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": "0" * n, "completion": "in"}) + "\n" for n in (9, 99, 9, 99)))
    with caplog.at_level("WARNING", logger="llama"):
        finetune(data, tmp_path / "out", tiny_checkpoint, **OPTIONS | {"epochs": 1})
    assert "max_seq_len=96: the prompts of 2 examples were cut, the first in line 2" in caplog.text


def test_on_the_command_line(runner, tiny_checkpoint, tmp_path, data):
    help_text = runner.run(finetune, "--help", name="llama.finetune").stdout
    assert "DATA OUT_DIR <flags>" in help_text
    for option in ("ckpt_dir", "train", "lr", "epochs", "batch_size", "grad_accum", "max_seq_len"):
        assert f"--{option}=" in help_text
    for option in ("warmup", "weight_decay", "clip", "val_fraction", "save_every", "seed", "activation_checkpointing"):
        assert f"--{option}=" in help_text
    data.write_text(data.read_text() + '{"prompt": 1}\n')
    result = runner.llama("finetune", data, tmp_path / "out", "--ckpt_dir", tiny_checkpoint)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1].startswith("  line 21: it must be an object with prompt and completion")
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out.training").exists()
