"""Generation: the one decode loop, and what lies on it.

    text -> ids -> [read the prompts in one pass] -> [draw a token a row, pass it through the network, again] -> text

`Llama.generate` works on ids; `text_completion` and `chat_completion` dress it in text.
"""

import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch

from llama import parallel
from llama.chat import ChatFormat, Dialog, Message, Role
from llama.checkpoint import check_tensors, load_model, open_checkpoint
from llama.checks import check_prompts, check_sampling, explain_non_finite
from llama.errors import InputError
from llama.memory import default_dtype, explain_out_of_memory, report
from llama.model import Transformer
from llama.sampling import next_tokens, sample_top_p, token_logprobs
from llama.tokenizer import Tokenizer

__all__ = ["ChatPrediction", "CompletionPrediction", "Dialog", "Llama", "Message", "Role", "sample_top_p"]

logger = logging.getLogger("llama")

# Prompts are scored in blocks of positions whose logits take about this many numbers (128 MB in float32).
LOGITS_AT_ONCE = 2**25


class CompletionPrediction(TypedDict, total=False):
    """A completed text; `tokens` (each token's text) and `logprobs` are there when logprobs were asked for."""

    generation: str
    tokens: list[str]
    logprobs: list[float]


class ChatPrediction(TypedDict, total=False):
    """The assistant's message; `tokens` (each token's text) and `logprobs` are there when they were asked for."""

    generation: Message
    tokens: list[str]
    logprobs: list[float]


class Drawn(NamedTuple):
    """A new token of one row."""

    row: int
    token: int
    logprob: float | None  # None unless asked for


class Llama:
    """A model and its tokenizer, ready to generate. `Llama.build` makes one from files.

    Calls from several threads wait for each other, since the model has one cache.

    Args:
        model: a `Transformer`, or anything with `params` (`max_batch_size`, `max_seq_len`) and `forward(tokens,
            start_pos)` -> logits (batch, seq, vocab_size). `start_pos` is an int, or for prompts of different lengths,
            once they are read, a (batch) tensor.
        tokenizer: a `Tokenizer`, or anything with `encode`, `decode` and `stop_tokens` or `eos_id`.
        formatter: how dialogs become prompts; by default `ChatFormat(tokenizer)`.
    """

    def __init__(self, model: Any, tokenizer: Any, *, formatter: Any = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._lock = threading.Lock()
        if formatter is not None:
            self.formatter = formatter

    @cached_property
    def formatter(self) -> Any:
        """How dialogs become prompts: made when first asked for, since not every tokenizer has a chat format."""
        return ChatFormat(self.tokenizer)

    @staticmethod
    def build(
        ckpt_dir: str | Path,
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
        0 standard output is silent (`llama.parallel.restore_stdout` undoes that).

        Args:
            ckpt_dir: a folder in Meta's layout, or a GGUF file.
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
        args = checkpoint.model_args(tokenizer.n_words, max_seq_len, max_batch_size)
        check_tensors(checkpoint, args)

        place = parallel.setup(device, model_parallel_size)
        parallel.silence_stdout()
        dtype = default_dtype(place) if dtype is None else dtype
        args.check(parallel.model_parallel_size())
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

        Returns:
            The ids of each row, up to and without its first stop token, and their logprobs, or None.

        Raises:
            InputError: an argument out of range; the message says which, and what is right.
            ArithmeticError: the network computed something that is no finite number.
        """
        check_sampling(max_gen_len, temperature, top_p)
        vocab_size = getattr(self.model.params, "vocab_size", -1)
        prompts = check_prompts(
            prompt_tokens,
            self.model.params.max_batch_size,
            self.model.params.max_seq_len,
            vocab_size if vocab_size > 0 else getattr(self.tokenizer, "n_words", sys.maxsize),
        )
        tokens = [list(prompt) if echo else [] for prompt in prompts]
        scores: list[list[float]] = [[] for _ in prompts]
        rooms = [min(max_gen_len, self.model.params.max_seq_len - len(prompt)) for prompt in prompts]
        with self._lock, torch.no_grad():
            if max(rooms) > 0 or (echo and logprobs):
                hidden, head = self._read(prompts, max(rooms))
                rows = torch.arange(len(prompts), device=hidden.device)
                last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=hidden.device)
                logits = head(hidden[rows, last])  # (batch, vocab_size)
                if echo and logprobs:
                    block = max(1, LOGITS_AT_ONCE // logits.shape[-1])
                    scores = [self._score(prompt, hidden[row], head, block) for row, prompt in enumerate(prompts)]
                del hidden  # of a model that isn't ours, these are the logits of every position
                for drawn in self._decode(prompts, logits, rooms, temperature, top_p, logprobs):
                    tokens[drawn.row].append(drawn.token)
                    if drawn.logprob is not None:
                        scores[drawn.row].append(drawn.logprob)
        return tokens, scores if logprobs else None

    def _read(self, prompts: list[list[int]], room: int) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        """Pass all prompts through the network at once; at most `room` tokens will follow.

        Returns:
            Something for each position, (batch, longest prompt, …), and the function that makes logits of it. For our
            network these are its two halves, so that only the positions that are used pass through `output`.
        """
        longest = max(len(prompt) for prompt in prompts)
        # Shorter rows are filled up on the right, where no token of their own looks; what they store there in the
        # cache is overwritten, slot by slot, before it is looked at.
        padded = [prompt + [0] * (longest - len(prompt)) for prompt in prompts]
        tokens = torch.tensor(padded, dtype=torch.long, device=self._device)
        if getattr(self.model.forward, "__func__", None) is Transformer.forward:
            if min(map(len, prompts)) < longest:  # then the shorter rows' slots there are masked, not written
                self.model.setup_cache().clear(longest, longest + room)
            return self.model.hidden_states(tokens, 0), self.model.logits
        return self.model.forward(tokens, 0), torch.Tensor.float

    def _score(
        self, prompt: list[int], hidden: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor], block: int
    ) -> list[float]:
        """The logprob of each token of a prompt, given those before it, from the logits of `block` positions a time."""
        ids = torch.tensor(prompt, dtype=torch.long, device=hidden.device)
        scores = [0.0]  # nothing stands before the first
        for start in range(0, len(prompt) - 1, block):
            targets = ids[1 + start : 1 + start + block]
            scores += token_logprobs(head(hidden[start : start + len(targets)]), targets).tolist()
        if any(map(math.isnan, scores)):
            raise ArithmeticError(explain_non_finite(self.model, prompt))
        return scores

    def _decode(
        self,
        prompts: list[list[int]],
        logits: torch.Tensor,
        rooms: list[int],
        temperature: float,
        top_p: float,
        logprobs: bool,
    ) -> Iterator[Drawn]:
        """The decode loop: yields the new tokens of the rows, step by step, until every row has ended.

        `logits`, (batch, vocab_size), are those after the prompts.

        A row ends before its first stop token, or when its room is used up. Ended rows stay in the batch, so that the
        others' draws don't depend on when they ended.
        """
        stop_tokens = self._stop_tokens
        lengths = [len(prompt) for prompt in prompts]
        last_pos = self.model.params.max_seq_len - 1
        # Rows of one length share one position, which stays a plain int; others have one each, on the CPU.
        start_pos: int | torch.Tensor = lengths[0]
        if len(set(lengths)) > 1:
            start_pos = torch.tensor(lengths, device="cpu").clamp(max=last_pos)
        alive = [room > 0 for room in rooms]
        texts = [list(prompt) for prompt in prompts]
        for step in range(max(rooms)):
            ids = parallel.same_on_all_ranks(next_tokens(logits, temperature, top_p))  # (batch)
            # Here the host waits for the device, once a step, to see which rows have ended.
            scores = token_logprobs(logits, ids.clamp(min=0)).tolist() if logprobs else [None] * len(prompts)
            for row, token in enumerate(ids.tolist()):
                if not alive[row]:
                    continue
                if token == -1:
                    raise ArithmeticError(explain_non_finite(self.model, texts[row]))
                alive[row] = token not in stop_tokens
                if alive[row]:
                    texts[row].append(token)
                    yield Drawn(row, token, scores[row])
                    alive[row] = step + 1 < rooms[row]
            if not any(alive):
                return
            logits = self.model.forward(ids[:, None].clamp(min=0), start_pos)[:, -1].float()
            if isinstance(start_pos, int):
                start_pos += 1
            else:  # a row at the end of the context has ended, and waits there
                start_pos = (start_pos + 1).clamp(max=last_pos)

    def text_completion(
        self,
        prompts: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
    ) -> list[CompletionPrediction]:
        """Continue texts.

        Args:
            prompts: a list of texts.
            max_gen_len: at most this many new tokens; None for as many as there is room for.
            temperature, top_p, logprobs, echo: see `generate`.

        Returns:
            A prediction for each prompt, in order.

        Raises:
            InputError: an argument out of range; the message says which, and what is right.
        """
        if isinstance(prompts, str) or not isinstance(prompts, Iterable):
            raise InputError(f"prompts must be a list of texts, not {prompts!r:.80}")
        bos = getattr(self.tokenizer, "add_bos", True)
        prompt_tokens = [self.tokenizer.encode(prompt, bos=bos, eos=False) for prompt in prompts]
        tokens, scores = self.generate(
            prompt_tokens, self._gen_len(max_gen_len), temperature, top_p, logprobs=logprobs, echo=echo
        )
        predictions = [CompletionPrediction(generation=self.tokenizer.decode(ids)) for ids in tokens]
        return self._with_logprobs(predictions, tokens, scores)

    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
    ) -> list[ChatPrediction]:
        """Answer dialogs, as the assistant.

        Args:
            dialogs: a list of dialogs, each a list of messages `{"role": …, "content": …}`. One that the chat format
                refuses gets its refusal as the content; tokens and logprobs are those of the model all the same.
            max_gen_len: at most this many new tokens; None for as many as there is room for.
            temperature, top_p, logprobs: see `generate`.

        Returns:
            A prediction for each dialog, in order.

        Raises:
            InputError: an argument out of range, an unknown role, or an order of roles the chat format doesn't know.
        """
        if isinstance(dialogs, str) or not isinstance(dialogs, Iterable):
            raise InputError(f"dialogs must be a list of dialogs, not {dialogs!r:.80}")
        dialogs = list(dialogs)
        prompt_tokens = [self.formatter.encode_dialog_prompt(dialog) for dialog in dialogs]
        tokens, scores = self.generate(prompt_tokens, self._gen_len(max_gen_len), temperature, top_p, logprobs=logprobs)
        predictions = []
        for dialog, ids in zip(dialogs, tokens, strict=True):
            refusal = getattr(self.formatter, "refusal", lambda dialog: None)(dialog)
            content = self.tokenizer.decode(ids) if refusal is None else refusal
            predictions.append(ChatPrediction(generation={"role": "assistant", "content": content}))
        return self._with_logprobs(predictions, tokens, scores)

    def _with_logprobs(self, predictions: list[Any], tokens: list[list[int]], scores: list[list[float]] | None) -> Any:
        """Add the two optional keys, if logprobs were asked for."""
        if scores is not None:
            for prediction, ids, row in zip(predictions, tokens, scores, strict=True):
                prediction["tokens"] = [self.tokenizer.decode([token]) for token in ids]
                prediction["logprobs"] = row
        return predictions

    def _gen_len(self, max_gen_len: int | None) -> int:
        return self.model.params.max_seq_len - 1 if max_gen_len is None else max_gen_len

    @property
    def _stop_tokens(self) -> set[int]:
        stop_tokens = getattr(self.tokenizer, "stop_tokens", None)
        return {self.tokenizer.eos_id} if stop_tokens is None else set(stop_tokens)

    @property
    def _device(self) -> torch.device:
        """Where the model's weights are; a scripted model may have none."""
        parameters = self.model.parameters() if hasattr(self.model, "parameters") else iter(())
        return next((parameter.device for parameter in parameters), torch.device("cpu"))
