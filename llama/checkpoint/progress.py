"""Progress of what takes long: a bar on a terminal, drawn by one process of all."""

from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

from llama.distributed import is_first_rank

Item = TypeVar("Item")


def progress(items: Iterable[Item], what: str, unit: str, total: int | None = None) -> Iterable[Item]:
    """The items, with a bar that appears when they take more than a second."""
    hidden = None if is_first_rank() else True  # None: shown on a terminal alone
    return tqdm(items, desc=what, unit=unit, total=total, delay=1, leave=False, disable=hidden)
