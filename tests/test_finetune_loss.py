"""The masked loss, training steps, AdamW and LoRA, compared with transformers, torch and their definitions."""

import copy
import io
import math

import pytest
import torch
from conftest import hugging_face_twin, same_weights, tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode
from train_everything import random_examples, training_params

from llama.errors import InputError
from llama.finetune.data import Example, make_batch
from llama.finetune.lora import LoRALinear, add_lora, merge_lora
from llama.finetune.loss import mean_loss, summed_loss
from llama.finetune.optimizer import BETAS, Optimizer, learning_rate
from llama.finetune.training import checkpoint_activations, select_trainable, train, train_step
from llama.finetune.training_params import TRAIN
from llama.quantized import Int8Weight


def transformers_loss(twin, rows):
    """The mean over all tokens that count, from one call for each row, so that there is no padding; with gradients."""
    total = 0
    for row in rows:
        labels = [token if counts else -100 for token, counts in zip(row.tokens, row.loss_mask, strict=True)]
        loss = twin(input_ids=torch.tensor([row.tokens]), labels=torch.tensor([labels])).loss
        total = total + loss * row.n_loss_tokens
    return total / sum(row.n_loss_tokens for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_the_same_loss_and_gradients_as_transformers(tie_embeddings):
    model = tiny_model(tie_embeddings=tie_embeddings)
    twin, rows = hugging_face_twin(model), random_examples()
    loss = summed_loss(model, make_batch(rows)) / sum(row.n_loss_tokens for row in rows)
    theirs = transformers_loss(twin, rows)
    assert loss.item() == pytest.approx(theirs.item(), abs=1e-4)
    assert loss.item() > 3
    loss.backward()
    theirs.backward()
    ours, hugging = dict(model.named_parameters()), dict(twin.named_parameters())
    for name, other in (
        ("tok_embeddings.weight", "model.embed_tokens.weight"),
        ("layers.0.feed_forward.w1.weight", "model.layers.0.mlp.gate_proj.weight"),
        ("layers.1.attention.wv.weight", "model.layers.1.self_attn.v_proj.weight"),
        ("norm.weight", "model.norm.weight"),
    ):
        torch.testing.assert_close(ours[name].grad, hugging[other].grad, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_same_loss_as_transformers_on_a_padded_batch():
    model, rows = tiny_model(), random_examples()
    tokens, _, _ = make_batch(rows)
    tokens = torch.nn.functional.pad(tokens, (0, 1))
    labels = torch.full_like(tokens, -100)
    for i, row in enumerate(rows):
        tokens[i, : len(row.tokens)] = torch.tensor(row.tokens)
        labels[i, : len(row.tokens)] = torch.where(torch.tensor(row.loss_mask), torch.tensor(row.tokens), -100)
    attention_mask = torch.arange(tokens.shape[1]) < torch.tensor([[len(row.tokens)] for row in rows])
    theirs = hugging_face_twin(model)(input_ids=tokens, attention_mask=attention_mask, labels=labels).loss
    assert mean_loss(model, rows, 4) == pytest.approx(theirs.item(), abs=1e-4)


def test_the_loss_is_the_mean_negative_logprob_of_the_tokens_that_count():
    model, rows = tiny_model(), random_examples()
    logprobs = []
    for row in rows:
        with torch.no_grad():
            predicted = torch.log_softmax(model(torch.tensor([row.tokens]))[0].double(), dim=-1)
        logprobs += [
            predicted[i - 1, token].item()
            for i, (token, counts) in enumerate(zip(row.tokens, row.loss_mask, strict=True))
            if counts
        ]
    assert mean_loss(model, rows, 4) == pytest.approx(-sum(logprobs) / len(logprobs), abs=1e-4)


def test_each_token_counts_the_same_in_any_batches():
    """The loss is the mean over tokens, not a mean of the means of batches or rows."""
    model, rows = tiny_model(), random_examples()
    losses = [mean_loss(model, rows, batch_size) for batch_size in (1, 2, 3, 7, 50)]
    assert losses == pytest.approx([losses[0]] * 5, abs=1e-5)
    assert mean_loss(model, rows[::-1], 3) == pytest.approx(losses[0], abs=1e-5)
    by_rows = sum(mean_loss(model, [row], 1) for row in rows) / len(rows)
    assert abs(by_rows - losses[0]) > 1e-3  # the mean of the rows' means is another number


def test_padding_does_not_matter():
    model, rows = tiny_model(), random_examples()
    batch = make_batch(rows)
    padding = torch.tensor([[i >= len(row.tokens) for i in range(batch.tokens.shape[1])] for row in rows])
    assert padding.any()
    other = batch._replace(tokens=batch.tokens.masked_fill(padding, 7))
    assert summed_loss(model, batch).item() == pytest.approx(summed_loss(model, other).item(), abs=1e-4)


def test_only_positions_whose_targets_count_pass_through_output():
    model, rows = tiny_model(), random_examples()
    shapes = []
    model.output.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    summed_loss(model, make_batch(rows))
    assert shapes == [(sum(row.n_loss_tokens for row in rows), 320)]


def gradients(model, rows, **changes):
    """The gradients of one step by parameter, the loss, and the gradient norm. The weights are not changed."""
    select_trainable(model, training_params(**changes))
    optimizer = Optimizer(model, 0.0)
    result = {}

    def record(rate, clip):
        result.update({name: weight.grad.clone() for name, weight in optimizer.master_weights.items()})
        return optimizer.gradient_norm()

    optimizer.step = record
    loss, norm = train_step(model, optimizer, rows, 0.0, training_params(**changes))
    return result, loss, norm


def test_gradient_accumulation_changes_nothing():
    rows = random_examples(8)
    whole, loss, norm = gradients(tiny_model(), rows, batch_size=8)
    for batch_size in (1, 3, 4):
        accumulated, accumulated_loss, accumulated_norm = gradients(tiny_model(), rows, batch_size=batch_size)
        assert (accumulated_loss, accumulated_norm) == pytest.approx((loss, norm), rel=1e-5)
        assert accumulated.keys() == whole.keys()
        for name, gradient in whole.items():
            torch.testing.assert_close(accumulated[name], gradient, rtol=1e-3, atol=1e-5)
    flat = torch.cat([gradient.flatten() for gradient in whole.values()])
    assert norm == pytest.approx(flat.double().norm().item(), rel=1e-5)


def test_a_completion_of_one_token():
    """Matrix products with few rows take another way (see llama.cpu_matmul), which has gradients too."""
    row = Example(1, [5, 6, 7, 8], [False, False, False, True])
    model = tiny_model()
    actual, actual_loss, _ = gradients(model, [row])
    expected, loss, _ = gradients(tiny_model(), [row, row])  # the mean of two equal rows, by the usual products
    assert actual_loss == pytest.approx(loss, abs=1e-5)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("train", ["all", "lora"])
def test_activation_checkpointing_gives_the_same_gradients(train):
    rows = random_examples()
    expected, loss, _ = gradients(tiny_model(), rows, train=train)
    model = tiny_model()
    calls = []
    model.layers[1].feed_forward.register_forward_pre_hook(lambda *_: calls.append(1))
    checkpoint_activations(model)
    actual, actual_loss, _ = gradients(model, rows, train=train)
    assert len(calls) == 4  # two batches, each computed twice
    assert actual_loss == pytest.approx(loss, abs=1e-6)
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-6)


def test_activation_checkpointing_keeps_less():
    def saved_elements(prepare):
        model, sizes = tiny_model(n_layers=4), []
        prepare(model)
        rows = make_batch(random_examples())
        weights = {weight.data_ptr() for weight in model.parameters()}

        def pack(tensor):
            sizes.append(tensor.numel() * (tensor.data_ptr() not in weights))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            summed_loss(model, rows)
        return sum(sizes)

    # A checkpointed layer saves its input only; what follows the last layer is saved as usual.
    assert saved_elements(checkpoint_activations) < saved_elements(lambda model: None) / 3


NAMES = {
    "attention": [f"layers.{i}.attention.{w}.weight" for i in range(2) for w in ("wq", "wk", "wv", "wo")],
    "norms": [f"layers.{i}.{part}_norm.weight" for i in range(2) for part in ("attention", "ffn")] + ["norm.weight"],
}


@pytest.mark.parametrize("train", ["all", "attention", "norms", "lora"])
def test_only_the_selected_weights_change(train):
    model, before = tiny_model(tie_embeddings=True), tiny_model(tie_embeddings=True).state_dict()
    select_trainable(model, training_params(train=train))
    optimizer = Optimizer(model, 0.1)
    for _ in range(2):  # LoRA's `up` starts as zeros, so that `down` changes from the second step on
        train_step(model, optimizer, random_examples(), 1e-2, training_params(train=train))
    merge_lora(model)
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    matrices = {name for name in before if ".attention." in name or ".feed_forward." in name}
    assert changed == {"all": set(before), "lora": matrices}.get(train) or set(NAMES.get(train, changed))
    assert after["output.weight"].data_ptr() == after["tok_embeddings.weight"].data_ptr()


@pytest.mark.parametrize("what", TRAIN)
def test_a_quantized_model_is_refused(what):
    model = tiny_model()
    layer = model.layers[1].feed_forward.w2
    del layer.weight
    layer.weight = Int8Weight(128, 192, dtype=torch.float32, device=torch.device("cpu"))
    message = "a model with quantized weights can't be trained: build it without quantize"
    with pytest.raises(InputError, match=message):
        train(model, random_examples(), [], training_params(train=what), folder=None)
    with pytest.raises(InputError, match=message):
        add_lora(model, 4, seed=1)
    with pytest.raises(InputError, match=message):
        Optimizer(model, 0.0)


def test_adamw_is_fused_on_a_gpu_alone(monkeypatch):
    """Unfused it takes memory for another copy of the weights; on the CPU, fused or not, results would change."""
    options = []
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, **given: options.append(given))
    for device, expected in (("cuda", True), ("cpu", None)):
        with FakeTensorMode():
            layer = torch.nn.Module()
            layer.weight = torch.nn.Parameter(torch.empty(4, 3, device=device))
            Optimizer(layer, 0.0)
        assert options.pop() == {"betas": BETAS, "fused": expected}


def test_a_state_that_was_saved_on_a_gpu_goes_on_as_any_other():
    def trained(state=None):
        model = tiny_model()
        optimizer = Optimizer(model, 0.1)
        if state is None:
            train_step(model, optimizer, random_examples(4), 1e-2, training_params())
            return optimizer.state()
        optimizer.restore(state)
        for seed in range(3):
            train_step(model, optimizer, random_examples(4, seed), 1e-2, training_params())
        return model

    state = copy.deepcopy(trained())
    expected = trained(copy.deepcopy(state))
    for group in state["adamw"]["param_groups"]:
        assert group["fused"] is None
        group["fused"] = True
    assert same_weights(trained(state), expected)
    assert state["adamw"]["param_groups"][0]["fused"] is True  # the caller's object isn't changed


def test_adamw_is_that_of_torch_with_decay_of_matrices_only():
    model, reference, rows = tiny_model(), tiny_model(), random_examples(4)
    optimizer = Optimizer(model, weight_decay=0.1)
    matrices = [weight for weight in reference.parameters() if weight.dim() == 2]
    norms = [weight for weight in reference.parameters() if weight.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0}]
    adamw = torch.optim.AdamW(groups, betas=BETAS)
    for rate in (1e-2, 3e-3):
        _, norm = train_step(model, optimizer, rows, rate, training_params(clip=0.5))
        loss = summed_loss(reference, make_batch(rows)) / sum(row.n_loss_tokens for row in rows)
        loss.backward()
        assert torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5).item() == pytest.approx(norm, rel=1e-4)
        assert norm > 0.5
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        adamw.zero_grad()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)


def test_clipping():
    rows = random_examples()
    steps = {}
    for clip in (0, 1e-3, 1e9):
        model = tiny_model()
        optimizer = Optimizer(model, 0.0)
        optimizer._adamw = torch.optim.SGD(
            list(optimizer.master_weights.values())
        )  # whose step is proportional to the gradient
        train_step(model, optimizer, rows, 1e-2, training_params(clip=clip))
        pairs = zip(model.state_dict().values(), tiny_model().state_dict().values(), strict=True)
        steps[clip] = torch.cat([(after - before).flatten() for after, before in pairs]).norm().item()
    assert steps[0] == pytest.approx(steps[1e9])  # 0: no clipping
    assert steps[0] > 1e-2
    assert steps[1e-3] == pytest.approx(1e-5, rel=0.2)


def test_small_steps_are_not_lost_in_bfloat16():
    """A step is smaller than half the distance to the next bfloat16 number, but many of them together are not."""
    model, rows = tiny_model().to(torch.bfloat16), random_examples(2)
    start = model.norm.weight.detach().clone()
    select_trainable(model, training_params(train="norms"))
    optimizer = Optimizer(model, 0.0)

    def changed_fraction(steps):
        for _ in range(steps):
            train_step(model, optimizer, rows, 1e-4, training_params())
        return (model.norm.weight != start).float().mean()

    assert changed_fraction(1) < 0.2
    assert changed_fraction(40) > 0.5
    assert optimizer.master_weights["norm.weight"].dtype == torch.float32
    assert torch.equal(model.norm.weight, optimizer.master_weights["norm.weight"].bfloat16())


def test_gradients_add_up_in_float32():
    """In bfloat16, 256 + 1 is 256."""
    model = tiny_model().to(torch.bfloat16)
    optimizer = Optimizer(model, 0.0)
    weight = optimizer.parameters["norm.weight"]
    for value in (256.0, 1.0, 1.0):
        weight.grad = torch.full_like(weight, value)
        optimizer.accumulate_gradients()
    assert optimizer.master_weights["norm.weight"].grad.eq(258).all()


def test_the_learning_rate_schedule():
    """Calculated by hand: 2 of 10 steps rise to 1; then (1 + cos(pi k / 8)) / 2 for k = 0 … 7."""
    rates = [learning_rate(step, 10, 1.0, 0.2) for step in range(10)]
    expected = [0.5, 1, 1, 0.961940, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.038060]
    assert rates == pytest.approx(expected, abs=1e-6)
    assert [learning_rate(step, 4, 2.0, 0) for step in range(2)] == pytest.approx([2, 1 + math.sqrt(0.5)])
    assert [learning_rate(step, 4, 2.0, 1) for step in range(4)] == [0.5, 1, 1.5, 2]
    assert learning_rate(0, 1, 2.0, 0.1) == 2
    for steps in range(1, 30):
        rates = [learning_rate(step, steps, 1.0, 0.1) for step in range(steps)]
        assert all(0 < rate <= 1 for rate in rates)
        assert max(rates) == 1


def test_lora_changes_nothing_at_first_and_merges_into_the_same_function():
    model, rows = tiny_model(), random_examples()
    tokens = make_batch(rows).tokens
    before = model(tokens).detach()
    names = list(model.state_dict())
    add_lora(model, 4, seed=1)
    assert len([1 for module in model.modules() if isinstance(module, LoRALinear)]) == 2 * 7
    assert torch.equal(model(tokens), before)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".up." in name or ".down." in name}
    optimizer = Optimizer(model, 0.0)
    for _ in range(3):
        train_step(model, optimizer, rows, 1e-2, training_params())
    after = model(tokens).detach()
    assert (after - before).abs().max() > 0.1
    with torch.no_grad():
        assert torch.allclose(model(tokens), after, atol=1e-4)  # products without gradients take another way
    merge_lora(model)
    assert torch.allclose(model(tokens), after, atol=1e-4)
    assert list(model.state_dict()) == names


def test_the_formula_of_lora():
    layer = tiny_model().layers[0].feed_forward.w2
    lora = LoRALinear(layer, 4, torch.Generator().manual_seed(1))
    torch.nn.init.normal_(lora.up.weight)
    x = torch.randn(5, layer.in_features)
    expected = x @ (layer.weight + 2 * lora.up.weight @ lora.down.weight).T
    torch.testing.assert_close(lora(x), expected, rtol=1e-4, atol=1e-4)
    assert lora.down.weight.shape == (4, layer.in_features)
    assert 0.8 < lora.down.weight.abs().max() * math.sqrt(layer.in_features) <= 1


def test_initial_lora_matrices_depend_on_the_seed_alone():
    def with_lora(seed):
        model = tiny_model()
        before = torch.get_rng_state()
        add_lora(model, 4, seed)
        assert torch.equal(torch.get_rng_state(), before)
        return model

    assert same_weights(with_lora(1), with_lora(1))
    assert not same_weights(with_lora(1), with_lora(2))


@pytest.mark.parametrize(
    ("dtype", "train"), [(torch.float32, "all"), (torch.bfloat16, "lora"), (torch.bfloat16, "attention")]
)
def test_training_continues_exactly_from_a_saved_state(dtype, train):
    def initial():
        model = tiny_model(tie_embeddings=True).to(dtype)
        select_trainable(model, training_params(train=train))
        return model, Optimizer(model, 0.01)

    def make_steps(model, optimizer):
        return [
            train_step(model, optimizer, random_examples(3, seed), 1e-3, training_params(train=train))
            for seed in range(2)
        ]

    model, optimizer = initial()
    make_steps(model, optimizer)
    file = io.BytesIO()
    torch.save(optimizer.state(), file)
    file.seek(0)
    expected = make_steps(model, optimizer)
    restored, restored_optimizer = initial()
    restored_optimizer.restore(torch.load(file, weights_only=True))
    assert make_steps(restored, restored_optimizer) == expected
    assert same_weights(model, restored)
