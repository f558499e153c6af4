"""`llama inspect`: its statistics, what it prints, and its page, which is also opened in a browser."""

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, Ranks, ScriptedModel, hugging_face_twin, load, tiny_model
from forked import fork_python
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from run_command import Runner, Stdin

from llama import Llama
from llama.cli.inspect import print_inspection, token_name
from llama.errors import CheckpointError, InputError
from llama.files import writable_file
from llama.inspection import inspect_text, inspect_tokens
from llama.inspection.formatting import format_settings, percent, readable, surprise_level
from llama.inspection.page import STYLE
from llama.inspection.token_statistics import text_statistics
from llama.model_lock import lock_of
from llama.output_folder import write_whole

HOSTILE = '<script>alert(1)</script><img src="http://127.0.0.1:9/x.png"> [bold]x[/bold] \x1b[31m\x1b]0;y\x07 \u202e'


@pytest.fixture(scope="module")
def tiny(llama3):
    return Llama(tiny_model(vocab_size=llama3.n_words, max_seq_len=160), llama3)


@pytest.fixture(scope="module")
def ids(llama3):
    """Text, an incomplete character, and a special token: everything that a prompt can hold."""
    ids = llama3.encode("The user is in the other house, thinking on an answer: 🙂\n\n", bos=True, eos=False)
    return [*ids, llama3.special_tokens["<|eot_id|>"], *range(40, 70)]


def inspect_completed(llama, ids, max_gen_len):
    """The inspection of a prompt and its greedy completion."""
    (generated,), _ = llama.generate([ids], max_gen_len=max_gen_len, temperature=0)
    return inspect_tokens(llama.model, llama.tokenizer, ids + generated, len(generated))


@pytest.fixture(scope="module")
def inspection(tiny, ids):
    """With surprising tokens (in the prompt) and expected ones (in the completion)."""
    return inspect_completed(tiny, ids, 8)


# Statistics


@pytest.mark.slow
@pytest.mark.parametrize("max_logits", [7 * 524, 2**23])
def test_statistics_agree_with_transformers(tiny, ids, monkeypatch, max_logits):
    """Each number follows from its definition and another implementation's probabilities, for any block size."""
    monkeypatch.setattr("llama.inspection.inspect.MAX_LOGITS", max_logits)
    inspection = inspect_tokens(tiny.model, tiny.tokenizer, ids, alternatives=4)
    with torch.no_grad():
        logits = hugging_face_twin(tiny.model).double()(torch.tensor([ids])).logits[0]  # (seq, vocab_size)
    check_statistics(inspection, ids, logits)


@pytest.mark.parametrize("max_logits", [7 * 524, 2**23])
def test_statistics_follow_from_the_logits(tiny, ids, monkeypatch, max_logits):
    monkeypatch.setattr("llama.inspection.inspect.MAX_LOGITS", max_logits)
    inspection = inspect_tokens(tiny.model, tiny.tokenizer, ids, alternatives=4)
    with torch.no_grad():
        check_statistics(inspection, ids, tiny.model(torch.tensor([ids]))[0].double())


def check_statistics(inspection, ids, logits):
    """Compare an inspection with four alternatives with the definitions, applied to logits (seq, vocab_size)."""
    assert [token.id for token in inspection.tokens] == ids
    first, *tokens = inspection.tokens
    assert first[2:] == (False, None, None, None, None, [])
    for token, row in zip(tokens, logits, strict=False):
        weights = [math.exp(x) for x in (row - row.max()).tolist()]
        total = sum(weights)
        probs = [weight / total for weight in weights]
        assert token.probability == pytest.approx(probs[token.id], abs=1e-4)
        assert token.logprob == pytest.approx(math.log(probs[token.id]), abs=2e-4)
        assert token.rank == 1 + sum(prob > probs[token.id] for prob in probs)
        assert token.entropy == pytest.approx(-sum(prob * math.log(prob) for prob in probs), abs=1e-4)
        order = sorted(range(len(probs)), key=lambda i: -probs[i])[:4]
        assert [candidate.id for candidate in token.alternatives] == order
        assert [candidate.probability for candidate in token.alternatives] == pytest.approx(
            [probs[i] for i in order], abs=1e-4
        )
    top = torch.softmax(logits[-1], dim=-1).topk(10)
    assert [candidate.id for candidate in inspection.next_tokens] == top.indices.tolist()
    probabilities = [candidate.probability for candidate in inspection.next_tokens]
    assert probabilities == pytest.approx(top.values.tolist(), abs=1e-4)


def test_logprobs_are_those_of_generate(tiny, ids, inspection):
    tokens = [token.id for token in inspection.tokens]
    _, ((_, *logprobs),) = tiny.generate([tokens], max_gen_len=0, echo=True, logprobs=True)
    assert [token.logprob for token in inspection.tokens[1:]] == pytest.approx(logprobs, abs=1e-5)
    assert [token.generated for token in inspection.tokens] == [False] * len(ids) + [True] * (len(tokens) - len(ids))


def test_the_cache_is_not_changed(tiny, ids):
    tiny.generate([ids], max_gen_len=3, temperature=0)
    before = tiny.model.cache.keys.clone()
    inspect_tokens(tiny.model, tiny.tokenizer, ids[::-1])
    assert torch.equal(tiny.model.cache.keys, before)


def test_text_statistics(inspection):
    statistics = text_statistics(inspection.tokens)
    logprobs = [token.logprob for token in inspection.tokens[1:]]
    assert statistics.n_tokens == len(logprobs) + 1
    assert statistics.logprob == pytest.approx(sum(logprobs))
    assert statistics.perplexity == pytest.approx(math.prod(math.exp(-x / len(logprobs)) for x in logprobs))
    assert statistics.entropy == pytest.approx(sum(token.entropy for token in inspection.tokens[1:]) / len(logprobs))
    assert text_statistics(inspection.tokens[:1]) == (1, 0.0, None, None)
    assert text_statistics([inspection.tokens[1]._replace(logprob=-1000.0)]).perplexity == math.inf


def sampling_probabilities(
    logits: list[float], temperature: float, top_p: float, top_k: int | None
) -> dict[int, float]:
    """The probability of each token that can be sampled, straight from the definitions."""
    if temperature == 0:
        return {logits.index(max(logits)): 1.0}
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[:top_k]
    weights = [math.exp((logits[i] - max(logits)) / temperature) for i in order]
    nucleus, cumulative = {}, 0.0
    for token, weight in zip(order, weights, strict=True):
        if cumulative > top_p * sum(weights):
            break
        nucleus[token] = weight
        cumulative += weight
    return {token: weight / cumulative for token, weight in nucleus.items()}


@pytest.mark.parametrize("settings", [(0.8, 0.7, 3), (2.0, 0.5, None), (0, 0.9, None), (1.3, 0.9, 1), (1.0, 1.0, 600)])
def test_sampling_distributions_follow_from_the_definitions(tiny, ids, settings):
    temperature, top_p, top_k = settings
    inspection = inspect_tokens(
        tiny.model, tiny.tokenizer, ids, n_next_tokens=524, temperature=temperature, top_p=top_p, top_k=top_k
    )
    with torch.no_grad():
        logits = tiny.model(torch.tensor([ids]))[0, -1].double().tolist()
    variations = [(0.5, 1.0, None), (1.0, 1.0, None), (1.5, 1.0, None), (1.0, 1.0, top_k or 5)]
    variations.append((1.0, top_p if top_p < 1 else 0.9, None))
    distributions = [inspection.requested, *inspection.variations]
    for distribution, expected in zip(distributions, [settings, *variations], strict=True):
        assert (distribution.temperature, distribution.top_p, distribution.top_k) == expected
        probs = sampling_probabilities(logits, *expected)
        listed = [probs.get(candidate.id, 0.0) for candidate in inspection.next_tokens]
        assert distribution.probabilities == pytest.approx(listed, abs=1e-4)
        tolerance = 0 if len(probs) < 300 else 300  # some probabilities underflow
        assert distribution.n_tokens == pytest.approx(len(probs), abs=tolerance)
        assert distribution.others == 0
    short = inspect_tokens(tiny.model, tiny.tokenizer, ids, n_next_tokens=2, temperature=2.0, top_p=1.0)
    assert len(short.next_tokens) == 2
    assert short.requested.others == pytest.approx(1 - sum(short.requested.probabilities), abs=1e-6)


def test_invalid_arguments(tiny, ids):
    for arguments, message in [
        (dict(alternatives=0), "alternatives=0 must be a whole number of at least 1"),
        (dict(n_next_tokens=1.5), "n_next_tokens=1.5 must be"),
        (dict(n_generated=-1), "n_generated=-1 must be"),
        (dict(n_generated=1000), "n_generated=1000 is more than the"),
        (dict(temperature=-1), "temperature=-1 must be"),
        (dict(top_p=2), "top_p=2 must be"),
    ]:
        with pytest.raises(InputError, match=message):
            inspect_tokens(tiny.model, tiny.tokenizer, ids, **arguments)
    with pytest.raises(InputError, match="524"):
        inspect_tokens(tiny.model, tiny.tokenizer, [524])
    with pytest.raises(InputError, match="max_seq_len=160"):
        inspect_tokens(tiny.model, tiny.tokenizer, [1] * 161)
    broken = tiny_model(vocab_size=524)
    broken.layers[1].feed_forward.w2.weight.data[0, 0] = math.nan
    with pytest.raises(ArithmeticError, match="NaN or infinity, first in layer 1"):
        inspect_tokens(broken, tiny.tokenizer, ids)
    with pytest.raises(ArithmeticError, match="NaN or infinity"):
        inspect_tokens(broken, tiny.tokenizer, [7])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux says which files are mapped")
def test_a_weight_file_that_was_cut_is_an_error(tiny_checkpoint, tmp_path, ids):
    """Where the process would be killed (SIGBUS)."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    mapped = Llama.build(folder, None, 96, 1, device="cpu", dtype=torch.float32)
    inspect_tokens(mapped.model, mapped.tokenizer, ids)
    path = folder / "consolidated.00.pth"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=f"{path} has been cut since the model was loaded"):
        inspect_tokens(mapped.model, mapped.tokenizer, ids)


def test_calls_wait_for_their_turn(tiny, ids):
    with ThreadPoolExecutor() as pool:
        with lock_of(tiny.model).turn():
            inspected = pool.submit(inspect_tokens, tiny.model, tiny.tokenizer, ids)
            with pytest.raises(FutureTimeout):  # in Python 3.10 not the built-in TimeoutError
                inspected.result(0.3)
        assert len(inspected.result(30).tokens) == len(ids)


def out_of_memory(*args):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("method", ["hidden_states", "logits"])
def test_too_little_memory_is_explained(tiny, ids, monkeypatch, method):
    monkeypatch.setattr(tiny.model, method, out_of_memory)
    with pytest.raises(MemoryError, match=rf"^not enough memory to prefill 1 prompt\(s\) of up to {len(ids)} tokens: "):
        inspect_tokens(tiny.model, tiny.tokenizer, ids)


def test_ranks_agree_before_they_compute(tiny_checkpoint, ids, llama3, monkeypatch):
    """Each holds half of the model. They tell each other the tokens, or what is wrong on one of them."""
    one_process = inspect_tokens(load(tiny_checkpoint), llama3, ids)
    ranks = Ranks(monkeypatch, 2)
    told = []

    def exchange(*call):
        told.append(ranks.exchange(call))
        for _, error in told[-1]:
            if error is not None:
                raise error

    monkeypatch.setattr("llama.embeddings.check_ranks_agree", exchange)
    models = ranks.run(lambda: load(tiny_checkpoint))

    def inspect_or_refuse(n_generated):
        try:
            return inspect_tokens(models[ranks.local.rank], llama3, ids, n_generated)
        except InputError as error:
            return str(error)

    for inspection in ranks.run(lambda: inspect_or_refuse(0)):
        expected = [token.logprob for token in one_process.tokens[1:]]
        assert [token.logprob for token in inspection.tokens[1:]] == pytest.approx(expected, abs=1e-4)
    assert told[0] == told[1]
    assert f"1 rows of {len(ids)} tokens with the checksum" in str(told[0])
    refusals = ranks.run(lambda: inspect_or_refuse(1000 * ranks.local.rank))
    assert refusals == 2 * [f"n_generated=1000 is more than the {len(ids)} tokens of the text"]


def test_a_text_and_its_continuation(tiny):
    text = "the user is in the other house"
    ids = tiny.tokenizer.encode(text, bos=True, eos=False)
    settings = dict(temperature=0.9, top_p=0.8, top_k=40)
    (generated,), _ = tiny.generate([ids], 6, seed=3, **settings)
    expected = inspect_tokens(tiny.model, tiny.tokenizer, ids + generated, len(generated), alternatives=2, **settings)
    assert inspect_text(tiny, text, 6, seed=3, alternatives=2, **settings) == expected
    logprob = text_statistics(expected.tokens).logprob
    assert repr(expected) == f"<Inspection: n_tokens={len(ids + generated)}, logprob={logprob:.2f}>"
    with pytest.raises(InputError, match=r"only what Llama\.build makes can be inspected, not .*ScriptedModel"):
        inspect_text(Llama(ScriptedModel(), tiny.tokenizer), text)


def test_the_library_s_part_needs_none_of_the_command():
    """Such as argparse, or what draws at a terminal."""
    modules = list((ROOT / "llama" / "inspection").glob("*.py"))
    assert len(modules) > 3
    for module in modules:
        names = set(re.findall(r"^ *(?:from|import) ([\w.]+)", module.read_text(encoding="utf-8"), re.MULTILINE))
        assert any(name.startswith("llama.") for name in names), module
        assert not {name for name in names if name.startswith("llama.cli")} | names & {"argparse", "rich"}, module


# Texts


@given(st.text())
def test_every_character_is_visible_and_harmless(text):
    for character in readable(text):
        assert unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
        assert character not in " \ufe0f"


def test_readable():
    assert readable(" the\n\t\x1b[0m\x7f\x9b\u202e\x00é中🙂") == "·the⏎⇥␛[0m␡\\x9b\\u202e␀é中🙂"
    assert readable("<b>[bold]\\xf0") == "<b>[bold]\\xf0"


def test_formatted_probabilities():
    formatted = [percent(p) for p in (1, 0.99949, 0.1234, 0.0012, 0.00012, 0.000012, 1e-9, 0)]
    assert formatted == ["100.0%", "99.9%", "12.3%", "0.1%", "0.01%", "0.001%", "<0.001%", "–"]
    assert [surprise_level(p) for p in (1, 0.5, 0.49, 0.2, 0.05, 0.01, 0.001, 0)] == [0, 0, 1, 1, 2, 3, 4, 5]


# On the terminal


def printed(inspection, width=100, **options) -> str:
    file = io.StringIO()
    print_inspection(inspection, Console(file=file, force_terminal=True, highlight=False, width=width, **options))
    return file.getvalue()


@pytest.fixture(scope="module")
def hostile(tiny, llama3):
    """A text, and tokens, that would do harm if they were taken for markup or for a terminal's commands."""
    ids = llama3.encode(f"{HOSTILE} & two\nlines", bos=True, eos=False)
    inspection = inspect_completed(tiny, ids, 4)
    next_tokens = [candidate._replace(text="[/b]</b><em>\x1b") for candidate in inspection.next_tokens]
    last = inspection.tokens[-1]._replace(text="[bold]</span><em>\x1b[0m", alternatives=next_tokens)
    return replace(inspection, tokens=[*inspection.tokens, last], next_tokens=next_tokens)


@pytest.mark.parametrize("width", [30, 80, 200])
def test_every_number_is_printed(inspection, width):
    text = printed(inspection, width, color_system=None)
    assert max(map(len, text.splitlines())) <= width
    if width >= 80:
        for token in inspection.tokens[1:]:
            name, probability = re.escape(readable(token.text)[:14]), re.escape(percent(token.probability))
            line = rf"^ *{name}.* {probability} +{token.rank:,}  +{token.entropy:.2f} "
            assert re.search(line, text, re.MULTILINE), line
            for candidate in token.alternatives:
                assert f"{token_name(candidate.text).plain} {percent(candidate.probability)} " in text
        assert text.count("generated:") == 1
        for distribution in (inspection.requested, *inspection.variations):
            assert format_settings(distribution).split(", ")[-1] in text
    assert f"{text_statistics(inspection.tokens).perplexity:,.4g}" in text


def test_colours_differ_with_probability(inspection):
    text = printed(inspection, color_system="truecolor").split("probability:")[0]
    backgrounds = set(re.findall(r"48;2;(\d+;\d+;\d+)m", text))
    levels = {surprise_level(token.probability) for token in inspection.tokens[1:]} - {0}
    assert len(backgrounds) == len(levels) > 2
    assert "\x1b[4m" in text or "\x1b[4;" in text  # the completion is underlined


def test_nothing_controls_the_terminal(hostile):
    text = printed(hostile, color_system=None)
    assert "\x1b" not in text.replace("\x1b[?25", "")
    assert "[bold]x[/bold] ␛[31m␛]0;y␇ \\xe2\\x80\\xae" in text.replace("\n", "")
    assert "[bold]</span><em>␛[0m" in text.replace("\n", "")
    assert text.count("[/b]</b><em>␛") == 10 + 2 * 10  # as alternatives of the token, and in two tables of charts


# The command


@pytest.fixture
def runner(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    return Runner(monkeypatch, capsys)


def options_of(checkpoint):
    return ["--ckpt_dir", checkpoint, "--max_seq_len", "96", "--dtype", "float32"]


def test_the_command(runner, tiny_checkpoint, tmp_path, llama3):
    count = len(llama3.encode("the user 🙂", bos=True, eos=False))
    args = ["inspect", "the user 🙂", *options_of(tiny_checkpoint), "--max_gen_len", "5", "--seed", "3"]
    result = runner.llama(*args)
    assert result.returncode == 0, result.stderr
    assert "<|begin_of_text|>the user \\xf0\\x9f\\x99\\x82" in result.stdout.replace("\n", "")
    assert re.search(rf"^tokens +{count + 5}   prompt {count} · completion 5$", result.stdout, re.MULTILINE)
    assert "\x1b" not in result.stdout  # no colours, since this isn't a terminal
    assert runner.llama(*args).stdout == result.stdout

    piped = runner.llama("inspect", *options_of(tiny_checkpoint), stdin="the user 🙂\n")
    assert "⏎" not in piped.stdout.splitlines()[0]  # the last newline isn't part of the text
    assert re.search(rf"^tokens +{count}$", piped.stdout, re.MULTILINE), piped.stderr

    file = tmp_path / "page.html"  # with a text that looks like a number
    written = runner.llama("inspect", "7", *options_of(tiny_checkpoint), "--html", file)
    assert (written.returncode, written.stdout) == (0, f"wrote {file}\n"), written.stderr
    assert file.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert os.listdir(tmp_path) == ["page.html"]


@pytest.mark.slow
def test_in_a_process_of_its_own(tiny_checkpoint):
    """Where the output's encoding lacks the symbols."""
    result = subprocess.run(
        [sys.executable, "-m", "llama", "inspect", "the user", *map(str, options_of(tiny_checkpoint))],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    assert "perplexity" in result.stdout


@pytest.mark.parametrize(
    ("args", "message", "code"),
    [
        (["x", "--temprature", "0"], "unknown option '--temprature'; did you mean --temperature?", 2),
        (["x", "--top_p", "2"], "error: top_p=2 must be a number between 0 and 1", 1),
        (["x", "--alternatives", "0"], "error: alternatives=0 must be a whole number of at least 1", 1),
        (["x", "--quantize", "int5", "--ckpt_dir", "."], "error: quantize='int5' must be one of ['int8', 'int4']", 1),
        (["x", "--html", "/nowhere/page.html"], "does not exist; ", 1),
        (["x", "--html", "/"], "error: html='/' must be the name of a file in a folder", 1),
        (["x", "--html"], "error: llama inspect: argument --html: expected one argument", 2),
        (["x", "--ckpt_dir", "/nowhere"], "error: ckpt_dir='/nowhere' does not exist; ", 1),
    ],
)
def test_mistakes(runner, args, message, code):
    result = runner.llama("inspect", *args)
    assert (result.returncode, result.stdout) == (code, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_no_text(runner):
    """At a terminal it is an error to give none: the command doesn't wait for input."""
    result = runner.llama("inspect", stdin=Stdin(b"", is_terminal=True))
    assert (result.returncode, result.stderr) == (1, 'error: no text: give one, in quotes ("…"), or pipe one in\n')


@pytest.mark.slow
def test_two_processes(runner, tiny_checkpoint, tmp_path):
    """They print the same as one, and write a page once."""
    args = ["the user", *map(str, options_of(tiny_checkpoint)), "--temperature", "0", "--max_gen_len", "4"]
    script = tmp_path / "inspect_twice.py"
    script.write_text(
        "from llama.cli import run\n"
        "from llama.cli.inspect import inspect\n"
        f"for options in ([], ['--html', {str(tmp_path / 'page.html')!r}]):\n"
        f"    run(inspect, 'llama inspect', {args!r} + options)\n"
    )
    one, two = runner.llama("inspect", *args), fork_python(script, ranks=2)
    assert two.returncode == 0, two.stderr
    expected, numbers = (
        re.findall(r"^(?:perplexity|mean entropy, in nats) +([\d.]+)", run.stdout, re.MULTILINE) for run in (one, two)
    )
    assert len(numbers) == 2
    assert [float(x) for x in numbers] == pytest.approx([float(x) for x in expected], rel=1e-3)
    assert two.stdout.splitlines()[0] == one.stdout.splitlines()[0]
    assert two.stdout.splitlines()[-1] == f"wrote {tmp_path / 'page.html'}"
    assert sorted(os.listdir(tmp_path)) == ["inspect_twice.py", "page.html"]


def test_several_processes_cannot_share_standard_input(runner, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "give the text as an argument" in runner.llama("inspect", stdin="the user").stderr


def test_a_page_is_written_completely_or_not_at_all(tmp_path):
    file = tmp_path / "page.html"
    write_whole(file, "before")
    with pytest.raises(UnicodeEncodeError):
        write_whole(file, "after" * 100_000 + "\ud800")
    assert file.read_text() == "before"
    write_whole(file, "after")
    assert file.read_text() == "after"
    assert os.listdir(tmp_path) == ["page.html"]


@pytest.mark.skipif(os.name != "posix", reason="makes a link and a named pipe")
def test_links_are_followed_and_only_regular_files_written(tmp_path):
    file, link = tmp_path / "page.html", tmp_path / "link.html"
    link.symlink_to(file)
    write_whole(writable_file(link, "html"), "through the link")
    assert file.read_text() == "through the link"
    assert link.is_symlink()
    os.mkfifo(tmp_path / "fifo")
    for name in (tmp_path / "fifo", "/dev/null", tmp_path):
        with pytest.raises(InputError, match="must be the name of a file in a folder"):
            writable_file(name, "html")


# The page


def test_markup_in_the_text_is_escaped(hostile):
    text = hostile.page("<b>model</b>")
    assert set(re.findall(r"<(\w+)", text)) <= {
        "html", "head", "meta", "link", "title", "style", "body", "main", "header", "h1", "h2", "p", "dl", "div",
        "dt", "dd", "small", "section", "a", "ul", "ol", "li", "span", "b", "i", "svg", "rect", "line", "figure",
        "figcaption", "details", "summary", "table", "thead", "tbody", "tr", "th", "td", "footer",
    }  # fmt: skip
    assert "<b>model" not in text
    assert set(re.findall(r"""(?:src|href)=["']?([^"' >]+)""", text.replace("&quot;", ""))) <= {
        "data:,",
        "#next",
        "http://127.0.0.1:9/x.png",
    }
    assert not re.search(r"url\(|@import|@font-face", STYLE)
    assert "\x1b" not in text


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium without a window. Where it isn't installed, these tests fail in CI, and are skipped elsewhere."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        message = "chromium and chromedriver are not installed"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
                 "disable-background-networking", "disable-component-update", "disable-dev-shm-usage",
                 f"user-data-dir={tmp_path_factory.mktemp('browser')}"):  # fmt: skip
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    driver.get("about:blank")
    yield driver
    driver.quit()


@pytest.fixture
def open_page(browser, tmp_path):
    """Opens the page of an inspection; at the end, it must have requested nothing and logged nothing."""
    path = tmp_path / "page.html"

    def open_page(inspection, width=1100, height=800, scheme="light"):
        write_whole(path, inspection.page("a model"))
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
        )
        browser.get(path.as_uri())
        return browser

    browser.get_log("performance")
    browser.get_log("browser")
    yield open_page
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requested = {
        event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"
    }
    assert requested <= {path.as_uri(), "data:,"}
    assert path.as_uri() in requested
    assert browser.get_log("browser") == []


def own_text(browser, element) -> str:
    """A token's text as it is on the page, without its tooltip."""
    script = "return [...arguments[0].childNodes].filter(n => n.className != 'tip').map(n => n.textContent).join('')"
    return browser.execute_script(script, element)


def colours_of(browser, selector: str, name: str) -> list[tuple[float, ...]]:
    """A colour of each element that a selector finds, asked for at once, since each question takes long."""
    script = "return [...document.querySelectorAll(arguments[0])].map(e => getComputedStyle(e)[arguments[1]])"
    colours = []
    for value in browser.execute_script(script, selector, name):
        red, green, blue, *alpha = map(float, re.findall(r"[\d.]+", value))
        assert alpha in ([], [1.0]), value
        colours.append((red, green, blue))
    assert colours
    return colours


def contrast(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """WCAG's ratio of two colours' luminances."""

    def luminance(rgb: tuple[float, ...]) -> float:
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in rgb)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted(map(luminance, (a, b)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.slow
def test_every_token_has_its_colour(open_page, inspection):
    browser = open_page(inspection)
    elements = browser.find_elements("css selector", ".t")
    shown = [own_text(browser, element) for element in elements]
    assert shown == [token.text.replace("\n", "⏎\n") for token in inspection.tokens]
    assert "<|eot_id|>" in shown
    assert "\\xf0" in shown
    colours: dict[int, set] = {}
    backgrounds = colours_of(browser, ".t", "background-color")
    for element, background, token in list(zip(elements, backgrounds, inspection.tokens, strict=True))[1:]:
        colours.setdefault(surprise_level(token.probability), set()).add(background)
        assert ("generated" in element.get_attribute("class").split()) == token.generated
    assert len(colours) > 3
    assert all(len(same) == 1 for same in colours.values())
    assert len(set.union(*colours.values())) == len(colours)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1100, 400])
def test_the_tooltip_of_a_token_that_is_pointed_at_or_has_the_focus(open_page, inspection, width):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    height = 400
    browser = open_page(inspection, width, height)
    elements = browser.find_elements("css selector", ".t")
    tooltips = browser.find_elements("css selector", ".t .tip")

    def visible() -> list[int]:
        script = "return [...document.querySelectorAll('.tip')].map(tooltip => tooltip.checkVisibility())"
        return [j for j, is_visible in enumerate(browser.execute_script(script)) if is_visible]

    def only_shows(i):
        assert visible() == [i]
        for candidate in inspection.tokens[i].alternatives:
            assert f"{readable(candidate.text)}\n{percent(candidate.probability)}" in tooltips[i].text
        box = browser.execute_script("return arguments[0].getBoundingClientRect()", tooltips[i])
        assert 0 <= box["left"] < box["right"] <= width
        assert 0 <= box["top"] < box["bottom"] <= height
        assert elements[i].get_attribute("aria-describedby") == tooltips[i].get_attribute("id")

    assert visible() == []
    rightmost = max(range(len(elements)), key=lambda i: elements[i].rect["x"])
    for i in (1, 20, rightmost, len(tooltips) - 1):
        # At the lower edge of the window, where the tooltip doesn't fit below the token.
        browser.execute_script("arguments[0].scrollIntoView({block: 'end'})", elements[i])
        ActionChains(browser).move_to_element(elements[i]).perform()
        only_shows(i)
        token = inspection.tokens[i]
        assert f"rank {token.rank:,} · log-probability {token.logprob:.2f}" in tooltips[i].text
    ActionChains(browser).move_to_element(browser.find_element("css selector", "h1")).perform()
    assert visible() == []
    ActionChains(browser).send_keys(Keys.TAB * 2).perform()  # past the link that skips the tokens
    assert "no prediction for the first token" in tooltips[0].text
    for i in (1, 2):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        assert browser.switch_to.active_element == elements[i]
        only_shows(i)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


@pytest.mark.slow
def test_charts_are_drawn_to_scale(open_page, inspection):
    browser = open_page(inspection)
    figures = browser.find_elements("css selector", "figure")
    distributions = [inspection.requested, *inspection.variations]
    assert len(figures) == len(distributions) == 6
    widths, probs = [], []
    for figure, distribution in zip(figures, distributions, strict=True):
        assert figure.find_element("css selector", "figcaption b").text == format_settings(distribution)
        rows = figure.find_elements("css selector", "li")
        assert len(rows) == len(inspection.next_tokens)
        for row, candidate, probability in zip(rows, inspection.next_tokens, distribution.probabilities, strict=True):
            assert row.text.split("\n") == [readable(candidate.text), percent(probability)]
            bar = row.find_element("css selector", "svg rect")
            widths.append(browser.execute_script("return arguments[0].getBoundingClientRect().width", bar))
            probs.append(probability)
    assert max(widths) > 50
    assert [width / max(widths) for width in widths] == pytest.approx([p / max(probs) for p in probs], abs=0.02)


@pytest.mark.slow
def test_light_and_dark(open_page, inspection):
    """There are two colour schemes, and every text has enough contrast in both."""
    backgrounds = []
    for scheme in ("light", "dark"):
        browser = open_page(inspection, scheme=scheme)
        backgrounds += colours_of(browser, "body", "background-color")
        (ink,) = colours_of(browser, "body", "color")
        assert contrast(ink, backgrounds[-1]) > 7
        for text, background in zip(
            colours_of(browser, ".t", "color"), colours_of(browser, ".t", "background-color"), strict=True
        ):
            assert contrast(text, background) >= 4.5
        card = colours_of(browser, "figure", "background-color")[0]
        for text in colours_of(browser, "dt, small, figure p, .out .n", "color"):
            assert contrast(text, card) >= 4.5
    assert contrast(*backgrounds) > 10


@pytest.mark.slow
def test_injected_text_is_inert(open_page, hostile):
    browser = open_page(hostile)
    shown = "".join(own_text(browser, element) for element in browser.find_elements("css selector", ".t"))
    assert '<script>alert(1)</script><img src="http://127.0.0.1:9/x.png"> [bold]x[/bold] ␛[31m' in shown
    assert browser.find_elements("css selector", "script, img, em, body style") == []
    assert browser.title == "How sure was the model? – a model"


@pytest.mark.slow
def test_the_policy_lets_nothing_run_or_load(browser, tmp_path, hostile):
    """Markup that did get into the page would have no effect."""
    path = tmp_path / "page.html"
    evil = '<script>document.title = "ran"</script><img src="http://127.0.0.1:9/x.png"><style>body{color:red}</style>'
    write_whole(path, hostile.page("a model").replace("</main>", evil + "</main>"))
    browser.get(path.as_uri())
    assert browser.find_elements("css selector", "main img")
    assert browser.title == "How sure was the model? – a model"
    assert colours_of(browser, "body", "color") != [(255, 0, 0)]
    refusals = " ".join(entry["message"] for entry in browser.get_log("browser"))
    assert all(directive in refusals for directive in ("script", "img-src", "style-src"))


@pytest.mark.slow
def test_a_notebook_shows_the_page_in_a_frame(browser, tmp_path, inspection, hostile):
    """It has its own style, and changes nothing around it."""
    path = tmp_path / "notebook.html"
    outputs = "".join(f"<div>{shown._repr_html_()}</div>" for shown in (inspection, hostile))
    path.write_text(f"<!DOCTYPE html><meta charset=utf-8><style>.t {{color: red}}</style><main>A</main>{outputs}")
    browser.get(path.as_uri())
    browser.get_log("browser")
    main = browser.find_element("css selector", "main")
    assert main.value_of_css_property("padding") == "0px"
    for frame, shown in zip(browser.find_elements("css selector", "iframe"), (inspection, hostile), strict=True):
        assert frame.rect["width"] > 700
        browser.switch_to.frame(frame)
        elements = browser.find_elements("css selector", ".t")
        assert len(elements) == len(shown.tokens)
        assert own_text(browser, elements[2]) == shown.tokens[2].text
        assert (255, 0, 0) not in colours_of(browser, ".t", "color")
        assert browser.find_elements("css selector", "script, img, em, .model:not(:empty)") == []
        browser.switch_to.default_content()
    assert browser.get_log("browser") == []


@pytest.mark.slow
def test_the_page_of_a_single_token(open_page, tiny):
    browser = open_page(inspect_tokens(tiny.model, tiny.tokenizer, [70]))
    assert len(browser.find_elements("css selector", ".t")) == 1
    assert "–" in browser.find_element("css selector", ".totals").text


def test_a_single_token_is_printed(tiny):
    text = printed(inspect_tokens(tiny.model, tiny.tokenizer, [70]), color_system=None)
    assert "no prediction for the first token" in text
