"""`llama inspect`: how sure a model was of a text, token by token."""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text as Styled

from llama.cli.command_line import build
from llama.cli.inspect_format import LEGEND, figures, level, percent, readable, settings
from llama.cli.inspect_page import page
from llama.cli.inspection import Inspection, Reshaped, Token, inspect_tokens
from llama.cli.terminal import text_given
from llama.default_model import default_checkpoint
from llama.distributed import is_first_rank
from llama.errors import InputError
from llama.files import writable_file, write_whole
from llama.sampling_params import SamplingParams, check_count

# The page's colours, from an expected token to a surprising one. Both colours are set, so that any terminal will do.
COLOURS = (
    "",
    "#22252a on #fdf0d8",
    "#22252a on #fbdfae",
    "#22252a on #f7c684",
    "#22252a on #f1a763",
    "#22252a on #e98558",
)
WIDEST = 15  # cells of a token's text in a table


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
    alternatives: int = 5,
    html: str | None = None,
) -> None:
    """Show how sure a model was of each token of a text, and what it would say next.

    With no --ckpt_dir this asks SmolLM2-135M-Instruct, which is fetched once. In a pipe: llama inspect < text

    Args:
        text: the text, in quotes; without it, standard input is read
        ckpt_dir: a checkpoint: a folder in Meta's or Hugging Face's layout, or a GGUF file
        tokenizer_path: the tokenizer's file, where it isn't with the checkpoint
        max_gen_len: continue the text by at most this many tokens, and show those, too
        temperature: how freely to draw; 0 always takes the likeliest token
        top_p: draw from the likeliest tokens that together have this probability
        top_k: draw from this many of the likeliest tokens
        seed: a number; the same one draws the same tokens again
        max_seq_len: room for text and continuation, in tokens; by default 4096, or what the model was made for if that
            is less
        dtype: float32, float16 or bfloat16; by default bfloat16 where the machine computes in it
        alternatives: how many of the likeliest tokens to show at each place
        html: write a page that shows it all to this file, and not to the terminal
    """
    # What can be refused is refused before the model takes its time to load.
    SamplingParams(max_gen_len, temperature, top_p, top_k=top_k, seed=seed)
    check_count("alternatives", alternatives, 1)
    file = None if html is None else writable_file(html, "html")
    prompt = text_given(text)
    checkpoint = str(default_checkpoint()) if ckpt_dir is None else ckpt_dir
    llama = build(checkpoint, tokenizer_path, max_seq_len, dtype, seed)
    ids = llama.tokenizer.encode(prompt, bos=llama.tokenizer.add_bos, eos=False)
    if not ids:
        raise InputError(f"text={prompt!r} has no tokens; give one that has")
    (new,), _ = llama.generate([ids], max_gen_len, temperature, top_p, top_k=top_k)
    found = inspect_tokens(
        llama, ids + new, len(new), alternatives=alternatives, temperature=temperature, top_p=top_p, top_k=top_k
    )
    if file is None:
        show(found, Console(highlight=False))
    elif is_first_rank():
        write_whole(file, page(found, Path(checkpoint).resolve().name))
        print(f"wrote {file}")


def show(found: Inspection, console: Console) -> None:
    """Print an inspection. Texts go in as `Styled`, in which nothing is markup, and `readable`."""
    console.print(coloured(found))
    console.print()
    console.print(legend(found))
    console.print()
    console.print(token_table(found, console.width))
    console.print()
    console.print(Styled("What would come next, and how settings reshape it", style="bold"))
    distributions = [found.asked, *found.single]
    columns = min(len(distributions), max(1, (console.width - WIDEST) // 20))
    for start in range(0, len(distributions), columns):
        console.print(chart(found, distributions[start : start + columns], (console.width - WIDEST) // columns - 9))
        console.print()
    for name, value, parts in figures(found):
        console.print(
            Styled.assemble((f"{name:26}", "dim"), (f"{value:>9}", "bold"), f"   {' · '.join(parts)}".rstrip())
        )


def coloured(found: Inspection) -> Styled:
    """The text, each token on its colour."""
    text = Styled()
    for token in found.tokens:
        shown = "\n".join(" ".join(map(readable, line.split(" "))) for line in token.text.split("\n"))
        colour = "" if token.probability is None else COLOURS[level(token.probability)]
        text.append(shown.replace("\n", "⏎\n"), style=f"{colour} underline" if token.new else colour)
    return text


def legend(found: Inspection) -> Styled:
    """What the colours mean."""
    text = Styled.assemble(("probability: ", "dim"))
    for colour, words in zip(COLOURS, LEGEND, strict=True):
        text.append(f" {words} ", style=colour).append(" ")
    if any(token.new for token in found.tokens):
        text.append("underlined: new", style="underline")
    return text


def token_table(found: Inspection, width: int) -> Table:
    """Each token with its numbers, and the likeliest tokens there."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("token", no_wrap=True)
    for name in ("probability", "rank", "entropy"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("likeliest there", no_wrap=True)
    own = False
    for token in found.tokens:
        if token.new and not own:
            own = True
            table.add_row(Styled("by the model:", style="dim"))
        if token.probability is None:
            table.add_row(label(token.text), "–", "–", "–", Styled("nothing stands before it", style="dim"))
            continue
        probability = Styled(percent(token.probability), style=COLOURS[level(token.probability)])
        numbers = (f"{token.rank:,}", f"{token.entropy:.2f}")
        table.add_row(label(token.text), probability, *numbers, likeliest(token, max(24, width - WIDEST - 33)))
    return table


def likeliest(token: Token, width: int) -> Styled:
    """The alternatives to a token, in lines of at most so many cells."""
    lines = [Styled()]
    for choice in token.alternatives:
        name = label(choice.text)
        name.stylize("bold" if choice.id == token.id else "")
        item = Styled.assemble(name, " ", (percent(choice.probability), "dim"), "  ")
        if lines[-1] and lines[-1].cell_len + item.cell_len > width:
            lines.append(Styled())
        lines[-1].append_text(item)
    return Styled("\n").join(lines)


def chart(found: Inspection, distributions: list[Reshaped], room: int) -> Table:
    """Distributions of the next token side by side, as bars on one scale, the longest of `room` cells."""
    scale = max(max(how.probabilities) for how in [found.asked, *found.single])
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True, min_width=WIDEST - 1)
    for how in distributions:
        table.add_column(Styled(settings(how)), width=room + 8)
    for row, choice in enumerate(found.next_tokens):
        table.add_row(label(choice.text), *(bar(how.probabilities[row], scale, room) for how in distributions))
    table.add_row(Styled("others", style="dim"), *(Styled(f"{percent(how.others):>7}", "dim") for how in distributions))
    counts = (Styled(f"{how.drawable:>7,}", style="dim") for how in distributions)
    table.add_row(Styled("can be drawn", style="dim"), *counts)
    return table


def bar(probability: float, scale: float, room: int) -> Styled:
    """A probability and its bar, in eighths of a cell."""
    whole, eighths = divmod(round(8 * room * probability / scale), 8)
    return Styled(f"{percent(probability):>7} ").append("█" * whole + " ▏▎▍▌▋▊▉"[eighths].strip(), style="bright_blue")


def label(text: str) -> Styled:
    """A token's text for a table: cut where it is long."""
    name = Styled(readable(text))
    name.truncate(WIDEST, overflow="ellipsis")
    return name
