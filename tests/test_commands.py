"""`llama complete`, `llama info`, and what all commands share."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run_python, tiny_model, torchrun, write_gguf, write_meta_checkpoint
from test_real_shapes import MODELS, model  # noqa: F401 - a fixture: the published models' settings

from llama import Llama
from llama.cli.info import info
from llama.default_model import default_checkpoint

real = pytest.mark.real
COMMANDS = ("chat", "complete", "inspect", "info", "convert", "finetune", "bench")


def llama_command(*words, stdin="", **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "llama", *map(str, words)],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


def test_help_of_all_and_of_each():
    shown = run_python("-m", "llama")
    assert (shown.returncode, shown.stderr) == (0, "")
    for name in COMMANDS:
        assert f"     {name}\n" in shown.stdout
        own = run_python("-m", "llama", name, "--help")
        assert (own.returncode, own.stderr) == (0, "")
        assert f"llama {name} - " in own.stdout
        options = {line.split("=")[0].split("--")[-1] for line in own.stdout.splitlines() if line.startswith("    -")}
        assert len(options) >= 4
        assert "Optional" not in own.stdout
        assert "_=" not in own.stdout


def test_it_is_installed_as_llama():
    shown = subprocess.run(["llama", "info", "--help"], capture_output=True, text=True)
    assert "llama info - Tell what a checkpoint is" in shown.stdout


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["chta"], 2, "error: 'chta' is no command of llama; did you mean chat?"),
        (["--ckpt_dir", "x"], 2, "error: --ckpt_dir comes after a command of llama; see --help"),
        (
            ["complete", "hi", "--temprature", "0"],
            2,
            "error: llama complete has no use for '--temprature'; did",
        ),
        (["complete", "hi", "--top_p", "2"], 1, "error: top_p=2 must be between 0 and 1"),
        (["complete", "--ckpt_dir", "--top_p", "1"], 2, "error: llama complete: --ckpt_dir needs a value; see --help"),
        (["complete", "The", "sun"], 2, "error: llama complete has no use for 'sun'; see --help"),
        pytest.param(["complete"], 1, "error: prompt 0 is empty: it needs at least one token", marks=real),
        (["complete", "hi", "--ckpt_dir", "/nowhere"], 1, "error: ckpt_dir='/nowhere' does not exist"),
        pytest.param(["info", "--nproc", "2"], 1, "error: this model can't be split over 2 processes", marks=real),
        (["info", "--max_batch_size", "x"], 1, "error: max_batch_size='x' must be a whole number of at least 1"),
        (["info", "--dtype", "int3"], 1, "error: dtype='int3' must be one of ['float32', 'float16', 'bfloat16']"),
        (["info", "/nowhere"], 1, "error: ckpt_dir='/nowhere' does not exist"),
        (["convert", "/nowhere"], 2, "error: llama convert: The function received no value for the required argument"),
        (["convert", "/nowhere", "/x"], 1, "error: ckpt_dir='/nowhere' does not exist"),
        (["convert", "/nowhere", "/x", "--dtype", "int3"], 1, "error: dtype='int3' must be one of"),
        (["bench", "--models", "2b"], 1, "error: models=2b must be some of smollm2,1b"),
        (["bench", "--rounds", "0"], 1, "error: rounds=0 must be a whole number of at least 1"),
        (["bench", "--peers", "transformers"], 1, "error: peers=transformers must begin with ours"),
    ],
)
def test_a_mistake_is_one_line(words, code, message):
    shown = llama_command(*words)
    told = ("134,515,008 parameters", "loaded", "only")  # the log
    lines = [line for line in shown.stderr.splitlines() if not line.startswith(told)]
    assert (shown.returncode, len(lines), shown.stdout.strip()) == (code, 1, ""), shown.stderr
    assert lines[0].startswith(message)


def test_a_traceback_on_request():
    shown = llama_command("info", "/nowhere", "--debug")
    assert shown.returncode == 1
    assert "Traceback" in shown.stderr
    assert shown.stderr.splitlines()[-1].startswith("error: ckpt_dir='/nowhere' does not exist")


def test_an_error_of_the_library_s_own_is_one_line_too(tmp_path):
    script = "from llama.cli.command_line import run\ndef main(): [][1]\nrun(main)"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert shown.returncode == 1
    assert shown.stderr == "error: IndexError: list index out of range (--debug shows where)\n"


GREEDY = ["--temperature", "0", "--max_gen_len", "9", "--dtype", "float32"]


def test_complete_as_json(tiny_checkpoint):
    llama = Llama.build(tiny_checkpoint, None, 96, 1, dtype=torch.float32)
    # A number stays the text it is; the last line end of a pipe goes, others stay.
    for words, stdin, prompt in ((["1984"], "", "1984"), ([], " the user\nin\n\n", " the user\nin\n")):
        shown = llama_command("complete", *words, "--json", "--ckpt_dir", tiny_checkpoint, *GREEDY, stdin=stdin)
        found = json.loads(shown.stdout)
        (want,) = llama.text_completion([prompt], 0, max_gen_len=9, logprobs=True)
        assert found.pop("prompt") == prompt
        assert found["logprobs"] == pytest.approx(want["logprobs"], abs=1e-5)
        assert found | {"logprobs": None} == want | {"logprobs": None}
        assert len(found["logprobs"]) == 9
        plain = llama_command("complete", *words, "--ckpt_dir", tiny_checkpoint, *GREEDY, stdin=stdin)
        assert plain.stdout == want["generation"] + "\n"


def test_words_are_taken_as_they_are_typed(tmp_path, tiny_checkpoint):
    """A path with a hash or a comma in it, a text after a flag, a number; a model made for a short context."""
    odd = tmp_path / "1,2#3"
    odd.mkdir()
    for file in tiny_checkpoint.iterdir():
        (odd / file.name).write_bytes(file.read_bytes())
    params = json.loads((odd / "params.json").read_text())
    (odd / "params.json").write_text(json.dumps(params | {"max_position_embeddings": 100}))
    shown = subprocess.run(
        [sys.executable, "-m", "llama", "complete", "--json", "1984", "--ckpt_dir", "1,2#3", *GREEDY],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["prompt"] == "1984"
    assert "max_seq_len=100" in shown.stderr


def test_bytes_that_are_no_text(tiny_checkpoint):
    command = [sys.executable, "-m", "llama", "complete", "--json", "--ckpt_dir", str(tiny_checkpoint), *GREEDY]
    shown = subprocess.run(command, input=b"caf\xe9", capture_output=True, cwd=ROOT)
    assert json.loads(shown.stdout)["prompt"] == "caf\ufffd"


def test_names_in_files_can_t_steer_the_terminal(tmp_path, tiny_checkpoint):
    for file in tiny_checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = torch.load(tmp_path / "consolidated.00.pth")
    torch.save(weights | {"x\x1b]0;owned\x07": torch.zeros(2)}, tmp_path / "consolidated.00.pth")
    params = json.loads((tmp_path / "params.json").read_text())
    (tmp_path / "params.json").write_text(json.dumps(params | {"y\x1b[2J": 1}))
    shown = llama_command("complete", "the", "--ckpt_dir", tmp_path)
    assert shown.returncode == 1
    assert "␛]0;owned␇" in shown.stderr
    assert "y␛[2J" in shown.stderr
    assert "\x1b" not in shown.stderr


def test_complete_under_torchrun(tiny_checkpoint):
    alone = llama_command("complete", "the user", "--json", "--ckpt_dir", tiny_checkpoint, *GREEDY)
    shared = torchrun(2, "-m", "llama", "complete", "the user", "--json", "--ckpt_dir", tiny_checkpoint, *GREEDY)
    assert shared.returncode == 0, shared.stderr
    one, other = json.loads(alone.stdout), json.loads(shared.stdout)
    assert one["tokens"] == other["tokens"]
    assert one["logprobs"] == pytest.approx(other["logprobs"], abs=1e-4)


def test_a_reader_that_has_enough(tiny_checkpoint):
    command = f"{sys.executable} -m llama complete the --ckpt_dir {tiny_checkpoint} --max_gen_len 3000 --temperature 0"
    shown = subprocess.run(
        ["bash", "-c", f"{command} | head -c 20"], capture_output=True, text=True, cwd=ROOT, timeout=100
    )
    assert "Traceback" not in shown.stderr
    assert "error" not in shown.stderr
    assert len(shown.stdout) >= 5


def told(*words) -> dict[str, str]:
    """What `llama info` says, by its first column."""
    shown = llama_command("info", *words)
    assert shown.returncode == 0, shown.stderr
    return by_first_column(shown.stdout)


def by_first_column(text: str) -> dict[str, str]:
    return {line[:14].strip(): line[14:].strip() for line in text.splitlines()}


def test_info_on_every_layout(tmp_path, llama3_path):
    small = tiny_model()
    write_gguf(tmp_path / "model.gguf", small)
    assert llama_command("convert", tmp_path / "model.gguf", tmp_path / "hf", "--layout", "hf").returncode == 0
    parameters = sum(weight.numel() for weight in small.parameters())
    for path, layout, chat in (
        (tmp_path / "model.gguf", "GGUF", "ChatML"),
        (tmp_path / "hf", "Hugging Face, 1 file of weights", "ChatML"),
    ):
        found = told(path, "--dtype", "float32", "--max_seq_len", 64, "--max_batch_size", 3)
        assert (found["layout"], found["chat format"]) == (layout, chat)
        assert found["parameters"] == f"{parameters:,}"
        assert found["weights"].startswith(f"{4 * parameters:,} bytes")
        assert found["KV cache"].startswith(f"{2 * 2 * 3 * 2 * 64 * 32 * 4:,} bytes")
        assert found["tokenizer"] == "byte-level BPE, 320 words"
        assert found["shape"].startswith("dim 128, 2 layers, 4 heads of 32 over 2 kv heads, feed-forward width")
        assert found["this machine"].endswith("it fits")
    meta = write_meta_checkpoint(tmp_path / "meta", tiny_model(vocab_size=524), llama3_path, 2)
    found = told(meta, "--nproc", 2, "--max_seq_len", 64)
    assert (found["layout"], found["chat format"]) == ("Meta, 2 files of weights", "Llama 3")
    assert "on each of 2 processes" in found["memory"]
    assert "it does not fit: " in told(meta, "--max_seq_len", 8192, "--max_batch_size", 10**7)["this machine"]


FAMILIES = {"Llama 2": "Llama 2", "Llama 3 ": "Llama 3", "Llama 3.": "Llama 3.1 or later"}


def test_info_on_published_models(model, capsys):  # noqa: F811
    """Their settings alone; parameters as their makers name them."""
    name, folder = model
    params, _, parameters = MODELS[name]
    for layout, words in (("meta", "Meta, no weights there"), ("hf", "Hugging Face, no weights there")):
        info(str(folder / layout), dtype="bfloat16", max_seq_len=4096, max_batch_size=2)
        found = by_first_column(capsys.readouterr().out)
        assert found["parameters"] == f"{parameters:,}"
        assert found["weights"].startswith(f"{2 * parameters:,} bytes")
        kv_heads, head_dim = params.get("n_kv_heads", params["n_heads"]), params["dim"] // params["n_heads"]
        cache = 2 * params["n_layers"] * 2 * 4096 * kv_heads * head_dim * 2
        assert found["KV cache"].startswith(f"{cache:,} bytes")
        assert found["together"].startswith(f"{2 * parameters + cache:,} bytes")
        assert found["layout"] == words
        assert found["family"] == next(family for start, family in FAMILIES.items() if name.startswith(start))
        assert found["tokenizer"] == "none there"


@pytest.mark.real
def test_the_default_model():
    default_checkpoint()
    found = told()
    assert found["parameters"] == "134,515,008"
    assert found["chat format"] == "ChatML"
    shown = llama_command("complete", "I believe the meaning of life is", *GREEDY)
    assert shown.stdout == " to find a way to live a life that\n"
