"""Parts of a tokenized dialog, some of which are to be learned."""

from typing import NamedTuple

from llama.protocols import TextTokenizer


class Segment(NamedTuple):
    """Successive tokens of a dialog. Those from the assistant are its contents, and the token that ends each."""

    tokens: list[int]
    from_assistant: bool


def encode_continued(
    tokenizer: TextTokenizer, text: str, continuation: str, *, bos: bool
) -> tuple[list[int], list[int]]:
    """The tokens of a text, and those of what follows it.

    The first are those of the text alone, which is what generation starts from. Where the tokens of both together begin
    with them, the second are the rest: sentencepiece would put a space before the continuation alone.
    """
    tokens = tokenizer.encode(text, bos=bos, eos=False)
    together = tokenizer.encode(text + continuation, bos=bos, eos=False)
    if together[: len(tokens)] == tokens:
        return tokens, together[len(tokens) :]
    return tokens, tokenizer.encode(continuation, bos=False, eos=False)
