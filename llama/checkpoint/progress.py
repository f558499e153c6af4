"""Progress bars for long operations, on a terminal or in a notebook, shown by the first rank only."""

import warnings
from collections.abc import Iterable
from typing import Any, TypeVar

from llama.distributed import is_first_rank
from llama.notebook import in_notebook

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # in a notebook without ipywidgets, where the bar is one of characters
    from tqdm import auto

Item = TypeVar("Item")


def progress(items: Iterable[Item], description: str, unit: str, total: int | None = None) -> Iterable[Item]:
    """The items, with a bar that appears if they take more than a second.

    Args:
        items: what is iterated over.
        description: the bar's label.
        unit: what the items are called.
        total: how many there are, if `items` has no length.
    """
    bar: Iterable[Item] = progress_bar(items, desc=description, unit=unit, total=total, delay=1, leave=False)
    return bar


def progress_bar(items: Iterable[Any], **options: Any) -> auto.tqdm:
    """A bar of tqdm's, which yields the items.

    Args:
        items: what is iterated over.
        options: those of `tqdm.tqdm`.
    """
    if not is_first_rank():
        options["disable"] = True
    elif not in_notebook():
        options["disable"] = None  # unless standard error is a terminal
    return auto.tqdm(items, **options)
