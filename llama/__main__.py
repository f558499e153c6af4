"""The command `llama`: what can be done with a model at a terminal."""

import sys
from pathlib import Path

from llama.command_line import Command, run
from llama.commands.chat import chat
from llama.commands.complete import complete
from llama.commands.info import info
from llama.commands.inspect import inspect
from llama.convert import convert
from llama.finetune import finetune

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"  # of a clone; they aren't installed


def main() -> None:
    commands: dict[str, Command] = {"chat": chat, "complete": complete, "inspect": inspect}
    commands |= {"info": info, "convert": convert, "finetune": finetune}
    if (BENCHMARKS / "compare.py").is_file():
        sys.path.insert(0, str(BENCHMARKS))
        from compare import main as bench

        commands["bench"] = bench
    run(commands, "llama")


if __name__ == "__main__":
    main()
