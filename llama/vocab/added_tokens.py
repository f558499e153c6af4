"""Added tokens: tokens with a text of their own, recognised before the rest of a text is encoded.

Hugging Face's files list them (`added_tokens` in `tokenizer.json`, `added_tokens_decoder` in `tokenizer_config.json`,
`added_tokens.json`). A text is cut at them as Hugging Face's package `tokenizers` cuts it.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

import regex

from llama.errors import InputError

Names = Literal["all"] | Collection[str]

WORD, WHITE_SPACE, WHITE_SPACE_BEFORE = regex.compile(r"\w"), regex.compile(r"\s*"), regex.compile(r"(?r)\s*")


@dataclass(frozen=True)
class AddedToken:
    """A token that stands for one text, `content`.

    Attributes:
        content: the text.
        id: the token id.
        special: it controls the model, such as the end of a turn: a text holds it only where that is allowed. Others
            (`<think>`) are recognised in every text.
        lstrip, rstrip: the white space before it, or after it, belongs to it.
        single_word: it is recognised only where no letter, digit or underscore stands right before or after it.
        normalized: it is looked for after those that are not.
    """

    content: str
    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


class AddedTokenSplitter:
    """Cuts texts at added tokens.

    Args:
        tokens: all that may be looked for.
    """

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        self._tokens = {token.content: token for token in tokens}
        self._lengths: dict[str, list[int]] = {}  # by first character, the longest first
        for content in sorted(self._tokens, key=len, reverse=True):
            lengths = self._lengths.setdefault(content[0], [])
            if len(content) not in lengths[-1:]:
                lengths.append(len(content))
        first_characters = "".join(map(regex.escape, self._lengths))
        self._first_character = regex.compile(f"[{first_characters}]" if first_characters else "(?!)")

    def split(self, text: str, names: Names) -> list[str | int]:
        """The text cut at the tokens with these contents: texts, none of them empty, and token ids.

        Of tokens that begin at the same place the longest counts. Those that are `normalized` are looked for in what
        the others have left.
        """
        wanted = self._tokens.keys() if names == "all" else self._tokens.keys() & set(names)
        normalized = {name for name in wanted if self._tokens[name].normalized}
        parts: list[str | int] = []
        for part in self._split(text, wanted - normalized):
            parts += [part] if isinstance(part, int) else self._split(part, normalized)
        return parts

    def _split(self, text: str, wanted: Collection[str]) -> list[str | int]:
        """The text cut at the wanted tokens, the leftmost first and then the longest."""
        parts: list[str | int] = []
        search_from = done = 0  # what has been searched, and what is in `parts`: white space is taken but searched
        while wanted and (match := self._first_character.search(text, search_from)):
            start = match.start()
            candidates = (text[start : start + length] for length in self._lengths[text[start]])
            content = next((candidate for candidate in candidates if candidate in wanted), None)
            if content is None:
                search_from = start + 1
                continue
            token, end = self._tokens[content], start + len(content)
            search_from = end
            if token.single_word and any(WORD.match(text, at) for at in (start - 1, end) if at >= 0):
                continue
            if token.lstrip:
                start = max(done, WHITE_SPACE_BEFORE.match(text, 0, start).start())
            if token.rstrip:
                end = WHITE_SPACE.match(text, end).end()
            if done < start:
                parts.append(text[done:start])
            if start < end:  # the white space of the token before may have been all of it
                parts.append(token.id)
            done = end
        if done < len(text):
            parts.append(text[done:])
        return parts


def names_to_recognise(tokens: Iterable[AddedToken], text: str, allowed: Names, disallowed: Names) -> set[str]:
    """The contents of the added tokens that are to be recognised in a text: those allowed, and those not special.

    Args:
        tokens: all added tokens.
        text: the text.
        allowed: the special tokens that the text may spell out.
        disallowed: strings that the text must not contain; "all" for every special token that isn't allowed.

    Raises:
        InputError: the text contains what `disallowed` forbids.
    """
    special = {token.content for token in tokens if token.special}
    allowed_special = special if allowed == "all" else special & set(allowed)
    for name in special - allowed_special if disallowed == "all" else disallowed:
        if name in text:
            raise InputError(f"the text contains {name!r}, which disallowed_special forbids")
    return allowed_special | {token.content for token in tokens if not token.special}
