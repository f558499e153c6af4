"""Families of models that people have, as tiny models of the same kind, in every layout: `docs/models.md` lists them.

A family has the rotary embedding, the sharing of weights, the kind of tokenizer and the style of chat template of the
models it stands for. In each layout its logits must be those of transformers, its chat prompts too.
"""

import json
import random
import re
from typing import NamedTuple

import pytest
import torch
from chat_templates import (
    ALPACA,
    CHATML,
    DEEPSEEK,
    LLAMA_3_1,
    TULU,
    VICUNA,
    ZEPHYR,
    Style,
    gguf_metadata,
    random_dialog,
    write_folder,
)
from conftest import ROOT, hugging_face_logits, hugging_face_twin, tiny_model, write_gguf, write_meta_checkpoint
from test_split_steps import PRE_TOKENIZERS

from llama import Llama, Tokenizer, Transformer
from llama.checkpoint.convert import convert
from llama.model import precompute_freqs_cis

LLAMA_2_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3_TEMPLATE = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{{ bos_token + content if loop.first else content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
DEEPSEEK_LLM_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ 'User: ' + message['content'] + '\n\n' }}{% elif message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] + eos_token }}{% else %}{{ message['content'] + '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
CHATML_TEMPLATE = CHATML.template.removeprefix("{{ bos_token }}")
SCALED_ROPE = {"use_scaled_rope": True, "rope_scaling_factor": 8.0, "rope_original_max_seq_len": 32}


class Family(NamedTuple):
    """Models that have their rotary embedding, sharing of weights, tokenizer and style of chat template in common."""

    sizes: dict  # changes of the tiny model's
    style: Style
    chat_format: str  # for people
    in_meta_layout: str = ""  # the chat format of Meta's own folders, where there are such


FAMILIES = {
    "Llama 2 Chat, Code Llama Instruct": Family(
        {"rope_theta": 10000.0, "n_kv_heads": 4},
        Style("sentencepiece", LLAMA_2_TEMPLATE),
        "`[INST]` turns between BOS and EOS",
        "Llama 2",
    ),
    "Llama 3 Instruct": Family(
        {}, Style("byte-level", LLAMA_3_TEMPLATE, end_of_turn="<|eot_id|>"), "headers, `<|eot_id|>`", "Llama 3"
    ),
    "Llama 3.1, 3.3 Instruct": Family(SCALED_ROPE, LLAMA_3_1, "headers, with the date", "Llama 3"),
    "Llama 3.2 Instruct 1B, 3B": Family(
        SCALED_ROPE | {"tie_embeddings": True}, LLAMA_3_1, "headers, with the date", "Llama 3"
    ),
    "TinyLlama Chat, Zephyr's style": Family(
        {"rope_theta": 10000.0}, ZEPHYR, "`<|user|>` and `<|assistant|>` as text, EOS"
    ),
    "Vicuna": Family({"rope_theta": 10000.0, "n_kv_heads": 4}, VICUNA, "`USER:` and `ASSISTANT:` as text, EOS"),
    "Alpaca, SOLAR Instruct": Family(
        {"rope_theta": 10000.0}, ALPACA, "`### Instruction:` and `### Response:` as text, EOS"
    ),
    "Yi Chat and other ChatML on sentencepiece": Family(
        {"rope_theta": 5000000.0},
        Style("sentencepiece", CHATML_TEMPLATE, special=("<|im_start|>", "<|im_end|>"), end_of_turn="<|im_end|>"),
        "ChatML",
    ),
    "Hermes, Dolphin on Llama 3": Family({}, CHATML, "ChatML after BOS"),
    "Tulu 3": Family(SCALED_ROPE, TULU, "`<|user|>` and `<|assistant|>` as text, `<|end_of_text|>`"),
    "DeepSeek-R1-Distill-Llama": Family(
        SCALED_ROPE, DEEPSEEK, "`<｜User｜>` and `<｜Assistant｜>`, old answers without thoughts"
    ),
    "DeepSeek LLM Chat": Family(
        {"rope_theta": 10000.0},
        DEEPSEEK._replace(
            template=DEEPSEEK_LLM_TEMPLATE,
            ordinary=(),
            pre="deepseek-llm",
            pre_tokenizer=PRE_TOKENIZERS["deepseek-llm"],
        ),
        "`User:` and `Assistant:` as text, EOS",
    ),
}

TOKENIZERS = {"sentencepiece": "sentencepiece", "byte-level": "byte-level BPE"}
LAYOUTS = ("model.safetensors", "pytorch_model.bin", "GGUF")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, family):
    """A tiny model of the family, as transformers and llama.cpp's converter write it, in each of `LAYOUTS`."""
    folder = tmp_path_factory.mktemp("family")
    path = write_folder(folder / LAYOUTS[0], family.style)
    model = tiny_model(vocab_size=Tokenizer(path).n_words, **family.sizes)
    twin = hugging_face_twin(model)
    twin.config.max_position_embeddings = 256
    for name in LAYOUTS[:2]:
        twin.save_pretrained(folder / name)
        (folder / name / "generation_config.json").unlink()  # which the tokenizer's files replace
        write_folder(folder / name, family.style)
    (folder / LAYOUTS[1] / LAYOUTS[0]).unlink()
    torch.save(twin.state_dict(), folder / LAYOUTS[1] / LAYOUTS[1])
    write_gguf(folder / LAYOUTS[2], model, rope_divisors=divisors(model), **gguf_metadata(path, family.style))
    return folder


def divisors(model: Transformer) -> list[float] | None:
    """The numbers by which scaled rope divides the frequencies, which GGUF files hold in its place."""
    args = model.params
    if not args.use_scaled_rope:
        return None
    plain = precompute_freqs_cis(args.head_size, 2, args.rope_theta)[1].angle()
    return (plain / model.freqs_cis[1].angle()).tolist()


@pytest.fixture(scope="module")
def expected(folder):
    """Tokens, and the logits that transformers computes for them."""
    vocab_size = json.loads((folder / LAYOUTS[0] / "config.json").read_text())["vocab_size"]
    tokens = torch.randint(vocab_size, (1, 64), generator=torch.Generator().manual_seed(1))
    return tokens, hugging_face_logits(folder / LAYOUTS[0], tokens)


@pytest.fixture(scope="module")
def dialogs():
    generator = random.Random(5)
    return [random_dialog(generator) for _ in range(20)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_family_in_a_layout(folder, family, layout, expected, dialogs, tmp_path):
    """Its logits and its chat prompts are those of transformers, also after conversion to Meta's layout."""
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(folder / LAYOUTS[0])
    if layout == "GGUF" and family.style.config.get("legacy"):
        write_folder(tmp_path / "tokenizer", family.style._replace(config={}))  # GGUF doesn't say legacy
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    prompts = [theirs.apply_chat_template(d, add_generation_prompt=True, return_dict=False) for d in dialogs]
    tokens, expected_logits = expected
    stop_tokens = []
    convert(folder / layout, tmp_path / "meta")
    for path in (folder / layout, tmp_path / "meta"):
        llama = Llama.build(path, None, 96, 1, device="cpu", dtype=torch.float32)
        assert torch.allclose(llama.model.forward(tokens, 0), expected_logits, rtol=0, atol=1e-4)
        assert [llama.formatter.encode_dialog_prompt(dialog) for dialog in dialogs] == prompts
        stop_tokens.append(llama.tokenizer.stop_tokens)
    assert theirs.convert_tokens_to_ids(family.style.end_of_turn) in stop_tokens[0]
    assert stop_tokens[1] == stop_tokens[0]


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.in_meta_layout])
def test_a_family_in_meta_s_own_layout(name, tmp_path, llama2_path, llama3_path):
    """The chat format is the reference's."""
    family = FAMILIES[name]
    path = llama2_path if family.style.kind == "sentencepiece" else llama3_path
    model = tiny_model(vocab_size=Tokenizer(path).n_words, **family.sizes)
    params = {} if name.startswith("Llama 2") else {"use_scaled_rope": bool(model.params.use_scaled_rope)}
    llama = Llama.build(write_meta_checkpoint(tmp_path / "meta", model, path, **params), None, 96, 1, device="cpu")
    assert llama.formatter.description == family.in_meta_layout


def table() -> list[str]:
    """The rows of the table in `docs/models.md`."""
    rows = []
    for name, family in FAMILIES.items():
        meta = f"; in Meta's own folders {family.in_meta_layout}'s" if family.in_meta_layout else ""
        layouts = ", ".join(["Meta"] * bool(family.in_meta_layout) + ["safetensors", "`.bin`", "GGUF"])
        cells = (name, TOKENIZERS[family.style.kind], layouts, family.chat_format + meta)
        escaped = [cell.replace("|", r"\|") for cell in cells]  # in a table of Markdown
        rows.append(f"| {' | '.join(escaped)} |")
    return rows


def test_the_document_lists_the_families():
    text = (ROOT / "docs" / "models.md").read_text()
    written = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| models")]
    assert written == table()


def test_the_config_of_a_family(folder, family):
    """The tiny models are what they are said to be: scaled, tied, with the family's rotary base."""
    config = json.loads((folder / LAYOUTS[0] / "config.json").read_text())
    assert config["tie_word_embeddings"] == family.sizes.get("tie_embeddings", False)
    assert config["rope_parameters"]["rope_theta"] == family.sizes.get("rope_theta", 500000)
    assert ("llama3" in re.findall(r"\w+", config["rope_parameters"]["rope_type"])) == (
        "use_scaled_rope" in family.sizes
    )
