"""Fine-tunes a model: python -m llama.finetune --data pairs.jsonl --out_dir FOLDER"""

from llama.cli import run
from llama.cli.terminal import exit_at_once, on_ctrl_c

if __name__ == "__main__":
    on_ctrl_c(exit_at_once)  # until `run` calls the command: its imports take over a second
    from llama.finetune.command import finetune

    run(finetune, "llama.finetune")
