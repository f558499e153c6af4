"""The command `llama`: chat with, complete with, inspect, convert and fine-tune models from a terminal."""

from llama.cli import run
from llama.cli.command_line import LazyCommand
from llama.cli.terminal import exit_at_once, on_ctrl_c

COMMANDS = {
    "chat": LazyCommand("llama.cli.chat", "chat", "Talk with a model. In the conversation, /help lists the commands."),
    "complete": LazyCommand(
        "llama.cli.complete", "complete", "Continue a text, printing the continuation while it is generated."
    ),
    "inspect": LazyCommand(
        "llama.cli.inspect",
        "inspect",
        "Show how likely a model finds each token of a text, and which tokens may come next.",
    ),
    "info": LazyCommand(
        "llama.cli.info",
        "info",
        "Describe a checkpoint, the memory that it takes, and whether it fits this machine.",
    ),
    "convert": LazyCommand(
        "llama.checkpoint.convert",
        "convert",
        "Write a checkpoint in another layout, number of files or dtype; merge a LoRA adapter into it.",
    ),
    "finetune": LazyCommand(
        "llama.finetune",
        "finetune",
        "Fine-tune a model on examples of prompts and answers, and write the result as a checkpoint.",
    ),
    "completion": LazyCommand(
        "llama.cli.completion",
        "completion",
        "Print a script for bash or zsh that completes commands, options and file names.",
    ),
}


def main() -> None:
    on_ctrl_c(exit_at_once)  # until `run` calls the command: its imports take over a second
    run(COMMANDS, "llama")


if __name__ == "__main__":
    main()
