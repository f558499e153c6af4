"""Added tokens: a text is cut at them as Hugging Face's tokenizers cut it."""

import tokenizers
from conftest import examples
from hypothesis import example, given
from hypothesis import strategies as st

from llama.vocab.added_tokens import AddedToken, AddedTokenSplitter

LETTERS = "ab_<> \n\u3000\u00e9-"
contents = st.text(LETTERS, min_size=1, max_size=4)
flags = st.fixed_dictionaries({name: st.booleans() for name in ("lstrip", "rstrip", "single_word", "normalized")})
lists_of_tokens = st.dictionaries(contents, flags, min_size=1, max_size=6)


def hugging_face_split(tokens: list[AddedToken], text: str) -> list[str | int]:
    """The parts that Hugging Face's tokenizers make of a text, with a vocabulary of single characters."""
    characters = {character: i + 1000 for i, character in enumerate(LETTERS)}
    engine = tokenizers.Tokenizer(tokenizers.models.BPE(characters, []))
    for token in tokens:
        flags = {name: getattr(token, name) for name in ("lstrip", "rstrip", "single_word", "normalized", "special")}
        engine.add_tokens([tokenizers.AddedToken(token.content, **flags)])
    ids = {engine.token_to_id(token.content): token.id for token in tokens}
    encoding = engine.encode(text, add_special_tokens=False)
    parts: list[str | int] = []
    for i, token in zip(encoding.ids, encoding.tokens, strict=True):
        if i in ids:
            parts.append(ids[i])
        elif parts and isinstance(parts[-1], str):
            parts[-1] += token
        else:
            parts.append(token)
    return parts


@examples(1000)
@given(lists_of_tokens, st.text(LETTERS, max_size=12) | st.lists(contents, max_size=6).map("".join))
@example({"  ": {"lstrip": False}, "a": {"rstrip": True}}, "a  b")
def test_a_text_is_cut_as_hugging_faces_tokenizers_cut_it(flags_by_content, text):
    tokens = [AddedToken(content, i, **flags) for i, (content, flags) in enumerate(flags_by_content.items())]
    tokens = [token for token in tokens if len(token.content) > 1 or token.content not in LETTERS]
    assert AddedTokenSplitter(tokens).split(text, "all") == hugging_face_split(tokens, text)
