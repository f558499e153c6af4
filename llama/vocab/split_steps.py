"""The steps in which a text is split into the pieces that byte pairs are merged within.

They are those of Hugging Face's pre-tokenizers. Each step cuts the pieces that the one before it has left.
"""

from dataclasses import dataclass
from typing import Literal

Behavior = Literal["Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"]

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

PUNCTUATION_PATTERN = r"[\p{P}$+<=>^`|~]"  # with the symbols that are punctuation in ASCII

# Cased letters of some scripts. Escaped are those that Unicode's normal form C would change.
DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝ\u1f5f-\u1f7d"
    "ᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿ"
    "\ufb00-\ufb06\ufb13-\ufb17Ａ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
DEEPSEEK_PUNCTUATION = "!-/:-~！-／：-～‘-‟\u3000-。"
DEEPSEEK_CHINESE = "一-龥ࠀ-一가-\ud7ff"


@dataclass(frozen=True)
class SplitStep:
    """One step: a text is cut around the matches of a pattern.

    Attributes:
        pattern: the regular expression.
        behavior: what becomes of a match: a piece of its own, nothing, a part of the piece before it, of the piece
            after it, or of one piece with the matches next to it.
        invert: whether what lies between the matches is taken for the matches, and these for what lies between.
        on_bytes: whether the text it is applied to has one of GPT-2's characters for each byte.
    """

    pattern: str
    behavior: Behavior = "Isolated"
    invert: bool = False
    on_bytes: bool = False


DIGIT = SplitStep(r"\p{N}")

LLAMA3_STEPS = (SplitStep(LLAMA3_PATTERN),)
GPT2_STEPS = (SplitStep(GPT2_PATTERN),)
SMOLLM_STEPS = (DIGIT, SplitStep(GPT2_PATTERN))
DEEPSEEK_LLM_STEPS = (
    SplitStep(r"[\r\n]"),
    SplitStep(rf"\s?[{DEEPSEEK_LETTERS}]+"),
    SplitStep(rf"\s?[{DEEPSEEK_PUNCTUATION}]+"),
    SplitStep(r"\s+$"),
    SplitStep(f"[{DEEPSEEK_CHINESE}]+"),
    DIGIT,
)
DEEPSEEK_CODER_STEPS = (
    SplitStep(r"[\r\n]"),
    SplitStep(r"\s?\p{L}+"),
    SplitStep(r"\s?\p{P}+"),
    SplitStep(f"[{DEEPSEEK_CHINESE}]+"),
    DIGIT,
)
