"""Answers a few chats with a Llama model: python example_chat_completion.py"""

from llama import Dialog, Llama
from llama.cli import run
from llama.default_model import default_checkpoint


def main(
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 512,
    max_gen_len: int | None = None,
    max_batch_size: int = 4,
    stream: bool = False,
    quantize: str | None = None,
    compile: bool = False,
) -> None:
    """Answer a few chats.

    Without arguments this runs SmolLM2-135M-Instruct, which is downloaded once. To run a model on several GPUs or
    processes: torchrun --nproc_per_node N example_chat_completion.py --ckpt_dir ...

    Args:
        ckpt_dir: the checkpoint of a chat model: a folder in Meta's or Hugging Face's layout, or a GGUF file
        tokenizer_path: the tokenizer file; by default the one that comes with the checkpoint
        temperature: sampling temperature; 0 always takes the most likely token
        top_p: sample only from the most likely tokens that together reach this probability (nucleus sampling)
        max_seq_len: maximum number of tokens of dialog and answer together
        max_gen_len: maximum number of tokens of an answer; by default as many as max_seq_len allows
        max_batch_size: maximum number of chats that are answered at a time
        stream: print each answer while it is generated, one chat at a time
        quantize: int8 or int4: keep the weights in 8 or 4 bits, which takes about a half or a third of the memory, and
            loses some precision
        compile: compile the decoding step of one answer at a time (see stream), so that it takes less time;
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
    dialogs: list[Dialog] = [
        [{"role": "user", "content": "Give me a tagline for a new coffee shop."}],
        [
            {"role": "user", "content": "I have one day in Paris. What should I see?"},
            {"role": "assistant", "content": "The Eiffel Tower, the Louvre, and a walk along the Seine."},
            {"role": "user", "content": "What is so great about the first one?"},
        ],
        [
            {"role": "system", "content": "You are a friendly pirate."},
            {"role": "user", "content": "Introduce yourself in one sentence."},
        ],
        [{"role": "user", "content": "What is the capital of Italy?"}],
    ]
    if stream:
        for dialog in dialogs:
            print_dialog(dialog)
            print("Assistant: ", end="")
            for piece in generator.chat_completion_stream([dialog], temperature, top_p, max_gen_len):
                print(piece.text, end="", flush=True)
            print("\n\n==================================\n")
        return
    for start in range(0, len(dialogs), max_batch_size):
        batch = dialogs[start : start + max_batch_size]
        results = generator.chat_completion(batch, temperature=temperature, top_p=top_p, max_gen_len=max_gen_len)
        for dialog, result in zip(batch, results, strict=True):
            print_dialog([*dialog, result["generation"]])
            print("==================================\n")


def print_dialog(dialog: Dialog) -> None:
    for message in dialog:
        print(f"{message['role'].capitalize()}: {message['content']}\n")


if __name__ == "__main__":
    run(main)
