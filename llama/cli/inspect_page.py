"""The page of `llama inspect --html`: one file that shows how sure a model was. It has no script, and fetches nothing.

Every text that a model or a person wrote goes through `escape`, which also makes what is invisible show.
"""

import base64
import hashlib
import html
from pathlib import Path

from llama.cli.inspect_format import LEGEND, figures, level, percent, readable, settings
from llama.cli.inspection import Choice, Inspection, Reshaped, Token

STYLE = (Path(__file__).parent / "inspect_page.css").read_text(encoding="utf-8")

# Nothing may run or be fetched, whatever a text brings with it; and only this style sheet counts.
POLICY = "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; style-src 'sha256-{}'"


def page(found: Inspection, model: str) -> str:
    """The HTML of an inspection.

    Args:
        model: its name.
    """
    policy = POLICY.format(base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode())
    own = any(token.new for token in found.tokens)
    key = "".join(f'<li><span class="swatch l{i}"></span>{html.escape(words)}</li>' for i, words in enumerate(LEGEND))
    own_key = '<li><span class="swatch own"></span>written by the model</li>' if own else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>How sure was the model? – {spaced(model)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<h1>How sure was the model?</h1>
<p class="model">{spaced(model)}</p>
</header>
<dl class="totals">{"".join(map(tile, figures(found)))}</dl>

<section aria-labelledby="text">
<h2 id="text">The text, token by token</h2>
<p class="hint">The warmer a token’s colour, the less the model expected it. Point at one, tap it, or move with the Tab
key to see what it expected. <a class="skip" href="#next">Skip the tokens</a></p>
<ul class="key" aria-label="Colours: the probability of a token">{key}{own_key}</ul>
<div class="tokens">{"".join(token_span(i, token) for i, token in enumerate(found.tokens))}</div>
</section>

<section aria-labelledby="next">
<h2 id="next" tabindex="-1">What would come next</h2>
<p class="hint">How likely each token is to follow the text, and how temperature, top-k and top-p reshape that. Bars are
the probability of being drawn, all on one scale; the thin mark is the model’s own probability.</p>
<div class="charts">{charts(found)}</div>
</section>

<section>
<details>
<summary>All numbers, as a table</summary>
<div class="scroll">{table(found.tokens)}</div>
</details>
</section>
<footer>Probability, rank and entropy are the model’s own, at temperature 1. Logarithms are natural: log-probability and
entropy are in nats. Perplexity is e to the power of minus the mean log-probability. In token names, · is a space, ⏎ a
line end and ⇥ a tab; \\xf0 and the like are the bytes of a part of a character.</footer>
</main>
</body>
</html>
"""


def escape(text: str) -> str:
    """A name, or a token's text, on one line."""
    return html.escape(readable(text))


def spaced(text: str) -> str:
    """The same, with its spaces left as they are."""
    return " ".join(map(escape, text.split(" ")))


def flowing(text: str) -> str:
    """A token's text as it stands in its text: with its spaces, and with its line ends both marked and made."""
    return "<i>⏎</i>\n".join(map(spaced, text.split("\n")))


def tile(figure: tuple[str, str, list[str]]) -> str:
    """One of the numbers at the top: what it is, the number, and its parts."""
    name, value, parts = figure
    return f"<div><dt>{name}</dt><dd>{value}{''.join(f'<small>{part}</small>' for part in parts)}</dd></div>"


def token_span(i: int, token: Token) -> str:
    """A token in its colour, and what shows when it is pointed at or has the focus."""
    if token.probability is None:
        tip = f"<b>{escape(token.text)}</b><span>Nothing stands before it, so that the model expected nothing.</span>"
        classes = "t first"
    else:
        likeliest = token.alternatives[0].probability
        tip = (
            f'<b>{escape(token.text)}</b><b class="n">{chance(token.probability)}</b>'
            f"<span>rank {token.rank:,} · log-probability {token.logprob:.2f} · entropy {token.entropy:.2f} nats</span>"
            + "".join(alternative(choice, likeliest, choice.id == token.id) for choice in token.alternatives)
        )
        classes = f"t l{level(token.probability)}"
    own = " own" if token.new else ""
    return (
        f'<span class="{classes}{own}" tabindex="0" aria-describedby="d{i}">{flowing(token.text)}'
        f'<span class="tip" role="tooltip" id="d{i}">{tip}</span></span>'
    )


def alternative(choice: Choice, likeliest: float, is_it: bool) -> str:
    """A row in what shows at a token; bars are on the scale of the likeliest."""
    name = f'<span class="name{" it" if is_it else ""}">{escape(choice.text)}</span>'
    return f'<span class="row">{name}{bar(choice.probability / likeliest)}{number(choice.probability)}</span>'


def number(probability: float) -> str:
    return f'<span class="n">{chance(probability)}</span>'


def chance(probability: float) -> str:
    return html.escape(percent(probability))


def bar(width: float, mark: float | None = None) -> str:
    """A bar, and perhaps a mark, as parts of the whole width."""
    line = "" if mark is None or mark < 0.01 else f'<line x1="{mark:.2%}" x2="{mark:.2%}" y1="0" y2="100%"/>'
    return f'<svg aria-hidden="true"><rect width="{width:.2%}" height="100%" rx="2"/>{line}</svg>'


def charts(found: Inspection) -> str:
    """The distribution of the next token as it is drawn, and under one setting at a time."""
    explained = [
        (found.asked, "what was asked for, all together"),
        *zip(
            found.single,
            (
                "below 1, likely tokens become likelier",
                "the model’s own distribution",
                "above 1, unlikely tokens get a chance",
                "only so many of the likeliest",
                "only the likeliest that together reach it",
            ),
            strict=True,
        ),
    ]
    scale = max(max(how.probabilities) for how, _ in explained)
    return "".join(chart(how, words, found.next_tokens, scale) for how, words in explained)


def chart(how: Reshaped, words: str, choices: list[Choice], scale: float) -> str:
    """One distribution.

    Args:
        words: what is to be seen in it.
        choices: its tokens, as the model has them.
        scale: the probability of a bar over the whole width.
    """
    rows = "".join(
        f'<li{"" if probability else " class=out"}><span class="name">{escape(choice.text)}</span>'
        f"{bar(probability / scale, choice.probability / scale)}{number(probability)}</li>"
        for choice, probability in zip(choices, how.probabilities, strict=True)
    )
    drawn = f"{how.drawable:,} token{'s' * (how.drawable != 1)} can be drawn"
    drawn += f"; those not shown: {chance(how.others)}" if how.others else ""
    return (
        f"<figure><figcaption><b>{settings(how)}</b><span>{words}</span></figcaption>"
        f"<ol>{rows}</ol><p>{drawn}</p></figure>"
    )


def table(tokens: list[Token]) -> str:
    """All tokens and their numbers."""
    rows = []
    for token in tokens:
        name = f'<th scope="row"{" class=own" if token.new else ""}>{escape(token.text)}</th><td>{token.id}</td>'
        if token.probability is None:
            rows.append(f"<tr>{name}<td>–</td><td>–</td><td>–</td><td>–</td><td>–</td></tr>")
            continue
        others = ", ".join(f"{escape(choice.text)} {chance(choice.probability)}" for choice in token.alternatives)
        rows.append(
            f"<tr>{name}<td>{chance(token.probability)}</td><td>{token.logprob:.3f}</td><td>{token.rank}</td>"
            f"<td>{token.entropy:.3f}</td><td>{others}</td></tr>"
        )
    heads = ("token", "id", "probability", "log-probability", "rank", "entropy", "likeliest")
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
