"""`llama inspect`: how likely a model found each token of a text, on the terminal or as a page."""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text as StyledText

from llama.cli.build import build_llama
from llama.cli.terminal import require_stdout, text_or_stdin
from llama.default_model import default_checkpoint
from llama.distributed import is_first_rank
from llama.files import writable_file
from llama.inspection import Inspection, inspect_text
from llama.inspection.formatting import LEGEND, figures, format_settings, percent, readable, surprise_level
from llama.inspection.token_statistics import SamplingDistribution, TokenStatistics
from llama.log import escape_control_characters
from llama.output_folder import write_whole
from llama.sampling_params import SamplingParams, check_number

# The style of each surprise level, in the colours of the page. Each sets text and background, to suit any terminal.
STYLES = (
    "",
    "#22252a on #fdf0d8",
    "#22252a on #fbdfae",
    "#22252a on #f7c684",
    "#22252a on #f1a763",
    "#22252a on #e98558",
)
TOKEN_WIDTH = 15  # maximum width of a token's text in a table, in terminal cells


def inspect(
    text: str | None = None,
    *,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    max_gen_len: int = 0,
    temperature: float = 0.6,
    top_p: float = 0.9,
    top_k: int | None = None,
    seed: int | None = None,
    max_seq_len: int | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    alternatives: int = 5,
    html: str | None = None,
) -> None:
    """Show how likely a model finds each token of a text, and which tokens may come next.

    For example: llama inspect "The sun rises", or with a file: llama inspect < FILE

    Args:
        text: the text, in quotes; by default standard input; one that begins with a dash comes last, after --
        ckpt_dir: the checkpoint: a folder in Meta's or Hugging Face's layout, or a GGUF file; by default
            SmolLM2-135M-Instruct, which is downloaded once
        tokenizer_path: the tokenizer file; by default the one that comes with the checkpoint
        max_gen_len: maximum number of new tokens to generate after the text and to show with it
        temperature: sampling temperature; 0 always takes the most likely token
        top_p: sample only from the most likely tokens that together reach this probability (nucleus sampling)
        top_k: sample only from this many of the most likely tokens
        seed: random seed: the same seed samples the same tokens; by default a different one each time
        max_seq_len: maximum number of tokens of text and continuation together; by default 4096, or the model's own
            maximum if that is smaller
        dtype: float32, float16 or bfloat16; by default bfloat16 if the device supports it or with quantize, else
            float16 on CUDA and float32 on the CPU
        quantize: int8 or int4: keep the weights in 8 or 4 bits, which takes about a half or a third of the memory, and
            loses some precision
        alternatives: how many of the most likely tokens to list at each position
        html: write an HTML page to this file, instead of printing to the terminal
    """
    # Checks everything before the model is loaded, which may take minutes.
    SamplingParams(max_gen_len, temperature, top_p, top_k=top_k, seed=seed)
    check_number("alternatives", alternatives, 1, integer=True)
    file = None if html is None else writable_file(html, "html")
    if file is None:
        require_stdout()
    prompt = text_or_stdin(text)
    checkpoint = str(default_checkpoint()) if ckpt_dir is None else ckpt_dir
    llama = build_llama(checkpoint, tokenizer_path, max_seq_len, dtype, seed, quantize=quantize, prompt=prompt)
    inspection = inspect_text(llama, prompt, max_gen_len, temperature, top_p, top_k=top_k, alternatives=alternatives)
    if file is None:
        print_inspection(inspection, Console(highlight=False))
    elif is_first_rank():
        write_whole(file, inspection.page(Path(checkpoint).resolve().name))
        print(escape_control_characters(f"wrote {file}"))


def print_inspection(inspection: Inspection, console: Console) -> None:
    """Print an inspection. Its texts are passed as `readable` StyledText, in which rich finds no markup."""
    console.print(colour_text(inspection.tokens))
    console.print()
    console.print(colour_legend(inspection.tokens))
    console.print()
    console.print(token_table(inspection.tokens, console.width))
    console.print()
    console.print(StyledText("The next token, with different sampling settings", style="bold"))
    distributions = [inspection.requested, *inspection.variations]
    columns = min(len(distributions), max(1, (console.width - TOKEN_WIDTH) // 20))
    bar_width = (console.width - TOKEN_WIDTH) // columns - 9
    for start in range(0, len(distributions), columns):
        console.print(distribution_table(inspection, distributions[start : start + columns], bar_width))
        console.print()
    for name, value, parts in figures(inspection.tokens):
        line = ((f"{name:26}", "dim"), (f"{value:>9}", "bold"), f"   {' · '.join(parts)}".rstrip())
        console.print(StyledText.assemble(*line))


def colour_text(tokens: list[TokenStatistics]) -> StyledText:
    """Return the text, with each token in the colour of its surprise level."""
    text = StyledText()
    for token in tokens:
        shown = "\n".join(" ".join(map(readable, line.split(" "))) for line in token.text.split("\n"))
        style = "" if token.probability is None else STYLES[surprise_level(token.probability)]
        text.append(shown.replace("\n", "⏎\n"), style=f"{style} underline" if token.generated else style)
    return text


def colour_legend(tokens: list[TokenStatistics]) -> StyledText:
    """Return a line that explains the colours."""
    text = StyledText.assemble(("probability: ", "dim"))
    for style, label in zip(STYLES, LEGEND, strict=True):
        text.append(f" {label} ", style=style).append(" ")
    if any(token.generated for token in tokens):
        text.append("underlined: generated", style="underline")
    return text


def token_table(tokens: list[TokenStatistics], width: int) -> Table:
    """Return a table with the statistics of each token, and the most likely tokens at its position.

    Args:
        tokens: the tokens.
        width: the width of the terminal in cells.
    """
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("token", no_wrap=True)
    for heading in ("probability", "rank", "entropy"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("most likely tokens", no_wrap=True)
    for i, token in enumerate(tokens):
        if token.generated and (i == 0 or not tokens[i - 1].generated):
            table.add_row(StyledText("generated:", style="dim"))
        name = token_name(token.text)
        if token.probability is None:
            table.add_row(name, "–", "–", "–", StyledText("no prediction for the first token", style="dim"))
            continue
        probability = StyledText(percent(token.probability), style=STYLES[surprise_level(token.probability)])
        alternatives = list_alternatives(token, max(24, width - TOKEN_WIDTH - 33))
        table.add_row(name, probability, f"{token.rank:,}", f"{token.entropy:.2f}", alternatives)
    return table


def list_alternatives(token: TokenStatistics, width: int) -> StyledText:
    """Return the most likely tokens at a token's position, in lines of at most `width` cells."""
    lines = [StyledText()]
    for candidate in token.alternatives:
        name = token_name(candidate.text)
        name.stylize("bold" if candidate.id == token.id else "")
        entry = StyledText.assemble(name, " ", (percent(candidate.probability), "dim"), "  ")
        if lines[-1] and lines[-1].cell_len + entry.cell_len > width:
            lines.append(StyledText())
        lines[-1].append_text(entry)
    return StyledText("\n").join(lines)


def distribution_table(inspection: Inspection, distributions: list[SamplingDistribution], bar_width: int) -> Table:
    """Return a table that shows distributions of the next token side by side, as bars.

    Args:
        inspection: all distributions, which share one scale.
        distributions: those to show.
        bar_width: the width of the longest possible bar, in cells.
    """
    every_distribution = [inspection.requested, *inspection.variations]
    scale = max(max(distribution.probabilities) for distribution in every_distribution)
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True, min_width=TOKEN_WIDTH - 1)
    for distribution in distributions:
        table.add_column(StyledText(format_settings(distribution)), width=bar_width + 8)
    for row, candidate in enumerate(inspection.next_tokens):
        bars = (bar(distribution.probabilities[row], scale, bar_width) for distribution in distributions)
        table.add_row(token_name(candidate.text), *bars)
    others = (StyledText(f"{percent(distribution.others):>7}", "dim") for distribution in distributions)
    table.add_row(StyledText("others", style="dim"), *others)
    counts = (StyledText(f"{distribution.n_tokens:>7,}", style="dim") for distribution in distributions)
    table.add_row(StyledText("can be sampled", style="dim"), *counts)
    return table


def bar(probability: float, scale: float, width: int) -> StyledText:
    """Return a probability and its bar, which has `width` cells if the probability is `scale`."""
    whole, eighths = divmod(round(8 * width * probability / scale), 8)
    blocks = "█" * whole + " ▏▎▍▌▋▊▉"[eighths].strip()
    return StyledText(f"{percent(probability):>7} ").append(blocks, style="bright_blue")


def token_name(text: str) -> StyledText:
    """Return a token's text for a table, shortened to `TOKEN_WIDTH`."""
    name = StyledText(readable(text))
    name.truncate(TOKEN_WIDTH, overflow="ellipsis")
    return name
