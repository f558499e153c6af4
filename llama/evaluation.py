"""Benchmarks with EleutherAI's lm-evaluation-harness: a model class for it, and its command with that model.

    python -m llama.evaluation --model llama --model_args ckpt_dir=Llama-3.2-1B --tasks hellaswag,gsm8k --batch_size 8

This needs the package `lm-eval`: `pip install "llama[eval]"`. The scores are those of the harness's own class for
Hugging Face models, on the same weights. Under torchrun every process makes the same calls on its share of the model,
and rank 0 prints and writes.
"""

import difflib
import hashlib
import inspect
import logging
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm

from llama.batch import generate_batch
from llama.chat_format import TemplateFormat
from llama.decoding import MAX_LOGITS
from llama.device import dtype_named
from llama.dialog import Dialog
from llama.distributed import is_first_rank
from llama.embeddings import batches_by_length, check_same_rows, checked_transformer, padded_hidden_states
from llama.errors import InputError, MissingFileError
from llama.generation import Llama
from llama.log import escape_control_characters
from llama.model_lock import lock_of
from llama.non_finite import explain_non_finite
from llama.sampling import token_logprobs
from llama.sampling_params import SamplingParams
from llama.template_process import render
from llama.tokenizer import Tokenizer
from llama.vocab.vocabulary import without_surrogates

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "lm_eval":
        raise
    advice = 'llama.evaluation needs the package lm-eval: pip install "llama[eval]"'
    if __name__ == "__main__":
        sys.exit(f"error: {advice}")
    raise ModuleNotFoundError(advice, name="lm_eval") from error

logger = logging.getLogger("llama")

# What a task's `generation_kwargs` may ask for, after the harness has chosen one of its names for `max_gen_toks`.
TASK_OPTIONS = (
    *("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "seed"),
    *("num_beams", "length_penalty", "early_stopping", "prompt_lookup_num_tokens"),
)

# What options are called elsewhere.
OTHER_NAMES = {"stop": "until", "stop_strings": "until", "stop_sequences": "until", "max_gen_len": "max_gen_toks"}
OTHER_MODEL_ARGS = {
    **{"pretrained": "ckpt_dir", "tokenizer": "tokenizer_path", "max_length": "max_seq_len"},
    **{"max_batch_size": "batch_size", "torch_dtype": "dtype"},
}

# What the harness asks for, encoded: its texts, or None for a window of a longer text; the context; what is scored.
EncodedRequest = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("llama")
class LlamaLM(TemplateLM):  # type: ignore[misc] # lm_eval has no types
    """A `Llama` as lm-evaluation-harness uses it, in batches of its `max_batch_size`.

    As in the harness's class for Hugging Face models, texts may spell control tokens, which chat templates do.

    Args:
        llama: its model and tokenizer must be a `Transformer` and a `Tokenizer`.

    Raises:
        InputError: they aren't.
    """

    tokenizer: Tokenizer

    def __init__(self, llama: Llama) -> None:
        super().__init__()
        if not isinstance(llama.tokenizer, Tokenizer):
            raise InputError(f"this needs a llama.Tokenizer, not a {type(llama.tokenizer).__name__}")
        self.llama, self.model, self.tokenizer = llama, checked_transformer(llama), llama.tokenizer

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "LlamaLM":
        """Build the model that the harness's `model_args` describe: see `build`.

        Args:
            arg_dict: the `model_args`.
            additional_config: the harness's `batch_size`, `max_batch_size` and `device`; None where they aren't given.

        Raises:
            InputError: a model argument that `build` doesn't have, or see there.
        """
        options = arg_dict | {name: value for name, value in (additional_config or {}).items() if value is not None}
        if options.get("device") == "cuda:0":  # the command's default, with or without a GPU, on every process
            del options["device"]
        known = list(inspect.signature(build).parameters)
        for name in options:
            check_name(name, known, OTHER_MODEL_ARGS, "a model argument")
        if "ckpt_dir" not in options:
            raise InputError("ckpt_dir is missing, the checkpoint: --model_args ckpt_dir=FOLDER")
        return cls(build(**options))

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> "LlamaLM":
        """The same, with `model_args` as a text: `ckpt_dir=…,max_seq_len=…`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text that is scored from its beginning."""
        return self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def max_length(self) -> int:
        """How many tokens the model sees at most."""
        return self.model.params.max_seq_len

    @property
    def max_gen_toks(self) -> int:
        """How many tokens are generated, unless the task says how many."""
        return 256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The token ids of a text.

        Args:
            string: may begin with BOS, which isn't put before it a second time.
            add_special_tokens: False puts no BOS before the text; None does if the model was trained with it.
        """
        engine = self.tokenizer.engine
        parts = engine.split(without_surrogates(string))  # at the control tokens that it spells
        tokens = engine.encode_parts(parts)
        bos_id = self.tokenizer.bos_id
        if bos_id is None or not self.tokenizer.add_bos or add_special_tokens is False or parts[:1] == [bos_id]:
            return tokens
        return [bos_id, *tokens]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a dialog in the model's chat format, where control tokens are spelled out.

        Args:
            chat_history: messages, each with its role and content.
            add_generation_prompt: False where the last message is the beginning of the assistant's answer.

        Raises:
            InputError: the chat format refuses the dialog, or can't be written as a text.
        """
        dialog, begun = chat_history, ""
        if not add_generation_prompt:
            *dialog, answer = chat_history
            begun = answer["content"]
        formatter = self.llama.formatter
        if isinstance(formatter, TemplateFormat):
            template = formatter.template
            variables: dict[str, Any] = {"messages": dialog, "add_generation_prompt": True}
            variables |= {"tools": None, "documents": None, **template.engine.template_tokens}
            return render(template.source, template.origin, [variables])[0] + begun
        tokens = formatter.encode_dialog_prompt(cast(Dialog, dialog))
        text = self.tokenizer.decode(tokens)
        if self.tok_encode(text) != tokens:  # it begins several turns with BOS, or a message spells a control token
            raise InputError("the model's chat format can't write this dialog as a text, which the harness asks for")
        return text + begun

    @property
    def tokenizer_name(self) -> str:
        """What tells apart, in the harness's cache of requests, texts that are written by different chat templates."""
        return hashlib.sha256(self.apply_chat_template([{"role": "user", "content": "text"}]).encode()).hexdigest()[:16]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The logprob of each continuation of a context, and whether greedy decoding would generate it."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm or not is_first_rank())
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The logprob of each text, in windows of `max_length` tokens, of which each sees as much as fits."""
        windows: list[EncodedRequest] = []
        request_of_window: list[int] = []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                request_of_window.append(i)
        totals = [0.0] * len(requests)
        for i, (logprob, _) in zip(request_of_window, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[i] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[EncodedRequest], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """`loglikelihood` of token ids. What is too long loses the beginning of its context."""
        requests_of: dict[tuple[int, ...], list[int]] = {}  # of each input: the choices of a question may share one
        n_shortened = 0
        for i, (texts, context, continuation) in enumerate(requests):
            if not 1 <= len(continuation) <= self.max_length:
                raise InputError(
                    f"{texts}: the continuation has {len(continuation)} tokens, and max_seq_len={self.max_length}; it "
                    f"must have at least one, and fit: build with a larger max_seq_len"
                )
            tokens = (context or [self.prefix_token_id]) + continuation
            n_shortened += len(tokens) > self.max_length + 1
            # The last token is only predicted.
            requests_of.setdefault(tuple(tokens[-self.max_length - 1 : -1]), []).append(i)
        self._warn_of_shortened(n_shortened, len(requests))
        distinct = list(requests_of)
        check_same_rows([*distinct, *(continuation for _, _, continuation in requests)])

        answers: dict[int, tuple[float, bool]] = {}
        bar = self._progress_bar(len(requests), "loglikelihood", disable_tqdm)
        for batch in batches_by_length(distinct, self.model.params.max_batch_size):
            rows = [distinct[i] for i in batch]
            asked = [(row, i) for row, tokens in enumerate(rows) for i in requests_of[tokens]]
            scores = self._score(rows, [(row, requests[i][2]) for row, i in asked])
            for (_, i), score in zip(asked, scores, strict=True):
                answers[i], texts = score, requests[i][0]
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, score)
            bar.update(len(asked))
        bar.close()
        return [answers[i] for i in range(len(requests))]

    @torch.inference_mode()
    def _score(
        self, rows: Sequence[Sequence[int]], continuations: Sequence[tuple[int, Sequence[int]]]
    ) -> list[tuple[float, bool]]:
        """The logprob of each continuation, and whether each of its tokens is the likeliest.

        Args:
            rows: inputs of the network.
            continuations: the row that a continuation belongs to, and its token ids; all but the last of them are the
                end of that row.
        """
        row_of: list[int] = []
        positions: list[int] = []
        targets: list[int] = []
        for row, continuation in continuations:
            row_of += [row] * len(continuation)
            positions += range(len(rows[row]) - len(continuation), len(rows[row]))
            targets += continuation
        logprobs: list[float] = []
        is_likeliest: list[bool] = []
        block = max(1, MAX_LOGITS // self.model.vocab_size)
        with lock_of(self.model).turn():
            hidden = padded_hidden_states(self.model, rows)  # (batch, seq, dim)
            for start in range(0, len(targets), block):
                end = start + block
                logits = self.model.logits(hidden[row_of[start:end], positions[start:end]])  # (block, vocab_size)
                expected = torch.tensor(targets[start:end], device=logits.device)
                logprobs += token_logprobs(logits, expected).tolist()
                is_likeliest += (logits.argmax(dim=-1) == expected).tolist()
            scores, start = [], 0
            for row, continuation in continuations:
                end = start + len(continuation)
                scores.append((sum(logprobs[start:end]), all(is_likeliest[start:end])))
                start = end
                if math.isnan(scores[-1][0]):
                    raise ArithmeticError(explain_non_finite(self.model, list(rows[row])))
        return scores

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to a stop string, as the task's options say; greedily, if they say nothing else.

        Raises:
            InputError: an option that isn't one of `TASK_OPTIONS`, a wrong value, or more new tokens than there is
                space for.
        """
        answers = [""] * len(requests)
        groups: dict[str, list[int]] = {}  # requests with the same options
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        bar = self._progress_bar(len(requests), "generate_until", disable_tqdm)
        for group in groups.values():
            params = sampling_params(requests[group[0]].args[1], self.max_gen_toks)
            max_context = self.max_length - params.max_gen_len
            if max_context < 1:
                raise InputError(
                    f"max_gen_toks={params.max_gen_len} new tokens leave no space for a context in "
                    f"max_seq_len={self.max_length}: build with a larger one, or lower it with --gen_kwargs"
                )
            contexts = [self.tok_encode(requests[i].args[0]) or [self.prefix_token_id] for i in group]
            self._warn_of_shortened(sum(len(context) > max_context for context in contexts), len(contexts))
            contexts = [context[-max_context:] for context in contexts]
            size = max(1, self.model.params.max_batch_size // params.rows_per_prompt)
            for batch in batches_by_length(contexts, size):
                for i, answer in zip(batch, self._generate([contexts[i] for i in batch], params), strict=True):
                    answers[group[i]] = answer
                    self.cache_hook.add_partial("generate_until", requests[group[i]].args, answer)
                bar.update(len(batch))
        bar.close()
        return answers

    def _generate(self, contexts: list[list[int]], params: SamplingParams) -> list[str]:
        """The texts that follow the contexts, without control tokens."""
        ends = [*params.stop_strings, self.tokenizer.token_text(self.eot_token_id)]
        special = set(self.tokenizer.special_tokens.values())
        answers = []
        for result in generate_batch(self.model, self.tokenizer, contexts, params):
            tokens = result.tokens
            text = self.tokenizer.decode([token for token in tokens if token not in special])
            # A stop string may begin within the last token: so many characters of it are not part of the answer.
            ends_in_text = bool(params.stop_strings and tokens and tokens[-1] not in special)
            n_cut = len(self.tokenizer.decode(tokens)) - len(result.text) if ends_in_text else 0
            # What is left may still spell a stop string: across a control token, or the end of the text in letters.
            answers.append(postprocess_generated_text(text[: len(text) - n_cut], ends, think_end_token=None))
        return answers

    def _warn_of_shortened(self, n_shortened: int, n_requests: int) -> None:
        if n_shortened:
            logger.warning(
                "%d of %d contexts don't fit into max_seq_len=%d, and lose their beginning",
                n_shortened,
                n_requests,
                self.max_length,
            )

    def _progress_bar(self, total: int, unit: str, disable: bool) -> "tqdm[Any]":
        return tqdm(total=total, desc=f"Running {unit} requests", disable=disable or not is_first_rank())


def sampling_params(gen_kwargs: dict[str, Any], max_gen_toks: int) -> SamplingParams:
    """What a task's `generation_kwargs` ask for. `do_sample` without a temperature samples at 1, as in transformers.

    Args:
        gen_kwargs: of one request.
        max_gen_toks: how many tokens are generated where they don't say it.

    Raises:
        InputError: an option that isn't one of `TASK_OPTIONS`, a wrong value, or `do_sample` at temperature 0.
    """
    if gen_kwargs.get("do_sample") and gen_kwargs.get("temperature") is None:
        gen_kwargs = gen_kwargs | {"temperature": 1.0}  # for which the harness would take 0
    try:
        options = dict(normalize_gen_kwargs(gen_kwargs, max_gen_toks))
    except (TypeError, ValueError) as error:
        raise InputError(f"generation_kwargs={gen_kwargs}: {error}") from error
    for name in options:
        check_name(name, TASK_OPTIONS, OTHER_NAMES, "an option of a task")
    stop = [string for string in options.pop("until") if string]
    do_sample, temperature = options.pop("do_sample"), options.pop("temperature", 0.0)
    if not isinstance(do_sample, bool):
        raise InputError(f"do_sample={do_sample!r} must be true or false")
    if do_sample and temperature == 0:
        raise InputError("do_sample=True asks for sampling, and temperature=0 for the likeliest tokens: give one")
    temperature = temperature if do_sample else 0.0
    return SamplingParams(options.pop("max_gen_toks"), temperature, options.pop("top_p", 1.0), stop=stop, **options)


def check_name(name: str, known: Sequence[str], other_names: dict[str, str], kind: str) -> None:
    """Raise InputError unless a name is a known one; it says which one was probably meant.

    Args:
        known: all names there are.
        other_names: what some are called elsewhere.
        kind: what they are names of, with its article.
    """
    if name not in known:
        similar = [other_names[name]] if name in other_names else difflib.get_close_matches(name, known, 1, 0.75)
        hint = f"did you mean {similar[0]}? There are" if similar else "there are"
        raise InputError(f"{name!r} is not {kind} that this model has; {hint} {', '.join(known)}")


def build(
    ckpt_dir: str | Path,
    tokenizer_path: str | Path | None = None,
    max_seq_len: int | None = None,
    batch_size: int | str = 1,
    model_parallel_size: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    seed: int = 1,
    compile: bool = False,
    mmap: bool = True,
) -> Llama:
    """`Llama.build`, with arguments as the harness passes them.

    Args:
        batch_size: rows of a batch.
        dtype: "float32", "bfloat16" or "float16".
        seed: what a task samples with that gives none itself.

    Raises:
        InputError: see `Llama.build`; or `batch_size` is "auto", which would have to run out of memory to find out.
    """
    if not str(batch_size).isdigit():
        raise InputError(f"batch_size={batch_size!r} must be a number")
    for name, value in {"compile": compile, "mmap": mmap}.items():
        if not isinstance(value, bool):
            raise InputError(f"{name}={value!r} must be true or false")
    return Llama.build(
        ckpt_dir,
        tokenizer_path,
        max_seq_len,
        int(batch_size),
        model_parallel_size,
        seed,
        device=device,
        dtype=dtype_named(dtype),
        quantize=quantize,
        compile=compile,
        mmap=mmap,
    )


def main() -> None:
    """The harness's command `lm_eval`, which knows the model `llama`."""
    if not is_first_rank():
        os.environ["LMEVAL_LOG_LEVEL"] = "ERROR"
    try:
        cli_evaluate()
    except (InputError, MissingFileError, MemoryError) as error:
        sys.exit(escape_control_characters(f"error: {error}"))


if __name__ == "__main__":
    main()
