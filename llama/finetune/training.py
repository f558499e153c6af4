"""The loop: examples in, a better model out."""

import functools
import logging
import math
import time
from collections.abc import Sequence

import torch
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from llama.distributed import data_parallel_size, is_first_rank, sum_over_data_parallel
from llama.finetune.data import Example, make_batch, shuffled
from llama.finetune.lora import add_adapters, merge_adapters
from llama.finetune.loss import mean_loss, shard, summed_loss
from llama.finetune.optimizer import Optimizer, learning_rate
from llama.finetune.run_folder import RunFolder
from llama.finetune.training_params import TRAIN, TrainingParams
from llama.model import Transformer

logger = logging.getLogger("llama")


def train(
    model: Transformer,
    training: Sequence[Example],
    validation: Sequence[Example],
    options: TrainingParams,
    folder: RunFolder,
) -> None:
    """Train a model, from the newest state in the folder on.

    Args:
        training: what to learn from.
        validation: what to measure the loss on, before the first epoch and after each; may be empty.

    Raises:
        ArithmeticError: the loss is no finite number any more.
    """
    choose_parameters(model, options)
    if options.activation_checkpointing:
        checkpoint_activations(model)
    optimizer = Optimizer(model, options.weight_decay)
    per_step = options.batch_size * options.grad_accum * data_parallel_size()
    per_epoch = math.ceil(len(training) / per_step)
    steps = options.epochs * per_epoch
    trained, numbers = (sum(map(torch.numel, tensors)) for tensors in (optimizer.masters.values(), model.parameters()))
    logger.info(
        "%d examples to learn from, %d to see how well; %d steps of %d; trained: %s of %s numbers on each process",
        len(training), len(validation), steps, min(per_step, len(training)), f"{trained:,}", f"{numbers:,}",
    )  # fmt: skip

    start = resume(optimizer, folder)
    bar = tqdm(
        range(start, steps), "training", steps, initial=start, unit=" steps", disable=None if is_first_rank() else True
    )
    order = shuffled(training, start // per_epoch, options.seed)
    for step in bar:
        epoch, turn = divmod(step, per_epoch)
        if turn == 0:
            validate(model, validation, options, folder, step)
            order = shuffled(training, epoch, options.seed)
        examples = order[turn * per_step : (turn + 1) * per_step]
        rate = learning_rate(step, steps, options.peak_rate, options.warmup)
        began = time.perf_counter()
        loss, norm = learn(model, optimizer, examples, rate, options)
        speed = sum(len(example.tokens) for example in examples) / (time.perf_counter() - began)
        if not math.isfinite(loss + norm):
            raise ArithmeticError(
                f"step {step + 1}: the loss is {loss} and the gradient's length {norm}: try a lower lr"
                + ("" if step else ", if the model computes something finite at all")
            )
        bar.set_postfix_str(f"loss {loss:.3f}, {speed:.0f} tokens/s")
        folder.log(step=step + 1, loss=loss, learning_rate=rate, gradient_norm=norm, tokens_per_second=round(speed, 1))
        if turn + 1 == per_epoch:
            logger.info("epoch %d of %d: loss %.3f", epoch + 1, options.epochs, loss)
        if (step + 1) % options.save_every == 0 or step + 1 == steps:
            folder.save(step + 1, optimizer.state())
    merge_adapters(model)
    validate(model, validation, options, folder, steps)


def resume(optimizer: Optimizer, folder: RunFolder) -> int:
    """Take up the newest state in the folder, if there is one; returns the steps made so far."""
    state = folder.newest()
    if state is None:
        return 0
    optimizer.restore(state)
    logger.info("going on after step %d", state["step"])
    return int(state["step"])


def choose_parameters(model: Transformer, options: TrainingParams) -> None:
    """Let those parameters that are to be trained, and no others, have gradients."""
    if options.train == "lora":
        add_adapters(model, options.lora_rank, options.seed)
    else:
        part, _ = TRAIN[options.train]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(part in name)


def checkpoint_activations(model: Transformer) -> None:
    """Keep only what goes into each layer, and compute what happens within it again when gradients are wanted.

    A third more arithmetic, for a fraction of the memory (arXiv 1604.06174).
    """
    for layer in model.layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def learn(
    model: Transformer, optimizer: Optimizer, examples: Sequence[Example], rate: float, options: TrainingParams
) -> tuple[float, float]:
    """One step: learn from examples, which are dealt to all copies of the model, and read in batches.

    Returns:
        The loss over all of them before the step, and the length of its gradient.
    """
    device = model.norm.weight.device
    count = sum(example.n_learned for example in examples)  # of all batches of all processes: see `llama.finetune.loss`
    total = torch.zeros((), device=device)
    for part in shard(examples, options.batch_size):
        loss = summed_loss(model, make_batch(part, device)) / count
        loss.backward()
        optimizer.add_gradients()
        total += loss.detach()
    optimizer.sum_gradients()
    return sum_over_data_parallel(total).item(), optimizer.step(rate, options.clip)


def validate(
    model: Transformer, validation: Sequence[Example], options: TrainingParams, folder: RunFolder, step: int
) -> None:
    """Measure the loss on examples that nothing is learned from, after `step` steps."""
    if validation:
        loss = mean_loss(model, validation, options.batch_size)
        folder.log(step=step, validation_loss=loss)
        logger.info("after %d steps: validation loss %.3f", step, loss)
