"""What the terminal output and the page of `llama inspect` have in common: how texts and numbers are written."""

import unicodedata
from collections.abc import Callable
from typing import NamedTuple

from llama.inspection.token_statistics import SamplingDistribution, TextStatistics, TokenStatistics, text_statistics

# The colour of a token is its surprise level: the number of these probabilities that its own is below.
LEVELS = (0.5, 0.2, 0.05, 0.01, 0.001)
LEGEND = ("≥ 50%", "≥ 20%", "≥ 5%", "≥ 1%", "≥ 0.1%", "< 0.1%")  # of each level

# Symbols in place of characters that are invisible, or that a terminal would act on.
SYMBOLS = {chr(i): chr(0x2400 + i) for i in range(32)} | {" ": "·", "\n": "⏎", "\t": "⇥", "\x7f": "␡"}


class Figure(NamedTuple):
    """A number about the whole text, and about its prompt and completion if it has both; formatted."""

    name: str
    value: str
    parts: list[str]


def surprise_level(probability: float) -> int:
    """Return how surprising a token of this probability is: from 0 to `len(LEVELS)`."""
    return sum(probability < bound for bound in LEVELS)


def readable(text: str) -> str:
    """Return a token's text on one line, with every character visible.

    Spaces and control characters become symbols, and other invisible characters escapes such as `\\u202e`. So no text
    can act on a terminal, or change the direction of the text around it.
    """
    return "".join(SYMBOLS.get(character) or _escaped(character) for character in text)


def _escaped(character: str) -> str:
    category = unicodedata.category(character)
    invisible = category[0] == "C" or category in ("Zl", "Zp")  # control, format, surrogate, private use, unassigned
    if invisible or "\ufe00" <= character <= "\ufe0f":  # variation selectors
        return character.encode("unicode_escape").decode("ascii")
    return character


def percent(probability: float) -> str:
    """Format a probability in at most seven characters; a dash for 0."""
    if probability == 0:
        return "–"
    if probability < 0.00001:
        return "<0.001%"
    return f"{probability:.1%}" if probability >= 0.001 else f"{100 * probability:.1g}%"


def format_settings(distribution: SamplingDistribution) -> str:
    """Format the sampling settings of a distribution, without those that have no effect."""
    parts = [f"temperature {distribution.temperature:g}"] if distribution.temperature != 1 else []
    parts += [f"top-k {distribution.top_k}"] if distribution.top_k is not None else []
    parts += [f"top-p {distribution.top_p:g}"] if distribution.top_p != 1 else []
    return ", ".join(parts) or "temperature 1"


def figures(tokens: list[TokenStatistics]) -> list[Figure]:
    """Format the statistics of the text, and of its prompt and completion if it has both."""
    text = text_statistics(tokens)
    prompt = text_statistics([token for token in tokens if not token.generated])
    completion = text_statistics([token for token in tokens if token.generated])

    def figure(name: str, value: Callable[[TextStatistics], str]) -> Figure:
        parts = [f"prompt {value(prompt)}", f"completion {value(completion)}"] if completion.n_tokens else []
        return Figure(name, value(text), parts)

    return [
        figure("tokens", lambda part: f"{part.n_tokens:,}"),
        figure("perplexity", lambda part: "–" if part.perplexity is None else f"{part.perplexity:,.4g}"),
        figure("log-probability, in nats", lambda part: f"{part.logprob:,.2f}"),
        figure("mean entropy, in nats", lambda part: "–" if part.entropy is None else f"{part.entropy:.2f}"),
    ]
