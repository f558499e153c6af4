"""How likely a model found each token of a text, and how the next token would be sampled.

    ids -> one forward pass without the cache -> logits of each position -> statistics of each token -> a page

`inspect` has the calls for a program or a notebook, `token_statistics` the numbers, `formatting` how they are written,
and `page` the page that a notebook shows and `llama inspect --html` writes.
"""

from llama.inspection.inspect import Inspection, inspect_text, inspect_tokens

__all__ = ["Inspection", "inspect_text", "inspect_tokens"]
