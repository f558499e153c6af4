"""Building the model that a command works with, and the smaller one that proposes tokens to it."""

import logging
import secrets

import torch

from llama.chat_format import named_format
from llama.checkpoint import open_checkpoint
from llama.default_model import default_checkpoint
from llama.device import dtype_named
from llama.errors import InputError
from llama.files import require_path
from llama.generation import Llama
from llama.quantized import check_quantize
from llama.sampling_params import check_draft_model, check_number
from llama.tokenizer import Tokenizer

logger = logging.getLogger("llama")


def build_llama(
    ckpt_dir: str | None,
    tokenizer_path: str | None,
    max_seq_len: int | None,
    dtype: str | None,
    seed: int | None,
    chat_format: str | None = None,
    quantize: str | None = None,
    compile: bool = False,
    prompt: str | None = None,
) -> Llama:
    """Build a `Llama` for one prompt at a time, from a command's options.

    What can be checked without the weights is checked before they are loaded, which may take minutes.

    Args:
        ckpt_dir: the checkpoint; None for the default model.
        tokenizer_path: the tokenizer file; None for the checkpoint's own.
        max_seq_len: the context size in tokens; None for the checkpoint's `Settings.default_seq_len`.
        dtype: the name of a dtype; None for the default of the device, and of `quantize`.
        seed: the random seed; None for a different one each time.
        chat_format: the name of a chat format; None for the model's own.
        quantize, compile: see `Llama.build`.
        prompt: the text that the model will continue, if it is known.

    Raises:
        InputError: the prompt has no tokens, or more than the context.
        See `Llama.build` for others.
    """
    if max_seq_len is not None:
        check_number("max_seq_len", max_seq_len, 1, integer=True)
    torch_dtype = dtype_named(dtype)
    check_quantize(quantize, torch_dtype)
    format_class = None if chat_format is None else named_format(chat_format)
    checkpoint = open_checkpoint(default_checkpoint() if ckpt_dir is None else ckpt_dir)
    if format_class is not None:
        format_class(checkpoint.tokenizer(tokenizer_path))  # raises if they don't fit
    if max_seq_len is None:
        max_seq_len = checkpoint.settings.default_seq_len
    if prompt is not None and not 0 < len(prompt.encode("utf-8", "replace")) < max_seq_len:  # no more tokens than bytes
        check_prompt(prompt, checkpoint.tokenizer(tokenizer_path), max_seq_len)
    llama = Llama.build(
        checkpoint,
        tokenizer_path,
        max_seq_len,
        max_batch_size=1,
        seed=secrets.randbits(63) if seed is None else seed,
        dtype=torch_dtype,
        quantize=quantize,
        compile=compile,
    )
    if format_class is not None:
        llama.formatter = format_class(llama.tokenizer)
        logger.info("chat format: %s", format_class.description)
    return llama


def check_proposers(prompt_lookup: int | None, draft: str | None) -> None:
    """Check what is to propose tokens (see `llama.speculative`), as far as that goes before a model is loaded.

    Args:
        prompt_lookup: how many tokens to propose of those that followed the latest ones before; None for none.
        draft: the checkpoint of a smaller model that proposes tokens; None for none.

    Raises:
        InputError: a number out of range, or both are given.
        MissingFileError, CheckpointError: there is no such checkpoint, or it is damaged.
    """
    if prompt_lookup is not None:
        check_number("prompt_lookup", prompt_lookup, 1, integer=True)
        if draft is not None:
            raise InputError("tokens are proposed by prompt_lookup or by draft: give one of them")
    if draft is not None:
        open_checkpoint(require_path(draft, "draft"))


def build_draft(
    draft: str | None, llama: Llama, dtype: str | None, quantize: str | None, compile: bool
) -> Llama | None:
    """Build the smaller model that proposes tokens to `llama`, with as large a context, for one prompt at a time.

    Args:
        draft: its checkpoint; None for none.
        dtype, quantize, compile: see `build_llama`.

    Raises:
        InputError: it has another tokenizer, or can't have a context of this size.
        See `Llama.build` for others.
    """
    if draft is None:
        return None
    max_seq_len = llama.model.params.max_seq_len
    try:
        built = Llama.build(
            draft,
            None,
            max_seq_len,
            max_batch_size=1,
            seed=torch.initial_seed(),  # with which `llama` was built
            dtype=dtype_named(dtype),
            quantize=quantize,
            compile=compile,
        )
        check_draft_model(built, llama.model, llama.tokenizer, 1, max_seq_len)
    except InputError as error:
        raise InputError(f"draft={draft!r}: {error}") from error
    return built


def check_prompt(prompt: str, tokenizer: Tokenizer, max_seq_len: int) -> None:
    """Raise InputError unless a text has at least one token, and no more than the context."""
    n_tokens = len(tokenizer.encode(prompt, bos=tokenizer.add_bos, eos=False))
    if not n_tokens:
        raise InputError("the text is empty, and this model needs at least one token to begin with: give a text")
    if n_tokens > max_seq_len:
        raise InputError(
            f"the text has {n_tokens} tokens, but max_seq_len={max_seq_len}: shorten it, or give a larger max_seq_len"
        )
