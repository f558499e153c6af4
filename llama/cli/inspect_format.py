"""What `llama inspect` says in the same words at a terminal and on a page."""

import unicodedata
from collections.abc import Callable

from llama.cli.inspection import Inspection, Reshaped, Totals, totals

# A token of at least the first probability was expected; each further bound is a step of surprise.
LEVELS = (0.5, 0.2, 0.05, 0.01, 0.001)
LEGEND = ("≥ 50%", "≥ 20%", "≥ 5%", "≥ 1%", "≥ 0.1%", "< 0.1%")

# For characters that show nothing, or do something to a terminal.
SIGNS = {chr(i): chr(0x2400 + i) for i in range(32)} | {" ": "·", "\n": "⏎", "\t": "⇥", "\x7f": "␡"}


def level(probability: float) -> int:
    """How surprising a token was: from 0, expected, to `len(LEVELS)`."""
    return sum(probability < bound for bound in LEVELS)


def readable(text: str) -> str:
    """A token's text on one line, in which every character shows and none steers a terminal or turns the text around
    it: spaces and control characters as signs, what else is invisible as an escape such as `\\u202e`."""
    return "".join(SIGNS.get(character) or _escaped(character) for character in text)


def _escaped(character: str) -> str:
    kind = unicodedata.category(character)
    hidden = kind[0] == "C" or kind in ("Zl", "Zp")  # controls, marks of direction, halves, what no font has
    if hidden or "\ufe00" <= character <= "\ufe0f":  # choices between looks of the character before
        return character.encode("unicode_escape").decode("ascii")
    return character


def percent(probability: float) -> str:
    """A probability, in few characters; a dash for what can't be."""
    if probability == 0:
        return "–"
    if probability < 0.00001:
        return "<0.001%"
    return f"{probability:.1%}" if probability >= 0.001 else f"{100 * probability:.1g}%"


def settings(how: Reshaped) -> str:
    """The settings of a distribution, but for those that change nothing."""
    parts = [f"temperature {how.temperature:g}"] if how.temperature != 1 else []
    parts += [f"top-k {how.top_k}"] if how.top_k is not None else []
    parts += [f"top-p {how.top_p:g}"] if how.top_p != 1 else []
    return ", ".join(parts) or "temperature 1"


def figures(found: Inspection) -> list[tuple[str, str, list[str]]]:
    """What the text comes to: names, numbers, and those of prompt and completion if there is one."""
    whole = totals(found.tokens)
    prompt, own = (totals([token for token in found.tokens if token.new == new]) for new in (False, True))

    def figure(name: str, say: Callable[[Totals], str]) -> tuple[str, str, list[str]]:
        return name, say(whole), [f"prompt {say(prompt)}", f"completion {say(own)}"] if own.tokens else []

    return [
        figure("tokens", lambda sums: f"{sums.tokens:,}"),
        figure("perplexity", lambda sums: "–" if sums.perplexity is None else f"{sums.perplexity:,.4g}"),
        figure("log-probability, in nats", lambda sums: f"{sums.logprob:,.2f}"),
        figure("mean entropy, in nats", lambda sums: "–" if sums.entropy is None else f"{sums.entropy:.2f}"),
    ]
