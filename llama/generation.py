"""Generation: a `Llama` is a model and its tokenizer, and answers prompts of ids, texts, and dialogs.

    text -> ids -> [the decode loop: `llama.decoding`] -> ids -> text

`generate` works on ids; `text_completion` and `chat_completion` dress it in text. Each has a stream, which yields what
it returns piece by piece, as it comes.
"""

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from typing_extensions import Unpack

from llama import distributed
from llama.chat_format import ChatFormat, Dialog, Message, Role
from llama.checkpoint import Checkpoint, check_tensors, load_model, open_checkpoint
from llama.checkpoint.memory import explain_out_of_memory, report
from llama.decoding import Decoder
from llama.device import default_dtype
from llama.errors import InputError
from llama.sampling import sample_top_p
from llama.sampling_params import SamplingOptions, SamplingParams, check_prompts
from llama.streaming import Piece
from llama.tokenizer import Tokenizer

__all__ = ["ChatPrediction", "CompletionPrediction", "Dialog", "Llama", "Message", "Piece", "Role", "sample_top_p"]

logger = logging.getLogger("llama")


class CompletionPrediction(TypedDict, total=False):
    """A completed text; `tokens` (each token's text) and `logprobs` are there when logprobs were asked for, and `score`
    when beams were."""

    generation: str
    tokens: list[str]
    logprobs: list[float]
    score: float


class ChatPrediction(TypedDict, total=False):
    """The assistant's message; the rest is as in `CompletionPrediction`."""

    generation: Message
    tokens: list[str]
    logprobs: list[float]
    score: float


class Collected(NamedTuple):
    """The answers to a batch, row by row."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    excess: list[int]  # characters of the last token that a stop text began in
    scores: list[float | None]


class Llama:
    """A model and its tokenizer, ready to generate. `Llama.build` makes one from files.

    Calls from several threads wait for each other, since the model has one cache; so does a call for another thread's
    stream. A stream that its own thread leaves behind, by another call, can't go on. Closed, it can be forgotten.

    Args:
        model: a `Transformer`, or anything with `params` (`max_batch_size`, `max_seq_len`) and `forward(tokens,
            start_pos)` -> logits (batch, seq, vocab_size). `start_pos` is an int, or for prompts of different lengths,
            once they are read, a (batch) tensor.
        tokenizer: a `Tokenizer`, or anything with `encode`, `decode` and `stop_tokens` or `eos_id`.
        formatter: how dialogs become prompts; by default `ChatFormat(tokenizer)`.
    """

    def __init__(self, model: Any, tokenizer: Any, *, formatter: Any = None) -> None:
        self._decoder = Decoder(model)
        self.tokenizer = tokenizer
        if formatter is not None:
            self.formatter = formatter

    @property
    def model(self) -> Any:
        return self._decoder.model

    @model.setter
    def model(self, model: Any) -> None:
        self._decoder = Decoder(model)

    @cached_property
    def formatter(self) -> Any:
        """How dialogs become prompts: made when first asked for, since not every tokenizer has a chat format."""
        return ChatFormat(self.tokenizer)

    @staticmethod
    def build(
        ckpt_dir: str | Path | Checkpoint,
        tokenizer_path: str | Path | None,
        max_seq_len: int,
        max_batch_size: int,
        model_parallel_size: int | None = None,
        seed: int = 1,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> "Llama":
        """Load a checkpoint, on one process or under torchrun.

        Changed for the whole process: torch's random state is seeded. Under torchrun also: the process group and
        fairscale's model-parallel group are made, if they aren't there yet; the CUDA device is set; and on ranks above
        0 standard output is silent (`llama.distributed.restore_stdout` undoes that).

        Args:
            ckpt_dir: a folder in Meta's layout or Hugging Face's, or a GGUF file; or an open checkpoint.
            tokenizer_path: the tokenizer's file; None for the one that comes with the checkpoint.
            max_seq_len: room for this many tokens a row, prompt and answer together.
            max_batch_size: room for this many rows.
            model_parallel_size: processes that share one copy of the model; None for all there are.
            seed: for `torch.manual_seed`; must be the same on every process.
            device: "cuda", "cpu", "mps"; None for CUDA if there is one, else the CPU.
            dtype: of weights and cache; None for bfloat16 where the device computes in it, else float16 on CUDA and
                float32 on the CPU.

        Raises:
            MissingFileError: no such folder or file, or no checkpoint in it.
            CheckpointError: a damaged, hostile or mismatched file.
            InputError: an argument the model or the machine can't serve.
            MemoryError: not enough memory; the message says what to lower.
        """
        begin = time.monotonic()
        for name, value in (("max_seq_len", max_seq_len), ("max_batch_size", max_batch_size)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name}={value!r} must be a whole number of at least 1")
        if dtype not in (None, torch.bfloat16, torch.float16, torch.float32, torch.float64):
            raise InputError(f"dtype={dtype!r} must be torch.bfloat16, float16, float32 or float64")
        checkpoint = open_checkpoint(ckpt_dir)
        tokenizer = Tokenizer(tokenizer_path) if tokenizer_path is not None else checkpoint.tokenizer()
        args = checkpoint.settings.model_args(tokenizer.n_words, max_seq_len, max_batch_size)
        check_tensors(checkpoint, args)

        place = distributed.setup(device, model_parallel_size)
        distributed.silence_stdout()
        dtype = default_dtype(place) if dtype is None else dtype
        args.check(distributed.model_parallel_size())
        report(args, place, dtype)
        with explain_out_of_memory(args, place, dtype):
            model = load_model(checkpoint, args, device=place, dtype=dtype)
            model.setup_cache()
        torch.manual_seed(seed)
        logger.info("loaded %s in %.1f s", checkpoint.path, time.monotonic() - begin)
        return Llama(model, tokenizer)

    def generate(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Continue prompts of token ids.

        Args:
            prompt_tokens: a list of ids for each row; lengths may differ, and need no padding.
            max_gen_len: at most this many new tokens a row; also no more than `max_seq_len` leaves room for.
            temperature: 0 takes the likeliest token each time; else tokens are drawn, more evenly the higher it is.
            top_p: draw from the likeliest tokens that together have this probability.
            logprobs: also return the natural log of each returned token's probability, whatever the temperature.
            echo: return the prompt before the new tokens. With `max_gen_len=0` and `logprobs` this scores a text; its
                first token, which nothing stands before, gets 0.0.
            options: see `llama.sampling_params.SamplingOptions`. Of several answers to a prompt, those to the first prompt come
                first; found by beams, the best first. A stop text ends an answer before the first token that is all
                part of it.

        Returns:
            The ids of each row, up to and without its first stop token, and their logprobs, or None.

        Raises:
            InputError: an argument out of range, or a combination that makes no sense; the message says what is right.
            ArithmeticError: the network computed something that is no finite number.
        """
        how = SamplingParams(max_gen_len, temperature, top_p, **options)
        found = self._collect(prompt_tokens, how, logprobs=logprobs, echo=echo)
        return found.tokens, found.logprobs if logprobs else None

    def generate_stream(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> Iterator[Piece]:
        """What `generate` returns, each token as it is drawn.

        Yields:
            Pieces with `row`, `token`, `logprob` (if asked for) and, in a row's last piece, `ended`: "stop" or
            "length". A last piece may have no token. The stream may be left at any time.
        """
        how = SamplingParams(max_gen_len, temperature, top_p, **options)
        return self._stream(prompt_tokens, how, logprobs=logprobs, text=how.stop is not None)

    def text_completion(
        self,
        prompts: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> list[CompletionPrediction]:
        """Continue texts.

        Args:
            prompts: a list of texts.
            max_gen_len: at most this many new tokens; None for as many as there is room for.
            temperature, top_p, logprobs, echo, options: see `generate`.

        Returns:
            A prediction for each prompt, in order; with `num_return_sequences`, all of the first prompt's, then all of
            the second's, and so on. What is raised is what `generate` raises.
        """
        how = SamplingParams(self._gen_len(max_gen_len), temperature, top_p, **options)
        found = self._collect(self._encode(prompts), how, logprobs=logprobs, echo=echo)
        answers = zip(found.tokens, found.excess, strict=True)
        predictions = [CompletionPrediction(generation=self._text(ids, excess)) for ids, excess in answers]
        return self._with_details(predictions, found, logprobs)

    def text_completion_stream(
        self,
        prompts: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> Iterator[Piece]:
        """What `text_completion` returns, piece by piece.

        Yields:
            Pieces whose `text`, joined row by row, is the prediction's. Text comes as soon as it is certain: no half
            characters, and no beginnings of stop texts. The rest is as in `generate_stream`.
        """
        how = SamplingParams(self._gen_len(max_gen_len), temperature, top_p, **options)
        return self._stream(self._encode(prompts), how, logprobs=logprobs, text=True)

    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> list[ChatPrediction]:
        """RowOutput dialogs, as the assistant.

        Args:
            dialogs: a list of dialogs, each a list of messages `{"role": …, "content": …}`. One that the chat format
                refuses gets its refusal as the content; tokens and logprobs are those of the model all the same.
            max_gen_len: at most this many new tokens; None for as many as there is room for.
            temperature, top_p, logprobs, options: see `generate`. With `reuse_cache=True` a dialog that is the last
                call's, a turn or more longer, costs only its new tokens.

        Returns:
            A prediction for each dialog, in the order of `text_completion`.

        Raises:
            InputError: an argument out of range, an unknown role, or an order of roles the chat format doesn't know.
        """
        how = SamplingParams(self._gen_len(max_gen_len), temperature, top_p, **options)
        prompt_tokens, refusals = self._encode_dialogs(dialogs)
        found = self._collect(prompt_tokens, how, logprobs=logprobs)
        predictions = []
        for row, ids in enumerate(found.tokens):
            refusal = refusals[row // how.num_return_sequences]
            content = self._text(ids, found.excess[row]) if refusal is None else refusal
            message: Message = {"role": "assistant", "content": content}
            predictions.append(ChatPrediction(generation=message))
        return self._with_details(predictions, found, logprobs)

    def chat_completion_stream(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> Iterator[Piece]:
        """What `chat_completion` returns, piece by piece: see `text_completion_stream`."""
        how = SamplingParams(self._gen_len(max_gen_len), temperature, top_p, **options)
        prompt_tokens, refusals = self._encode_dialogs(dialogs)
        stream = self._stream(prompt_tokens, how, logprobs=logprobs, text=True)

        def pieces() -> Iterator[Piece]:
            told = set()  # the rows whose refusal is out
            for piece in stream:
                refusal = refusals[piece.row // how.num_return_sequences]
                if refusal is not None:
                    piece = piece._replace(text="" if piece.row in told else refusal)
                    told.add(piece.row)
                yield piece

        return pieces()

    def _collect(
        self, prompt_tokens: Sequence[Sequence[int]], how: SamplingParams, *, logprobs: bool, echo: bool = False
    ) -> Collected:
        """All answers, when they are done."""
        prompts = self._check(prompt_tokens, how)
        rows = len(prompts) * how.num_return_sequences
        found = Collected([[] for _ in range(rows)], [[] for _ in range(rows)], [0] * rows, [None] * rows)
        texts = [""] * rows
        for piece in self._run(prompts, how, logprobs=logprobs, echo=echo, text=how.stop is not None):
            if piece.token is not None:
                found.tokens[piece.row].append(piece.token)
                if piece.logprob is not None:
                    found.logprobs[piece.row].append(piece.logprob)
            texts[piece.row] += piece.text
            if piece.ended is not None:
                found.scores[piece.row] = piece.score
        for row in range(rows if how.stop is not None else 0):
            new = found.tokens[row][len(prompts[row // how.num_return_sequences]) if echo else 0 :]
            found.excess[row] = len(self.tokenizer.decode(new)) - len(texts[row])
        return found

    def _stream(
        self, prompt_tokens: Sequence[Sequence[int]], how: SamplingParams, *, logprobs: bool, text: bool
    ) -> Iterator[Piece]:
        """The answers, piece by piece. What is wrong with the arguments is said now, not at the first piece."""
        if how.num_beams > 1:
            raise InputError(
                f"num_beams={how.num_beams}: beam search has no answer before it is done, so there is no stream"
            )
        return self._run(self._check(prompt_tokens, how), how, logprobs=logprobs, echo=False, text=text)

    def _run(
        self, prompts: list[list[int]], how: SamplingParams, *, logprobs: bool, echo: bool, text: bool
    ) -> Iterator[Piece]:
        stop_tokens = getattr(self.tokenizer, "stop_tokens", None)
        ends = {self.tokenizer.eos_id} if stop_tokens is None else set(stop_tokens)
        decode = self.tokenizer.decode if text else None
        return self._decoder.run(prompts, how, ends, decode, logprobs=logprobs, echo=echo)

    def _check(self, prompt_tokens: Sequence[Sequence[int]], how: SamplingParams) -> list[list[int]]:
        """The prompts as lists of ints; InputError if they don't fit the model."""
        params = self.model.params
        vocab_size = getattr(params, "vocab_size", -1)
        words = vocab_size if vocab_size > 0 else getattr(self.tokenizer, "n_words", sys.maxsize)
        each = max(how.num_return_sequences, how.num_beams)
        prompts = check_prompts(prompt_tokens, each, params.max_batch_size, params.max_seq_len, words)
        if each > 1:
            self._decoder.check_reorder()
        return prompts

    def _encode(self, prompts: Sequence[str]) -> list[list[int]]:
        if isinstance(prompts, str) or not isinstance(prompts, Iterable):
            raise InputError(f"prompts must be a list of texts, not {prompts!r:.80}")
        bos = getattr(self.tokenizer, "add_bos", True)
        return [self.tokenizer.encode(prompt, bos=bos, eos=False) for prompt in prompts]

    def _encode_dialogs(self, dialogs: Sequence[Dialog]) -> tuple[list[list[int]], list[str | None]]:
        """The prompts of dialogs, and what to answer in the model's place, if the format says so."""
        if isinstance(dialogs, str) or not isinstance(dialogs, Iterable):
            raise InputError(f"dialogs must be a list of dialogs, not {dialogs!r:.80}")
        dialogs = list(dialogs)
        refusal = getattr(self.formatter, "refusal", lambda dialog: None)
        prompt_tokens = [self.formatter.encode_dialog_prompt(dialog) for dialog in dialogs]
        return prompt_tokens, [refusal(dialog) for dialog in dialogs]

    def _text(self, ids: list[int], excess: int) -> str:
        """The text of an answer, without the part of its last token that a stop text began in."""
        text = self.tokenizer.decode(ids)
        return text[: len(text) - excess]

    def _with_details(self, predictions: list[Any], found: Collected, logprobs: bool) -> Any:
        """Add the optional keys."""
        for row, prediction in enumerate(predictions):
            if logprobs:
                tokens = [self.tokenizer.decode([token]) for token in found.tokens[row]]
                if found.excess[row]:
                    tokens[-1] = tokens[-1][: max(0, len(tokens[-1]) - found.excess[row])]
                prediction["tokens"], prediction["logprobs"] = tokens, found.logprobs[row]
            if found.scores[row] is not None:
                prediction["score"] = found.scores[row]
        return predictions

    def _gen_len(self, max_gen_len: int | None) -> int:
        return self.model.params.max_seq_len - 1 if max_gen_len is None else max_gen_len
