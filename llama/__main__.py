"""The command `llama`: what can be done with a model at a terminal."""

import sys
from pathlib import Path

from llama.checkpoint.convert import convert
from llama.cli.chat import chat
from llama.cli.command_line import Command, run
from llama.cli.complete import complete
from llama.cli.info import info
from llama.cli.inspect import inspect
from llama.finetune import finetune

ROOT = Path(__file__).parent.parent  # a clone's; what is installed has no benchmarks


def main() -> None:
    commands: dict[str, Command] = {"chat": chat, "complete": complete, "inspect": inspect}
    commands |= {"info": info, "convert": convert, "finetune": finetune}
    in_clone = all((ROOT / file).is_file() for file in ("pyproject.toml", "benchmarks/compare.py"))
    if in_clone and sys.argv[1:2] not in [[name] for name in commands]:
        sys.path.append(str(ROOT / "benchmarks"))
        from compare import main as bench

        commands["bench"] = bench
    run(commands, "llama")


if __name__ == "__main__":
    main()
