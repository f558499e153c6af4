"""LoRA adapters of PEFT, merged into their base model: PEFT's formula, worked out here by hand."""

import copy
import json
import math
import shutil
import time

import pytest
import torch
from conftest import (
    cut,
    examples,
    hugging_face_twin,
    load,
    same_weights,
    tiny_model,
    write_gguf,
    write_meta_checkpoint,
    write_tokenizer_json,
)
from forked import fork_python
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_hugging_face import random_hugging_face_model

from llama import Tokenizer
from llama.checkpoint import open_checkpoint
from llama.checkpoint.lora_adapter import AdapterConfig
from llama.convert import convert
from llama.errors import CheckpointError, InputError, MissingFileError

VOCAB = 524
TOKENS = torch.randint(VOCAB, (2, 60), generator=torch.Generator().manual_seed(4))
LAYER_MODULES = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
MODULES = [f"model.layers.{i}.{module}" for i in range(2) for module in LAYER_MODULES]


def matrices(module, weight, rank, seed=0):
    """Random A and B of a module, by their names in the file, so large that their product matters to the logits."""
    generator = torch.Generator().manual_seed(seed + len(module) + sum(module.encode()))
    rows, columns = weight.shape if module != "model.embed_tokens" else weight.shape[::-1]
    kind, end = ("lora_embedding_", "") if module == "model.embed_tokens" else ("lora_", ".weight")
    return {
        f"base_model.model.{module}.{kind}A{end}": 0.15 * torch.randn(rank, columns, generator=generator),
        f"base_model.model.{module}.{kind}B{end}": 0.15 * torch.randn(rows, rank, generator=generator),
    }


def write_adapter(folder, model, modules=MODULES, ranks=None, pickled=False, **config):
    """Write an adapter as PEFT does.

    Args:
        folder: where to write it.
        model: transformers' model.
        modules: the names of the adapted modules.
        ranks: the rank of each module where it is not the configuration's.
        pickled: write adapter_model.bin.
        config: changes of adapter_config.json; `...` removes a key.
    """
    defaults = {
        "base_model_name_or_path": "someone/base-model",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": 3,
        "lora_dropout": 0.05,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": sorted({module.split(".")[-1] for module in modules}),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
        "loftq_config": {},
        "megatron_core": "megatron.core",
        "qalora_group_size": 16,
        "lora_bias": False,
    }
    config = {key: value for key, value in (defaults | config).items() if value is not ...}
    tensors = {}
    for module in modules:
        weight = model.get_submodule(module).weight
        tensors |= matrices(module, weight, (ranks or {}).get(module, config["r"]))
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def merge_by_hand(model, adapter, scale):
    """Add scale(module) * B A to the weights of transformers' model."""
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path) if path.exists() else torch.load(adapter / "adapter_model.bin")
    for name, a in tensors.items():
        if "lora_" in name and "A" in name.split("lora_")[1]:
            module = name.removeprefix("base_model.model.").split(".lora_")[0]
            product = tensors["B".join(name.rsplit("A", 1))].float() @ a.float()
            weight = model.get_submodule(module).weight
            weight.data += scale(module) * (product.t() if module == "model.embed_tokens" else product)


@pytest.fixture
def base(tmp_path):
    """transformers' model, and the folder in which it is."""
    model = random_hugging_face_model(num_key_value_heads=2)
    model.save_pretrained(tmp_path / "base")
    write_tokenizer_json(tmp_path / "base")
    return model, tmp_path / "base"


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        result = model(tokens)
    return getattr(result, "logits", result)


def assert_merged(base, adapter, scale, layout="hf", **options):
    """Merge an adapter into the base model: the logits and the weights are those of transformers' model."""
    model, folder = base
    before = logits(model)
    merge_by_hand(model, adapter, scale)
    assert (logits(model) - before).abs().max() > 0.5
    convert(folder, folder.parent / "merged", layout, adapter=adapter, **options)
    merged = load(folder.parent / "merged")
    assert torch.allclose(logits(merged), logits(model), atol=1e-4)
    model.save_pretrained(folder.parent / "by-hand")
    write_tokenizer_json(folder.parent / "by-hand")
    expected = load(folder.parent / "by-hand").state_dict()
    for name, weight in merged.state_dict().items():
        assert torch.allclose(weight, expected[name], atol=1e-6), name


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_every_matrix_of_the_layers(tmp_path, base, layout, pickled):
    adapter = write_adapter(tmp_path / "adapter", base[0], pickled=pickled)
    assert_merged(base, adapter, lambda module: 3 / 4, layout)


@pytest.mark.parametrize("module", LAYER_MODULES)
def test_each_matrix_alone(tmp_path, base, module):
    adapter = write_adapter(tmp_path / "adapter", base[0], [name for name in MODULES if name.endswith(module)])
    assert_merged(base, adapter, lambda module: 3 / 4)


def test_rslora(tmp_path, base):
    adapter = write_adapter(tmp_path / "adapter", base[0], use_rslora=True)
    assert_merged(base, adapter, lambda module: 3 / math.sqrt(4))


@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens"])
def test_embedding_and_output(tmp_path, base, module):
    adapter = write_adapter(tmp_path / "adapter", base[0], [*MODULES, module])
    assert_merged(base, adapter, lambda module: 3 / 4)


def test_embeddings_that_were_saved_with_the_adapter(tmp_path, base):
    """As PEFT does: then the change belongs to them."""
    path = write_adapter(tmp_path / "adapter", base[0], ["lm_head", "model.embed_tokens"]) / "adapter_model.safetensors"
    tensors = load_file(path)
    for module in ("lm_head", "model.embed_tokens"):
        weight = base[0].get_submodule(module).weight
        weight.data = weight.data + 0.1
        tensors[f"base_model.model.{module}.base_layer.weight"] = weight.data
    save_file(tensors, path)
    assert_merged(base, path.parent, lambda module: 3 / 4)


def test_tensors_with_the_name_of_the_adapter(tmp_path, base):
    """As in the checkpoints of a training run."""
    adapter = write_adapter(tmp_path / "adapter", base[0])
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()},
        adapter / "adapter_model.safetensors",
    )
    expected, folder = tmp_path / "expected", tmp_path / "merged"
    convert(base[1], folder, adapter=adapter)
    save_file(tensors, adapter / "adapter_model.safetensors")
    convert(base[1], expected, adapter=adapter)
    assert same_weights(load(folder), load(expected))


PATTERNS = {
    "the end of a name": ({"q_proj": 8}, {"k_proj": 5}),
    "a longer end": ({"self_attn.q_proj": 8}, {"self_attn.k_proj": 5}),
    "a whole name": (
        {f"model.layers.{i}.self_attn.q_proj": 8 for i in range(2)},
        {f"model.layers.{i}.self_attn.k_proj": 5 for i in range(2)},
    ),
    "a regular expression": ({r".*\.q_(proj|x)": 8}, {r"^model\.layers\.\d+\.self_attn\.k_proj": 5}),
    "the same value twice": ({"q_proj": 8, ".*q_proj": 8}, {"k_proj": 5, "self_attn.k_proj": 5}),
    "not a part of a name": ({"q_proj": 8, "proj": 16}, {"k_proj": 5, "proj": 9, "attn.q_proj": 9}),
}


@pytest.mark.parametrize(("rank_pattern", "alpha_pattern"), PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_patterns_of_ranks_and_alphas(tmp_path, base, rank_pattern, alpha_pattern, use_rslora):
    """Both the ranks and the scales they result in."""
    ranks = {module: 8 for module in MODULES if module.endswith("q_proj")}
    options = {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern, "use_rslora": use_rslora}
    adapter = write_adapter(tmp_path / "adapter", base[0], ranks=ranks, **options)
    root = math.sqrt if use_rslora else float

    def scale(module):
        return (5 if module.endswith("k_proj") else 3) / root(ranks.get(module, 4))

    assert_merged(base, adapter, scale)


TARGETS = {
    "whole names": (MODULES[3:9], {"target_modules": MODULES[3:9]}),
    "all matrices": (MODULES, {"target_modules": "all-linear"}),
    "a regular expression": (
        [module for module in MODULES if module.endswith(("q_proj", "v_proj"))],
        {"target_modules": r".*\.(q|v)_proj$"},
    ),
    "a longer one": (
        [module for module in MODULES if "self_attn" in module],
        {"target_modules": r"(?:.*?(?:language|model).*?(?:self_attn|attention).*?)(?<!x)(?:[\w.]*_proj)(?!x)"},
    ),
    "one layer": (MODULES[7:], {"layers_to_transform": 1}),
    "a list of layers": (MODULES[7:], {"layers_to_transform": [1, 5], "layers_pattern": "layers"}),
    "one layer, and a whole name": (
        [*MODULES[7:9], MODULES[0]],
        {"target_modules": ["q_proj", "k_proj", MODULES[0]], "layers_to_transform": [1], "layers_pattern": ["layers"]},
    ),
    "all but one": (MODULES[1:], {"exclude_modules": ["layers.0.self_attn.q_proj"]}),
    "all but what matches": (MODULES[7:], {"exclude_modules": r"model\.layers\.0\..*"}),
    "a module that no Llama has": (MODULES[:7], {"target_modules": [*MODULES[:7], "query_key_value", "proj"]}),
}


@pytest.mark.parametrize(("modules", "config"), TARGETS.values(), ids=TARGETS)
def test_ways_to_name_the_modules(tmp_path, base, modules, config):
    adapter = write_adapter(tmp_path / "adapter", base[0], modules, **config)
    assert_merged(base, adapter, lambda module: 3 / 4)


@given(
    st.sets(st.sampled_from([*MODULES, "lm_head", "model.embed_tokens"]), min_size=1),
    st.dictionaries(st.sampled_from(MODULES), st.integers(1, 40), max_size=4),
    st.floats(0.1, 30),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
@examples(60)
def test_any_modules_and_ranks(tmp_path_factory, modules, ranks, alpha, use_rslora, dtype):
    """The merged weights, by the formula and in Hugging Face's order of rows."""
    folder = tmp_path_factory.mktemp("random")
    model = random_hugging_face_model(num_key_value_heads=2, num_hidden_layers=2).to(dtype)
    model.save_pretrained(folder / "base")
    config = {"rank_pattern": ranks, "lora_alpha": alpha, "use_rslora": use_rslora, "target_modules": sorted(modules)}
    adapter = write_adapter(folder / "adapter", model, sorted(modules), ranks, **config)
    convert(folder / "base", folder / "merged", "hf", adapter=adapter)
    model = model.float()
    merge_by_hand(
        model, adapter, lambda module: alpha / (ranks.get(module, 4) ** 0.5 if use_rslora else ranks.get(module, 4))
    )
    merged, expected = load_file(folder / "merged" / "model.safetensors"), model.state_dict()
    assert merged.keys() == expected.keys()
    for name, weight in merged.items():
        assert weight.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        assert torch.allclose(weight.float(), expected[name], atol=tolerance, rtol=tolerance), name


@pytest.mark.parametrize("layout", ["meta", "gguf"])
def test_base_models_in_other_layouts(tmp_path, llama3_path, layout):
    model = tiny_model(vocab_size=Tokenizer(llama3_path).n_words)
    if layout == "meta":
        folder = write_meta_checkpoint(tmp_path / "base", model, llama3_path, 2)
    else:
        folder = write_gguf(tmp_path / "base.gguf", model)
    twin = hugging_face_twin(model)
    adapter = write_adapter(tmp_path / "adapter", twin)
    merge_by_hand(twin, adapter, lambda module: 3 / 4)
    convert(folder, tmp_path / "merged", adapter=adapter)
    assert torch.allclose(logits(load(tmp_path / "merged")), logits(twin), atol=1e-4)


def test_the_dtype_is_that_of_the_base_model(tmp_path, base):
    model, folder = base
    for weight in model.parameters():
        weight.data = weight.bfloat16().float()
    copy.deepcopy(model).bfloat16().save_pretrained(folder)
    adapter = write_adapter(tmp_path / "adapter", model)
    path = adapter / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    convert(folder, tmp_path / "bfloat16", adapter=adapter)
    convert(folder, tmp_path / "float32", adapter=adapter, dtype="float32")
    assert open_checkpoint(tmp_path / "bfloat16").dtype() == torch.bfloat16
    exact = load(tmp_path / "float32")
    merge_by_hand(model, adapter, lambda module: 3 / 4)
    assert torch.allclose(logits(exact), logits(model), atol=1e-4)
    assert same_weights(load(tmp_path / "bfloat16", torch.bfloat16), exact.bfloat16())  # rounded once, at the end


def test_a_tied_embedding_stays_as_it_is(tmp_path):
    model = random_hugging_face_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    write_tokenizer_json(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", model)
    merge_by_hand(model, adapter, lambda module: 3 / 4)
    convert(tmp_path / "base", tmp_path / "merged", "hf", adapter=adapter)
    assert torch.allclose(logits(load(tmp_path / "merged")), logits(model), atol=1e-4)
    for module in ("lm_head", "model.embed_tokens"):
        adapter = write_adapter(tmp_path / module, model, [*MODULES, module])
        with pytest.raises(
            CheckpointError, match=f"unsupported: {module}, since the base model's embedding is tied to its output"
        ):
            convert(tmp_path / "base", tmp_path / "unwritten", adapter=adapter)


REFUSED = {
    "another kind of adapter": ({"peft_type": "IA3"}, r"peft_type is 'IA3', and only \['LORA'\] can be merged"),
    "no kind": ({"peft_type": ...}, "lacks 'peft_type'"),
    "DoRA": ({"use_dora": True}, "use_dora is True, and only adapters without it can be merged"),
    "biases": ({"bias": "all"}, r"bias is 'all', and only \['none'\] can be merged"),
    "biases of LoRA": ({"lora_bias": True}, "lora_bias is True, and only adapters without it"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\], and only"),
    "transposed weights": ({"fan_in_fan_out": True}, "fan_in_fan_out is True, and only"),
    "new tokens": ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices is \[1, 2\], and only"),
    "repeated layers": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication is "),
    "parameters": ({"target_parameters": ["w"]}, r"target_parameters is \['w'\]"),
    "activated LoRA": ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens is "),
    "quantized groups": ({"use_qalora": True}, "use_qalora is True"),
    "a changed base model": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', and only"),
    "what a later version may add": (
        {"use_something": {"a": 1}},
        r"use_something is \{'a': 1\}, and only adapters with",
    ),
    "no rank": ({"r": ...}, "lacks 'r'"),
    "a rank of zero": ({"rank_pattern": {"q_proj": 0}}, "the rank 0 must be at least 1"),
    "a rank that is text": ({"rank_pattern": {"q_proj": "8"}}, "q_proj is '8', not of type int"),
    "an infinite alpha": ({"lora_alpha": math.inf}, "lora_alpha is inf, not a finite number"),
    "an alpha that is no number": ({"alpha_pattern": {"q_proj": math.nan}}, "lora_alpha is nan, not a finite number"),
    "a huge alpha": ({"lora_alpha": 1e300}, r"merging makes layers\.0\.attention\.wq\.weight NaN or infinite"),
    "no modules": ({"target_modules": []}, "target_modules names no modules"),
    "numbers for modules": ({"target_modules": [1]}, r"target_modules is \[1\], not a list of names"),
    "a module without tensors": (
        {"exclude_modules": None, "target_modules": [module.split(".")[-1] for module in MODULES] + ["lm_head"]},
        r"2 problem\(s\):\n  missing: lora_A of lm_head \(4, 128\)\n  missing: lora_B of lm_head",
    ),
    "tensors without a module": (
        {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]},
        r"unexpected: model\.layers\.0\.mlp\.down_proj, which adapter_config\.json doesn't name",
    ),
    "another rank": (
        {"r": 8},
        r"wrong shape: lora_A of model\.layers\.0\.self_attn\.q_proj is \(4, 128\), should be \(8",
    ),
    "another rank of one module": (
        {"rank_pattern": {"o_proj": 5}},
        r"4 problem\(s\):\n  wrong shape: lora_A of model\.layers\.0\.self_attn\.o_proj is \(4, 128\), should be \(5",
    ),
    "several ranks": (
        {"rank_pattern": {"q_proj": 4, ".*_proj": 5}},
        r"rank_pattern has several values for model\.layers\.0\.self_attn\.q_proj: \[4, 5\]",
    ),
    "several alphas": (
        {"alpha_pattern": {"q_proj": 2, "self_attn.q_proj": 3}},
        r"alpha_pattern has several values for model\.layers\.0\.self_attn\.q_proj: \[2\.0, 3\.0\]",
    ),
    "other layers": (
        {"layers_to_transform": [0]},
        r"7 problem\(s\):\n  unexpected: model\.layers\.1\.self_attn\.q_proj",
    ),
    "layers that are text": ({"layers_to_transform": ["0"]}, r"layers_to_transform is \['0'\], not a list of numbers"),
    "layers and a pattern": (
        {"layers_to_transform": [0, 1], "target_modules": ".*_proj"},
        "layers_to_transform has no meaning for a pattern of target_modules",
    ),
    "layers of another name": (
        {"layers_to_transform": [0, 1], "layers_pattern": "h"},
        "layers_pattern is 'h'; a Llama's layers are in 'layers'",
    ),
    "a pattern that is not valid": ({"target_modules": "(q_proj"}, r"the pattern '\(q_proj' is not valid"),
    "a pattern that calls itself": ({"target_modules": "(?R)"}, "not a simple regular expression"),
    "a pattern of counted repeats": ({"target_modules": "((a{9999}){9999}){9999}"}, "not a simple regular expression"),
    "a long pattern": ({"rank_pattern": {"a" * 3000: 3}}, "is too long, or not a simple regular expression"),
    "a deep pattern": ({"target_modules": "(" * 30 + "a" + ")+" * 30}, "not a simple regular expression"),
    "a pattern of no module": ({"target_modules": "nothing"}, "doesn't name"),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED)
def test_what_can_not_be_merged_is_refused_by_name(tmp_path, base, config, message):
    adapter = write_adapter(tmp_path / "adapter", base[0])
    path = adapter / "adapter_config.json"
    changed = json.loads(path.read_text()) | config
    path.write_text(json.dumps({key: value for key, value in changed.items() if value is not ...}))
    with pytest.raises(CheckpointError, match=message) as error:
        convert(base[1], tmp_path / "merged", adapter=adapter)
    assert str(adapter) in str(error.value)
    assert not (tmp_path / "merged").exists()


def test_patterns_that_take_too_long(tmp_path, base, monkeypatch):
    monkeypatch.setattr("llama.checkpoint.lora_adapter.MAX_SECONDS", 0.0)
    adapter = write_adapter(tmp_path / "adapter", base[0], target_modules=".*_proj")
    with pytest.raises(CheckpointError, match="take over 0 s to compare"):
        convert(base[1], tmp_path / "merged", adapter=adapter)


def test_many_patterns(tmp_path, monkeypatch):
    """To compile them takes time as well."""
    monkeypatch.setattr("llama.checkpoint.lora_adapter.MAX_SECONDS", 0.1)
    config = {"peft_type": "LORA", "target_modules": ["q_proj"], "r": 4, "lora_alpha": 8}
    config["rank_pattern"] = {f"x{i}": 4 for i in range(50_000)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    start = time.process_time()
    with pytest.raises(CheckpointError, match=r"take over 0\.1 s to compare"):
        AdapterConfig(tmp_path / "adapter_config.json")
    assert time.process_time() - start < 1


Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"
WRONG_TENSORS = {
    "a missing B": (
        lambda t: t.pop(f"{Q_PROJ}.lora_B.weight"),
        r"missing: lora_B of model\.layers\.0\.self_attn\.q_proj",
    ),
    "another layer": (
        lambda t: t.update({Q_PROJ.replace("0", "7") + ".lora_A.weight": torch.zeros(4, 128)}),
        r"unexpected: base_model\.model\.model\.layers\.7\.self_attn\.q_proj\.lora_A\.weight \(4, 128\)",
    ),
    "a magnitude of DoRA": (
        lambda t: t.update({f"{Q_PROJ}.lora_magnitude_vector": torch.zeros(128)}),
        r"unexpected: .*q_proj\.lora_magnitude_vector \(128,\)",
    ),
    "a bias": (
        lambda t: t.update({f"{Q_PROJ}.lora_B.bias": torch.zeros(128)}),
        r"unexpected: .*q_proj\.lora_B\.bias \(128,\)",
    ),
    "a whole weight": (
        lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(VOCAB, 128)}),
        r"unexpected: base_model\.model\.lm_head\.weight \(524, 128\)",
    ),
    "the same twice": (
        lambda t: t.update({f"{Q_PROJ}.lora_A.default.weight": torch.zeros(4, 128)}),
        r"unexpected: .*q_proj\.lora_A\.(default\.)?weight \(4, 128\)",
    ),
    "an embedding's matrix elsewhere": (
        lambda t: t.update({f"{Q_PROJ}.lora_embedding_A": torch.zeros(4, 128)}),
        r"unexpected: lora_embedding_A of model\.layers\.0\.self_attn\.q_proj \(4, 128\)",
    ),
    "a whole weight of a layer": (
        lambda t: t.update({f"{Q_PROJ}.base_layer.weight": torch.zeros(128, 128)}),
        r"unexpected: base_layer of model\.layers\.0\.self_attn\.q_proj \(128, 128\)",
    ),
    "a norm": (
        lambda t: t.update({"base_model.model.model.norm.lora_A.weight": torch.zeros(4, 128)}),
        r"unexpected: base_model\.model\.model\.norm\.lora_A\.weight",
    ),
    "another base model": (
        lambda t: t.update({f"{Q_PROJ}.lora_A.weight": torch.zeros(4, 256)}),
        r"wrong shape: lora_A of model\.layers\.0\.self_attn\.q_proj is \(4, 256\), should be \(4, 128\) with rank 4",
    ),
    "no number": (
        lambda t: t.update({f"{Q_PROJ}.lora_A.weight": torch.full((4, 128), math.nan)}),
        r"merging makes layers\.0\.attention\.wq\.weight NaN or infinite",
    ),
    "integers": (
        lambda t: t.update({f"{Q_PROJ}.lora_A.weight": torch.zeros(4, 128, dtype=torch.int8)}),
        r"q_proj\.lora_A\.weight is stored as torch\.int8",
    ),
}


@pytest.mark.parametrize(("edit", "message"), WRONG_TENSORS.values(), ids=WRONG_TENSORS)
def test_tensors_that_do_not_fit_are_listed(tmp_path, base, edit, message):
    path = write_adapter(tmp_path / "adapter", base[0]) / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=message):
        convert(base[1], tmp_path / "merged", adapter=path.parent)
    assert not (tmp_path / "merged").exists()


def test_an_adapter_in_place_of_a_model(tmp_path, base):
    adapter = write_adapter(tmp_path / "adapter", base[0])
    with pytest.raises(
        InputError, match=r"adapter is a PEFT LoRA adapter, not a model.*'someone/base-model'.*--adapter"
    ):
        open_checkpoint(adapter)
    write_adapter(tmp_path / "other", base[0], base_model_name_or_path=None, peft_type="IA3")
    with pytest.raises(InputError, match=r"other is a PEFT 'IA3' adapter, not a model. Its base model is not named"):
        open_checkpoint(tmp_path / "other")
    shutil.copy(adapter / "adapter_config.json", base[1])  # left beside a model, it makes no difference
    assert open_checkpoint(base[1])
    cut(adapter / "adapter_config.json")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is not JSON"):
        open_checkpoint(adapter)


def test_what_is_no_adapter(tmp_path, base):
    adapter = write_adapter(tmp_path / "adapter", base[0])
    for path, kind, message in (
        (tmp_path / "nowhere", MissingFileError, "adapter='.*nowhere' does not exist"),
        (base[1], MissingFileError, r"adapter_config\.json' does not exist"),
        (adapter / "adapter_config.json", InputError, "must be the folder of a PEFT adapter, not a file"),
    ):
        with pytest.raises(kind, match=message):
            convert(base[1], tmp_path / "merged", adapter=path)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(
        MissingFileError, match=r"adapter has none of \['adapter_model\.safetensors', 'adapter_model\.bin'"
    ):
        convert(base[1], tmp_path / "merged", adapter=adapter)


@pytest.mark.slow
def test_the_command(tmp_path, base):
    adapter = write_adapter(tmp_path / "adapter", base[0])
    command = ("-m", "llama", "convert", "--from", base[1], "--to", tmp_path / "merged", "--adapter", adapter)
    run = fork_python(*command)
    assert run.returncode == 0, run.stderr
    merge_by_hand(base[0], adapter, lambda module: 3 / 4)
    assert torch.allclose(logits(load(tmp_path / "merged")), logits(base[0]), atol=1e-4)
