"""The command `llama`: what can be done with a model at a terminal."""

from llama.command_line import run
from llama.commands.chat import chat
from llama.commands.complete import complete
from llama.commands.info import info
from llama.commands.inspect import inspect
from llama.convert import convert


def main() -> None:
    run({"chat": chat, "complete": complete, "inspect": inspect, "info": info, "convert": convert}, "llama")


if __name__ == "__main__":
    main()
