"""Generation: a `Llama` is a network and its tokenizer, and answers prompts of ids, texts, and dialogs.

    text -> ids -> prefill -> [sample a token -> forward it] -> ids -> text

`generate` works on ids; `text_completion` and `chat_completion` on text. Each has a stream, which yields what the call
returns as it comes. `llama.decoding` has prefill and the loop; `llama.batch` decides that a row has finished.
"""

import logging
import time
from collections.abc import Generator, Iterable, Sequence
from functools import cached_property
from pathlib import Path

import torch
from typing_extensions import Unpack

from llama import distributed
from llama.batch import generate_batch, predict, stream_batch
from llama.chat_format import ChatFormat
from llama.checkpoint import Checkpoint, check_tensors, load_model, open_checkpoint
from llama.checkpoint.memory import check_memory, describe_model, explain_out_of_memory
from llama.compiled import compile_model
from llama.device import choose_dtype
from llama.dialog import ChatPrediction, CompletionPrediction, Dialog, Message, Role
from llama.errors import InputError
from llama.protocols import DialogFormat, LanguageModel, TextTokenizer
from llama.sampling import sample_top_p
from llama.sampling_options import BEAM_OPTIONS, SamplingOptions, takes_sampling_options
from llama.sampling_params import SamplingParams, check_number
from llama.streaming import Piece, refused

__all__ = ["ChatPrediction", "CompletionPrediction", "Dialog", "Llama", "Message", "Piece", "Role", "sample_top_p"]

logger = logging.getLogger("llama")


class Llama:
    """A network and its tokenizer, ready to generate. `Llama.build` makes one from files.

    Calls from several threads wait for each other, since the model has one cache. A stream is produced by a thread of
    its own, so its consumer may be slow, on any thread, or gone.

    Args:
        model: a `Transformer`, or a network of your own: see `llama.protocols.LanguageModel`.
        tokenizer: a `Tokenizer`, or anything with `encode`, `decode` and `stop_tokens` or `eos_id`.
        formatter: how dialogs become prompts; by default `ChatFormat(tokenizer)`.
    """

    def __init__(
        self, model: LanguageModel, tokenizer: TextTokenizer, *, formatter: DialogFormat | None = None
    ) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, type(model).__name__
        if formatter is not None:
            self.formatter = formatter

    def __repr__(self) -> str:
        return f"<Llama {getattr(self, 'name', '')}: {describe_model(self.model)}>"

    @cached_property
    def formatter(self) -> DialogFormat:
        """How dialogs become prompts: made when first asked for, since not every tokenizer has a chat format."""
        formatter = ChatFormat(self.tokenizer)
        logger.info("chat format: %s", formatter.description)
        return formatter

    @staticmethod
    def build(
        ckpt_dir: str | Path | Checkpoint,
        tokenizer_path: str | Path | None = None,
        max_seq_len: int | None = None,
        max_batch_size: int = 4,
        model_parallel_size: int | None = None,
        seed: int = 1,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        quantize: str | None = None,
        compile: bool = False,
        mmap: bool = True,
    ) -> "Llama":
        """Load a checkpoint, in one process or under torchrun.

        Seeds torch's random state. Under torchrun it also makes the process group and fairscale's model-parallel group,
        if they aren't there yet, sets the CUDA device, and discards standard output on ranks above 0 (until
        `llama.distributed.restore_stdout`).

        Args:
            ckpt_dir: a folder in Meta's or Hugging Face's layout, or a GGUF file; or an open checkpoint.
            tokenizer_path: the tokenizer's file; None for the one that comes with the checkpoint.
            max_seq_len, max_batch_size: the size of the KV cache: tokens of a row, prompt and answer together (None for
                4096, or the model's own limit if that is lower); rows.
            model_parallel_size: processes that share one copy of the model; None for all there are.
            seed: for `torch.manual_seed`; the same on every process.
            device: "cuda", "cpu", "mps"; None for CUDA if there is one, else the CPU.
            dtype: of weights and cache; None for `llama.device.default_dtype`.
            quantize: "int8" or "int4" keeps the matrices in so many bits: see `llama.quantized`.
            compile: run decoding steps in a faster form: see `llama.compiled`, and `llama.captured` for CUDA.
            mmap: use weights where their files are mapped, if they need not be converted; False copies them.

        Raises:
            MissingFileError: no such folder or file, or no checkpoint in it.
            CheckpointError: a damaged, hostile or mismatched file.
            InputError: an argument that the model or the machine can't serve.
            MemoryError: not enough memory; the message says what to lower.
        """
        begin = time.monotonic()
        check_number("max_seq_len", 1 if max_seq_len is None else max_seq_len, 1, integer=True)
        check_number("max_batch_size", max_batch_size, 1, integer=True)
        check_number("seed", seed, -(2**63), 2**64 - 1, integer=True)  # as torch.manual_seed takes it
        checkpoint = open_checkpoint(ckpt_dir)
        tokenizer = checkpoint.tokenizer(tokenizer_path)
        args = checkpoint.settings.model_args(tokenizer.n_words, max_seq_len, max_batch_size)
        check_tensors(checkpoint, args)
        chosen_device = distributed.setup(device, model_parallel_size)
        distributed.silence_stdout()
        dtype = choose_dtype(dtype, chosen_device, quantize)
        args.check(distributed.model_parallel_size())
        check_memory(args, chosen_device, dtype, quantize, mmap)
        with explain_out_of_memory(args, chosen_device, dtype, quantize):
            model = load_model(checkpoint, args, device=chosen_device, dtype=dtype, quantize=quantize, mmap=mmap)
            model.setup_cache()
        if compile:
            compile_model(model)
        torch.manual_seed(seed)
        logger.info("loaded %s in %.1f s", checkpoint.path, time.monotonic() - begin)
        built = Llama(model, tokenizer)
        built.name = checkpoint.path.name
        return built

    @takes_sampling_options("top_logprobs")
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
            max_gen_len: at most this many new tokens a row; also no more than fit into `max_seq_len`.
            temperature: 0 takes the likeliest token each time; above 0 tokens are sampled, the higher the more evenly.
            top_p: sample from the likeliest tokens that together have this probability.
            logprobs: also return the natural log of each returned token's probability, whatever the temperature.
            echo: return the prompt before the new tokens. With `max_gen_len=0` and `logprobs` this scores a text; its
                first token, which has no context, gets 0.0.
            options: see `llama.sampling_options.SamplingOptions`.

        Returns:
            The ids of each row, up to and without its first stop token, and their logprobs, or None.

        Raises:
            InputError: an argument out of range, or a combination that makes no sense; the message says what is right.
            ArithmeticError, MemoryError: the network computed NaN or infinity; or there was not enough memory.
        """
        params = SamplingParams(max_gen_len, temperature, top_p, logprobs, echo, **options)
        if params.top_logprobs:
            raise InputError("generate has no place for top_logprobs: its stream and text_completion do")
        results = generate_batch(self.model, self.tokenizer, prompt_tokens, params)
        return [result.tokens for result in results], [result.logprobs for result in results] if logprobs else None

    @takes_sampling_options(*BEAM_OPTIONS)
    def generate_stream(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> Generator[Piece, None, None]:
        """What `generate` returns, each token as it is sampled.

        Args:
            options: see `llama.sampling_options.SamplingOptions`.

        Yields:
            Pieces with `row`, `token`, `logprob` (if asked for) and, in a row's last piece, `ended`: "stop" or
            "length". A last piece may have no token. The stream may be left at any time.
        """
        params = SamplingParams(max_gen_len, temperature, top_p, logprobs, echo=False, **options)
        return stream_batch(self.model, self.tokenizer, prompt_tokens, params, text=bool(params.stop_strings))

    @takes_sampling_options()
    def text_completion(
        self,
        prompts: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
        *,
        details: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> list[CompletionPrediction]:
        """Continue texts.

        Args:
            prompts: a list of texts.
            max_gen_len: at most this many new tokens; None for as many as fit into `max_seq_len`.
            temperature, top_p, logprobs, echo: see `generate`.
            details: also tell each prediction's finish_reason ("stop" or "length"), prompt_tokens, completion_tokens.
            options: see `llama.sampling_options.SamplingOptions`.

        Returns:
            A prediction for each prompt, or several with `num_return_sequences`.
        """
        params = SamplingParams(self._max_gen_len(max_gen_len), temperature, top_p, logprobs, echo, **options)
        return predict(self.model, self.tokenizer, self._encode(prompts), params, details=details)

    @takes_sampling_options(*BEAM_OPTIONS)
    def text_completion_stream(
        self,
        prompts: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> Generator[Piece, None, None]:
        """What `text_completion` returns, piece by piece.

        Args:
            options: see `llama.sampling_options.SamplingOptions`.

        Yields:
            Pieces as in `generate_stream`, whose `text`, joined row by row, is the prediction's. It comes as soon as it
            is certain: no half characters, and no beginnings of stop strings.
        """
        params = SamplingParams(self._max_gen_len(max_gen_len), temperature, top_p, logprobs, echo=False, **options)
        return stream_batch(self.model, self.tokenizer, self._encode(prompts), params, text=True)

    @takes_sampling_options()
    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        *,
        details: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> list[ChatPrediction]:
        """Answer dialogs, as the assistant.

        Args:
            dialogs: a list of dialogs, each a list of messages `{"role": …, "content": …}`. If the chat format refuses
                one, its refusal is the content; tokens and logprobs are still the model's.
            temperature, top_p, max_gen_len, logprobs, details: see `text_completion`.
            options: see `llama.sampling_options.SamplingOptions`.

        Returns:
            A prediction for each dialog, in the order of `text_completion`.

        Raises:
            InputError: as `generate`; or an unknown role, or an order of roles the chat format can't express.
        """
        params = SamplingParams(self._max_gen_len(max_gen_len), temperature, top_p, logprobs, echo=False, **options)
        prompt_tokens, refusals = self._encode_dialogs(dialogs, params.num_return_sequences)
        answers = predict(self.model, self.tokenizer, prompt_tokens, params, details=details)
        contents = [refusals[row] or answer["generation"] for row, answer in enumerate(answers)]
        return [
            {**answer, "generation": {"role": "assistant", "content": content}}
            for answer, content in zip(answers, contents, strict=True)
        ]

    @takes_sampling_options(*BEAM_OPTIONS)
    def chat_completion_stream(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> Generator[Piece, None, None]:
        """What `chat_completion` returns, piece by piece: see `text_completion_stream`.

        Args:
            options: see `llama.sampling_options.SamplingOptions`.
        """
        params = SamplingParams(self._max_gen_len(max_gen_len), temperature, top_p, logprobs, echo=False, **options)
        prompt_tokens, refusals = self._encode_dialogs(dialogs, params.num_return_sequences)
        return refused(stream_batch(self.model, self.tokenizer, prompt_tokens, params, text=True), refusals)

    def _encode(self, prompts: Sequence[str]) -> list[list[int]]:
        if isinstance(prompts, str) or not isinstance(prompts, Iterable):
            raise InputError(f"prompts must be a list of texts, not {prompts!r:.80}")
        bos = getattr(self.tokenizer, "add_bos", True)
        return [self.tokenizer.encode(prompt, bos=bos, eos=False) for prompt in prompts]

    def _encode_dialogs(self, dialogs: Sequence[Dialog], n_answers: int) -> tuple[list[list[int]], list[str | None]]:
        """The prompts of dialogs; and for each answer what to say in the model's place, if the format refuses."""
        if isinstance(dialogs, str) or not isinstance(dialogs, Iterable):
            raise InputError(f"dialogs must be a list of dialogs, not {dialogs!r:.80}")
        dialogs = list(dialogs)
        refusal = getattr(self.formatter, "refusal", lambda dialog: None)
        prompt_tokens = [self.formatter.encode_dialog_prompt(dialog) for dialog in dialogs]
        return prompt_tokens, [refusal(dialog) for dialog in dialogs for _ in range(n_answers)]

    def _max_gen_len(self, max_gen_len: int | None) -> int:
        return self.model.params.max_seq_len - 1 if max_gen_len is None else max_gen_len  # as in the reference
