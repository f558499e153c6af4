"""Whole fine-tuning runs: what they write, which options are refused, and how an interrupted run is resumed."""

import contextlib
import errno
import json
import os
import random
import re
import shlex
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from chat_templates import STYLES, write_folder
from conftest import load, same_weights, strong, tiny_model
from forked import ForkedProgram, fork_python
from run_command import Runner, example
from test_finetune_parallel import write_pairs

from llama import ChatFormat, Llama, Tokenizer
from llama.checkpoint import save_checkpoint
from llama.convert import convert
from llama.errors import InputError
from llama.finetune import command, finetune, metrics, training
from llama.finetune.interruption import Interruption
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


def wait_for_step(step, program, metrics_path):
    """Wait until a run has made so many steps."""
    while not metrics_path.exists() or metrics_path.read_bytes().count(b'"loss"') < step:
        assert all(process.is_alive() for process in program.processes)
        time.sleep(0.002)


def run_to_the_end(arguments, ranks) -> str:
    """Start a run, and wait until it has finished; return its standard error."""
    finished = fork_python(*arguments, ranks=ranks)
    assert finished.returncode == 0, finished.stderr
    return finished.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "n_kills"), [(None, 2), (2, 1)])
def test_killed_at_random_steps_a_run_resumes_to_the_same_losses(tiny_checkpoint, tmp_path, data, ranks, n_kills):
    """They are the same to the last bit."""
    out, whole, unfinished = tmp_path / "out", tmp_path / "whole", tmp_path / "out.training"

    def command(out_dir):
        options = ["--lr", "1e-3", "--epochs", "8", "--save_every", "7", "--dtype", "float32", "--max_seq_len", "96"]
        paths = ["--data", data, "--out_dir", out_dir, "--ckpt_dir", tiny_checkpoint]
        return ["-m", "llama.finetune", *paths, *options]

    steps = sorted(random.sample(range(1, 37), n_kills))  # of 40
    print(f"killed at {steps}")  # shown if the test fails
    for step in steps:
        with ForkedProgram(*command(out), ranks=ranks) as program:
            wait_for_step(step, program, unfinished / "metrics.jsonl")
        assert unfinished.exists()
        assert not out.exists()
        assert not list(unfinished.glob("*.pth"))
    log = run_to_the_end(command(out), ranks)
    if steps[-1] > 8:
        resumed = int(re.search(r"resuming after step (\d+)", log)[1])
        assert resumed % 7 == 0 or resumed % 5 == 0  # after an epoch, too
        assert steps[-1] - 8 <= resumed <= 40
    run_to_the_end(command(whole), ranks)
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
        (torch, "save", 7),  # after six states: the weights of the checkpoint
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
    with RunFolder(tmp_path / "out") as folder:
        folder.begin({"seed": 1})
        folder.save_state(3, {"masters": {}}, 0)
        assert folder.load_state()["step"] == folder.saved_step == 3
        path = tmp_path / "out.training" / "step-000003" / "part-00.pt"
        path.write_bytes(b"PK")
        with pytest.raises(InputError, match=r"part-00\.pt can't be read: remove .*out\.training to start again"):
            folder.load_state()


def test_damaged_metrics(tmp_path):
    with RunFolder(tmp_path / "out") as folder:
        folder.begin({"seed": 1})
        path = tmp_path / "out.training" / "metrics.jsonl"
        for content in (b'{"step": 1,\n', b"\xff\xfe\n", b"[1]\n", b'{"loss": 1.0}\n'):
            path.write_bytes(content)
            with pytest.raises(InputError, match=r"metrics\.jsonl can't be read: remove .*out\.training"):
                folder.load_state()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such pipes")
def test_pipes_in_the_place_of_files(tmp_path):
    """To open one would be to wait for a writer."""
    with RunFolder(tmp_path / "out") as folder:
        folder.begin({"seed": 1})
        path = tmp_path / "out.training" / "metrics.jsonl"
        os.mkfifo(path)
        with pytest.raises(InputError, match=r"metrics\.jsonl can't be read: .* is a pipe, not an ordinary file"):
            folder.load_state()
        path.unlink()
        folder.save_state(3, {"masters": {}}, 0)
        path = tmp_path / "out.training" / "step-000003" / "part-00.pt"
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(InputError, match=r"part-00\.pt can't be read: remove .*part-00\.pt is a pipe, not a file"):
            folder.load_state()


def test_the_same_run_started_twice_is_refused_the_second_time(tiny_checkpoint, tmp_path, uninterrupted, monkeypatch):
    """And the first goes on undisturbed."""
    data, expected = uninterrupted
    refused, step = [], training.train_step

    def train_step(*arguments):
        if not refused:
            before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
            with pytest.raises(InputError, match=r"out is being written by process \d+: wait until that has ended"):
                finetune(data, tmp_path / "out", tiny_checkpoint, **OPTIONS, save_every=2)
            with pytest.raises(InputError, match=r"out is being written by process \d+"):
                convert(tiny_checkpoint, tmp_path / "out")
            assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
            refused.append(True)
        return step(*arguments)

    monkeypatch.setattr(training, "train_step", train_step)
    finetune(data, tmp_path / "out", tiny_checkpoint, **OPTIONS, save_every=2)
    assert refused
    assert losses(tmp_path / "out") == losses(expected)
    assert os.listdir(tmp_path) == ["out"]


def test_killed_after_its_last_step_a_run_leaves_nothing_either(tiny_checkpoint, tmp_path, data, monkeypatch):
    with monkeypatch.context() as patched:
        interrupt(patched, RunFolder, "_remove", 1)
        with pytest.raises(Killed):
            finetune(data, tmp_path / "out", tiny_checkpoint, **OPTIONS)
    assert (tmp_path / "out.training" / "step-000010").exists()
    written = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(InputError, match="out is there already"):
        finetune(data, tmp_path / "out", tiny_checkpoint, **OPTIONS)
    assert sorted(os.listdir(tmp_path)) == ["data.jsonl", "out"]
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == written


def test_an_interrupted_run_is_not_removed_for_another_result(tiny_checkpoint, tmp_path, data, monkeypatch):
    with monkeypatch.context() as patched:
        interrupt(patched, training, "train_step", 7)
        with pytest.raises(Killed):
            finetune(data, tmp_path / "out", tiny_checkpoint, **OPTIONS)
    shutil.copytree(tiny_checkpoint, tmp_path / "out")
    (tmp_path / "out" / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="out is there already"):
        finetune(data, tmp_path / "out", tiny_checkpoint, **OPTIONS)
    assert (tmp_path / "out.training" / "step-000005" / "part-00.pt").exists()  # after the first epoch


def test_through_a_link_and_with_paths_in_the_home(tiny_checkpoint, tmp_path, data, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "model")
    (tmp_path / "base").symlink_to(tiny_checkpoint)
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = {"data": "~/data.jsonl", "out_dir": "~/out", "ckpt_dir": "~/base"}
    paths["tokenizer_path"] = "~/base/tokenizer.model"
    with monkeypatch.context() as patched:
        interrupt(patched, training, "train_step", 7)
        with pytest.raises(Killed):
            finetune(**paths, **OPTIONS)
    assert os.listdir(tmp_path / "disk") == ["model.training"]
    assert os.listdir(tmp_path / "disk" / "model.training" / "step-000005") == ["part-00.pt"]
    finetune(tmp_path, tmp_path / "out", **OPTIONS, ckpt_dir=paths["ckpt_dir"], tokenizer_path=paths["tokenizer_path"])
    assert os.listdir(tmp_path / "disk") == ["model"]
    assert (tmp_path / "out").is_symlink()
    assert len(losses(tmp_path / "out")) == 10 + 3
    build(tmp_path / "out")


def test_a_place_that_nothing_can_be_moved_to_is_refused_before_the_data_are_read(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    rename = Path.rename

    def fail(path, target):
        if path in (tmp_path / "out", tmp_path / "other.training" / "unfinished"):
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    monkeypatch.setattr(command, "read_examples", lambda *arguments: pytest.fail("too late"))
    monkeypatch.setattr(command, "open_checkpoint", lambda *arguments: pytest.fail("too late"))
    with pytest.raises(InputError, match=r"out can't be replaced by the finished folder \(Device or resource busy\)"):
        finetune(write_pairs(tmp_path / "data.jsonl"), tmp_path / "out")
    with RunFolder(tmp_path / "other") as folder, pytest.raises(InputError, match="nothing can be moved from"):
        folder.begin({})


def test_a_disk_that_is_too_small_is_refused_before_training(tiny_checkpoint, tmp_path, data, monkeypatch):
    """Two states of three float32 numbers for each weight, or one and the checkpoint, staged and written."""
    count = sum(weight.numel() for weight in load(tiny_checkpoint).parameters())
    lora_count = 2 * 2 * (2 * 256 + 2 * 192 + 3 * 320)  # rank 2, two layers, inputs and outputs of their matrices
    limits = {"all": 24 * count, "lora": 12 * lora_count + 8 * count}

    def disk(free):
        return lambda path: shutil._ntuple_diskusage(10**12, 0, free)

    for train, needed in limits.items():
        monkeypatch.setattr("shutil.disk_usage", disk(needed + 2**25 - 1000))
        with monkeypatch.context() as patched:
            patched.setattr(training, "train_step", lambda *arguments: pytest.fail("too late"))
            with pytest.raises(OSError, match=r"writing takes 0\.\d GB, and only 0\.\d GB are free") as error:
                finetune(data, tmp_path / train, tiny_checkpoint, **OPTIONS, train=train, lora_rank=2)
        assert error.value.filename == str(tmp_path / train)
        monkeypatch.setattr("shutil.disk_usage", disk(needed + 2**25 + 1000))
        finetune(data, tmp_path / train, tiny_checkpoint, **OPTIONS, train=train, lora_rank=2)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limits")
def test_a_disk_that_is_full_all_the_same_is_named(tiny_checkpoint, tmp_path, uninterrupted, monkeypatch, caplog):
    """And when there is space again, the same command resumes the run."""
    from test_save import largest_file

    data, expected = uninterrupted
    step, calls = training.train_step, []

    def train_step(*arguments):
        calls.append(1)
        if len(calls) == 4:
            stack.enter_context(largest_file(1_000_000))
        return step(*arguments)

    with monkeypatch.context() as patched, contextlib.ExitStack() as stack:
        patched.setattr(training, "train_step", train_step)
        with pytest.raises(OSError, match=r"the disk takes no more: writing takes 0\.0 GB, and \d.* free") as error:
            finetune(data, tmp_path / "out", tiny_checkpoint, **OPTIONS, save_every=2)
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(tmp_path / "out.training"))
    assert "the run has not ended; it goes on after 2 steps with:\n  llama finetune --data" in caplog.text
    assert sorted(os.listdir(tmp_path / "out.training")) == ["metrics.jsonl", "settings.json", "step-000002"]
    finetune(data, tmp_path / "out", tiny_checkpoint, **OPTIONS, save_every=2)
    assert losses(tmp_path / "out") == losses(expected)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limits")
def test_a_disk_that_has_no_space_even_for_the_metrics_is_named(tmp_path):
    from test_save import largest_file

    with RunFolder(tmp_path / "out") as folder:
        folder.begin({})
        with largest_file(10), pytest.raises(OSError, match="the disk takes no more") as error:
            folder.log(step=1, loss=2.0)
    assert error.value.filename == str(tmp_path / "out.training")


def send_signal(monkeypatch, number, at, times):
    """Send this process a signal within a step, so often."""
    step, calls = training.train_step, []

    def train_step(*arguments):
        calls.append(1)
        if len(calls) == at:
            for _ in range(times):
                signal.raise_signal(number)
        return step(*arguments)

    monkeypatch.setattr(training, "train_step", train_step)


@pytest.mark.parametrize(("times", "saved"), [(1, 7), (2, 5)])
def test_ctrl_c_saves_the_step_and_says_how_to_go_on(
    tiny_checkpoint, tmp_path, uninterrupted, monkeypatch, caplog, runner, times, saved
):
    """The second one doesn't wait for the step: then the last state is that of the first epoch's end."""
    data, expected = uninterrupted
    out = tmp_path / "out of luck"
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched:
        send_signal(patched, signal.SIGINT, 7, times)
        with pytest.raises(KeyboardInterrupt):
            finetune(data, out, tiny_checkpoint, **OPTIONS)
    assert signal.getsignal(signal.SIGINT) is handler
    assert "Ctrl-C: this step is finished and its state saved; another Ctrl-C stops at once" in caplog.text
    assert [path.name for path in tmp_path.rglob("step-*")] == [f"step-00000{saved}"]
    message, shown = caplog.messages[-1].split("\n  ")
    assert message == f"the run has not ended; it goes on after {saved} steps with:"
    program, *arguments = shlex.split(shown)
    assert program == "llama"
    assert runner.llama(*arguments).returncode == 0
    assert losses(out) == losses(expected)
    assert same_weights(load(out), load(expected))
    assert os.listdir(tmp_path) == ["out of luck"]


def test_a_scheduler_s_signal_saves_the_step_and_ends_the_program(
    tiny_checkpoint, tmp_path, uninterrupted, monkeypatch, caplog, runner
):
    data, expected = uninterrupted
    arguments = ["--data", data, "--out_dir", tmp_path / "out", "--ckpt_dir", tiny_checkpoint]
    arguments += [word for name, value in OPTIONS.items() for word in (f"--{name}", value)]
    with monkeypatch.context() as patched:
        send_signal(patched, signal.SIGTERM, 7, 1)
        assert runner.llama("finetune", *arguments).returncode == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert "SIGTERM: this step is finished and its state saved; another SIGTERM stops at once" in caplog.text
    assert "it goes on after 7 steps with:\n  llama finetune --data" in caplog.text
    assert runner.llama("finetune", *arguments).returncode == 0
    assert losses(tmp_path / "out") == losses(expected)


def test_ctrl_c_in_a_thread_or_with_a_handler_of_the_program_s_own():
    """Both are left alone."""
    monitor = Interruption()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: monitor.__enter__().requested(torch.device("cpu"))).result() is None
    heard = []
    before = signal.signal(signal.SIGINT, lambda *arguments: heard.append(1))
    try:
        with Interruption() as interruption:
            signal.raise_signal(signal.SIGINT)
        assert heard == [1]
        assert interruption.requested(torch.device("cpu")) is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_command_that_resumes_a_run(monkeypatch):
    options = {
        "data": "my data.jsonl",
        "out_dir": Path("out"),
        "epochs": 3,
        "lr": 1e-4,
        "activation_checkpointing": True,
    }
    options |= {"ckpt_dir": None, "clip": 1.0}
    expected = "--data 'my data.jsonl' --out_dir out --lr 0.0001 --activation_checkpointing True"
    assert command.resume_command(options) == "llama finetune " + expected
    monkeypatch.setattr(command.distributed, "model_parallel_size", lambda: 4)
    assert command.resume_command(options) == "torchrun --nproc_per_node 4 -m llama.finetune " + expected
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert command.resume_command(options) == "torchrun --nproc_per_node 2 -m llama.finetune " + expected


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_one_of_several_processes_is_heard_by_all(tiny_checkpoint, tmp_path, data, number, code):
    out = tmp_path / "out"
    options = ["--epochs", "500", "--dtype", "float32", "--max_seq_len", "96", "--save_every", "10000"]
    paths = ["--data", data, "--out_dir", out, "--ckpt_dir", tiny_checkpoint]
    with ForkedProgram("-m", "llama.finetune", *paths, *options, "--train", "norms", ranks=2) as program:
        wait_for_step(3, program, tmp_path / "out.training" / "metrics.jsonl")
        os.kill(program.processes[1].pid, number)
        for process in program.processes:
            process.join(60)
        log = program.finish().stderr
    assert [process.exitcode for process in program.processes] == [code, code], log
    step = int(re.search(r"it goes on after (\d+) steps with:\n  torchrun --nproc_per_node 2 -m llama", log)[1])
    assert read_metrics(tmp_path / "out.training")[-1]["step"] == step
    parts = sorted(path.name for path in (tmp_path / "out.training" / f"step-{step:06}").iterdir())
    assert parts == ["part-00.pt", "part-01.pt"]


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
    assert "DATA OUT_DIR [options]" in help_text
    for option in ("ckpt_dir", "train", "lr", "epochs", "batch_size", "grad_accum", "max_seq_len"):
        assert f"--{option}" in help_text
    for option in ("warmup", "weight_decay", "clip", "val_fraction", "save_every", "seed", "activation_checkpointing"):
        assert f"--{option}" in help_text
    data.write_text(data.read_text() + '{"prompt": 1}\n')
    result = runner.llama("finetune", data, tmp_path / "out", "--ckpt_dir", tiny_checkpoint)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1].startswith("  line 21: it must be an object with prompt and completion")
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out.training").exists()
