"""The command `llama`: one module for each of its commands, and what they share. `run` runs a function as a program."""

from llama.cli.command_line import run

__all__ = ["run"]
