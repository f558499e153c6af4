"""Fine-tunes a model: python -m llama.finetune --data pairs.jsonl --out_dir FOLDER"""

from llama.cli import run
from llama.finetune import finetune

if __name__ == "__main__":
    run(finetune, "llama.finetune")
