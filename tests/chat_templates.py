"""Chat templates in the styles of well-known models, and tokenizers of these models' kinds that carry them.

The templates are written for the tests. What they share with the models' own is what decides on the ids: control
tokens, white space, the order of roles, and the features of Jinja that they use.
"""

import json
import random
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import tokenizers
from conftest import write_llama2_tokenizer, write_tokenizer_json
from sentencepiece import SentencePieceProcessor


class Style(NamedTuple):
    """A chat template, and the tokens that its model's tokenizer adds to those of its kind."""

    kind: str  # "sentencepiece" or "byte-level"
    template: str
    special: tuple[str, ...] = ()  # added special tokens
    ordinary: tuple[str, ...] = ()  # added tokens that are not special
    config: dict = {}  # noqa: RUF012  of tokenizer_config.json
    end_of_turn: str = "</s>"
    pre: str = "llama-bpe"  # GGUF's name of how a byte-level tokenizer splits a text
    pre_tokenizer: list | None = None  # the steps in which it does so, where they are others than Llama 3's


ZEPHYR = Style(
    "sentencepiece",
    "{% for message in messages %}\n"
    "{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
    "{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n"
    "{{ '<|assistant|>' }}\n"
    "{% endif %}\n"
    "{% endfor %}",
)

VICUNA = Style(
    "sentencepiece",
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = 'A helpful assistant answers a curious user. ' %}"
    "{% set rest = messages %}{% endif %}"
    "{{ bos_token + system }}"
    "{% for message in rest %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate: user, assistant, user, ...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'].strip() + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'].strip() + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    config={"legacy": True},
)

CHATML = Style(
    "byte-level",
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    special=("<|im_start|>", "<|im_end|>"),
    end_of_turn="<|im_end|>",
)

DEEPSEEK = Style(
    "byte-level",
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% set ns = namespace(system='') %}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}{% set ns.system = message['content'] %}"
    "{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is not none %}"
    "{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{%- endif %}"
    "{%- endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}",
    special=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    ordinary=("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
    config={"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"},
    end_of_turn="<｜end▁of▁sentence｜>",
)

TULU = Style(
    "byte-level",
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ '<|system|>\n' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '\n' }}"
    "{% else %}{{ '<|assistant|>\n' + message['content'] + eos_token }}"
    "{% if not loop.last %}{{ '\n' }}{% endif %}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
    config={"eos_token": "<|end_of_text|>"},
    end_of_turn="<|end_of_text|>",
)

LLAMA_3_1 = Style(
    "byte-level",
    "{{- bos_token }}\n"
    "{%- if not date_string is defined %}\n"
    "    {%- if strftime_now is defined %}\n"
    '        {%- set date_string = strftime_now("%d %b %Y") %}\n'
    "    {%- else %}\n"
    '        {%- set date_string = "26 Jul 2024" %}\n'
    "    {%- endif %}\n"
    "{%- endif %}\n"
    "{#- The system message comes first, with the date. #}\n"
    "{%- if messages[0]['role'] == 'system' %}\n"
    "    {%- set system_message = messages[0]['content']|trim %}\n"
    "    {%- set messages = messages[1:] %}\n"
    "{%- else %}\n"
    '    {%- set system_message = "" %}\n'
    "{%- endif %}\n"
    '{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}\n'
    "{%- if tools is not none %}\n"
    '    {{- "Environment: ipython\\n" }}\n'
    "{%- endif %}\n"
    '{{- "Cutting Knowledge Date: December 2023\\nToday Date: " + date_string + "\\n\\n" }}\n'
    '{{- system_message + "<|eot_id|>" }}\n'
    "{%- for message in messages %}\n"
    "    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}\n"
    "        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' }}\n"
    "    {%- endif %}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n"
    "{%- endif %}\n",
    end_of_turn="<|eot_id|>",
)

ALPACA = Style(
    "sentencepiece",
    "{% if messages[0]['role'] == 'system' %}{{ bos_token + messages[0]['content'] + '\n\n' }}"
    "{% else %}{{ bos_token + 'Below is an instruction. Write a response.\n\n' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] | trim + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '### Response:\n' + message['content'] + eos_token + '\n\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}",
    special=("<|extra|>",),
    ordinary=("<think>",),
)

EVERYTHING = Style(
    "byte-level",
    "{%- macro header(role) -%}\n"
    "<|start_header_id|>{{ role | capitalize | lower }}<|end_header_id|>\n\n"
    "{%- endmacro -%}\n"
    "{%- set ns = namespace(found=false, first=none, count=0) -%}\n"
    "{%- for message in messages -%}\n"
    "  {%- if message.role == 'user' -%}{%- set ns.first = message.content -%}{%- break -%}{%- endif -%}\n"
    "{%- endfor -%}\n"
    "{{ bos_token }}{{ header('system') }}{{ {'first': ns.first, 'turns': messages | length} | tojson }}"
    "{{ messages | map(attribute='role') | join('~') }}<|eot_id|>\n"
    "{%- for message in messages if message.content is string -%}\n"
    "  {%- if message.role == 'system' -%}{%- continue -%}{%- endif -%}\n"
    "  {%- set ns.count = ns.count + 1 -%}\n"
    "  {{- header(message.role) }}{{ loop.index ~ '/' ~ loop.length ~ ' ' }}\n"
    "  {%- if message.role == 'assistant' -%}\n"
    "    {%- generation -%}{{ message.content | trim }}<|eot_id|>{%- endgeneration -%}\n"
    "  {%- else -%}\n"
    "    {{- message['content'].replace('a', 'aa')[:40] | trim ~ '<|eot_id|>' -}}\n"
    "  {%- endif -%}\n"
    "{%- endfor -%}\n"
    "{{ '%d messages' % ns.count }}{% if add_generation_prompt %}{{ header('assistant') }}{% endif %}",
    end_of_turn="<|eot_id|>",
)

STYLES = {
    "Zephyr": ZEPHYR,
    "Vicuna": VICUNA,
    "ChatML with BOS": CHATML,
    "DeepSeek-R1-Distill": DEEPSEEK,
    "Tulu": TULU,
    "Llama 3.1": LLAMA_3_1,
    "Alpaca": ALPACA,
    "namespaces, loop controls, tojson": EVERYTHING,
}


def write_folder(folder: Path, style: Style, source: str = "tokenizer_config.json") -> Path:
    """Write a tokenizer with this chat template as a Hugging Face folder has it, and return the tokenizer's file.

    Args:
        folder: where to write it.
        style: the template and the tokens.
        source: the file that the template is written to: tokenizer_config.json or chat_template.jinja.
    """
    folder.mkdir(parents=True, exist_ok=True)
    added = [(name, True) for name in style.special] + [(name, False) for name in style.ordinary]
    if style.kind == "sentencepiece":
        path = write_llama2_tokenizer(folder / "tokenizer.model")
        path.with_suffix(".txt").unlink()
        path.with_suffix(".vocab").unlink()
        size = SentencePieceProcessor(model_file=str(path)).vocab_size()
        config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        config["added_tokens_decoder"] = {
            str(size + i): {"content": name, "special": special, "normalized": False, "lstrip": False, "rstrip": False}
            for i, (name, special) in enumerate(added)
        }
    else:
        write_tokenizer_json(folder)
        path = folder / "tokenizer.json"
        engine = tokenizers.Tokenizer.from_file(str(path))
        if style.pre_tokenizer is not None:
            engine.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(style.pre_tokenizer)
        engine.add_special_tokens(list(style.special))
        engine.add_tokens([tokenizers.AddedToken(name, special=False, normalized=False) for name in style.ordinary])
        engine.save(str(path))
        config = json.loads((folder / "tokenizer_config.json").read_text())
        del config["chat_template"]
    config |= style.config
    if source == "tokenizer_config.json":
        config["chat_template"] = style.template
    else:
        config["chat_template"] = "{{ 'the other file counts' }}"
        (folder / "chat_template.jinja").write_text(style.template, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def gguf_metadata(path: Path, style: Style) -> dict[str, Any]:
    """The metadata of a GGUF file that say what `write_folder` has written, as llama.cpp's converter makes them.

    Args:
        path: the tokenizer's file.
        style: what it was written from.
    """
    config = json.loads((path.parent / "tokenizer_config.json").read_text())
    if style.kind == "sentencepiece":
        model = SentencePieceProcessor(model_file=str(path))
        size = model.vocab_size()
        tokens = [model.id_to_piece(i) for i in range(size)]
        kinds = (model.is_unknown, model.is_control, model.is_unused, model.is_byte)
        types = [next((t for t, of in zip((2, 3, 5, 6), kinds, strict=True) if of(i)), 1) for i in range(size)]
        added = [(name, 3) for name in style.special] + [(name, 4) for name in style.ordinary]
        tokens += [name for name, _ in added]
        types += [kind for _, kind in added]
        scores = [model.get_score(i) for i in range(size)] + [-1000.0] * len(added)
        of_kind = {"model": "llama", "scores": scores, "add_bos_token": True, "add_space_prefix": True}
        of_kind |= {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    else:
        engine = json.loads(path.read_text())
        added = {entry["id"]: entry for entry in engine["added_tokens"]}
        by_id = {i: token for token, i in engine["model"]["vocab"].items()}
        by_id |= {i: entry["content"] for i, entry in added.items()}
        tokens = [by_id[i] for i in range(len(by_id))]
        types = [(3 if added[i]["special"] else 4) if i in added else 1 for i in range(len(by_id))]
        merges = [" ".join(merge) for merge in engine["model"]["merges"]]
        eos = config["eos_token"]
        eos_id = tokens.index(eos if isinstance(eos, str) else eos["content"])
        of_kind = {"model": "gpt2", "pre": style.pre, "merges": merges}
        of_kind |= {"bos_token_id": tokens.index(config["bos_token"]), "eos_token_id": eos_id}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in of_kind.items()}
    metadata |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    return metadata | {"tokenizer.chat_template": style.template}


def write_gguf_tokenizer(folder: Path, style: Style) -> Path:
    """Write the same tokenizer as the metadata of a GGUF file without tensors."""
    writer = gguf.GGUFWriter(folder / "tokenizer.gguf", "llama")
    add_value = {int: writer.add_uint32, str: writer.add_string, list: writer.add_array, bool: writer.add_bool}
    for key, value in gguf_metadata(write_folder(folder / "of", style), style).items():
        add_value[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    shutil.rmtree(folder / "of")
    return folder / "tokenizer.gguf"


PIECES = (
    "the house",
    " in",
    "river",
    "\n",
    "\n\n",
    "  ",
    "\t",
    "🙂",
    "👩‍👩‍👧",
    "é中文",
    "x = {1: 'a'}",
    "<b>",
    "'ll",
    "12345",
    "?!",
    ".",
)


def random_content(generator: random.Random) -> str:
    """A message's content: words, white space at its ends or alone, emoji, or nothing."""
    return "".join(generator.choices(PIECES, k=generator.choice((0, 1, 2, 5, 9))))


def random_dialog(generator: random.Random, n_turns: int | None = None) -> list[dict[str, str]]:
    """A dialog of user and assistant in turn that ends with the user; some answers begin with thoughts."""
    dialog = [{"role": "system", "content": random_content(generator)}] if generator.random() < 0.5 else []
    for _ in range(generator.randrange(4) if n_turns is None else n_turns):
        thoughts = generator.choice(("", f"<think>\n{random_content(generator)}\n</think>\n\n"))
        dialog.append({"role": "user", "content": random_content(generator)})
        dialog.append({"role": "assistant", "content": thoughts + random_content(generator)})
    return [*dialog, {"role": "user", "content": random_content(generator)}]
