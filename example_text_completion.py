"""Completes a few texts with a Llama model: python example_text_completion.py"""

from llama import Llama
from llama.cli import run
from llama.default_model import default_checkpoint


def main(
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 128,
    max_gen_len: int = 64,
    max_batch_size: int = 4,
    stream: bool = False,
    quantize: str | None = None,
    compile: bool = False,
) -> None:
    """Complete a few texts.

    Without arguments this runs SmolLM2-135M-Instruct, which is downloaded once. To run a model on several GPUs or
    processes: torchrun --nproc_per_node N example_text_completion.py --ckpt_dir ...

    Args:
        ckpt_dir: the checkpoint: a folder in Meta's or Hugging Face's layout, or a GGUF file
        tokenizer_path: the tokenizer file; by default the one that comes with the checkpoint
        temperature: sampling temperature; 0 always takes the most likely token
        top_p: sample only from the most likely tokens that together reach this probability (nucleus sampling)
        max_seq_len: maximum number of tokens of prompt and completion together
        max_gen_len: maximum number of tokens of a completion
        max_batch_size: maximum number of texts that are completed at a time
        stream: print each completion while it is generated, one text at a time
        quantize: int8 or int4: keep the weights in 8 or 4 bits, which takes about a half or a third of the memory, and
            loses some precision
        compile: compile the decoding step of one completion at a time (see stream), so that it takes less time;
            compiling takes some 10 to 30 s, and only the first time, since its result is kept on disk
    """
    generator = Llama.build(
        ckpt_dir=ckpt_dir or default_checkpoint(),
        tokenizer_path=tokenizer_path,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
        quantize=quantize,
        compile=compile,
    )
    prompts = [
        "I believe the meaning of life is",
        "Simply put, the theory of relativity states that",
        "A short list of things to take on a walk in the rain:\n1. An umbrella\n2.",
        "Once upon a time, in a library that nobody had visited for a hundred years,",
    ]
    if stream:
        for prompt in prompts:
            print(f"{prompt}\n> ", end="")
            for piece in generator.text_completion_stream([prompt], temperature, top_p, max_gen_len):
                print(piece.text, end="", flush=True)
            print("\n\n==================================\n")
        return
    for start in range(0, len(prompts), max_batch_size):
        batch = prompts[start : start + max_batch_size]
        results = generator.text_completion(batch, temperature=temperature, top_p=top_p, max_gen_len=max_gen_len)
        for prompt, result in zip(batch, results, strict=True):
            print(f"{prompt}\n> {result['generation']}\n\n==================================\n")


if __name__ == "__main__":
    run(main)
