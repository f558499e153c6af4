"""What the files beside a tokenizer in a Hugging Face folder say of it: BOS, the tokens that end a text, chat template.

`tokenizer_config.json` names special tokens; `generation_config.json` or `config.json` lists the ids that end a text.
"""

from pathlib import Path
from typing import Any

from llama.errors import CheckpointError
from llama.files import Metadata, first_bytes, read_json, write_json

TOKENIZER_CONFIG = "tokenizer_config.json"
EOS_FILES = ("generation_config.json", "config.json")  # the first that has an eos_token_id counts


def read_tokenizer_config(folder: Path) -> Metadata:
    """The content of `tokenizer_config.json`; empty where there is no such file."""
    path = folder / TOKENIZER_CONFIG
    return Metadata(path, read_json(path) if path.exists() else {})


def read_add_bos(folder: Path, default: bool) -> bool:
    """Whether a text begins with BOS; `default` where `tokenizer_config.json` doesn't say."""
    return read_tokenizer_config(folder).get("add_bos_token", bool, default)


def read_eos_ids(folder: Path) -> set[int]:
    """The ids that end a text; empty where no file says."""
    for name in EOS_FILES:
        value = read_json(folder / name).get("eos_token_id") if (folder / name).exists() else None
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(type(i) is int and i >= 0 for i in ids):
                raise CheckpointError(
                    f"{folder / name}: eos_token_id is {value!r:.80}; it must be a token id or a list of them"
                )
            return set(ids)
    return set()


def read_chat_template(folder: Path) -> str | None:
    """The chat template: one in `tokenizer_config.json`, the default of several there, or `chat_template.jinja`."""
    template, file = read_tokenizer_config(folder).values.get("chat_template"), folder / "chat_template.jinja"
    if isinstance(template, list):
        by_name = {str(entry.get("name")): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = by_name.get("default")
    if template is None and file.exists():
        first_bytes(file)  # raises if the file is what a failed download leaves
        template = file.read_text(encoding="utf-8", errors="replace")
    return template if isinstance(template, str) else None


def special_token_name(token: Any) -> str | None:
    """The name of a special token, which files write as a string or as an object with `content`."""
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None


def write_tokenizer_config(folder: Path, config: dict[str, Any], bos_id: int | None, stop_tokens: set[int]) -> None:
    """Write `tokenizer_config.json`, and `generation_config.json` with the ids that begin and end a text.

    Args:
        folder: where to write them.
        config: the content of `tokenizer_config.json`; None values are left out.
        bos_id: the id that begins a text, or None.
        stop_tokens: the ids that end it.
    """
    write_json(folder / TOKENIZER_CONFIG, {key: value for key, value in config.items() if value is not None})
    bos = {} if bos_id is None else {"bos_token_id": bos_id}
    write_json(folder / EOS_FILES[0], {**bos, "eos_token_id": sorted(stop_tokens)})
