"""`mlx-server completions SHELL`: completions, made from the parser, so that they know what it knows.

Models complete by what `mlx-server ls` prints.
"""

from __future__ import annotations

from argparse import ArgumentParser, _SubParsersAction
from collections.abc import Mapping

MODELS = "mlx-server ls 2>/dev/null | cut -f1"
WITH_MODELS = ("show", "rm")  # commands whose argument is a model
OTHERS = ("serve", "launch", "config")

BASH = """_mlx_server() {{
    local current=${{COMP_WORDS[COMP_CWORD]}}
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{commands}" -- "$current"))
        return
    fi
    case ${{COMP_WORDS[1]}} in
{cases}
    esac
}}
complete -F _mlx_server mlx-server"""
BASH_CASE = '        {name}) COMPREPLY=($(compgen -W "{words}" -- "$current"));;'
ZSH = """#compdef mlx-server
autoload -Uz bashcompinit && bashcompinit
{bash}"""


def script(shell: str, parser: ArgumentParser) -> str:
    """What a shell reads to complete the commands."""
    words = _words(parser)
    if shell == "fish":
        return _fish(words)
    cases = (BASH_CASE.format(name=name, words=" ".join(_with_models(name, each))) for name, each in words.items())
    bash = BASH.format(commands=" ".join([*words, *OTHERS]), cases="\n".join(cases))
    return ZSH.format(bash=bash) if shell == "zsh" else bash


def _words(parser: ArgumentParser) -> Mapping[str, list[str]]:
    """The flags and choices of every command."""
    (commands,) = (each for each in parser._actions if isinstance(each, _SubParsersAction))
    return {
        name: [
            word
            for action in each._actions
            for word in (*action.option_strings, *(map(str, action.choices) if action.choices else ()))
            if word != "-h"
        ]
        for name, each in commands.choices.items()
    }


def _with_models(name: str, words: list[str]) -> list[str]:
    return [*words, f"$({MODELS})"] if name in WITH_MODELS else words


def _fish(words: Mapping[str, list[str]]) -> str:
    lines = [f'complete -c mlx-server -f -n __fish_use_subcommand -a "{" ".join([*words, *OTHERS])}"']
    for name, each in words.items():
        seen = f'-n "__fish_seen_subcommand_from {name}"'
        lines += [f"complete -c mlx-server {seen} -l {word[2:]}" for word in each if word.startswith("--")]
        if choices := [word for word in each if not word.startswith("-")]:
            lines.append(f'complete -c mlx-server -f {seen} -a "{" ".join(choices)}"')
        if name in WITH_MODELS:
            lines.append(f'complete -c mlx-server -f {seen} -a "({MODELS})"')
    return "\n".join(lines)
