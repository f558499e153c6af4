"""The published models, on the meta device: parameters' names, shapes and slices, and the memory they take."""

import json
import math
import resource
from types import SimpleNamespace

import pytest
import torch

import llama.distributed
from llama import Transformer
from llama.checkpoint import parameter_count, parameter_shapes, read_settings, share
from llama.checkpoint.hugging_face import LAYER_PREFIX, NAMES
from llama.checkpoint.parameters import network_name
from llama.memory import Footprint, footprint

LLAMA2 = {"multiple_of": 256, "norm_eps": 1e-5, "vocab_size": -1}
LLAMA3 = {"n_kv_heads": 8, "vocab_size": 128256, "norm_eps": 1e-5, "rope_theta": 500000.0}
SCALED = LLAMA3 | {"use_scaled_rope": True}

# The published params.json, the feed-forward width, and the number of parameters.
MODELS = {
    "Llama 2 7B": (LLAMA2 | {"dim": 4096, "n_heads": 32, "n_layers": 32}, 11008, 6_738_415_616),
    "Llama 2 13B": (LLAMA2 | {"dim": 5120, "n_heads": 40, "n_layers": 40}, 13824, 13_015_864_320),
    "Llama 2 70B": (
        LLAMA2
        | {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8, "n_layers": 80},
        28672,
        68_976_648_192,
    ),
    "Llama 3 8B": (
        LLAMA3 | {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 1024, "ffn_dim_multiplier": 1.3},
        14336,
        8_030_261_248,
    ),
    "Llama 3 70B": (
        LLAMA3 | {"dim": 8192, "n_layers": 80, "n_heads": 64, "multiple_of": 4096, "ffn_dim_multiplier": 1.3},
        28672,
        70_553_706_496,
    ),
    "Llama 3.1 405B": (
        SCALED | {"dim": 16384, "n_layers": 126, "n_heads": 128, "multiple_of": 4096, "ffn_dim_multiplier": 1.2},
        53248,
        405_853_388_800,
    ),
    "Llama 3.2 1B": (
        SCALED | {"dim": 2048, "n_layers": 16, "n_heads": 32, "multiple_of": 256, "ffn_dim_multiplier": 1.5},
        8192,
        1_235_814_400,
    ),
    "Llama 3.2 3B": (
        SCALED | {"dim": 3072, "n_layers": 28, "n_heads": 24, "multiple_of": 256, "ffn_dim_multiplier": 1.0},
        8192,
        3_212_749_824,
    ),
}
TIED = ("Llama 3.2 1B", "Llama 3.2 3B")


def sizes_for(name: str) -> list[int]:
    return [1, 2, 4, 8, 16] if "405B" in name else [1, 2, 4, 8]


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] * (MODELS[name][2] > 10e9)) for name in MODELS])
def model(request, tmp_path):
    """A published model's name, and a folder with its params.json in `meta` and its config.json in `hf`."""
    params, width, _ = MODELS[request.param]
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "params.json").write_text(json.dumps(params))
    config = {
        "model_type": "llama",
        "hidden_size": params["dim"],
        "intermediate_size": width,
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params.get("n_kv_heads", params["n_heads"]),
        "vocab_size": 32000 if params["vocab_size"] == -1 else params["vocab_size"],
        "rms_norm_eps": params["norm_eps"],
        "rope_theta": params.get("rope_theta", 10000.0),
        "tie_word_embeddings": request.param in TIED,
        "max_position_embeddings": 131072 if params.get("use_scaled_rope") else 4096,
    }
    if params.get("use_scaled_rope"):
        factor = 32.0 if request.param in TIED else 8.0
        config["rope_scaling"] = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0}
        config["rope_scaling"] |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    return request.param, tmp_path


def args_of(folder, layout, max_seq_len=16):
    settings = read_settings(folder / layout)
    vocab_size = settings.params["vocab_size"]
    return settings.model_args(32000 if vocab_size == -1 else vocab_size, max_seq_len, 1)


def test_both_layouts_describe_the_same_model(model):
    name, folder = model
    meta, hugging_face = args_of(folder, "meta"), args_of(folder, "hf")
    for attribute in ("dim", "n_layers", "n_heads", "kv_heads", "head_size", "ffn_size", "vocab_size", "norm_eps"):
        assert getattr(meta, attribute) == getattr(hugging_face, attribute), attribute
    assert (meta.use_scaled_rope, meta.rope_theta) == (hugging_face.use_scaled_rope, hugging_face.rope_theta)
    if meta.use_scaled_rope:
        assert meta.rope_scaling_factor == hugging_face.rope_scaling_factor == (32.0 if name in TIED else 8.0)
    assert meta.ffn_size == MODELS[name][1]


def test_names_and_shapes_are_those_of_transformers(model):
    import transformers

    _, folder = model
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(folder / "hf"))
    expected = {
        network_name(name, LAYER_PREFIX, NAMES): tuple(weight.shape) for name, weight in theirs.named_parameters()
    }
    assert parameter_shapes(args_of(folder, "hf")) == expected


def network_of_rank(monkeypatch, args, rank, size) -> Transformer:
    """The network, on the meta device, that one of `size` model-parallel processes would make."""
    group = SimpleNamespace(
        model_parallel_is_initialized=lambda: True,
        get_model_parallel_world_size=lambda: size,
        get_model_parallel_rank=lambda: rank,
    )
    monkeypatch.setattr(llama.distributed, "groups", group)
    with torch.device("meta"):
        return Transformer(args)


def test_parameters_of_each_rank_are_its_share(model, monkeypatch):
    name, folder = model
    args = args_of(folder, "hf")
    shapes = parameter_shapes(args)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for size in sizes_for(name):
        for rank in {0, size - 1}:
            parameters = dict(network_of_rank(monkeypatch, args, rank, size).named_parameters())
            assert parameters.keys() == shapes.keys()
            for parameter, weight in parameters.items():
                assert weight.is_meta
                axis, start, stop = share(parameter, shapes[parameter], args, rank, size)
                expected = list(shapes[parameter])
                if axis is not None:
                    expected[axis] = stop - start
                assert list(weight.shape) == expected, (parameter, size)
            assert sum(weight.numel() for weight in parameters.values()) == parameter_count(args, size)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


# (model, parameter, processes) -> the shape on the last of them, computed by hand.
SHAPES_BY_HAND = {
    ("Llama 2 70B", "layers.79.attention.wk.weight", 8): (128, 8192),
    ("Llama 2 70B", "layers.79.feed_forward.w2.weight", 8): (8192, 3584),
    ("Llama 2 13B", "tok_embeddings.weight", 2): (16000, 5120),
    ("Llama 3 8B", "layers.0.attention.wv.weight", 4): (256, 4096),
    ("Llama 3 70B", "output.weight", 8): (16032, 8192),
    ("Llama 3.1 405B", "layers.125.attention.wq.weight", 16): (1024, 16384),
    ("Llama 3.1 405B", "layers.125.attention.wk.weight", 16): (128, 16384),  # each of the 8 kv heads on two processes
    ("Llama 3.1 405B", "layers.0.feed_forward.w1.weight", 16): (3328, 16384),
    ("Llama 3.2 1B", "layers.15.attention.wo.weight", 4): (2048, 512),
    ("Llama 3.2 3B", "layers.27.attention.wk.weight", 8): (128, 3072),
    ("Llama 3.2 3B", "norm.weight", 8): (3072,),
}


@pytest.mark.parametrize(
    ("key", "shape"), SHAPES_BY_HAND.items(), ids=[" ".join(map(str, key)) for key in SHAPES_BY_HAND]
)
def test_shapes_computed_by_hand(monkeypatch, tmp_path, key, shape):
    name, parameter, size = key
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "params.json").write_text(json.dumps(MODELS[name][0]))
    model = network_of_rank(monkeypatch, args_of(tmp_path, "meta"), size - 1, size)
    assert tuple(model.get_parameter(parameter).shape) == shape


def test_footprint_without_weights(model):
    name, folder = model
    parameters = MODELS[name][2]
    for layout in ("meta", "hf"):
        whole = footprint(folder / layout, max_seq_len=2048, max_batch_size=4, dtype=torch.bfloat16)
        assert whole.parameters == parameters
        assert whole.weight_bytes == 2 * whole.parameters
        for size in sizes_for(name):
            share_of_one = footprint(
                folder / layout, max_seq_len=2048, max_batch_size=4, dtype=torch.bfloat16, model_parallel_size=size
            )
            assert share_of_one.parameters == whole.parameters
            args = args_of(folder, layout, 2048)
            norms = (2 * args.n_layers + 1) * args.dim
            repeated = max(size // args.kv_heads, 1)  # processes that hold the same kv head
            kv = 2 * args.n_layers * args.kv_heads * args.head_size * args.dim
            assert share_of_one.weight_bytes * size == 2 * (whole.parameters + norms * (size - 1) + kv * (repeated - 1))
            assert share_of_one.cache_bytes * size == whole.cache_bytes * repeated


def test_footprint_computed_by_hand(tmp_path):
    (tmp_path / "params.json").write_text(json.dumps(MODELS["Llama 3 8B"][0]))
    whole = footprint(tmp_path / "params.json", max_seq_len=8192, max_batch_size=1, dtype=torch.bfloat16)
    assert whole == Footprint(8_030_261_248, 16_060_522_496, 2**30)
    half = footprint(tmp_path, max_seq_len=8192, max_batch_size=6, dtype=torch.float32, model_parallel_size=2)
    assert half.cache_bytes == 6 * 2**30
    assert math.isclose(half.weight_bytes, 2 * 8_030_261_248, rel_tol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_parallel_size": 3}, "can't be split over 3 processes, only over one of"),
        ({"max_seq_len": 9000}, "max_seq_len=9000 is over this model's limit of 8192"),
        ({"max_batch_size": 0}, "max_batch_size=0 must be at least 1"),
    ],
)
def test_invalid_arguments_of_footprint(tmp_path, options, message):
    (tmp_path / "params.json").write_text(json.dumps(MODELS["Llama 3 8B"][0]))
    with pytest.raises(ValueError, match=message):
        footprint(tmp_path, **{"max_seq_len": 16, "max_batch_size": 1, "dtype": torch.float16} | options)
