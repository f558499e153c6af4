"""Decoding steps in compiled form: their tokens are the same, whatever happens to the network or the files."""

import copy

import pytest
import torch
from conftest import ScriptedTokenizer, run_python, tiny_model, write_meta_checkpoint
from forked import fork_python

from llama import Llama, Transformer, compiled
from llama.checkpoint import load_model, open_checkpoint
from llama.compiled import cache_folder, compile_model

pytestmark = pytest.mark.slow  # each kind of model is compiled once, in some 8 s

PROMPT = list(range(3, 20))


@pytest.fixture(scope="module", autouse=True)
def cache_home(tmp_path_factory):
    """Compiled code is kept for the tests of this file, and not in the user's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def compilations(monkeypatch) -> list[int]:
    """Grows by an item for each compilation."""
    counted: list[int] = []

    def count(*arguments):
        counted.append(1)
        return compile_layer(*arguments)

    compile_layer = compiled.compile_layer
    monkeypatch.setattr(compiled, "compile_layer", count)
    return counted


def compiled_model(**changes) -> Transformer:
    model = tiny_model(**changes)
    compile_model(model)
    assert model.compiled is not None
    assert model.compiled.layers
    return model


def steps(model: Transformer, start: int, end: int) -> torch.Tensor:
    """The logits of decoding steps at positions from `start` to `end`, after a prompt."""
    tokens = torch.arange(end) % model.vocab_size
    with torch.inference_mode():
        model.forward(tokens[None, :start], 0)
        return torch.cat([model.forward(tokens[None, i : i + 1], i) for i in range(start, end)], dim=1)


def llama(model: Transformer) -> Llama:
    return Llama(model, ScriptedTokenizer(stop_tokens=()))


def test_the_logits_of_every_position_without_compiling_again(compilations):
    model, plain = compiled_model(), tiny_model()
    n_compiled = len(compilations)
    for start in (1, 2, 17):
        assert (steps(model, start, 96) - steps(plain, start, 96)).abs().max() < 1e-4
    assert len(compilations) == n_compiled


def test_the_compiled_layers_are_those_that_run(monkeypatch):
    model = compiled_model()
    for layer in model.layers:
        monkeypatch.setattr(layer, "forward", None)
    with torch.inference_mode():
        model.forward(torch.tensor([[5]]), 7)


def test_greedy_tokens_and_logprobs():
    expected, logprobs = llama(tiny_model()).generate([PROMPT], 60, temperature=0, logprobs=True)
    tokens, compiled_logprobs = llama(compiled_model()).generate([PROMPT], 60, temperature=0, logprobs=True)
    assert tokens == expected
    assert torch.allclose(torch.tensor(compiled_logprobs), torch.tensor(logprobs), atol=1e-4)


def test_bfloat16_is_rounded_no_more_than_without():
    exact, plain, model = tiny_model(), tiny_model().bfloat16(), tiny_model().bfloat16()
    compile_model(model)
    assert model.compiled.layers
    expected = steps(exact, 20, 40)
    difference = (steps(model, 20, 40) - expected).abs().mean()
    assert difference < 1.2 * (steps(plain, 20, 40) - expected).abs().mean()


@pytest.mark.parametrize(
    ("quantize", "sizes", "output_is_compiled"),
    [
        ("int8", {"n_kv_heads": 4, "dim": 96, "head_dim": 32, "n_layers": 3}, compiled.COMPILED_INT8_IS_FAST),
        ("int4", {}, False),  # as on processors where that is no faster
    ],
)
def test_quantized(quantize, sizes, output_is_compiled, llama3_path, tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "COMPILED_INT8_IS_FAST", output_is_compiled)
    checkpoint = open_checkpoint(write_meta_checkpoint(tmp_path, tiny_model(**sizes), llama3_path))
    args = checkpoint.settings.model_args(checkpoint.settings.params["vocab_size"], 96, 4)
    model, plain = (
        load_model(checkpoint, args, device=torch.device("cpu"), dtype=torch.float32, quantize=quantize)
        for _ in range(2)
    )
    compile_model(model)
    assert model.compiled.layers
    assert len(list(cache_folder().glob(f"{model.compiled._key}-*.pt2"))) == 1 + output_is_compiled
    assert (steps(model, 5, 40) - steps(plain, 5, 40)).abs().max() < 1e-4


def test_every_way_to_decode():
    compiled_llama, plain = llama(compiled_model()), llama(tiny_model())
    prompts = [PROMPT, PROMPT[:4], PROMPT[:9]]

    def forbid_sevens(input_ids, scores):
        return scores.index_fill(-1, torch.tensor([7]), -torch.inf)

    for options in (
        {"temperature": 0},
        {"temperature": 0.8, "seed": 3, "top_k": 20},
        {"temperature": 0.8, "seed": 3, "num_return_sequences": 1, "logits_processor": forbid_sevens},
    ):
        for batch in ([PROMPT], prompts):
            assert compiled_llama.generate(batch, 30, **options) == plain.generate(batch, 30, **options)
    for draft, model in ((plain, compiled_llama), (compiled_llama, plain)):  # steps, and passes of several tokens
        assert model.generate([PROMPT], 30, 0, draft_model=draft) == plain.generate([PROMPT], 30, 0)
    assert compiled_llama.generate([PROMPT], 20, num_beams=3) == plain.generate([PROMPT], 20, num_beams=3)
    pieces = compiled_llama.generate_stream([PROMPT], 30, temperature=0)
    assert [piece.token for piece in pieces if piece.token is not None] == plain.generate([PROMPT], 30, 0)[0][0]
    longer = [[*PROMPT, 9, 8, 7]]
    compiled_llama.generate([PROMPT], 10, 0)
    assert compiled_llama.generate(longer, 10, 0, reuse_cache=True) == plain.generate(longer, 10, 0)


def test_a_prompt_of_one_token_and_a_full_context():
    for length in (1, 2, 94, 95):
        prompt = [list(range(length))]
        assert llama(compiled_model()).generate(prompt, 96, 0) == llama(tiny_model()).generate(prompt, 96, 0)


def test_replaced_weights_and_hooks_count():
    model, other = compiled_model(), tiny_model(seed=1)
    model.layers[1].attention.wo.weight = other.layers[1].attention.wo.weight
    plain = tiny_model()
    plain.layers[1].attention.wo.weight = other.layers[1].attention.wo.weight
    assert (steps(model, 5, 20) - steps(plain, 5, 20)).abs().max() < 1e-4
    calls = []
    hook = model.layers[0].feed_forward.register_forward_hook(lambda *_: calls.append(1))
    steps(model, 5, 20)
    assert len(calls) == 16  # the prompt, and each step
    hook.remove()
    steps(model, 5, 20)
    assert len(calls) == 16


def test_a_change_of_dtype_counts():
    model, plain = compiled_model(), tiny_model().bfloat16()
    steps(model, 5, 20)
    difference = steps(model.bfloat16(), 5, 20) - steps(plain, 5, 20)
    assert model.compiled.layers
    assert difference.abs().mean() < 0.1


def test_a_copy_has_a_cache_of_its_own():
    model = compiled_model()
    clone = copy.deepcopy(model)
    with torch.no_grad():
        clone.layers[0].feed_forward.w1.weight.zero_()
    difference = steps(clone, 5, 20) - steps(tiny_model(), 5, 20)
    assert difference.abs().max() > 0.1
    assert (steps(model, 5, 20) - steps(tiny_model(), 5, 20)).abs().max() < 1e-4


def test_it_is_taken_from_the_disk_by_another_model(compilations):
    compiled_model()
    n_compiled = len(compilations)
    model, plain = tiny_model(seed=2), tiny_model(seed=2)
    compile_model(model)
    assert len(compilations) == n_compiled
    assert (steps(model, 5, 20) - steps(plain, 5, 20)).abs().max() < 1e-4


def test_a_damaged_file_is_compiled_again(monkeypatch, caplog):
    path = cache_folder() / f"{compiled_model().compiled._key}-layer.pt2"
    content = path.read_bytes()
    path.write_bytes(content[:1000])

    def compile_again(model, path):
        path.write_bytes(content)  # which is what `compile_layer` would write, in some seconds
        return path

    monkeypatch.setattr(compiled, "compile_layer", compile_again)
    assert (steps(compiled_model(), 5, 20) - steps(tiny_model(), 5, 20)).abs().max() < 1e-4
    assert path.read_bytes() == content
    assert "compiled again" in caplog.text
    assert not list(cache_folder().glob(".compiling-*"))


def test_without_a_compiler_steps_run_as_they_are(tmp_path, tiny_checkpoint):
    script = (
        "import logging, sys; logging.basicConfig()\n"
        "from llama import Llama\n"
        "for compile in (False, True):\n"
        "    model = Llama.build(sys.argv[1], None, 64, 1, compile=compile)\n"
        "    print(model.generate([[5, 6, 7]], 20, temperature=0)[0][0])\n"
    )
    result = run_python(
        "-c",
        script,
        tiny_checkpoint,
        CXX="/nonexistent/c++",
        XDG_CACHE_HOME=str(tmp_path),
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path),
    )
    assert result.returncode == 0, result.stderr
    plain, compiled_tokens = result.stdout.splitlines()
    assert plain == compiled_tokens
    assert "decoding steps run without being compiled" in result.stderr
    assert "No working C++ compiler" in result.stderr


def test_several_processes_run_steps_as_they_are(tiny_checkpoint, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import logging, sys; logging.basicConfig()\n"
        "from llama import Llama\n"
        "model = Llama.build(sys.argv[1], None, 64, 1, compile=True)\n"
        "print(model.generate([[5, 6, 7]], 20, temperature=0)[0][0])\n"
    )
    result = fork_python(script, tiny_checkpoint, ranks=2)
    assert result.returncode == 0, result.stderr
    assert "has no effect with several processes" in result.stderr
    plain = Llama.build(tiny_checkpoint, None, 64, 1)
    assert result.stdout.strip() == str(plain.generate([[5, 6, 7]], 20, temperature=0)[0][0])


def test_a_short_context_has_nothing_to_compile(caplog):
    model = tiny_model(max_seq_len=3)
    compile_model(model)
    assert not model.compiled.layers
    assert not caplog.records
    assert llama(model).generate([[1, 2]], 5, 0) == llama(tiny_model(max_seq_len=3)).generate([[1, 2]], 5, 0)


def test_layers_that_are_not_alike_run_as_they_are():
    """One of them, compiled, could not serve as all."""
    model = compiled_model()
    expected = steps(model, 5, 20)
    weight = model.layers[1].feed_forward.w1.weight
    model.layers[1].feed_forward.w1.weight = torch.nn.Parameter(weight.detach().T.contiguous().T)  # other strides
    assert (steps(model, 5, 20) - expected).abs().max() < 1e-4
    assert not model.compiled.layers


def test_under_autocast_steps_run_as_they_are():
    model, plain = compiled_model(), tiny_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(steps(model, 5, 20), steps(plain, 5, 20))


def test_prompts_of_one_token_are_looked_at_too():
    model, other = compiled_model(), tiny_model(seed=1)
    llama(model).generate([[5]], 5, 0)
    plain = tiny_model()
    for network in (model, plain):
        network.layers[1].attention.wo.weight = other.layers[1].attention.wo.weight
    assert llama(model).generate([[5]], 5, 0) == llama(plain).generate([[5]], 5, 0)
