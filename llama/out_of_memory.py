"""Running out of memory: how to recognise it in torch's errors, and what to say."""

import contextlib
from collections.abc import Iterator

PHRASES = (
    "out of memory",  # CUDA and its driver, MPS, and NCCL where it quotes CUDA
    "allocate memory",  # the CPU's allocator and the operating system
    "not enough memory",
    "_STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN and other libraries for CUDA
    "Failed to CUDA calloc",  # NCCL
    "Failed to CUDA malloc",
)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that there is not enough memory, on the CPU or on a GPU."""
    return isinstance(error, MemoryError) or any(phrase in str(error) for phrase in PHRASES)


@contextlib.contextmanager
def out_of_memory_explained(message: str) -> Iterator[None]:
    """Turn the errors by which torch runs out of memory into a MemoryError with this message."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise MemoryError(message) from error
        raise


def explain_generation(stage: str, prompts: list[list[int]], rows_per_prompt: int) -> str:
    """An error message: what a call of `generate` had no memory for, and what to try.

    Args:
        stage: "prefill" or "decode".
        prompts: ids.
        rows_per_prompt: num_return_sequences or num_beams.
    """
    several = rows_per_prompt > 1
    work = f"{len(prompts)} prompt(s) of up to {max(map(len, prompts))} tokens"
    work += f", with {rows_per_prompt} rows each (num_return_sequences or num_beams)" if several else ""
    if stage == "decode":
        work = f"the next token of {len(prompts) * rows_per_prompt} row(s): {work}"
    return (
        f"not enough memory to {stage} {work}: give fewer prompts at a time{', fewer rows each' if several else ''} or "
        f"shorter prompts; or build with quantize='int8' or 'int4', over more processes, or with a lower "
        f"max_batch_size or max_seq_len, for a smaller KV cache"
    )
