"""A progress bar for long operations, on a terminal, shown by the first rank only."""

from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

from llama.distributed import is_first_rank

Item = TypeVar("Item")


def progress(items: Iterable[Item], description: str, unit: str, total: int | None = None) -> Iterable[Item]:
    """The items, with a bar that appears if they take more than a second.

    Args:
        items: what is iterated over.
        description: the bar's label.
        unit: what the items are called.
        total: how many there are, if `items` has no length.
    """
    hidden = None if is_first_rank() else True  # None: shown only on a terminal
    bar: Iterable[Item] = tqdm(items, desc=description, unit=unit, total=total, delay=1, leave=False, disable=hidden)
    return bar
