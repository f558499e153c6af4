"""The keyword arguments that `Llama.generate`, `text_completion`, `chat_completion` and their streams share."""

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, ParamSpec, TypedDict, TypeVar

from llama.protocols import TextGenerator
from llama.sampling_params import LogitsProcessor, SamplingParams

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class SamplingOptions(TypedDict, total=False):
    """What else a call can ask for. A token is chosen by logits_processor, temperature, top_k and top_p, in this order.

    Attributes:
        top_k: sample from this many of the likeliest tokens, and then from the nucleus of these; None for all.
        num_return_sequences: answers to each prompt: first all to the first prompt, then all to the second, and so on.
        num_beams: above 1: beam search with this many beams, instead of sampling. The best answer comes first.
        length_penalty: a beam's score is its log-probability / length ** length_penalty.
        early_stopping: when beam search ends. True: when num_beams answers are finished; False: when the best beam's
            score at its present length is no better than theirs; "never": when its score at the greatest length isn't.
        stop: strings that end an answer, and aren't part of it. Tokens that lie wholly within one are left out.
        logits_processor: a function (input_ids, scores) -> scores, or a list of them, as Hugging Face's transformers
            and grammar engines have them: of each row, the ids so far (rows, length) and the logits of the next token
            (rows, vocab_size). Where rows differ in length, their ids are padded on the left with their own first
            token. In beam search the scores are log-probabilities.
        seed: sample with a random generator of this call's own.
        reuse_cache: prefill only what the KV cache doesn't hold of the last call's prompts and answers; not after
            changing the weights.
        top_logprobs: with logprobs=True, also tell this many of the likeliest tokens in each new token's place, with
            their logprobs: in predictions, and in the pieces of streams.
        prompt_lookup_num_tokens: speculative decoding: propose up to this many tokens at a time, those that followed
            when the latest ones occurred before. It takes less time where an answer quotes its prompt.
        draft_model: speculative decoding: propose what another `Llama` says, a smaller one with the same tokenizer. It
            takes less time where that often says the same.
    """

    top_k: int | None
    num_return_sequences: int
    num_beams: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
    stop: str | Iterable[str] | None
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None
    seed: int | None
    reuse_cache: bool
    top_logprobs: int
    prompt_lookup_num_tokens: int | None
    draft_model: TextGenerator | None


OTHER_NAMES = {  # what other libraries call an option, or where it belongs, and what to do here
    "assistant_model": "it is called draft_model here",
    "bad_words_ids": "give transformers' NoBadWordsLogitsProcessor as logits_processor",
    "details": "it is an option of text_completion and chat_completion",
    "do_sample": "temperature=0 takes the likeliest token, and any higher one samples",
    "echo": "it is an option of generate and text_completion",
    "eos_token_id": "the ids that end an answer are tokenizer.stop_tokens",
    "frequency_penalty": "give a penalty as logits_processor",
    "generator": "give a seed",
    "max_length": "give max_gen_len, the number of new tokens",
    "max_new_tokens": "it is called max_gen_len here",
    "max_tokens": "it is called max_gen_len here",
    "min_p": "give transformers' MinPLogitsWarper as logits_processor",
    "n": "it is called num_return_sequences here",
    "num_assistant_tokens": "their number adapts to how many are accepted",
    "presence_penalty": "give a penalty as logits_processor",
    "repetition_penalty": "give transformers' RepetitionPenaltyLogitsProcessor as logits_processor",
    "stop_sequence": "it is called stop here",
    "stop_sequences": "it is called stop here",
    "stop_strings": "it is called stop here",
    "stream": "the methods whose names end in _stream yield an answer as it comes",
    "streamer": "the methods whose names end in _stream yield an answer as it comes",
}
BEAM_OPTIONS = ("num_beams", "length_penalty", "early_stopping")


def takes_sampling_options(
    *hidden: str,
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """A decorator for methods that end in `**options: Unpack[SamplingOptions]`: help shows each with its description.

    The line "options: ..." of the docstring makes way for their descriptions. An option that doesn't exist is a
    TypeError that says which one does.

    Args:
        hidden: options that the method always refuses, with a reason: help doesn't show them.
    """

    def decorate(method: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        signature, options = inspect.signature(method), SamplingOptions.__annotations__
        parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        known = {*(parameter.name for parameter in parameters), *options}
        for name, annotation in options.items():
            if name not in hidden:
                default = SamplingParams.__dataclass_fields__[name].default
                kind = inspect.Parameter.KEYWORD_ONLY
                parameters.append(inspect.Parameter(name, kind, default=default, annotation=annotation))
        shown = [parameter.name for parameter in parameters[1:]]

        @functools.wraps(method)
        def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            for name in kwargs:
                if name not in known:
                    raise TypeError(f"{method.__name__}() has no option {name!r}: {advice(name, shown)}")
            return method(*args, **kwargs)

        described: Any = checked
        described.__signature__ = signature.replace(parameters=parameters)
        described.__doc__ = describe_options(method.__doc__ or "", [name for name in options if name not in hidden])
        return checked

    return decorate


def describe_options(docstring: str, options: Iterable[str]) -> str:
    """A docstring with the descriptions of these options in place of its line "options: ..."."""
    attributes = inspect.cleandoc(SamplingOptions.__doc__ or "").partition("Attributes:\n")[2]
    descriptions = dict(re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", attributes, re.MULTILINE))

    def describe(line: re.Match[str]) -> str:
        indent, lines = line[1], []
        for name in options:
            first, *others = descriptions[name].splitlines()
            lines += [f"{indent}{name}: {first}", *(f"{indent}    {other.strip()}" for other in others)]
        return "\n".join(lines) + "\n"

    return re.sub(r"^( *)options: .*\n", describe, docstring, flags=re.MULTILINE)


def advice(name: str, known: list[str]) -> str:
    """What to do about the name of an option that doesn't exist.

    Args:
        known: the names that do.
    """
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    similar = difflib.get_close_matches(name, known, 1, cutoff=0.7)
    return f"did you mean {similar[0]}?" if similar else f"there are {', '.join(known)}"
