"""The command `llama`: chat with, complete with, inspect, convert, fine-tune and measure models from a terminal."""

import sys
from pathlib import Path

from llama.checkpoint.convert import convert
from llama.cli import run
from llama.cli.chat import chat
from llama.cli.command_line import Command
from llama.cli.complete import complete
from llama.cli.info import info
from llama.cli.inspect import inspect
from llama.finetune import finetune

COMMANDS: dict[str, Command] = {
    "chat": chat,
    "complete": complete,
    "inspect": inspect,
    "info": info,
    "convert": convert,
    "finetune": finetune,
}
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"  # only in a clone of the repository


def main() -> None:
    commands = COMMANDS
    in_clone = (BENCHMARKS / "compare.py").is_file() and (BENCHMARKS.parent / "pyproject.toml").is_file()
    if in_clone and sys.argv[1:2] not in [[name] for name in commands]:  # the import is slow: not for other commands
        sys.path.append(str(BENCHMARKS))
        from compare import main as bench

        commands = commands | {"bench": bench}
    run(commands, "llama")


if __name__ == "__main__":
    main()
