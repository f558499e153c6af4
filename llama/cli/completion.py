"""`llama completion`: completes commands, options and file names in a shell."""

from llama.__main__ import COMMANDS
from llama.cli.command_line import options_of
from llama.errors import InputError

SCRIPT = """_llama() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} words=
    if (( COMP_CWORD == 1 )); then
        words="{commands} --help --version"
    elif [[ $current == -* ]]; then
        case ${{COMP_WORDS[1]}} in
{options}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _llama llama"""  # -o default: file names where COMPREPLY is empty

SET_UP = {"bash": "", "zsh": "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"}


def completion(shell: str) -> None:
    """Print a script for bash or zsh that completes commands, options and file names.

    For example: llama completion bash > ~/.llama-completion, and in ~/.bashrc: source ~/.llama-completion

    Args:
        shell: bash or zsh
    """
    if shell not in SET_UP:
        raise InputError(f"shell={shell!r} must be one of {list(SET_UP)}")
    options = {name: [f"--{option}" for option in options_of(command.load())] for name, command in COMMANDS.items()}
    cases = (f'            {name}) words="{" ".join([*words, "--help"])}" ;;' for name, words in options.items())
    print(SET_UP[shell] + SCRIPT.format(commands=" ".join(options), options="\n".join(cases)))
