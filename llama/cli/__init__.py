"""The commands of `llama` at a terminal, one file each."""
