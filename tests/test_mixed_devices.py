"""Nothing mixes tensors of two devices, and only what must be is copied between them. Shown by a GPU without values."""

from types import SimpleNamespace

import pytest
import torch
from conftest import ScriptedModel, ScriptedTokenizer
from fake_gpu import GPU, NUMBER, TOKEN, fake_gpu, on_gpu
from torch._subclasses.fake_tensor import FakeTensor

from llama import Llama
from llama.finetune.data import Example
from llama.finetune.lora import merge_lora
from llama.finetune.loss import mean_loss
from llama.finetune.optimizer import Optimizer
from llama.finetune.training import checkpoint_activations, select_trainable, train_step
from llama.finetune.training_params import TrainingParams
from llama.kv_cache import KVCache
from llama.non_finite import explain_non_finite
from llama.sampling import sample, sampling_probs, token_logprobs

BATCH, SEQ = 3, 12
EQUAL, UNEQUAL = [[5, 6, 7], [4, 4, 4]], [[5, 6, 7], [8], [9] * SEQ]
ONE_ROW = [[5, 6, 7]]


@pytest.fixture(scope="module")
def module_gpu():
    with fake_gpu() as gpu:
        yield gpu


@pytest.fixture(scope="module")
def module_llama(module_gpu):
    llama = Llama(on_gpu(), ScriptedTokenizer())
    llama.generate(ONE_ROW, 2)
    return llama


@pytest.fixture
def gpu(module_gpu):
    module_gpu.clear()
    return module_gpu


@pytest.fixture
def llama(module_llama, gpu):
    """A network on the GPU that has been used before."""
    return module_llama


def check_copies(gpu, *more_dtypes: torch.dtype) -> None:
    """Check that only ids, positions and numbers of rows went to the GPU, and only tokens and logprobs came back.

    Args:
        more_dtypes: of what else may have gone to the GPU.
    """
    uploads = [copy for copy in gpu.uploads if copy[0] != torch.complex64]
    assert len(gpu.uploads) - len(uploads) <= 1  # the rotations, at the first call
    assert {dtype for dtype, _ in uploads} <= {torch.int64, *more_dtypes}
    assert {dtype for dtype, _ in gpu.downloads} <= {torch.int64, torch.float32}
    assert all(n <= BATCH * SEQ for _, n in uploads + gpu.downloads)


@pytest.mark.parametrize(
    ("quantize", "dtype"),
    [(None, torch.float32), (None, torch.bfloat16), ("int8", torch.float16), ("int4", torch.bfloat16)],
)
@torch.no_grad()
def test_prefill_and_decoding(gpu, quantize, dtype):
    model = on_gpu(dtype, quantize, use_scaled_rope=True, tie_embeddings=quantize == "int8")
    weights = [*model.parameters(), *model.buffers()]
    assert len(weights) >= 20
    assert {weight.device for weight in weights} == {GPU}
    gpu.clear()
    tokens = torch.zeros(BATCH, SEQ, dtype=torch.long, device=GPU)
    positions = torch.tensor([SEQ, SEQ + 2, 1])  # the decode loop keeps the rows' positions on the CPU
    hidden = model.hidden_states(tokens, 0)
    rows = torch.arange(BATCH, device=GPU)
    logits = model.logits(hidden[rows, torch.full((BATCH,), SEQ - 1, device=GPU)])
    for temperature, start_pos in ((0, SEQ), (0.6, SEQ + 1), (0.6, positions), (1, positions.to(GPU))):
        next_token = sample(logits, temperature, 0.9, top_k=5)
        logprobs = token_logprobs(logits, next_token)
        probs = sampling_probs(logits, temperature, 0.9)
        logits = model(next_token[:, None], start_pos)[:, -1]
        assert {x.device for x in (next_token, logprobs, probs, logits)} == {GPU}
        assert (logits.shape, logits.dtype) == ((BATCH, 320), torch.float32)
    for chunk in (tokens[:, :4], tokens[:1, :4], tokens[:1, :1]):
        assert model(chunk, 6).device == GPU
        assert model(chunk, torch.full((len(chunk),), 6)).device == GPU
        assert model(chunk).device == GPU  # without a cache
    assert (model.cache.keys.device, model.cache.values.dtype) == (GPU, dtype)
    check_copies(gpu)


@pytest.mark.parametrize("prompts", [ONE_ROW, EQUAL, UNEQUAL], ids=["one row", "equal", "unequal"])
def test_the_decode_loop(llama, gpu, prompts):
    for temperature in (0, 0.6):
        tokens, logprobs = llama.generate(prompts, 4, temperature, logprobs=True, echo=True)
        assert tokens == [prompt + [TOKEN] * 4 for prompt in prompts]
        assert logprobs[0] == [0.0] + [NUMBER] * 6
    check_copies(gpu)


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 5},
        {"num_return_sequences": 2},
        {"num_beams": 2, "num_return_sequences": 2},
        {"num_beams": 2, "num_return_sequences": 2, "logits_processor": lambda input_ids, scores: scores * 2},
        {"logits_processor": lambda input_ids, scores: scores * 2},
        {"stop": "7 7"},
        {"prompt_lookup_num_tokens": 3},
        {"prompt_lookup_num_tokens": 3, "temperature": 0},
        {"prompt_lookup_num_tokens": 3, "logits_processor": lambda input_ids, scores: scores * 2},
        {"draft_model": None},
    ],
    ids=lambda options: " and ".join(options),
)
@pytest.mark.parametrize("prompts", [EQUAL, [[5, 6, 7], [8, 9]]], ids=["equal", "unequal"])
def test_the_options_of_a_call(llama, gpu, prompts, options):
    token = (
        int(NUMBER) if "num_beams" in options else TOKEN
    )  # beams, their tokens and logprobs are copied as one tensor
    if "draft_model" in options:
        options = {"draft_model": Llama(on_gpu(), ScriptedTokenizer())}
        gpu.clear()
    tokens, _ = llama.generate(prompts, 4, logprobs=True, **options)
    assert tokens == [[token] * (0 if "stop" in options else 4)] * (2 * options.get("num_return_sequences", 1))
    check_copies(gpu, *([torch.float32] if "num_beams" in options else []))


@pytest.mark.parametrize("prompts", [ONE_ROW, EQUAL, UNEQUAL], ids=["one row", "equal", "unequal"])
def test_scoring(llama, gpu, prompts, monkeypatch):
    monkeypatch.setattr("llama.decoding.MAX_LOGITS", 5 * 320)  # several blocks of positions
    tokens, logprobs = llama.generate(prompts, 0, logprobs=True, echo=True)
    assert tokens == prompts
    assert logprobs == [[0.0] + [NUMBER] * (len(prompt) - 1) for prompt in prompts]
    check_copies(gpu)


def test_the_cache_is_reused(llama, gpu):
    llama.generate(EQUAL, 2, reuse_cache=True)
    gpu.clear()
    longer = [[*prompt, TOKEN, TOKEN, 9] for prompt in EQUAL]
    assert llama.generate(longer, 4, reuse_cache=True)[0] == [[TOKEN] * 4] * 2
    # A reused position costs no upload of its token. (The answer's last token has not been in the network.)
    assert gpu.uploads[0] == (torch.int64, 2 * 2)
    check_copies(gpu)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantized_weights(gpu, quantize):
    llama = Llama(on_gpu(quantize=quantize), ScriptedTokenizer())
    gpu.clear()
    tokens, _ = llama.generate(UNEQUAL, 4, logprobs=True, echo=True)
    assert tokens == [prompt + [TOKEN] * 4 for prompt in UNEQUAL]
    check_copies(gpu)
    products = [name for name in gpu.operations if "_weight_int4pack_mm" in str(name)]
    assert bool(products) == (quantize == "int4")


@pytest.mark.parametrize(
    ("train", "dtype", "activation_checkpointing"),
    [
        ("all", torch.float32, False),
        ("all", torch.bfloat16, True),
        ("lora", torch.bfloat16, False),
        ("norms", torch.bfloat16, True),
    ],
)
def test_fine_tuning(gpu, monkeypatch, train, dtype, activation_checkpointing):
    """All but the backward pass, which torch doesn't run without a GPU."""
    model = on_gpu(dtype)

    def backward(loss):
        assert loss.device == GPU
        assert loss.requires_grad
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    params = training_params(train, activation_checkpointing)
    select_trainable(model, params)
    assert {parameter.device for parameter in model.parameters()} == {GPU}
    if activation_checkpointing:
        checkpoint_activations(model)
    gpu.clear()
    examples = [Example(1, list(range(3, 3 + n)), [False] * 2 + [True] * (n - 2), 0) for n in (5, 7, 9)]
    optimizer = Optimizer(model, weight_decay=0.1)
    assert train_step(model, optimizer, examples, 1e-3, params) == (NUMBER, NUMBER)
    assert any("_fused_adamw" in str(operation) for operation in gpu.operations)
    optimizer.restore(optimizer.state())
    assert train_step(model, optimizer, examples, 1e-3, params) == (NUMBER, NUMBER)
    assert mean_loss(model, examples, batch_size=2) == NUMBER / sum(example.n_loss_tokens for example in examples)
    merge_lora(model)
    assert {parameter.device for parameter in model.parameters()} == {GPU}
    assert all(isinstance(parameter, FakeTensor) for parameter in model.parameters())
    check_copies(gpu, torch.bool)  # which tokens the loss counts


def training_params(train: str, activation_checkpointing: bool) -> TrainingParams:
    return TrainingParams(
        format="plain",
        train=train,
        lr=None,
        epochs=1,
        batch_size=2,
        grad_accum=1,
        max_seq_len=64,
        warmup=0.1,
        weight_decay=0.1,
        clip=1.0,
        val_fraction=0.0,
        save_every=1,
        seed=1,
        lora_rank=4,
        activation_checkpointing=activation_checkpointing,
    )


def test_decoding_continues_on_the_device_of_the_logits(gpu):
    """A network of another kind may have no parameters, or have them on several devices."""

    class OnGPU(ScriptedModel):
        def forward(self, tokens, start_pos):
            return torch.zeros(*tokens.shape, self.vocab_size, device=GPU)

    llama = Llama(OnGPU(), ScriptedTokenizer())
    tokens, logprobs = llama.generate([[5, 6, 7], [4, 4]], 3, 0.6, logprobs=True, echo=True)
    assert tokens == [[5, 6, 7, 7, 7, 7], [4, 4, 7, 7, 7]]
    assert logprobs[1] == [0.0] + [NUMBER] * 4


@torch.no_grad()
def test_the_cache_is_changed_where_it_is(gpu):
    cache = KVCache((2, 3, 2, 5, 4), device=GPU, dtype=torch.float32)
    for rows in (torch.tensor([1, 0, 0]), torch.tensor([1, 0, 0], device=GPU)):
        cache.reorder(rows, 4)
    cache.clear(1, 3)
    assert (cache.keys.device, cache.values.device) == (GPU, GPU)
    check_copies(gpu)


def test_the_layer_that_computes_nan_is_looked_for_on_the_device(llama, gpu):
    assert "the network computed NaN or infinity, after the last layer" in explain_non_finite(llama.model, [5, 6])
    assert gpu.waits[torch.ops.aten._local_scalar_dense.default] == llama.model.n_layers


def test_the_generator_of_a_seed_is_made_where_the_logits_are(llama, monkeypatch):
    devices = []

    def generator(device):  # without CUDA, torch.Generator can't be made there
        devices.append(device)
        return SimpleNamespace(manual_seed=lambda seed: None)

    monkeypatch.setattr(torch, "Generator", generator)
    llama.generate([[5, 6], [8, 9]], 2, seed=1)
    assert devices == [GPU]


@torch.no_grad()
def test_a_mixture_is_noticed(llama):
    """Else the tests above would show nothing. Most of these torch accepts, and copies."""
    on_both = torch.zeros(BATCH, device=GPU), torch.zeros(BATCH, dtype=torch.long)
    for mix in (
        lambda gpus, cpus: llama.model(cpus[None], 0),
        lambda gpus, cpus: gpus + cpus,
        lambda gpus, cpus: gpus[cpus],
        lambda gpus, cpus: gpus.index_put_((cpus,), gpus),
        lambda gpus, cpus: torch.nn.functional.scaled_dot_product_attention(gpus, gpus, cpus),
    ):
        with pytest.raises(AssertionError, match="mixes devices"):
            mix(*on_both)
