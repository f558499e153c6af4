"""The masked loss and the step that makes it smaller: against transformers, torch, and what they must not depend on."""

import io
import math

import pytest
import torch
from conftest import hugging_face_twin, same_weights, tiny_model
from train_everything import examples, options

from llama.finetune.data import Example, make_batch
from llama.finetune.lora import LoRALinear, add_adapters, merge_adapters
from llama.finetune.loss import mean_loss, summed_loss
from llama.finetune.optimizer import BETAS, Optimizer, learning_rate
from llama.finetune.training import checkpoint_activations, choose_parameters, learn


def transformers_loss(twin, rows):
    """The mean over all learned tokens, from one call a row, so that nothing is filled up; with gradients."""
    total = 0
    for row in rows:
        labels = [token if learned else -100 for token, learned in zip(row.tokens, row.learned, strict=True)]
        loss = twin(input_ids=torch.tensor([row.tokens]), labels=torch.tensor([labels])).loss
        total = total + loss * row.n_learned
    return total / sum(row.n_learned for row in rows)


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_the_same_loss_and_gradients_as_transformers(tie_embeddings):
    model = tiny_model(tie_embeddings=tie_embeddings)
    twin, rows = hugging_face_twin(model), examples()
    loss = summed_loss(model, make_batch(rows)) / sum(row.n_learned for row in rows)
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


def test_the_same_loss_as_transformers_on_a_filled_up_batch():
    model, rows = tiny_model(), examples()
    tokens, _, _ = make_batch(rows)
    tokens = torch.nn.functional.pad(tokens, (0, 1))
    labels = torch.full_like(tokens, -100)
    for i, row in enumerate(rows):
        tokens[i, : len(row.tokens)] = torch.tensor(row.tokens)
        labels[i, : len(row.tokens)] = torch.where(torch.tensor(row.learned), torch.tensor(row.tokens), -100)
    attention_mask = torch.arange(tokens.shape[1]) < torch.tensor([[len(row.tokens)] for row in rows])
    theirs = hugging_face_twin(model)(input_ids=tokens, attention_mask=attention_mask, labels=labels).loss
    assert mean_loss(model, rows, 4) == pytest.approx(theirs.item(), abs=1e-4)


def test_each_token_counts_the_same_whatever_it_is_read_with():
    """The loss is the mean over tokens: not of the batches' means, nor of the rows'."""
    model, rows = tiny_model(), examples()
    losses = [mean_loss(model, rows, batch_size) for batch_size in (1, 2, 3, 7, 50)]
    assert losses == pytest.approx([losses[0]] * 5, abs=1e-5)
    assert mean_loss(model, rows[::-1], 3) == pytest.approx(losses[0], abs=1e-5)
    by_rows = sum(mean_loss(model, [row], 1) for row in rows) / len(rows)
    assert abs(by_rows - losses[0]) > 1e-3  # the other mean is another number


def test_what_fills_a_row_up_does_not_matter():
    model, rows = tiny_model(), examples()
    batch = make_batch(rows)
    filled = torch.tensor([[i >= len(row.tokens) for i in range(batch.tokens.shape[1])] for row in rows])
    assert filled.any()
    other = batch._replace(tokens=batch.tokens.masked_fill(filled, 7))
    assert summed_loss(model, batch).item() == pytest.approx(summed_loss(model, other).item(), abs=1e-4)


def test_only_what_is_learned_passes_through_output():
    model, rows = tiny_model(), examples()
    seen = []
    model.output.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    summed_loss(model, make_batch(rows))
    assert seen == [(sum(row.n_learned for row in rows), 320)]


def gradients(model, rows, **changes):
    """Of one step: by parameter; with the loss and the length. The step itself is too short to matter."""
    choose_parameters(model, options(**changes))
    optimizer = Optimizer(model, 0.0)
    found = {}

    def keep(rate, clip):
        found.update({name: master.grad.clone() for name, master in optimizer.masters.items()})
        return optimizer.gradient_norm()

    optimizer.step = keep
    loss, norm = learn(model, optimizer, rows, 0.0, options(**changes))
    return found, loss, norm


def test_accumulation_changes_nothing():
    rows = examples(8)
    whole, loss, norm = gradients(tiny_model(), rows, batch_size=8)
    for batch_size in (1, 3, 4):
        parts, part_loss, part_norm = gradients(tiny_model(), rows, batch_size=batch_size)
        assert (part_loss, part_norm) == pytest.approx((loss, norm), rel=1e-5)
        assert parts.keys() == whole.keys()
        for name, gradient in whole.items():
            torch.testing.assert_close(parts[name], gradient, rtol=1e-3, atol=1e-5)
    flat = torch.cat([gradient.flatten() for gradient in whole.values()])
    assert norm == pytest.approx(flat.double().norm().item(), rel=1e-5)


def test_a_completion_of_one_token():
    """Few rows take another product (see llama.cpu_matmul): it has gradients too."""
    row = Example(1, [5, 6, 7, 8], [False, False, False, True])
    model = tiny_model()
    loss = summed_loss(model, make_batch([row]))
    assert loss.item() == pytest.approx(transformers_loss(hugging_face_twin(model), [row]).item(), abs=1e-4)
    found, _, _ = gradients(model, [row])
    want, _, _ = gradients(tiny_model(), [row, row])  # the mean of two alike, by the other product
    for name in want:
        torch.testing.assert_close(found[name], want[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("train", ["all", "lora"])
def test_activation_checkpointing_gives_the_same_gradients(train):
    rows = examples()
    want, loss, _ = gradients(tiny_model(), rows, train=train)
    model = tiny_model()
    passes = []
    model.layers[1].feed_forward.register_forward_pre_hook(lambda *_: passes.append(1))
    checkpoint_activations(model)
    found, found_loss, _ = gradients(model, rows, train=train)
    assert len(passes) == 4  # two batches, each read twice
    assert found_loss == pytest.approx(loss, abs=1e-6)
    assert found.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(found[name], want[name], rtol=1e-5, atol=1e-6)


def test_activation_checkpointing_keeps_less():
    def kept(prepare):
        model, sizes = tiny_model(n_layers=4), []
        prepare(model)
        rows = make_batch(examples())
        weights = {weight.data_ptr() for weight in model.parameters()}

        def pack(tensor):
            sizes.append(tensor.numel() * (tensor.data_ptr() not in weights))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            summed_loss(model, rows)
        return sum(sizes)

    # The recomputing frames keep nothing of their own; what is counted is what goes into each, and the last part.
    assert kept(checkpoint_activations) < kept(lambda model: None) / 3


NAMES = {
    "attention": [f"layers.{i}.attention.{w}.weight" for i in range(2) for w in ("wq", "wk", "wv", "wo")],
    "norms": [f"layers.{i}.{part}_norm.weight" for i in range(2) for part in ("attention", "ffn")] + ["norm.weight"],
}


@pytest.mark.parametrize("train", ["all", "attention", "norms", "lora"])
def test_only_what_is_to_be_trained_changes(train):
    model, before = tiny_model(tie_embeddings=True), tiny_model(tie_embeddings=True).state_dict()
    choose_parameters(model, options(train=train))
    optimizer = Optimizer(model, 0.1)
    for _ in range(2):  # what LoRA puts beside a weight begins as zeros, and so its other half learns from step 2 on
        learn(model, optimizer, examples(), 1e-2, options(train=train))
    merge_adapters(model)
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    every = set(before)
    matrices = {name for name in before if ".attention." in name or ".feed_forward." in name}
    assert changed == {"all": every, "lora": matrices}.get(train) or set(NAMES.get(train, changed))
    assert after["output.weight"].data_ptr() == after["tok_embeddings.weight"].data_ptr()


def test_adamw_is_torch_s_with_decay_of_matrices_alone():
    model, reference, rows = tiny_model(), tiny_model(), examples(4)
    optimizer = Optimizer(model, weight_decay=0.1)
    matrices = [weight for weight in reference.parameters() if weight.dim() == 2]
    norms = [weight for weight in reference.parameters() if weight.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0}]
    adamw = torch.optim.AdamW(groups, betas=BETAS)
    for rate in (1e-2, 3e-3):
        _, norm = learn(model, optimizer, rows, rate, options(clip=0.5))
        loss = summed_loss(reference, make_batch(rows)) / sum(row.n_learned for row in rows)
        loss.backward()
        assert torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5).item() == pytest.approx(norm, rel=1e-4)
        assert norm > 0.5
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        adamw.zero_grad()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)


def test_no_limit_to_the_gradient():
    rows = examples()
    steps = {}
    for clip in (0, 1e-3, 1e9):
        model = tiny_model()
        optimizer = Optimizer(model, 0.0)
        optimizer._adamw = torch.optim.SGD(list(optimizer.masters.values()))  # whose step is as long as the gradient
        learn(model, optimizer, rows, 1e-2, options(clip=clip))
        moved = [a - b for a, b in zip(model.state_dict().values(), tiny_model().state_dict().values(), strict=True)]
        steps[clip] = torch.cat([one.flatten() for one in moved]).norm().item()
    assert steps[0] == pytest.approx(steps[1e9])
    assert steps[0] > 1e-2
    assert steps[1e-3] == pytest.approx(1e-5, rel=0.2)


def test_small_steps_are_not_lost_in_bfloat16():
    """Each is below half the distance to the next bfloat16 number; together they aren't."""
    model = tiny_model().to(torch.bfloat16)
    start = model.norm.weight.detach().clone()
    choose_parameters(model, options(train="norms"))
    optimizer = Optimizer(model, 0.0)
    learn(model, optimizer, examples(), 1e-4, options())
    once = (model.norm.weight != start).float().mean()
    for _ in range(60):
        learn(model, optimizer, examples(), 1e-4, options())
    assert once < 0.2
    assert (model.norm.weight != start).float().mean() > 0.5
    assert optimizer.masters["norm.weight"].dtype == torch.float32
    assert torch.equal(model.norm.weight, optimizer.masters["norm.weight"].bfloat16())


def test_gradients_add_up_in_float32():
    """In bfloat16, 256 + 1 is 256."""
    model = tiny_model().to(torch.bfloat16)
    optimizer = Optimizer(model, 0.0)
    weight = optimizer.parameters["norm.weight"]
    for value in (256.0, 1.0, 1.0):
        weight.grad = torch.full_like(weight, value)
        optimizer.add_gradients()
    assert optimizer.masters["norm.weight"].grad.eq(258).all()


def test_the_course_of_the_learning_rate():
    """Worked out by hand: 2 of 10 steps rise to 1; then (1 + cos(pi k / 8)) / 2 for k = 0 … 7."""
    rates = [learning_rate(step, 10, 1.0, 0.2) for step in range(10)]
    want = [0.5, 1, 1, 0.961940, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.038060]
    assert rates == pytest.approx(want, abs=1e-6)
    assert [learning_rate(step, 4, 2.0, 0) for step in range(2)] == pytest.approx([2, 1 + math.sqrt(0.5)])
    assert [learning_rate(step, 4, 2.0, 1) for step in range(4)] == [0.5, 1, 1.5, 2]
    assert learning_rate(0, 1, 2.0, 0.1) == 2
    for steps in range(1, 30):
        rates = [learning_rate(step, steps, 1.0, 0.1) for step in range(steps)]
        assert all(0 < rate <= 1 for rate in rates)
        assert max(rates) == 1


def test_lora_begins_as_nothing_and_merges_into_the_same():
    model, rows = tiny_model(), examples()
    tokens = make_batch(rows).tokens
    plain = model(tokens).detach()
    names = list(model.state_dict())
    add_adapters(model, 4, seed=1)
    assert len([1 for module in model.modules() if isinstance(module, LoRALinear)]) == 2 * 7
    assert torch.equal(model(tokens), plain)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".up." in name or ".down." in name}
    optimizer = Optimizer(model, 0.0)
    for _ in range(3):
        learn(model, optimizer, rows, 1e-2, options())
    adapted = model(tokens).detach()
    assert (adapted - plain).abs().max() > 0.1
    with torch.no_grad():
        assert torch.allclose(model(tokens), adapted, atol=1e-4)  # without gradients, other products are made
    merge_adapters(model)
    assert torch.allclose(model(tokens), adapted, atol=1e-4)
    assert list(model.state_dict()) == names


def test_lora_s_formula():
    layer = tiny_model().layers[0].feed_forward.w2
    adapted = LoRALinear(layer, 4, torch.Generator().manual_seed(1))
    torch.nn.init.normal_(adapted.up.weight)
    x = torch.randn(5, layer.in_features)
    want = x @ (layer.weight + 2 * adapted.up.weight @ adapted.down.weight).T
    torch.testing.assert_close(adapted(x), want, rtol=1e-4, atol=1e-4)
    assert adapted.down.weight.shape == (4, layer.in_features)
    assert 0.8 < adapted.down.weight.abs().max() * math.sqrt(layer.in_features) <= 1


def test_adapters_are_drawn_by_the_seed_alone():
    def drawn(seed):
        model = tiny_model()
        before = torch.get_rng_state()
        add_adapters(model, 4, seed)
        assert torch.equal(torch.get_rng_state(), before)
        return model

    assert same_weights(drawn(1), drawn(1))
    assert not same_weights(drawn(1), drawn(2))


def test_the_state_goes_on_exactly():
    """From float32 and from bfloat16, for each kind of training."""
    for dtype, train in ((torch.float32, "all"), (torch.bfloat16, "lora"), (torch.bfloat16, "attention")):

        def fresh(dtype=dtype, train=train):
            model = tiny_model(tie_embeddings=True).to(dtype)
            choose_parameters(model, options(train=train))
            return model, Optimizer(model, 0.01)

        def go(model, optimizer, count):
            return [learn(model, optimizer, examples(seed=i), 1e-3, options()) for i in range(count)]

        model, optimizer = fresh()
        go(model, optimizer, 3)
        state = torch.load(_saved(optimizer.state()), weights_only=True)
        want = go(model, optimizer, 3)
        other, other_optimizer = fresh()
        other_optimizer.restore(state)
        assert go(other, other_optimizer, 3) == want
        assert same_weights(model, other)


def _saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file
