"""The inspection of a text: what the network predicts at each of its tokens, in one forward pass without the cache."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llama.embeddings import check_same_rows, padded_hidden_states
from llama.errors import InputError
from llama.generation import Llama
from llama.inspection.page import render_page
from llama.inspection.token_statistics import (
    Candidate,
    SamplingDistribution,
    TokenStatistics,
    predictions,
    sampling_distribution,
    text_statistics,
)
from llama.model import Transformer
from llama.model_lock import lock_of
from llama.non_finite import explain_non_finite
from llama.out_of_memory import explain_generation, out_of_memory_explained
from llama.sampling_params import SamplingParams, check_number, check_prompts
from llama.tokenizer import Tokenizer

MAX_LOGITS = 2**23  # logits that are computed at once; their statistics take a few tensors of this size

# A document of its own, so that neither its style nor the notebook's changes the other. It needs no scripts.
FRAME = '<iframe title="{title}" sandbox="" srcdoc="{page}" style="width: 100%; height: 40rem; border: 0"></iframe>'


@dataclass(frozen=True, repr=False)
class Inspection:
    """The result of `inspect_text` and `inspect_tokens`.

    Attributes:
        tokens: the tokens of the text.
        next_tokens: the most likely tokens after the text, with their probabilities at temperature 1.
        requested: the distribution of the next token with the requested sampling settings.
        variations: its distributions with one setting at a time: temperatures 0.5, 1 and 1.5; top-k; top-p (the
            requested ones, or 5 and 0.9).
    """

    tokens: list[TokenStatistics]
    next_tokens: list[Candidate]
    requested: SamplingDistribution
    variations: list[SamplingDistribution]

    def page(self, model_name: str = "") -> str:
        """Return the HTML page that `llama inspect --html` writes.

        Args:
            model_name: what is shown below its heading.
        """
        return render_page(self.tokens, self.next_tokens, [self.requested, *self.variations], model_name)

    def _repr_html_(self) -> str:
        """What a notebook shows: the page, in a frame."""
        return FRAME.format(title="How sure was the model?", page=html.escape(self.page()))

    def __repr__(self) -> str:
        statistics = text_statistics(self.tokens)
        return f"<Inspection: n_tokens={statistics.n_tokens}, logprob={statistics.logprob:.2f}>"


def inspect_text(
    llama: Llama,
    text: str,
    max_gen_len: int = 0,
    temperature: float = 0.6,
    top_p: float = 0.9,
    *,
    top_k: int | None = None,
    seed: int | None = None,
    alternatives: int = 5,
) -> Inspection:
    """Compute the statistics of each token of a text and its continuation, and of the token after it.

    Under torchrun every process must make the same call, and gets the same result.

    Args:
        llama: the model, as `Llama.build` makes it.
        text: the text.
        max_gen_len: at most this many new tokens are generated after the text, and inspected with it.
        temperature, top_p, top_k, seed: how they are sampled, see `Llama.generate`; how the token after them would be.
        alternatives: how many of the most likely tokens to list at each position.

    Raises:
        InputError: the model isn't a `Transformer`, or an argument is out of range.
        Others: see `inspect_tokens`.
    """
    model, tokenizer = llama.model, llama.tokenizer
    if not isinstance(model, Transformer) or not isinstance(tokenizer, Tokenizer):
        raise InputError(f"only what Llama.build makes can be inspected, not {type(model)} with {type(tokenizer)}")
    tokens = tokenizer.encode(text, bos=tokenizer.add_bos, eos=False)
    (generated,), _ = llama.generate([tokens], max_gen_len, temperature, top_p, top_k=top_k, seed=seed)
    return inspect_tokens(
        model,
        tokenizer,
        tokens + generated,
        len(generated),
        alternatives=alternatives,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
    )


@torch.inference_mode()
def inspect_tokens(
    model: Transformer,
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    n_generated: int = 0,
    *,
    alternatives: int = 5,
    n_next_tokens: int = 10,
    temperature: float = 0.6,
    top_p: float = 0.9,
    top_k: int | None = None,
) -> Inspection:
    """Compute the statistics of each token of a text, and the distributions of the token after it.

    Under torchrun every process must make the same call, and gets the same result.

    Args:
        model: the model. Its cache is neither used nor changed.
        tokenizer: the tokenizer, which names the tokens.
        tokens: the ids of the text: a prompt, and what was generated after it.
        n_generated: how many of them, at the end, were generated.
        alternatives: how many of the most likely tokens to list at each position.
        n_next_tokens: how many of the most likely tokens to list after the text.
        temperature, top_p, top_k: the requested sampling settings; see `llama.sampling.sample`.

    Raises:
        InputError: no tokens, more than `max_seq_len`, an id outside the vocabulary, or a number out of range.
        CheckpointError: a file of the model's weights has been cut since it was loaded.
        ArithmeticError, MemoryError: the network computed NaN or infinity; or there was not enough memory.
    """
    ids: list[int] = []
    error: InputError | None = None
    try:
        params = SamplingParams(0, temperature, top_p, top_k=top_k)  # which checks the sampling settings
        (ids,) = check_prompts([tokens], model, tokenizer, params)
        check_number("alternatives", alternatives, 1, integer=True)
        check_number("n_next_tokens", n_next_tokens, 1, integer=True)
        check_number("n_generated", n_generated, 0, integer=True)
        if n_generated > len(ids):
            raise InputError(f"n_generated={n_generated} is more than the {len(ids)} tokens of the text")
    except InputError as raised:
        error = raised
    check_same_rows([ids], error)

    with lock_of(model).turn(), out_of_memory_explained(explain_generation("prefill", [ids], 1)):
        hidden = padded_hidden_states(model, [ids])[0]  # (seq, dim)
        first_generated = len(ids) - n_generated
        statistics = [
            TokenStatistics(ids[0], tokenizer.token_text(ids[0]), first_generated == 0, None, None, None, None, [])
        ]
        positions = max(1, MAX_LOGITS // model.vocab_size)  # of one block
        for start in range(0, len(ids) - 1, positions):
            targets = torch.tensor(ids[1 + start : 1 + start + positions], device=hidden.device)
            logits = finite_logits(model, ids, hidden[start : start + len(targets)])  # (positions, vocab_size)
            for prediction in predictions(logits, targets, alternatives, tokenizer.token_text):
                i = len(statistics)
                name = tokenizer.token_text(ids[i])
                statistics.append(TokenStatistics(ids[i], name, i >= first_generated, *prediction))

        logits = finite_logits(model, ids, hidden[-1:])  # (1, vocab_size)
        probs, next_ids = torch.softmax(logits[0], dim=-1).topk(min(n_next_tokens, logits.shape[-1]))
        next_tokens = [
            Candidate(token, tokenizer.token_text(token), prob)
            for token, prob in zip(next_ids.tolist(), probs.tolist(), strict=True)
        ]
        settings = [
            (temperature, top_p, top_k),
            *((value, 1.0, None) for value in (0.5, 1.0, 1.5)),
            (1.0, 1.0, top_k or 5),
            (1.0, top_p if top_p < 1 else 0.9, None),
        ]
        requested, *variations = [sampling_distribution(logits, next_ids, *setting) for setting in settings]
    return Inspection(statistics, next_tokens, requested, variations)


def finite_logits(model: Transformer, tokens: list[int], hidden: torch.Tensor) -> torch.Tensor:
    """Return the logits of hidden states that the model computed on these tokens: (seq, dim) -> (seq, vocab_size).

    Raises:
        ArithmeticError: some are NaN or infinity.
    """
    logits = model.logits(hidden)
    if not logits.isfinite().all():
        raise ArithmeticError(explain_non_finite(model, tokens))
    return logits
