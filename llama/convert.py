"""Write a checkpoint in another layout: python -m llama.convert --from CHECKPOINT --to FOLDER --layout meta"""

from llama.checkpoint.convert import convert

__all__ = ["convert"]

if __name__ == "__main__":
    from llama.cli.command_line import run

    run(convert)
