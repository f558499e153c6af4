"""Hidden states and embeddings of texts: what the network computes of them, before its output layer.

No tokens are generated, and the KV cache is neither used nor changed.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F

from llama.distributed import check_ranks_agree, model_parallel_size
from llama.errors import InputError
from llama.generation import Llama
from llama.model import Transformer
from llama.model_lock import lock_of
from llama.non_finite import explain_non_finite
from llama.out_of_memory import explain_generation, out_of_memory_explained


def hidden_states(llama: Llama, texts: Sequence[str]) -> list[torch.Tensor]:
    """The network's last hidden states, after its final norm, for each token of some texts.

    Under torchrun every process must make the same call, and gets the same result.

    Args:
        llama: its model must be a `Transformer`.
        texts: any number; `max_batch_size` are computed at a time. They are encoded as `text_completion` encodes
            prompts, with BOS before them if the model was trained with it.

    Returns:
        For each text (tokens, dim) float32, on the CPU.

    Raises:
        InputError: no texts, an empty one, or one of more than `max_seq_len` tokens.
        ArithmeticError, MemoryError: the network computed NaN or infinity; or there was not enough memory.
    """
    return _apply_to_hidden_states(llama, texts, lambda states: states)


def embed(
    llama: Llama, texts: Sequence[str], pooling: Literal["mean", "last"] = "mean", normalize: bool = True
) -> torch.Tensor:
    """One vector for each text, made of the hidden states of its tokens.

    Args:
        llama, texts: see `hidden_states`.
        pooling: "mean" takes the mean over all tokens, "last" the last token, the only one that has seen all others.
        normalize: divide each vector by its Euclidean norm, so that the dot product of two is their cosine similarity.

    Returns:
        (texts, dim) float32, on the CPU.

    Raises:
        See `hidden_states`.
    """
    if pooling not in ("mean", "last"):
        raise InputError(f"pooling={pooling!r} must be 'mean' or 'last'")

    def pool(states: torch.Tensor) -> torch.Tensor:
        return states.float().mean(dim=0) if pooling == "mean" else states[-1]

    vectors = torch.stack(_apply_to_hidden_states(llama, texts, pool))
    return F.normalize(vectors, dim=-1) if normalize else vectors


def _apply_to_hidden_states(
    llama: Llama, texts: Sequence[str], function: Callable[[torch.Tensor], torch.Tensor]
) -> list[torch.Tensor]:
    """`function` of the hidden states (tokens, dim) of each text, as float32 on the CPU."""
    model = checked_transformer(llama)
    rows = _encode(llama, texts)
    results: dict[int, torch.Tensor] = {}
    for batch in batches_by_length(rows, model.params.max_batch_size):
        with lock_of(model).turn():
            hidden = padded_hidden_states(model, [rows[i] for i in batch])  # (batch, seq, dim)
            for row, i in enumerate(batch):
                with torch.inference_mode():
                    result = function(hidden[row, : len(rows[i])])
                # A copy made outside of inference mode can be used where gradients are computed.
                results[i] = result.to("cpu", torch.float32, copy=True)
                if not results[i].isfinite().all():
                    raise ArithmeticError(explain_non_finite(model, rows[i]))
    return [results[i] for i in range(len(rows))]


def _encode(llama: Llama, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of the texts, which are checked."""
    rows: list[list[int]] = []
    error: InputError | None = None
    max_seq_len = llama.model.params.max_seq_len
    try:
        if isinstance(texts, str) or not isinstance(texts, Iterable):
            raise InputError(f"texts must be a list of texts, not {texts!r:.80}")
        bos = getattr(llama.tokenizer, "add_bos", True)
        rows = [llama.tokenizer.encode(text, bos=bos, eos=False) for text in texts]
        if not rows:
            raise InputError("an empty list: at least one text is needed")
        for i, row in enumerate(rows):
            if not row:
                raise InputError(f"text {i} is empty: it needs at least one token")
            if len(row) > max_seq_len:
                raise InputError(
                    f"text {i} has {len(row)} tokens, but max_seq_len={max_seq_len}: shorten it, or build with a "
                    f"larger max_seq_len"
                )
    except InputError as raised:
        error = raised
    check_same_rows(rows, error)
    return rows


def checked_transformer(llama: Llama) -> Transformer:
    """The model, whose hidden states are wanted. InputError if it isn't this library's."""
    if not isinstance(llama.model, Transformer):
        raise InputError(
            f"hidden states are those of a llama.Transformer; this model is a {type(llama.model).__name__}"
        )
    return llama.model


def check_same_rows(rows: Sequence[Sequence[int]], error: InputError | None = None) -> None:
    """Raise `error`, or InputError unless all processes that share a model are here with the same rows of token ids."""
    if model_parallel_size() > 1:
        checksum = hashlib.sha256()
        for row in rows:
            checksum.update(repr(row).encode())
        described = f"{len(rows)} rows of {sum(map(len, rows))} tokens with the checksum {checksum.hexdigest()[:8]}"
        check_ranks_agree({"the input": described}, error)
    elif error is not None:
        raise error


def batches_by_length(rows: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Batches of at most `size` rows of similar length, the longest first, as indices of rows.

    They need little padding, and if there isn't enough memory, the first batch shows it.
    """
    longest_first = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    return [longest_first[start : start + size] for start in range(0, len(rows), size)]


@torch.inference_mode()
def padded_hidden_states(model: Transformer, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """The hidden states of a batch, without the KV cache. It must be the caller's turn to use the model.

    Args:
        rows: token ids; shorter rows are padded on the right, to which none of their own tokens attends.

    Returns:
        (batch, seq, dim), in the model's dtype and on its device. What follows a row's own tokens is meaningless.
    """
    if (mapped_files := getattr(model, "mapped_files", None)) is not None:
        mapped_files.check()
    longest = max(map(len, rows))
    padded = [[*row, *[0] * (longest - len(row))] for row in rows]
    with out_of_memory_explained(explain_generation("prefill", [list(row) for row in rows], 1)):
        return model.hidden_states(torch.tensor(padded, dtype=torch.long, device=model.norm.weight.device))
