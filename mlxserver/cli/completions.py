"""`mlx-server completions SHELL`: completions, made from the parsers, so that they know what these know.

Words that begin with a dash are completed to flags, others to what the command takes; models are those that
`mlx-server ls` prints. Where nothing is known the shell completes names of files.
"""

from __future__ import annotations

from argparse import ArgumentParser, _SubParsersAction
from collections.abc import Mapping
from dataclasses import dataclass

from mlxserver.client.launch import options as launch
from mlxserver.config import load
from mlxserver.config.settings import Settings

MODELS = "$(mlx-server ls 2>/dev/null | cut -f1)"
FISH_MODELS = "(mlx-server ls 2>/dev/null | cut -f1)"
WITH_MODELS = ("show", "rm")  # commands whose argument is a model

# Bash divides words at colons. Its list of words stands in single quotes: names of models are not expanded.
BASH = """_mlx_server() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} before=
    if [ "$current" = : ]; then
        before=${{COMP_WORDS[COMP_CWORD-1]}}: current=
    elif [ "${{COMP_WORDS[COMP_CWORD-1]}}" = : ]; then
        before=${{COMP_WORDS[COMP_CWORD-2]}}:
    fi
    local command=${{COMP_WORDS[1]}} words=
    if [ "$COMP_CWORD" -eq 1 ]; then
        command=
    fi
    case $command:$before$current in
{cases}
    esac
    COMPREPLY=($(compgen -W "$words" -- "$before$current"))
    COMPREPLY=("${{COMPREPLY[@]#"$before"}}")
}}
complete -o default -F _mlx_server mlx-server"""
BASH_CASE = "        {pattern}) words='{words}';;"
ZSH = """(( $+functions[compdef] )) || {{ autoload -Uz compinit && compinit; }}
autoload -Uz bashcompinit && bashcompinit
{bash}"""


@dataclass(frozen=True, slots=True)
class Words:
    """What a command takes. flags: with whether a value follows them. choices: of its argument."""

    flags: Mapping[str, bool]
    choices: tuple[str, ...] = ()


def script(shell: str, parser: ArgumentParser) -> str:
    """What a shell reads to complete the commands."""
    words = _commands(parser)
    if shell == "fish":
        return _fish(words)
    cases = [BASH_CASE.format(pattern=":-*", words=" ".join(words["serve"].flags))]
    cases += [BASH_CASE.format(pattern=":*", words=" ".join(words))]
    for name, each in words.items():
        cases += [BASH_CASE.format(pattern=f"{name}:-*", words=" ".join(each.flags))]
        if given := [*each.choices, *([MODELS] if name in WITH_MODELS else ())]:
            cases += [BASH_CASE.format(pattern=f"{name}:*", words=" ".join(given))]
    bash = BASH.format(cases="\n".join(cases))
    if shell == "bash":
        return bash
    # Zsh's compgen runs no command; in double quotes the command is run once, and its output is not expanded.
    return ZSH.format(bash=bash.replace(f"'{MODELS}'", f'"{MODELS}"'))


def _commands(parser: ArgumentParser) -> dict[str, Words]:
    """The words of every command."""
    (commands,) = (each for each in parser._actions if isinstance(each, _SubParsersAction))
    server = load.parser(Settings())
    known = {**commands.choices, "serve": server, "launch": launch.parser()}
    words = {name: _words(each) for name, each in known.items()}
    return {**words, "config": Words({**words["serve"].flags, "--json": False})}


def _words(parser: ArgumentParser) -> Words:
    flags = {
        option: action.nargs not in (0, "?")
        for action in parser._actions
        for option in action.option_strings
        if option != "-h"
    }
    choices = (map(str, each.choices) for each in parser._actions if each.choices and not each.option_strings)
    return Words(flags, tuple(word for each in choices for word in each))


def _fish(words: Mapping[str, Words]) -> str:
    lines = [f'complete -c mlx-server -f -n __fish_use_subcommand -a "{" ".join(words)}"']
    lines += _fish_flags("-n __fish_use_subcommand", words["serve"])
    for name, each in words.items():
        seen = f'-n "__fish_seen_subcommand_from {name}"'
        lines += _fish_flags(seen, each)
        if given := [*each.choices, *([FISH_MODELS] if name in WITH_MODELS else ())]:
            lines.append(f'complete -c mlx-server -f {seen} -a "{" ".join(given)}"')
    return "\n".join(lines)


def _fish_flags(condition: str, words: Words) -> list[str]:
    return [f"complete -c mlx-server {condition} -l {flag[2:]}{' -r' * value}" for flag, value in words.flags.items()]
