"""Measures speculative decoding beside plain decoding and llama.cpp: python benchmarks/speculative.py

The default model copies a paragraph with one change, which quotes its prompt, and answers a question, which doesn't.
All contestants answer one after the other, round by round; a time is the median over the rounds, with the prefill.
llama.cpp runs the default model's file as it is, whose weights have 4 bits, with the prompt lookup of llama-cpp-python.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from compare import processor

from llama import ChatFormat, Dialog, Llama, Tokenizer
from llama.cli import run
from llama.default_model import default_checkpoint
from llama.device import DTYPES

PARAGRAPH = """The lighthouse stood at the end of the stone pier, where the waves broke against the rocks all winter. \
Every evening at six o'clock the keeper climbed the one hundred and twelve steps to the lamp, cleaned the glass with a \
soft cloth, and lit the flame. His name was Thomas Brown, and he had done this work for thirty-one years. Ships from \
the north used his light to find the narrow channel into the harbour, and no captain had lost a vessel there since he \
began. In the village they said that Thomas could smell a storm two days before it came."""
QUESTIONS = {
    "copy": f"Rewrite this paragraph exactly, but change the name Thomas Brown to Henry Miller:\n\n{PARAGRAPH}",
    "question": "How does a steam engine work? Explain it to a child, with an example for each part of it.",
}
MAX_SEQ_LEN, MAX_GEN_LEN, NUM_TOKENS = 512, 128, 7


class Answer(NamedTuple):
    """What a contestant answered."""

    n_tokens: int
    n_passes: int | None  # of the network, after the prefill; None if that isn't known


Contestant = Callable[[str], Answer]


def ours(build: dict[str, Any], options: dict[str, Any], draft: dict[str, Any] | None = None) -> Contestant:
    """This library.

    Args:
        build: how to build the model.
        options: of the call.
        draft: how to build the draft model; None for none.
    """
    sizes: dict[str, Any] = {"max_seq_len": MAX_SEQ_LEN, "max_batch_size": 1}
    llama = Llama.build(default_checkpoint(), **sizes, **build)
    if draft is not None:
        options = {**options, "draft_model": Llama.build(default_checkpoint(), **sizes, **draft)}

    def answer(question: str) -> Answer:
        dialog: Dialog = [{"role": "user", "content": question}]
        (prediction,) = llama.chat_completion([dialog], 0, max_gen_len=MAX_GEN_LEN, details=True, **options)
        n_tokens = prediction["completion_tokens"]
        n_steps = n_tokens - (prediction["finish_reason"] == "length")  # the token that ends it takes one, too
        return Answer(n_tokens, n_steps - prediction.get("accepted_tokens", 0))

    return answer


def llama_cpp(*, lookup: bool) -> Contestant:
    """llama.cpp, through the package llama-cpp-python."""
    from llama_cpp import Llama as LlamaCpp
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    chat_format = ChatFormat(Tokenizer(default_checkpoint()))
    model: Any = LlamaCpp(
        str(default_checkpoint()),
        n_ctx=MAX_SEQ_LEN,
        n_threads=torch.get_num_threads(),
        n_threads_batch=torch.get_num_threads(),
        draft_model=LlamaPromptLookupDecoding(num_pred_tokens=NUM_TOKENS) if lookup else None,
        verbose=False,
    )

    def answer(question: str) -> Answer:
        prompt = chat_format.encode_dialog_prompt([{"role": "user", "content": question}])
        model.reset()
        completion = model.create_completion(prompt, max_tokens=MAX_GEN_LEN, temperature=0)
        return Answer(completion["usage"]["completion_tokens"], None)

    return answer


def main(dtype: str = "float32", rounds: int = 5) -> None:
    """Measure, and print a table.

    Args:
        dtype: float32 or bfloat16; of the weights.
        rounds: how often each contestant answers each question.
    """
    torch_dtype = DTYPES[dtype]
    plain, lookup = {"dtype": torch_dtype}, {"prompt_lookup_num_tokens": NUM_TOKENS}
    compiled, int4 = {**plain, "compile": True}, {"quantize": "int4", "compile": True}
    contestants = {
        "plain": ours(plain, {}),
        "lookup": ours(plain, lookup),
        "draft of 4 bits, compiled": ours(plain, {}, int4),
        "compiled": ours(compiled, {}),
        "compiled, lookup": ours(compiled, lookup),
        "4 bits, compiled": ours(int4, {}),
        "4 bits, compiled, lookup": ours(int4, lookup),
    }
    if importlib.util.find_spec("llama_cpp") is not None:
        contestants["llama.cpp, Q4_1"] = llama_cpp(lookup=False)
        contestants["llama.cpp, Q4_1, lookup"] = llama_cpp(lookup=True)
    print(f"{processor()}, {torch.get_num_threads()} threads, {dtype}, medians of {rounds} rounds")
    for name, question in QUESTIONS.items():
        seconds: dict[str, list[float]] = {contestant: [] for contestant in contestants}
        answers: dict[str, Answer] = {}
        for _ in range(rounds):
            for contestant, answer in contestants.items():
                begin = time.perf_counter()
                answers[contestant] = answer(question)
                seconds[contestant].append(time.perf_counter() - begin)
        for contestant, (n_tokens, n_passes) in answers.items():
            median = statistics.median(seconds[contestant])
            ratios = [a / b for a, b in zip(seconds["plain"], seconds[contestant], strict=True)]
            passes = "" if n_passes is None else f"{n_passes / n_tokens:.2f} passes a token"
            speed = f"{n_tokens / median:6.1f} tokens/s, {statistics.median(ratios):.2f} x plain"
            print(f"{name:9} {contestant:26} {speed}  {passes}", flush=True)


if __name__ == "__main__":
    run(main)
