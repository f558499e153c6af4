"""Building the model that a command works with."""

import logging
import secrets

from llama.chat_format import named_format
from llama.checkpoint import open_checkpoint
from llama.default_model import default_checkpoint
from llama.device import dtype_named
from llama.errors import InputError
from llama.generation import Llama
from llama.quantized import check_quantize
from llama.sampling_params import check_number
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


def check_prompt(prompt: str, tokenizer: Tokenizer, max_seq_len: int) -> None:
    """Raise InputError unless a text has at least one token, and no more than the context."""
    n_tokens = len(tokenizer.encode(prompt, bos=tokenizer.add_bos, eos=False))
    if not n_tokens:
        raise InputError("the text is empty, and this model needs at least one token to begin with: give a text")
    if n_tokens > max_seq_len:
        raise InputError(
            f"the text has {n_tokens} tokens, but max_seq_len={max_seq_len}: shorten it, or give a larger max_seq_len"
        )
