"""`llama complete`: a text, continued."""

import json as json_format
from typing import Any

from llama.cli.command_line import build
from llama.cli.terminal import show, text_given
from llama.sampling_params import SamplingParams


def complete(
    text: str | None = None,
    *,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    max_gen_len: int = 256,
    temperature: float = 0.6,
    top_p: float = 0.9,
    top_k: int | None = None,
    stop: str | None = None,
    seed: int | None = None,
    max_seq_len: int | None = None,
    dtype: str | None = None,
    json: bool = False,
) -> None:
    """Continue a text, and show what comes as it comes.

    For example: llama complete "The sun rises", or in a pipe: llama complete < text. With no --ckpt_dir this runs
    SmolLM2-135M-Instruct, which is fetched once.

    Args:
        text: the text, in quotes (one that begins with dashes after --text=); without it, standard input is read
        ckpt_dir: a checkpoint: a folder in Meta's or Hugging Face's layout, or a GGUF file
        tokenizer_path: the tokenizer's file, where it isn't with the checkpoint
        max_gen_len: most tokens to add
        temperature: how freely to draw; 0 always takes the likeliest token
        top_p: draw from the likeliest tokens that together have this probability
        top_k: draw from this many of the likeliest tokens
        stop: a text to stop before
        seed: a number; the same one draws the same tokens again
        max_seq_len: room for text and continuation, in tokens; by default 4096, or what the model was made for if that
            is less
        dtype: float32, float16 or bfloat16; by default bfloat16 where the machine computes in it
        json: print one JSON object instead, with prompt, generation, tokens and logprobs
    """
    prompt = text_given(text)
    how: dict[str, Any] = {"max_gen_len": max_gen_len, "temperature": temperature, "top_p": top_p}
    how |= {"top_k": top_k, "stop": stop}
    SamplingParams(**how)  # refuses what is out of range, before the model takes its time to load
    llama = build(ckpt_dir, tokenizer_path, max_seq_len, dtype, seed)
    if json:
        (prediction,) = llama.text_completion([prompt], logprobs=True, **how)
        print(json_format.dumps({"prompt": prompt, **prediction}, ensure_ascii=False))
        return
    try:
        for piece in llama.text_completion_stream([prompt], **how):
            show(piece.text)
    finally:
        print(flush=True)
