"""Hugging Face's layout: the logits of transformers, and refusing damaged and unsupported folders."""

import json
import os
import shutil
import sys

import pytest
import torch
from conftest import (
    Ranks,
    cut,
    hugging_face_logits,
    load,
    same_weights,
    write_llama2_tokenizer,
    write_llama3_tokenizer,
    write_tokenizer_json,
)
from safetensors.torch import load_file, save_file

from llama import Llama
from llama.checkpoint import open_checkpoint, read_settings

VOCAB = 524


def llama3_rope(factor, **changes):
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0}
    return rope | {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192} | changes


MODELS = {
    "grouped heads": dict(num_key_value_heads=2),
    "tied": dict(tie_word_embeddings=True),
    "rope factor 8": dict(rope_parameters=llama3_rope(8.0)),
    "rope factor 32, tied": dict(rope_parameters=llama3_rope(32.0), tie_word_embeddings=True, num_key_value_heads=2),
    # so short that the 80 positions of the tests are affected
    "short original context": dict(rope_parameters=llama3_rope(8.0, original_max_position_embeddings=64)),
    "linear rope scaling": dict(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
    "odd sizes": dict(
        intermediate_size=151, hidden_size=120, head_dim=34, num_attention_heads=3, num_key_value_heads=1
    ),
    "another rotary base": dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6}, rms_norm_eps=1e-4),
}


def random_hugging_face_model(seed=0, **changes):
    """transformers' LlamaForCausalLM with large random weights."""
    import transformers

    sizes = dict(hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCAB)
    sizes |= dict(num_key_value_heads=4, max_position_embeddings=131072, attn_implementation="eager") | changes
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.uniform_(0.5, 1.5)
        else:
            weight.data.normal_(0, 0.2)
    return model


def write_hugging_face(folder, tokenizer=write_llama3_tokenizer, max_shard_size="5GB", **changes):
    """Write a random model as transformers does, and a tokenizer.model beside it."""
    random_hugging_face_model(**changes).save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer is not None:
        tokenizer(folder / "tokenizer.model")
    return folder


TOKENS = torch.randint(VOCAB, (2, 80), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_same_logits_as_transformers(tmp_path, changes):
    write_hugging_face(tmp_path, **changes)
    model = load(tmp_path)
    with torch.no_grad():
        expected = hugging_face_logits(tmp_path, TOKENS)
        assert torch.allclose(model(TOKENS), expected, atol=1e-4)
        assert torch.allclose(model(TOKENS, 0), expected, atol=1e-4)
        assert expected.std() > 0.5
    assert (model.output.weight is model.tok_embeddings.weight) == changes.get("tie_word_embeddings", False)


@pytest.mark.parametrize("name", ["rope factor 8", "linear rope scaling", "another rotary base"])
def test_rope_parameters_matter(tmp_path, name):
    write_hugging_face(tmp_path, **MODELS[name])
    expected = hugging_face_logits(tmp_path, TOKENS)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        assert (load(tmp_path)(TOKENS) - expected).abs().max() > 1e-2


def test_older_keys_of_rope_scaling(tmp_path):
    """As in the published folders of Llama 3.1 and 3.2."""
    write_hugging_face(tmp_path, **MODELS["short original context"])
    expected = load(tmp_path).freqs_cis
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(load(tmp_path).freqs_cis, expected)
    rope["type"] = rope.pop("rope_type")  # older still
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(load(tmp_path).freqs_cis, expected)
    config |= {"rope_theta": None, "rope_scaling": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load(tmp_path).params.rope_theta == 10000.0


def test_defaults_of_config_json_are_those_of_transformers(tmp_path):
    write_hugging_face(tmp_path, rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    removed = ("rms_norm_eps", "rope_parameters", "num_key_value_heads", "head_dim", "attention_bias", "mlp_bias")
    change_config(tmp_path, **dict.fromkeys(removed, ...))
    params = load(tmp_path).params
    assert (params.norm_eps, params.rope_theta, params.kv_heads, params.head_size) == (1e-6, 10000.0, 4, 32)
    with torch.no_grad():
        assert torch.allclose(load(tmp_path)(TOKENS), hugging_face_logits(tmp_path, TOKENS), atol=1e-4)


def test_several_files_and_their_index(tmp_path):
    write_hugging_face(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    with torch.no_grad():
        assert torch.allclose(load(tmp_path)(TOKENS), hugging_face_logits(tmp_path, TOKENS), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_the_right_dtype_are_not_copied(tmp_path, dtype):
    random_hugging_face_model().to(dtype).save_pretrained(tmp_path)
    write_llama3_tokenizer(tmp_path / "tokenizer.model")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.dtype() == dtype
    assert load(tmp_path, dtype).norm.weight.dtype == dtype
    name = "layers.0.feed_forward.w1.weight"
    whole, part = checkpoint.read(name, 0, 0, 192), checkpoint.read(name, 0, 10, 20)
    assert part.data_ptr() == whole.data_ptr() + 10 * 128 * dtype.itemsize  # a view of the mapping
    assert torch.equal(part, whole[10:20])


def test_any_slice(tmp_path):
    write_hugging_face(tmp_path, **MODELS["grouped heads"])
    checkpoint = open_checkpoint(tmp_path)
    for name, shape in checkpoint.shapes().items():
        for axis in range(len(shape) if len(shape) == 2 else 0):
            whole = checkpoint.read(name, axis, 0, shape[axis])
            for start, stop in ((0, 10), (5, 70), (33, 35), (shape[axis] - 9, shape[axis])):
                expected = whole.narrow(axis, start, min(stop, shape[axis]) - start)
                assert torch.equal(checkpoint.read(name, axis, start, min(stop, shape[axis])), expected), (name, axis)


def test_a_rotary_table_in_old_files_is_ignored(tmp_path):
    write_hugging_face(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    save_file(tensors, tmp_path / "model.safetensors")
    assert load(tmp_path)


def write_pickled(folder, model, shards=1, tokenizer=write_llama3_tokenizer, edit=lambda weight: weight):
    """Write a model with pickled weights, as older versions of transformers do.

    Args:
        folder: where to write it.
        model: transformers' model.
        shards: number of files of weights; with several there is an index.
        tokenizer: writes the tokenizer.
        edit: what becomes of each weight before it is saved.
    """
    folder.mkdir(exist_ok=True)
    model.config.save_pretrained(folder)
    tokenizer(folder / "tokenizer.model")
    weights = {name: edit(weight) for name, weight in model.state_dict().items()}
    if shards == 1:
        torch.save(weights, folder / "pytorch_model.bin")
        return folder
    weight_map = {
        name: f"pytorch_model-{i % shards + 1:05d}-of-{shards:05d}.bin" for i, name in enumerate(sorted(weights))
    }
    for file in set(weight_map.values()):
        torch.save({name: weights[name] for name in weights if weight_map[name] == file}, folder / file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_pickled_weights(tmp_path, changes, shards):
    """In one file or several. The oracle has the same weights; it no longer writes such files."""
    theirs = random_hugging_face_model(**changes)
    model = load(write_pickled(tmp_path, theirs, shards))
    with torch.no_grad():
        assert torch.allclose(model(TOKENS), theirs(TOKENS).logits, atol=1e-4)


WAYS_TO_SAVE = {
    "parameters": torch.nn.Parameter,
    "transposed": lambda weight: weight.t().contiguous().t(),
    "parts of a larger tensor": lambda weight: torch.cat([weight, weight])[: len(weight)],
    "half precision": lambda weight: weight.half(),
}


@pytest.mark.parametrize("edit", WAYS_TO_SAVE.values(), ids=WAYS_TO_SAVE)
def test_pickled_weights_however_they_were_saved(tmp_path, edit):
    theirs = random_hugging_face_model(tie_word_embeddings=True, num_key_value_heads=2)
    write_pickled(tmp_path / "pickled", theirs, 2, edit=edit)
    theirs.load_state_dict({name: edit(weight).float() for name, weight in theirs.state_dict().items()})
    theirs.save_pretrained(tmp_path / "safetensors")
    write_llama3_tokenizer(tmp_path / "safetensors" / "tokenizer.model")
    model = load(tmp_path / "pickled")
    assert same_weights(model, load(tmp_path / "safetensors"))
    assert model.output.weight is model.tok_embeddings.weight
    assert all(weight.is_leaf and weight.is_contiguous() for weight in model.parameters())


@pytest.mark.parametrize("size", [2, 4])
def test_each_rank_reads_its_part_of_pickled_weights(tmp_path, monkeypatch, size):
    theirs = random_hugging_face_model(num_key_value_heads=2)
    write_pickled(tmp_path, theirs, 3)
    with monkeypatch.context() as patch:
        outputs = Ranks(patch, size).run(lambda: load(tmp_path)(TOKENS))
    with torch.no_grad():
        assert torch.allclose(outputs[-1], theirs(TOKENS).logits, atol=1e-4)
    checkpoint = open_checkpoint(tmp_path)
    name = "layers.0.feed_forward.w1.weight"
    whole, part = checkpoint.read(name, 0, 0, 192), checkpoint.read(name, 0, 10, 20)
    assert part.data_ptr() == whole.data_ptr() + 10 * 128 * 4  # a view of the mapping


def test_safetensors_go_before_pickled_weights(tmp_path):
    write_pickled(tmp_path, random_hugging_face_model(seed=1))
    pickled = load(tmp_path)
    write_hugging_face(tmp_path, max_shard_size="200KB")
    (tmp_path / "pytorch_model.bin.index.json").write_text("not read")
    with torch.no_grad():
        assert torch.allclose(load(tmp_path)(TOKENS), hugging_face_logits(tmp_path, TOKENS), atol=1e-4)
    assert not same_weights(load(tmp_path), pickled)


UNUSABLE_PICKLED = {
    "a missing file": (lambda f: (f / "pytorch_model-00002-of-00003.bin").unlink(), r"00002-of-00003\.bin' does not"),
    "a truncated file": (
        lambda f: cut(f / "pytorch_model-00002-of-00003.bin"),
        r"00002-of-00003\.bin \(\d+ bytes\) is",
    ),
    "a hostile file": (
        lambda f: torch.save({"model.norm.weight": os.mkdir}, f / "pytorch_model-00002-of-00003.bin"),
        r"00002-of-00003\.bin would call posix\.mkdir while it is read",
    ),
    "a file elsewhere": (
        lambda f: edit_index(f, lambda m: m.update({"model.norm.weight": "../x.bin"})),
        r"model\.norm\.weight is in '\.\./x\.bin', which can't be a file of this folder",
    ),
    "a file of another kind": (
        lambda f: edit_index(f, lambda m: m.update({"model.norm.weight": "x.safetensors"})),
        r"model\.norm\.weight is in 'x\.safetensors', which can't be",
    ),
    "a tensor that isn't in its file": (
        lambda f: edit_index(f, lambda m: m.update({"x.weight": "pytorch_model-00001-of-00003.bin"})),
        r"bin\.index\.json: x\.weight should be in .*pytorch_model-00001-of-00003\.bin, but isn't",
    ),
    "a missing tensor": (
        lambda f: edit_index(f, lambda m: m.pop("model.norm.weight")),
        r"missing: norm\.weight \(128,\)",
    ),
    "no index": (lambda f: (f / "pytorch_model.bin.index.json").unlink(), r"bin\.index\.json isn't"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="functions of the operating system have other names")
@pytest.mark.parametrize(("damage", "message"), UNUSABLE_PICKLED.values(), ids=UNUSABLE_PICKLED)
def test_unusable_folders_of_pickled_weights(tmp_path, damage, message):
    damage(write_pickled(tmp_path, random_hugging_face_model(), 3))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        Llama.build(tmp_path, None, 32, 1)
    assert isinstance(error.value, AssertionError)
    assert str(tmp_path) in str(error.value)


def change_config(folder, file="config.json", **changes):
    """Change values of a JSON file; `...` removes a key."""
    config = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def test_a_config_without_tie_word_embeddings(tmp_path):
    write_hugging_face(tmp_path / "tied", tie_word_embeddings=True)
    write_hugging_face(tmp_path / "untied")
    for name in ("tied", "untied"):
        change_config(tmp_path / name, tie_word_embeddings=...)
        assert load(tmp_path / name).params.tie_embeddings == (name == "tied")
    change_config(tmp_path / "tied", tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"missing: output\.weight"):
        load(tmp_path / "tied")


def test_padded_embedding(tmp_path):
    """The embedding has more rows than the tokenizer has tokens."""
    write_hugging_face(tmp_path, vocab_size=576)
    llama = Llama.build(tmp_path, None, 64, 2, device="cpu")
    assert llama.tokenizer.n_words == 576
    assert llama.tokenizer.decode([104, 575, 105]) == "hi"
    assert len(llama.generate([[5, 6]], 5)[0][0]) <= 5


def test_a_tokenizer_from_elsewhere_is_completed_by_the_folder(tmp_path):
    """By the padding of the embedding, and by the ids that end a text."""
    write_hugging_face(tmp_path / "model", None, vocab_size=576)
    change_config(tmp_path / "model", "generation_config.json", eos_token_id=[269, 276])
    checkpoint = open_checkpoint(tmp_path / "model")
    tokenizer = checkpoint.tokenizer(write_llama3_tokenizer(tmp_path / "other.model"))
    assert (tokenizer.n_words, tokenizer.n_padding) == (576, 52)
    assert tokenizer.stop_tokens == {269, 276, 277}
    with pytest.raises(FileNotFoundError, match=r"tokenizer_path=.*tokenizer\.model' does not exist"):
        checkpoint.tokenizer()
    with pytest.raises(FileNotFoundError, match=r"tokenizer_path=.*nowhere' does not exist"):
        checkpoint.tokenizer(tmp_path / "nowhere")


def test_a_folder_like_llama_3_2_1b_instruct(tmp_path):
    """Tied, rope factor 32, only a tokenizer.json, several stop tokens: transformers gives the same answer."""
    import transformers

    write_hugging_face(tmp_path, None, **MODELS["rope factor 32, tied"])
    write_tokenizer_json(tmp_path)
    change_config(tmp_path, "tokenizer_config.json", chat_template=...)  # the tokens tell the format then
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    llama = Llama.build(tmp_path, None, 96, 2, device="cpu", dtype=torch.float32)
    assert llama.model.params.rope_scaling_factor == 32.0
    special = llama.tokenizer.special_tokens
    assert llama.tokenizer.stop_tokens == {special[f"<|{end}|>"] for end in ("end_of_text", "eom_id", "eot_id")}
    dialog = [{"role": "system", "content": "the user"}, {"role": "user", "content": "in there <|eot_id|>?"}]
    answer = llama.chat_completion([dialog], temperature=0, max_gen_len=20)[0]["generation"]
    assert answer["role"] == "assistant"
    assert answer["content"]

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    prompt = llama.formatter.encode_dialog_prompt(dialog)
    expected_prompt = [tokenizer.bos_token_id]
    for role, text in (("system", "the user"), ("user", "in there <|eot_id|>?"), ("assistant", None)):
        expected_prompt += [special["<|start_header_id|>"], *tokenizer.encode(role, add_special_tokens=False)]
        expected_prompt += [special["<|end_header_id|>"], *tokenizer.encode("\n\n", add_special_tokens=False)]
        if text is not None:
            plain = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
            expected_prompt += [*plain, special["<|eot_id|>"]]
    assert prompt == expected_prompt
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    out = network.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0)[0, len(prompt) :]
    expected = [token for token in out.tolist() if token not in llama.tokenizer.stop_tokens]
    assert answer["content"] == llama.tokenizer.decode(expected)


def test_a_folder_like_llama_2_chat(tmp_path):
    """A sentencepiece tokenizer.model, with a tokenizer as JSON beside it, which counts only alone."""
    write_hugging_face(tmp_path, write_llama2_tokenizer, vocab_size=320, rope_parameters={"rope_theta": 10000.0})
    as_json = {"model": {"type": "BPE", "byte_fallback": True, "vocab": {"a": 0}, "merges": []}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(as_json))
    llama = Llama.build(tmp_path, None, 64, 2, device="cpu")
    assert llama.tokenizer.bos_id == 1
    assert llama.chat_completion([[{"role": "user", "content": "the house"}]], max_gen_len=3)
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json: its normalizer or pre_tokenizer does .*tokenizer_path"):
        Llama.build(tmp_path, None, 64, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with an index and eight files of weights. Tests must not change it."""
    return write_hugging_face(tmp_path_factory.mktemp("hf"), max_shard_size="200KB")


def edit_index(folder, edit):
    path = next(folder.glob("*.index.json"))
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def edit_shard(folder, edit):
    path = next(iter(sorted(folder.glob("model-*.safetensors"))))
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def to_int8(tensors):
    name = next(iter(tensors))
    tensors[name] = tensors[name].to(torch.int8)


UNUSABLE = {
    "another model": (lambda f: change_config(f, model_type="mistral"), r"config\.json: model_type is 'mistral'; only"),
    "no model type": (lambda f: change_config(f, model_type=...), r"config\.json: model_type is None; only"),
    "attention biases": (lambda f: change_config(f, attention_bias=True), "attention_bias is True, and this network"),
    "biases": (lambda f: change_config(f, mlp_bias=True), "mlp_bias is True, and"),
    "a sliding window": (lambda f: change_config(f, sliding_window=4096), "sliding_window is 4096, and"),
    "another activation": (lambda f: change_config(f, hidden_act="gelu"), r"hidden_act is 'gelu', and .*'silu'"),
    "quantized": (lambda f: change_config(f, quantization_config={"bits": 4}), "quantization_config is "),
    "partial rotary embedding": (
        lambda f: change_config(f, partial_rotary_factor=0.5),
        r"partial_rotary_factor is 0\.5",
    ),
    "sliding attention": (lambda f: change_config(f, layer_types=["sliding_attention"]), "layer_types has"),
    "unknown rope scaling": (
        lambda f: change_config(f, rope_scaling={"rope_type": "yarn", "factor": 4.0}, rope_parameters=...),
        "rope scaling of type 'yarn'; only 'default', 'linear' and 'llama3' are supported",
    ),
    "scaling without a factor": (lambda f: change_config(f, rope_parameters={"rope_type": "llama3"}), "lacks 'factor'"),
    "a negative rotary base": (
        lambda f: change_config(f, rope_parameters={"rope_theta": -1.0}),
        r"rope_theta=-1\.0 must be",
    ),
    "a rope factor of zero": (
        lambda f: change_config(f, rope_parameters={"rope_type": "linear", "factor": 0.0}),
        r"rope_divisors=\(0\.0,\) must be numbers above 0",
    ),
    "no hidden size": (lambda f: change_config(f, hidden_size=...), r"config\.json lacks 'hidden_size'"),
    "a string for a number": (lambda f: change_config(f, hidden_size="128"), "hidden_size is '128', not of type int"),
    "a boolean for a number": (
        lambda f: change_config(f, num_attention_heads=True),
        "num_attention_heads is True, not of type int",
    ),
    "a huge number": (
        lambda f: change_config(f, rope_parameters={"rope_theta": 10**400}),
        "rope_theta is 1000.*, outside the range of 64-bit integers",
    ),
    "absurdly many layers": (
        lambda f: change_config(f, num_hidden_layers=10**12),
        r"config\.json: n_layers=1000000000000 is larger than that of any model",
    ),
    "no heads": (lambda f: change_config(f, num_attention_heads=0), "n_heads=0 must be at least 1"),
    "another hidden size": (lambda f: change_config(f, hidden_size=256), r"wrong shape: norm\.weight is \(128,\)"),
    "a truncated config": (lambda f: cut(f / "config.json"), r"config\.json is not JSON"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json.* does not exist"),
    "a truncated index": (lambda f: cut(f / "model.safetensors.index.json"), r"index\.json is not JSON"),
    "an empty index": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        r"index\.json lacks 'weight_map'",
    ),
    "a file in another folder": (
        lambda f: edit_index(f, lambda m: m.update({"model.norm.weight": "../x.safetensors"})),
        r"model\.norm\.weight is in '\.\./x\.safetensors', which can't be a file of this folder",
    ),
    "a tensor under our own name": (
        lambda f: (
            edit_shard(f, lambda t: t.update({"norm.weight": torch.ones(128)}))
            or edit_index(f, lambda m: m.update({"norm.weight": "model-00001-of-00008.safetensors"}))
        ),
        r"unexpected: \[norm\.weight\] \(128,\)",
    ),
    "a parent folder for a file": (
        lambda f: edit_index(f, lambda m: m.update({"model.norm.weight": ".."})),
        r"model\.norm\.weight is in '\.\.', which can't be a file of this folder",
    ),
    "a number for a file": (
        lambda f: edit_index(f, lambda m: m.update({"model.norm.weight": 3})),
        r"model\.norm\.weight is in 3, which can't be a file of this folder",
    ),
    "a tensor that isn't in its file": (
        lambda f: edit_index(f, lambda m: m.update({"x.weight": next(iter(m.values()))})),
        r"index\.json: x\.weight should be in .*model-00007",
    ),
    "a missing tensor": (
        lambda f: edit_index(f, lambda m: m.pop("model.norm.weight")),
        r"missing: norm\.weight \(128,\)",
    ),
    "a missing file": (
        lambda f: (f / "model-00002-of-00008.safetensors").unlink(),
        r"model-00002-of-00008\.safetensors' does not exist",
    ),
    "a truncated file": (
        lambda f: cut(f / "model-00002-of-00008.safetensors"),
        r"model-00002-of-00008\.safetensors \(\d+ bytes\) is damaged or cut short",
    ),
    "an empty file": (
        lambda f: (f / "model-00002-of-00008.safetensors").write_bytes(b""),
        r"model-00002-of-00008\.safetensors is empty",
    ),
    "a web page": (
        lambda f: (f / "model-00002-of-00008.safetensors").write_text("<!doctype html>"),
        r"model-00002-of-00008\.safetensors is a web page",
    ),
    "a Git LFS pointer": (
        lambda f: (f / "model-00002-of-00008.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        r"model-00002-of-00008\.safetensors is a Git LFS pointer",
    ),
    "integer weights": (lambda f: edit_shard(f, to_int8), r"model-00001.* is stored as torch\.int8, not as one of"),
    "an eos_token_id that is a string": (
        lambda f: change_config(f, "generation_config.json", eos_token_id="</s>"),
        r"generation_config\.json: eos_token_id is '</s>'; it must be a token id or a list",
    ),
}


@pytest.mark.parametrize(("damage", "message"), UNUSABLE.values(), ids=UNUSABLE)
def test_unusable_folders_are_refused(folder, tmp_path, damage, message):
    assert len(list(folder.glob("model-*-of-00008.safetensors"))) == 8
    copy = shutil.copytree(folder, tmp_path / "copy")
    damage(copy)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        Llama.build(copy, None, 32, 1)
    assert isinstance(error.value, AssertionError)
    assert str(copy) in str(error.value)


def test_the_limit_of_max_seq_len(folder):
    assert read_settings(folder / "config.json").params["max_position_embeddings"] == 131072
    with pytest.raises(ValueError, match="max_seq_len=131073 is over this model's limit of 131072"):
        Llama.build(folder, None, 131073, 1)


@pytest.mark.parametrize(
    ("factor", "changes", "limit"),
    [
        (4.0, {}, 8192),
        (2.5, {}, 5120),
        (1 / 3, {}, 682),
        (4.0, {"max_sequence_length": 7000}, 7000),
        (4.0, {"max_position_embeddings": ...}, None),
        (1e-9, {}, 2048),
        (1e300, {}, 2048),
    ],
)
def test_linear_rope_scaling_stretches_the_context(tmp_path, factor, changes, limit):
    """As in Vicuna 1.5 16k: max_position_embeddings 4096, factor 4, and max_sequence_length 16384."""
    write_hugging_face(tmp_path, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": factor})
    change_config(tmp_path, **{"max_position_embeddings": 2048} | changes)
    assert read_settings(tmp_path).params["max_position_embeddings"] == limit
    if limit is not None and limit > 5000:
        assert Llama.build(tmp_path, None, limit, 1, device="cpu").model.params.max_seq_len == limit
        with pytest.raises(ValueError, match=f"max_seq_len={limit + 1} is over this model's limit of {limit}"):
            Llama.build(tmp_path, None, limit + 1, 1)


def test_a_longer_sequence_without_scaling_is_no_limit(tmp_path):
    """As in old conversions of Llama 1, which say both, and in other kinds of scaling."""
    write_hugging_face(tmp_path, **MODELS["rope factor 8"])
    change_config(tmp_path, max_position_embeddings=4096, max_sequence_length=2048)
    assert read_settings(tmp_path).params["max_position_embeddings"] == 4096


def test_metas_files_in_the_folder(folder, tmp_path, tiny_checkpoint):
    """In `original`, as Meta publishes them; and a `.pth` file of other content, as from a training run."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    shutil.copytree(tiny_checkpoint, copy / "original")
    torch.save({"rng": torch.zeros(3)}, copy / "rng_state.pth")
    assert load(copy).n_layers == 2
    for path in copy.glob("model*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"pass ckpt_dir='.*original'"):
        load(copy)
    assert load(copy / "original")


def test_a_file_instead_of_the_folder(folder):
    for path in (folder / "config.json", next(folder.glob("model-*"))):
        with pytest.raises(ValueError, match="is one of a checkpoint's files: pass its folder"):
            Llama.build(path, None, 32, 1)
