"""Print a script that completes commands, flags and files in a shell.

megatron-peft completion bash > ~/.local/share/bash-completion/completions/megatron-peft
megatron-peft completion zsh > ~/.zfunc/_megatron-peft, with fpath+=~/.zfunc before compinit in ~/.zshrc
"""

from dataclasses import dataclass
from typing import Literal

from megatron_peft.cli.command import ArgumentParser, Command
from megatron_peft.commands.program import COMMANDS, command
from megatron_peft.config import required_option

FILES = ("FILE", "FILE.yaml", "FOLDER", "PATH", "EXPERIMENT.yaml", "PREFIX")


@dataclass(frozen=True)
class CompletionSettings:
    """Which shell reads the script."""

    shell: Literal["bash", "zsh", "tcsh"] = required_option("the shell that reads the script", flags=("shell",))


def run(settings: CompletionSettings) -> int:
    """Print the script."""
    import shtab

    whole = whole_parser()
    for parser in with_commands(whole):
        for action in parser._actions:
            if action.metavar in FILES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(whole, settings.shell))
    return 0


def whole_parser() -> ArgumentParser:
    """All commands with their flags, which imports their modules."""
    whole = ArgumentParser("megatron-peft")
    groups = {"": whole.add_subparsers()}
    for name, summary in COMMANDS.items():
        group, _, last = name.rpartition(" ")
        if group not in groups:
            groups[group] = groups[""].add_parser(group, help=f"commands for {group}").add_subparsers()
        command(name).add_arguments(groups[group].add_parser(last, help=summary))
    return whole


def with_commands(parser: ArgumentParser) -> list[ArgumentParser]:
    """The parser and those of all its commands."""
    choices = (action.choices for action in parser._actions if isinstance(action.choices, dict))
    return [parser, *(deeper for commands in choices for each in commands.values() for deeper in with_commands(each))]


main = Command("completion", __doc__, CompletionSettings, run)
