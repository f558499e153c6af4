"""Byte-pair vocabularies: what they are made of, and how GPT-2's byte-level notation is read."""

from dataclasses import dataclass, field
from pathlib import Path

from llama.errors import CheckpointError
from llama.vocab.added_tokens import AddedToken
from llama.vocab.split_steps import SplitStep

# Special tokens that end a text or a chat turn, whether or not a file says so.
END_TOKENS = ("<|end_of_text|>", "<|eot_id|>", "<|im_end|>")


@dataclass
class Vocabulary:
    """What a byte-pair tokenizer needs to know.

    Attributes:
        ranks: the bytes of each ordinary token -> its id, which is its merging priority as well.
        added_tokens: the tokens that are recognised before the rest of a text is encoded.
        split_steps: how a text is split into the pieces that byte pairs are merged within.
        bos_id: the token that begins a text, or None.
        eos_id: the token that ends a text.
        stop_tokens: the tokens at which generation ends.
        add_bos: whether a text to complete begins with BOS.
        chat_template: the Jinja template of the model's chat format, or None.
        chat_template_source: the name of the file, or of the GGUF field, that the template is from.
        template_tokens: the tokens that chat templates know by name, as `bos_token` -> its text.
    """

    ranks: dict[bytes, int]
    added_tokens: tuple[AddedToken, ...]
    split_steps: tuple[SplitStep, ...]
    bos_id: int | None
    eos_id: int
    stop_tokens: set[int]
    add_bos: bool = True
    chat_template: str | None = field(default=None, repr=False)
    chat_template_source: str | None = None
    template_tokens: dict[str, str] = field(default_factory=dict)

    @property
    def special_tokens(self) -> dict[str, int]:
        """The content of each special added token -> its id."""
        return {token.content: token.id for token in self.added_tokens if token.special}


def byte_level_ranks(
    tokens: dict[str, int], merges: list[str], path: Path, ignore_merges: bool = True
) -> dict[bytes, int]:
    """The ranks of a byte-level vocabulary, in which tokens are written in GPT-2's characters.

    tiktoken merges by token id. That gives the same as merging in the order of the list of merges if no merge makes a
    token with a smaller id than the merge before it. (Llama 3's lists have all the ways to make a token in a row.)

    Args:
        tokens: each ordinary token, in GPT-2's characters, and its id.
        merges: "left right" pairs, the highest priority first.
        path: the file, for error messages.
        ignore_merges: whether a piece of text that is a token becomes that token even if no merges make it, which is
            what tiktoken does.

    Raises:
        CheckpointError: ids can't serve as ranks, or a token has a character that stands for no byte.
    """
    last_id = -1
    merged_ids = set()
    for merge in merges:
        merged_id = tokens.get(merge.replace(" ", "", 1))
        if merged_id is None or merged_id < last_id:
            raise CheckpointError(f"{path}: the merge {merge!r} is out of order; this vocabulary can't be used by rank")
        last_id = merged_id
        merged_ids.add(merged_id)
    if not ignore_merges:
        unmergeable = [token for token, i in tokens.items() if len(token) > 1 and i not in merged_ids]
        if unmergeable:
            raise CheckpointError(
                f"{path}: no merge makes the tokens {unmergeable[:8]}; this vocabulary can't be used by rank"
            )
    byte_of = {character: byte for byte, character in enumerate(gpt2_characters())}
    try:
        return {bytes(byte_of[character] for character in token): i for token, i in tokens.items()}
    except KeyError as error:
        raise CheckpointError(f"{path}: the character {error} in a token stands for no byte") from error


def gpt2_characters() -> list[str]:
    """The character by which GPT-2's vocabularies write each byte: itself if it is printable, else one from 256 up."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    substitutes = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(substitutes)) for byte in range(256)]


def without_surrogates(text: str) -> str:
    """The text with U+FFFD in place of every half of a surrogate pair, which UTF-8 can't encode."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
