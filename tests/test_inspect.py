"""`llama inspect`: its numbers, what it prints, and its page, which a browser looks at."""

import io
import json
import math
import os
import pty
import re
import shutil
import subprocess
import sys
import unicodedata
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, hugging_face_twin, tiny_model, torchrun
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from test_sampling import nucleus_of

import llama.cli.inspection
from llama import Llama
from llama.cli.inspect import label, show
from llama.cli.inspect_format import level, percent, readable, settings
from llama.cli.inspect_page import STYLE, page
from llama.cli.inspection import inspect_tokens, totals
from llama.errors import InputError
from llama.files import writable_file, write_whole

HOSTILE = '<script>alert(1)</script><img src="http://127.0.0.1:9/x.png"> [bold]x[/bold] \x1b[31m\x1b]0;y\x07 \u202e'


@pytest.fixture(scope="module")
def tiny(llama3):
    return Llama(tiny_model(vocab_size=llama3.n_words, max_seq_len=160), llama3)


@pytest.fixture(scope="module")
def ids(llama3):
    """Text, and special tokens: all that a prompt can hold."""
    ids = llama3.encode("The user is in the other house, thinking on an answer: 🙂\n\n", bos=True, eos=False)
    return [*ids, llama3.special_tokens["<|eot_id|>"], *range(40, 70)]


@pytest.fixture(scope="module")
def found(tiny, ids):
    """With a completion, so that there are surprising tokens and expected ones."""
    (new,), _ = tiny.generate([ids], max_gen_len=8, temperature=0)
    return inspect_tokens(tiny, ids + new, len(new))


# Numbers


@pytest.mark.parametrize("at_once", [4 * 7 * 524, 2**25])
def test_numbers_are_those_of_transformers(tiny, ids, monkeypatch, at_once):
    """Each number from its definition, on the probabilities of another implementation, whatever the blocks."""
    monkeypatch.setattr(llama.cli.inspection, "LOGITS_AT_ONCE", at_once)
    found = inspect_tokens(tiny, ids, alternatives=4)
    with torch.no_grad():
        logits = hugging_face_twin(tiny.model).double()(torch.tensor([ids])).logits[0]  # (seq, vocab_size)
    assert [token.id for token in found.tokens] == ids
    first, *tokens = found.tokens
    assert first[2:] == (False, None, None, None, None, [])
    for token, row in zip(tokens, logits, strict=False):
        weights = [math.exp(x) for x in (row - row.max()).tolist()]
        probs = [weight / sum(weights) for weight in weights]
        assert token.probability == pytest.approx(probs[token.id], abs=1e-4)
        assert token.logprob == pytest.approx(math.log(probs[token.id]), abs=2e-4)
        assert token.rank == 1 + sum(prob > probs[token.id] for prob in probs)
        assert token.entropy == pytest.approx(-sum(prob * math.log(prob) for prob in probs), abs=1e-4)
        order = sorted(range(len(probs)), key=lambda i: -probs[i])[:4]
        assert [choice.id for choice in token.alternatives] == order
        assert [choice.probability for choice in token.alternatives] == pytest.approx(
            [probs[i] for i in order], abs=1e-4
        )
    after = torch.softmax(logits[-1], dim=-1).topk(10)
    assert [choice.id for choice in found.next_tokens] == after.indices.tolist()
    assert [choice.probability for choice in found.next_tokens] == pytest.approx(after.values.tolist(), abs=1e-4)


def test_logprobs_are_those_of_generate(tiny, ids, found):
    tokens = [token.id for token in found.tokens]
    _, ((_, *logprobs),) = tiny.generate([tokens], max_gen_len=0, echo=True, logprobs=True)
    assert [token.logprob for token in found.tokens[1:]] == pytest.approx(logprobs, abs=1e-5)
    assert [token.new for token in found.tokens] == [False] * len(ids) + [True] * (len(tokens) - len(ids))


def test_the_cache_is_left_as_it_is(tiny, ids):
    """A talk goes on where it was: nothing is read into the cache."""
    tiny.generate([ids], max_gen_len=3, temperature=0)
    before = tiny.model.cache.keys.clone()
    inspect_tokens(tiny, ids[::-1])
    assert torch.equal(tiny.model.cache.keys, before)


def test_totals(found):
    sums = totals(found.tokens)
    logprobs = [token.logprob for token in found.tokens[1:]]
    assert sums.tokens == len(logprobs) + 1
    assert sums.logprob == pytest.approx(sum(logprobs))
    assert sums.perplexity == pytest.approx(math.prod(math.exp(-x / len(logprobs)) for x in logprobs))
    assert sums.entropy == pytest.approx(sum(token.entropy for token in found.tokens[1:]) / len(logprobs))
    assert totals(found.tokens[:1]) == (1, 0.0, None, None)
    assert totals([found.tokens[1]._replace(logprob=-1000.0)]).perplexity == math.inf


@pytest.mark.parametrize("how", [(0.8, 0.7, 3), (2.0, 0.5, None), (0, 0.9, None), (1.3, 0.9, 1), (1.0, 1.0, 600)])
def test_distributions_are_those_of_the_definitions(tiny, ids, how):
    temperature, top_p, top_k = how
    found = inspect_tokens(tiny, ids, bars=524, temperature=temperature, top_p=top_p, top_k=top_k)
    with torch.no_grad():
        logits = tiny.model(torch.tensor([ids]))[0, -1].double().tolist()

    def defined(temperature: float, top_p: float, top_k: int | None) -> dict[int, float]:
        if temperature == 0:
            return {logits.index(max(logits)): 1.0}
        kept = sorted(range(len(logits)), key=lambda i: -logits[i])[:top_k]
        weights = [math.exp((logits[i] - max(logits)) / temperature) for i in kept]
        nucleus = nucleus_of([weight / sum(weights) for weight in weights], top_p)
        return {kept[place]: prob for place, prob in nucleus.items()}

    singles = [(0.5, 1.0, None), (1.0, 1.0, None), (1.5, 1.0, None), (1.0, 1.0, top_k or 5)]
    singles.append((1.0, top_p if top_p < 1 else 0.9, None))
    for reshaped, wanted in zip([found.asked, *found.single], [how, *singles], strict=True):
        assert (reshaped.temperature, reshaped.top_p, reshaped.top_k) == wanted
        probs = defined(*wanted)
        assert reshaped.probabilities == pytest.approx([probs.get(c.id, 0.0) for c in found.next_tokens], abs=1e-4)
        assert reshaped.drawable == pytest.approx(len(probs), abs=0 if len(probs) < 300 else 300)  # some underflow
        assert reshaped.others == 0
    few = inspect_tokens(tiny, ids, bars=2, temperature=2.0, top_p=1.0)
    assert len(few.sample) == 2
    assert few.asked.others == pytest.approx(1 - sum(few.asked.probabilities), abs=1e-6)


def test_what_is_refused(tiny, ids):
    for wrong, message in [
        (dict(alternatives=0), "alternatives=0 must be a whole number of at least 1"),
        (dict(bars=1.5), "bars=1.5 must be"),
        (dict(new=-1), "new=-1 must be"),
        (dict(new=1000), "new=1000 is more than the"),
        (dict(temperature=-1), "temperature=-1 must be"),
        (dict(top_p=2), "top_p=2 must be"),
    ]:
        with pytest.raises(InputError, match=message):
            inspect_tokens(tiny, ids, **wrong)
    with pytest.raises(InputError, match="524"):
        inspect_tokens(tiny, [524])
    with pytest.raises(InputError, match="max_seq_len=160"):
        inspect_tokens(tiny, [1] * 161)
    broken = tiny_model(vocab_size=524)
    broken.layers[1].feed_forward.w2.weight.data[0, 0] = math.nan
    with pytest.raises(ArithmeticError, match="NaN or infinity, first in layer 1"):
        inspect_tokens(Llama(broken, tiny.tokenizer), ids)
    with pytest.raises(ArithmeticError, match="NaN or infinity"):
        inspect_tokens(Llama(broken, tiny.tokenizer), [7])


# Texts


@given(st.text())
def test_every_character_shows_and_none_steers(text):
    for character in readable(text):
        assert unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
        assert character not in " \ufe0f"


def test_readable():
    assert readable(" the\n\t\x1b[0m\x7f\x9b\u202e\x00é中🙂") == "·the⏎⇥␛[0m␡\\x9b\\u202e␀é中🙂"
    assert readable("<b>[bold]\\xf0") == "<b>[bold]\\xf0"


def test_probabilities_in_words():
    words = [percent(p) for p in (1, 0.99949, 0.1234, 0.0012, 0.00012, 0.000012, 1e-9, 0)]
    assert words == ["100.0%", "99.9%", "12.3%", "0.1%", "0.01%", "0.001%", "<0.001%", "–"]
    assert [level(p) for p in (1, 0.5, 0.49, 0.2, 0.05, 0.01, 0.001, 0)] == [0, 0, 1, 1, 2, 3, 4, 5]


# At a terminal


def printed(found, width=100, **options) -> str:
    file = io.StringIO()
    show(found, Console(file=file, force_terminal=True, highlight=False, width=width, **options))
    return file.getvalue()


@pytest.fixture(scope="module")
def hostile(tiny, llama3):
    """A text that would do harm if it were taken for markup or for a terminal's commands; so would tokens of it."""
    ids = llama3.encode(f"{HOSTILE} & two\nlines", bos=True, eos=False)
    (new,), _ = tiny.generate([ids], max_gen_len=4, temperature=0)
    found = inspect_tokens(tiny, ids + new, len(new))
    bad = [choice._replace(text="[/b]</b><em>\x1b") for choice in found.next_tokens]
    last = found.tokens[-1]._replace(text="[bold]</span><em>\x1b[0m", alternatives=bad)
    return replace(found, tokens=[*found.tokens, last], sample=bad)


@pytest.mark.parametrize("width", [30, 80, 200])
def test_every_number_is_printed(found, width):
    text = printed(found, width, color_system=None)
    assert max(map(len, text.splitlines())) <= width
    if width >= 80:
        for token in found.tokens[1:]:
            line = (
                rf"^ *{re.escape(readable(token.text)[:14])}.* {re.escape(percent(token.probability))} +{token.rank:,} "
            )
            assert re.search(line + rf" +{token.entropy:.2f} ", text, re.MULTILINE), line
            for choice in token.alternatives:
                assert f"{label(choice.text).plain} {percent(choice.probability)} " in text
        assert text.count("by the model:") == 1
        for how in (found.asked, *found.single):
            assert settings(how).split(", ")[-1] in text
    assert f"{totals(found.tokens).perplexity:,.4g}" in text


def test_colours_differ_with_probability(found):
    text = printed(found, color_system="truecolor").split("probability:")[0]
    backgrounds = set(re.findall(r"48;2;(\d+;\d+;\d+)m", text))
    assert len(backgrounds) == len({level(token.probability) for token in found.tokens[1:]} - {0}) > 2
    assert "\x1b[4m" in text or "\x1b[4;" in text  # the completion is underlined


def test_nothing_steers_the_terminal(hostile):
    text = printed(hostile, color_system=None)
    assert "\x1b" not in text.replace("\x1b[?25", "")
    assert "[bold]x[/bold] ␛[31m␛]0;y␇ \\xe2\\x80\\xae" in text.replace("\n", "")
    assert "[bold]</span><em>␛[0m" in text.replace("\n", "")
    assert text.count("[/b]</b><em>␛") == 10 + 2 * 10  # at the token; and in two rows of charts


# The command


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("command") / "llama_inspect.py"
    imports = "from llama.cli.command_line import run\nfrom llama.cli.inspect import inspect\n"
    path.write_text(imports + "run(inspect, 'llama inspect')\n")
    return path


def run_command(script, *words, stdin=subprocess.DEVNULL, **options) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | options.pop("env", {})
    if "input" not in options:
        options["stdin"] = stdin
    command = [sys.executable, script, *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, **options)


def test_command(tiny_checkpoint, script, tmp_path, llama3):
    count = len(llama3.encode("the user 🙂", bos=True, eos=False))
    options = ["--ckpt_dir", tiny_checkpoint, "--max_seq_len", "96", "--dtype", "float32"]
    result = run_command(script, "the user 🙂", *options, "--max_gen_len", "5", "--seed", "3")
    assert result.returncode == 0, result.stderr
    assert "<|begin_of_text|>the user \\xf0\\x9f\\x99\\x82" in result.stdout.replace("\n", "")
    assert re.search(rf"^tokens +{count + 5}   prompt {count} · completion 5$", result.stdout, re.MULTILINE)
    assert "\x1b" not in result.stdout  # no colours where nobody sees them
    again = run_command(script, "the user 🙂", *options, "--max_gen_len", "5", "--seed", "3")
    assert again.stdout == result.stdout

    piped = run_command(script, *options, input="the user 🙂\n", env={"PYTHONIOENCODING": "utf-8"})
    assert "⏎" not in piped.stdout.splitlines()[0]  # the last line end is none of the text
    assert re.search(rf"^tokens +{count}$", piped.stdout, re.MULTILINE), piped.stderr
    plain = run_command(script, "the user", *options, env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert plain.returncode == 0, plain.stderr

    file = tmp_path / "page.html"
    result = run_command(script, "7", *options, "--html", file)  # a text, though it looks like a number
    assert (result.returncode, result.stdout) == (0, f"wrote {file}\n"), result.stderr
    assert file.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert os.listdir(tmp_path) == ["page.html"]


def test_help(script):
    result = run_command(script, "--help")
    assert result.returncode == 0
    for option in ("text", "ckpt_dir", "max_gen_len", "temperature", "top_p", "top_k", "seed", "alternatives", "html"):
        assert f"--{option}=" in result.stdout
    assert "how sure a model was" in result.stdout


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (
            ["x", "--temprature", "0"],
            "error: llama inspect has no use for '--temprature'; did you mean --temperature?",
            2,
        ),
        (["x", "--top_p", "2"], "error: top_p=2 must be between 0 and 1", 1),
        (["x", "--alternatives", "0"], "error: alternatives=0 must be a whole number of at least 1", 1),
        (["x", "--html", "/nowhere/page.html"], "error: the folder of html='/nowhere' does not exist; / holds ", 1),
        (["x", "--html", "/"], "error: html='/' must be the name of a file in a folder", 1),
        (["x", "--html"], "error: llama inspect: --html needs a value; see --help", 2),
        (["x", "--ckpt_dir", "/nowhere"], "error: ckpt_dir='/nowhere' does not exist; / holds ", 1),
    ],
)
def test_mistakes(script, words, message, code):
    result = run_command(script, *words)
    assert (result.returncode, result.stdout) == (code, "")
    assert result.stderr.startswith(message), result.stderr
    assert result.stderr.count("\n") == 1


def test_no_text(script):
    """A person at a terminal who gave none is told so, and not left waiting."""
    _, terminal = pty.openpty()
    result = run_command(script, stdin=terminal)
    assert (result.returncode, result.stderr) == (1, 'error: no text: give one, in quotes ("…"), or pipe one in\n')


def test_two_processes(tiny_checkpoint, script, tmp_path):
    options = ["--ckpt_dir", tiny_checkpoint, "--max_seq_len", "96", "--dtype", "float32", "--temperature", "0"]
    alone = run_command(script, "the user", *options, "--max_gen_len", "4")
    both = torchrun(2, script, "the user", *options, "--max_gen_len", "4")
    assert both.returncode == 0, both.stderr
    numbers = [
        re.findall(r"^(?:perplexity|mean entropy, in nats) +([\d.]+)", run.stdout, re.MULTILINE)
        for run in (alone, both)
    ]
    assert len(numbers[1]) == 2
    assert [float(x) for x in numbers[1]] == pytest.approx([float(x) for x in numbers[0]], rel=1e-3)
    assert both.stdout.splitlines()[0] == alone.stdout.splitlines()[0]
    written = torchrun(2, script, "the user", *options, "--html", tmp_path / "page.html")
    assert written.stdout == f"wrote {tmp_path / 'page.html'}\n"
    assert os.listdir(tmp_path) == ["page.html"]
    assert "give the text as an argument" in torchrun(2, script, *options).stderr


def test_a_page_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "page.html"
    write_whole(file, "before")
    with pytest.raises(UnicodeEncodeError):
        write_whole(file, "after" * 100_000 + "\ud800")
    assert file.read_text() == "before"
    write_whole(file, "after")
    assert file.read_text() == "after"
    assert os.listdir(tmp_path) == ["page.html"]
    link = tmp_path / "link.html"
    link.symlink_to(file)
    write_whole(writable_file(link, "html"), "through the link")
    assert file.read_text() == "through the link"
    assert link.is_symlink()
    os.mkfifo(tmp_path / "fifo")
    for name in (tmp_path / "fifo", "/dev/null", tmp_path):
        with pytest.raises(InputError, match="must be the name of a file in a folder"):
            writable_file(name, "html")


# The page


def test_the_page_carries_no_markup_of_the_text(hostile):
    text = page(hostile, "<b>model</b>")
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
    """Chromium without a window. Where it isn't installed, CI fails, and a person's tests go on without it."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        message = "chromium and chromedriver are not installed"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for word in ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
                 "disable-background-networking", "disable-component-update", "disable-dev-shm-usage",
                 f"user-data-dir={tmp_path_factory.mktemp('browser')}"):  # fmt: skip
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    driver.get("about:blank")
    yield driver
    driver.quit()


@pytest.fixture
def look(browser, tmp_path):
    """Open an inspection's page; afterwards nothing may have been asked of the network, or stand in the console."""
    path = tmp_path / "page.html"

    def look(found, width=1100, height=800, scheme="light"):
        write_whole(path, page(found, "a model"))
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
    yield look
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
    assert asked <= {path.as_uri(), "data:,"}
    assert path.as_uri() in asked
    assert browser.get_log("browser") == []


def own_text(browser, element) -> str:
    """A token's text as it stands on the page, without what shows when it is pointed at."""
    script = "return [...arguments[0].childNodes].filter(n => n.className != 'tip').map(n => n.textContent).join('')"
    return browser.execute_script(script, element)


def colour(element, name: str) -> tuple[float, ...]:
    red, green, blue, *alpha = map(float, re.findall(r"[\d.]+", element.value_of_css_property(name)))
    assert alpha in ([], [1.0]), element.text
    return red, green, blue


def contrast(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """WCAG's ratio of two colours' luminances."""

    def luminance(rgb: tuple[float, ...]) -> float:
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in rgb)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted(map(luminance, (a, b)))
    return (light + 0.05) / (dark + 0.05)


def test_every_token_is_there_in_its_colour(look, found):
    browser = look(found)
    elements = browser.find_elements("css selector", ".t")
    shown = [own_text(browser, element) for element in elements]
    wanted = [token.text.replace("\n", "⏎\n") for token in found.tokens]
    assert shown == wanted
    assert "<|eot_id|>" in shown
    assert "\\xf0" in shown
    colours: dict[int, set] = {}
    for element, token in list(zip(elements, found.tokens, strict=True))[1:]:
        colours.setdefault(level(token.probability), set()).add(colour(element, "background-color"))
        assert ("own" in element.get_attribute("class").split()) == token.new
    assert len(colours) > 3
    assert all(len(same) == 1 for same in colours.values())
    assert len(set.union(*colours.values())) == len(colours)


@pytest.mark.parametrize("width", [1100, 400])
def test_alternatives_show_when_a_token_is_pointed_at_or_focused(look, found, width):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    height = 400
    browser = look(found, width, height)
    elements = browser.find_elements("css selector", ".t")
    tips = [element.find_element("css selector", ".tip") for element in elements]

    def shows(i):
        assert [place for place, tip in enumerate(tips) if tip.is_displayed()] == [i]
        for choice in found.tokens[i].alternatives:
            assert f"{readable(choice.text)}\n{percent(choice.probability)}" in tips[i].text
        box = browser.execute_script("return arguments[0].getBoundingClientRect()", tips[i])
        assert 0 <= box["left"] < box["right"] <= width
        assert 0 <= box["top"] < box["bottom"] <= height
        assert elements[i].get_attribute("aria-describedby") == tips[i].get_attribute("id")

    assert not any(tip.is_displayed() for tip in tips)
    rightmost = max(range(len(elements)), key=lambda i: elements[i].rect["x"])
    for i in (1, 20, rightmost, len(tips) - 1):
        # At the lower edge, where there is no room below it.
        browser.execute_script("arguments[0].scrollIntoView({block: 'end'})", elements[i])
        ActionChains(browser).move_to_element(elements[i]).perform()
        shows(i)
        assert f"rank {found.tokens[i].rank:,} · log-probability {found.tokens[i].logprob:.2f}" in tips[i].text
    ActionChains(browser).move_to_element(browser.find_element("css selector", "h1")).perform()
    assert not any(tip.is_displayed() for tip in tips)
    ActionChains(browser).send_keys(Keys.TAB * 2).perform()  # past the link that skips them
    assert "Nothing stands before it" in tips[0].text
    for i in (1, 2):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        assert browser.switch_to.active_element == elements[i]
        shows(i)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_charts_are_drawn_to_scale(look, found):
    browser = look(found)
    figures = browser.find_elements("css selector", "figure")
    distributions = [found.asked, *found.single]
    assert len(figures) == len(distributions) == 6
    widths, probs = [], []
    for figure, how in zip(figures, distributions, strict=True):
        assert figure.find_element("css selector", "figcaption b").text == settings(how)
        rows = figure.find_elements("css selector", "li")
        assert len(rows) == len(found.next_tokens)
        for row, choice, probability in zip(rows, found.next_tokens, how.probabilities, strict=True):
            assert row.text.split("\n") == [readable(choice.text), percent(probability)]
            bar = row.find_element("css selector", "svg rect")
            widths.append(browser.execute_script("return arguments[0].getBoundingClientRect().width", bar))
            probs.append(probability)
    assert max(widths) > 50
    assert [width / max(widths) for width in widths] == pytest.approx([p / max(probs) for p in probs], abs=0.02)


def test_light_and_dark(look, found):
    """Two sets of colours, and in both every text can be read."""
    papers = []
    for scheme in ("light", "dark"):
        browser = look(found, scheme=scheme)
        papers.append(colour(browser.find_element("css selector", "body"), "background-color"))
        ink = colour(browser.find_element("css selector", "body"), "color")
        assert contrast(ink, papers[-1]) > 7
        for element in browser.find_elements("css selector", ".t"):
            assert contrast(colour(element, "color"), colour(element, "background-color")) >= 4.5
        card = colour(browser.find_element("css selector", "figure"), "background-color")
        for quiet in browser.find_elements("css selector", "dt, small, figure p, .out .n"):
            assert contrast(colour(quiet, "color"), card) >= 4.5
    assert contrast(*papers) > 10


def test_injected_text_is_inert(look, hostile):
    browser = look(hostile)
    shown = "".join(own_text(browser, element) for element in browser.find_elements("css selector", ".t"))
    assert '<script>alert(1)</script><img src="http://127.0.0.1:9/x.png"> [bold]x[/bold] ␛[31m' in shown
    assert browser.find_elements("css selector", "script, img, em, body style") == []
    assert browser.title == "How sure was the model? – a model"


def test_the_policy_lets_nothing_run_or_load(browser, tmp_path, hostile):
    """If markup did get in, it could do nothing."""
    path = tmp_path / "page.html"
    evil = '<script>document.title = "ran"</script><img src="http://127.0.0.1:9/x.png"><style>body{color:red}</style>'
    write_whole(path, page(hostile, "a model").replace("</main>", evil + "</main>"))
    browser.get(path.as_uri())
    assert browser.find_elements("css selector", "main img")
    assert browser.title == "How sure was the model? – a model"
    assert colour(browser.find_element("css selector", "body"), "color") != (255, 0, 0)
    refusals = " ".join(entry["message"] for entry in browser.get_log("browser"))
    assert all(f"'{what}" in refusals or what in refusals for what in ("script", "img-src", "style-src"))


def test_a_text_of_one_token(look, tiny):
    one = inspect_tokens(tiny, [70])
    browser = look(replace(one))
    assert len(browser.find_elements("css selector", ".t")) == 1
    assert "–" in browser.find_element("css selector", ".totals").text
    assert "nothing stands before it" in printed(one)
