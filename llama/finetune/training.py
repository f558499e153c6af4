"""The training loop."""

import contextlib
import functools
import logging
import math
import time
from collections.abc import Sequence

import torch
from torch.utils.checkpoint import checkpoint

from llama.checkpoint.parameters import parameter_count
from llama.checkpoint.progress import progress_bar
from llama.distributed import data_parallel_size, sum_over_data_parallel, sum_over_model_parallel
from llama.fast_kernels import CUDNN_ATTENTION_SWITCH
from llama.finetune.data import Example, make_batch, shuffled
from llama.finetune.interruption import Interruption
from llama.finetune.lora import add_lora, merge_lora
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
    params: TrainingParams,
    folder: RunFolder,
) -> None:
    """Train a model, from the last saved state in the folder on.

    Args:
        model: the model.
        training: the examples to train on.
        validation: the examples to compute the validation loss on, before the first epoch and after each; may be empty.
        params: the options.
        folder: where states and metrics are kept.

    Raises:
        InputError: the model is quantized.
        ArithmeticError: the loss or the gradient is NaN or infinity.
        OSError: the disk has not enough space for the states and the checkpoint, which is told before the first step.
        KeyboardInterrupt, SystemExit: there was a Ctrl-C, or a SIGTERM; the state of the step that was at work then is
            saved.
    """
    select_trainable(model, params)
    if params.activation_checkpointing:
        checkpoint_activations(model)
    optimizer = Optimizer(model, params.weight_decay)
    examples_per_step = params.batch_size * params.grad_accum * data_parallel_size()
    steps_per_epoch = math.ceil(len(training) / examples_per_step)
    steps = params.epochs * steps_per_epoch
    logger.info(
        "%d examples for training, %d for validation; %d steps of %d examples; %s of %s parameters of each process are "
        "trained",
        len(training),
        len(validation),
        steps,
        min(examples_per_step, len(training)),
        f"{sum(weight.numel() for weight in optimizer.master_weights.values()):,}",
        f"{sum(parameter.numel() for parameter in model.parameters()):,}",
    )

    device = model.norm.weight.device
    state_bytes = int(sum_over_model_parallel(torch.tensor(optimizer.state_bytes(), device=device)).item())
    folder.check_disk_space(state_bytes, parameter_count(model.params) * model.norm.weight.dtype.itemsize)
    first_step = resume(optimizer, folder)
    progress = progress_bar(range(first_step, steps), desc="training", total=steps, initial=first_step, unit=" steps")
    order = shuffled(training, first_step // steps_per_epoch, params.seed)
    with Interruption() as interruption:
        for step in progress:
            epoch, step_of_epoch = divmod(step, steps_per_epoch)
            if step_of_epoch == 0:
                log_validation_loss(model, validation, params, folder, step)
                order = shuffled(training, epoch, params.seed)
            examples = order[step_of_epoch * examples_per_step : (step_of_epoch + 1) * examples_per_step]
            rate = learning_rate(step, steps, params.peak_lr, params.warmup)
            begin = time.perf_counter()
            loss, norm = train_step(model, optimizer, examples, rate, params)
            tokens_per_second = sum(len(example.tokens) for example in examples) / (time.perf_counter() - begin)
            if not math.isfinite(loss + norm):
                raise ArithmeticError(
                    f"step {step + 1}: the loss is {loss} and the gradient norm is {norm}: try a lower lr"
                    + ("" if step else "; or the model computes NaN or infinity even without training")
                )
            progress.set_postfix_str(f"loss {loss:.3f}, {tokens_per_second:.0f} tokens/s")
            folder.log(
                step=step + 1,
                loss=loss,
                learning_rate=rate,
                gradient_norm=norm,
                tokens_per_second=round(tokens_per_second, 1),
            )
            if step_of_epoch + 1 == steps_per_epoch:
                logger.info("epoch %d of %d: loss %.3f", epoch + 1, params.epochs, loss)
            interrupted = interruption.requested(device)
            if interrupted is not None or step_of_epoch + 1 == steps_per_epoch or (step + 1) % params.save_every == 0:
                folder.save_state(step + 1, optimizer.state(), optimizer.state_bytes())
            if interrupted is not None:
                raise interrupted
    merge_lora(model)
    log_validation_loss(model, validation, params, folder, steps)


def resume(optimizer: Optimizer, folder: RunFolder) -> int:
    """Restore the last saved state of the folder, if there is one, and return the number of steps that it has made."""
    state = folder.load_state()
    if state is None:
        return 0
    optimizer.restore(state)
    logger.info("resuming after step %d", state["step"])
    return int(state["step"])


def select_trainable(model: Transformer, params: TrainingParams) -> None:
    """Make those parameters require gradients that `params.train` names, and no others."""
    if params.train == "lora":
        add_lora(model, params.lora_rank, params.seed)
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(TRAIN[params.train].name_part in name)


def checkpoint_activations(model: Transformer) -> None:
    """Keep only the input of each layer in the forward pass, and compute the layer again in the backward pass.

    This takes a third more time, and a fraction of the memory (arXiv 1604.06174).
    """
    for layer in model.layers:
        layer.forward = functools.partial(
            checkpoint,
            layer.forward,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=contexts_of_checkpoint,
        )


def contexts_of_checkpoint() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """Contexts of a layer's two computations. The second is to use the kernels of the first (see `fast_kernels`)."""
    return contextlib.nullcontext(), CUDNN_ATTENTION_SWITCH.off()


def train_step(
    model: Transformer, optimizer: Optimizer, examples: Sequence[Example], rate: float, params: TrainingParams
) -> tuple[float, float]:
    """Make one step: train on examples, which are sharded over the copies of the model and split into batches.

    Returns:
        The loss over all of the examples before the step, and the gradient norm before clipping.
    """
    device = model.norm.weight.device
    n_loss_tokens = sum(example.n_loss_tokens for example in examples)  # of all processes; see `llama.finetune.loss`
    total = torch.zeros((), dtype=torch.float32, device=device)
    for batch in shard(examples, params.batch_size):
        loss = summed_loss(model, make_batch(batch, device)) / n_loss_tokens
        loss.backward()
        optimizer.accumulate_gradients()
        total += loss.detach()
    optimizer.sum_gradients()
    return sum_over_data_parallel(total).item(), optimizer.step(rate, params.clip)


def log_validation_loss(
    model: Transformer, validation: Sequence[Example], params: TrainingParams, folder: RunFolder, step: int
) -> None:
    """Compute and log the validation loss after `step` steps, if there are examples for it."""
    if validation:
        loss = mean_loss(model, validation, params.batch_size)
        folder.log(step=step, validation_loss=loss)
        logger.info("after %d steps: validation loss %.3f", step, loss)
