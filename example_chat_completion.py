"""Answers a few chats with a Llama model: python example_chat_completion.py"""

from llama import Dialog, Llama
from llama.cli.command_line import run
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
) -> None:
    """RowOutput a few chats.

    With no arguments this runs SmolLM2-135M-Instruct, which is fetched once. For a model on several GPUs or processes:
    torchrun --nproc_per_node N example_chat_completion.py --ckpt_dir ...

    Args:
        ckpt_dir: the checkpoint of a chat model: a folder in Meta's or Hugging Face's layout, or a GGUF file
        tokenizer_path: the tokenizer's file, where it isn't with the checkpoint
        temperature: how freely to draw; 0 always takes the likeliest token
        top_p: draw from the likeliest tokens that together have this probability
        max_seq_len: longest chat, in tokens: dialog and answer together
        max_gen_len: longest answer, in tokens; by default as long as max_seq_len allows
        max_batch_size: most chats at a time
        stream: show each answer as it comes, one after the other
    """
    generator = Llama.build(
        ckpt_dir=ckpt_dir or default_checkpoint(),
        tokenizer_path=tokenizer_path,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
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
            show(dialog)
            print("Assistant: ", end="")
            for piece in generator.chat_completion_stream([dialog], temperature, top_p, max_gen_len):
                print(piece.text, end="", flush=True)
            print("\n\n==================================\n")
        return
    for start in range(0, len(dialogs), max_batch_size):
        batch = dialogs[start : start + max_batch_size]
        results = generator.chat_completion(batch, temperature=temperature, top_p=top_p, max_gen_len=max_gen_len)
        for dialog, result in zip(batch, results, strict=True):
            show([*dialog, result["generation"]])
            print("==================================\n")


def show(dialog: Dialog) -> None:
    for message in dialog:
        print(f"{message['role'].capitalize()}: {message['content']}\n")


if __name__ == "__main__":
    run(main)
