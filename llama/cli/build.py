"""Building the model that a command works with, and the smaller one that proposes tokens to it."""

import contextlib
import logging
import secrets
from collections.abc import Iterator
from pathlib import Path

import torch

from llama.chat_format import named_format
from llama.checkpoint import Checkpoint, open_checkpoint
from llama.default_model import default_checkpoint
from llama.device import dtype_named
from llama.errors import InputError, MissingFileError
from llama.files import require_path
from llama.generation import Llama
from llama.quantized import check_quantize
from llama.sampling_params import check_draft_model, check_number, have_same_tokens
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
    draft: Checkpoint | None = None,
) -> Llama:
    """Build a `Llama` for one prompt at a time, from a command's options.

    What can be checked without the weights is checked before they are loaded, which may take minutes.

    Args:
        ckpt_dir: the checkpoint; None for the default model.
        tokenizer_path: the tokenizer file; None for the checkpoint's own.
        max_seq_len: the context size in tokens; None for the checkpoint's `Settings.default_seq_len`, or that of
            `draft` if it is smaller.
        dtype: the name of a dtype; None for the default of the device, and of `quantize`.
        seed: the random seed; None for a different one each time.
        chat_format: the name of a chat format; None for the model's own.
        quantize, compile: see `Llama.build`.
        prompt: the text that the model will continue, if it is known.
        draft: the checkpoint of a model that will propose tokens to this one.

    Raises:
        InputError: the prompt has no tokens, or more than the context; or `draft` doesn't fit the model.
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
        checkpoints = [checkpoint] if draft is None else [checkpoint, draft]
        max_seq_len = min(each.settings.default_seq_len for each in checkpoints)
    if draft is not None:
        check_draft(draft, checkpoint.tokenizer(tokenizer_path), max_seq_len)
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


def open_draft(draft: str | None, prompt_lookup: int | None) -> Checkpoint | None:
    """Check what is to propose tokens (see `llama.speculative`), and open its checkpoint.

    Args:
        draft: the checkpoint of a smaller model that proposes tokens; None for none.
        prompt_lookup: how many tokens to propose of those that followed the latest ones before; None for none.

    Raises:
        InputError: a number out of range, or both are given.
        MissingFileError, CheckpointError: there is no such checkpoint, or it is damaged.
    """
    if prompt_lookup is not None:
        check_number("prompt_lookup", prompt_lookup, 1, 100, integer=True)
        if draft is not None:
            raise InputError("tokens are proposed by prompt_lookup or by draft: give one of them")
    if draft is None:
        return None
    path = require_path(draft, "draft")
    with naming_draft(path):
        return open_checkpoint(path)


def check_draft(draft: Checkpoint, tokenizer: Tokenizer, max_seq_len: int) -> None:
    """Check whether a model can propose tokens to another one, as far as that goes before they are loaded.

    Args:
        draft: the checkpoint of the model that proposes them.
        tokenizer: that of the other one.
        max_seq_len: the context size in tokens, of both.

    Raises:
        InputError: it has another tokenizer, or can't have a context of this size.
        MissingFileError, CheckpointError: it has no tokenizer, or a damaged one.
    """
    with naming_draft(draft.path):
        limit = draft.settings.params.get("max_position_embeddings")
        if limit is not None and max_seq_len > limit:
            raise InputError(f"max_seq_len={max_seq_len} is over this model's limit of {limit}")
        if not have_same_tokens(draft.tokenizer(), tokenizer):
            raise InputError("it has another tokenizer: take a model of the same family, whose ids mean the same")


def build_draft(
    draft: Checkpoint | None, llama: Llama, dtype: str | None, quantize: str | None, compile: bool
) -> Llama | None:
    """Build the smaller model that proposes tokens to `llama`, with as large a context, for one prompt at a time.

    Args:
        draft: its checkpoint; None for none.
        dtype, quantize, compile: see `build_llama`.

    Raises:
        InputError: it can't propose tokens to this model.
        See `Llama.build` for others.
    """
    if draft is None:
        return None
    max_seq_len = llama.model.params.max_seq_len
    with naming_draft(draft.path):
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
    return built


@contextlib.contextmanager
def naming_draft(path: Path) -> Iterator[None]:
    """Let an error say that it is about the checkpoint of --draft, and not about that of the model."""
    try:
        yield
    except (InputError, MissingFileError) as error:
        message = str(error).replace("ckpt_dir=", "draft=").replace("tokenizer_path=", "its tokenizer ")
        raise type(error)(f"draft={str(path)!r}: {message}") from error


def check_prompt(prompt: str, tokenizer: Tokenizer, max_seq_len: int) -> None:
    """Raise InputError unless a text has at least one token, and no more than the context."""
    n_tokens = len(tokenizer.encode(prompt, bos=tokenizer.add_bos, eos=False))
    if not n_tokens:
        raise InputError("the text is empty, and this model needs at least one token to begin with: give a text")
    if n_tokens > max_seq_len:
        raise InputError(
            f"the text has {n_tokens} tokens, but max_seq_len={max_seq_len}: shorten it, or give a larger max_seq_len"
        )
