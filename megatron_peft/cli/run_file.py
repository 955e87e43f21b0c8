"""A run as a configuration file: what `--print-config` prints, and `run.yaml` in the folder of `--save`."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from megatron_peft.cli.config_files import WrittenFlag, written
from megatron_peft.cli.flags import TAKES_A_VALUE, Flag, launch_flags, sections, served_flags
from megatron_peft.config import PeftConfig, RunConfig

TITLE = "Repeat this run, in the folder where it was started: megatron-peft train --config FOLDER/run.yaml --save OTHER"


def run_file(config: RunConfig, launch: Mapping[str, Any], title: str = TITLE, unset: Collection[str] = ()) -> str:
    """The text of a file from which the run can be repeated: every flag with its value, under its help.

    Flags of other methods stand there only if they were given. A flag that is not set is a comment.

    Args:
        launch: typed values of `LaunchConfig`.
        title: the first line, a comment.
        unset: fields that are written as if they were not set.
    """
    lines: dict[str, list[WrittenFlag]] = {name: [] for name in ("launch", *sections())}
    for one in launch_flags():
        if one.key in launch:
            lines["launch"].append(WrittenFlag(one.names[0][2:], launch[one.key], one.help))
    for one in served_flags():
        if one.section in sections() and not (_is_another_name(one) or _has_no_effect(one, config)):
            found = _setting(one, config, launch)
            lines[one.section] += [replace(it, value=None) for it in found] if one.key in unset else found
    return written(title, {name: found for name, found in lines.items() if found})


def _setting(one: Flag, config: RunConfig, launch: Mapping[str, Any]) -> Iterator[WrittenFlag]:
    if one.target == "transformer" or one.target == "shape":
        value = (config.model.transformer if one.target == "transformer" else config.model.shape_flags).get(one.key)
        if one.constant is not TAKES_A_VALUE:  # several switches may set one field
            value = True if value == one.constant else None
    else:
        value = getattr(getattr(config, one.section), one.key)
    yield WrittenFlag(one.names[0][2:], float(value) if one.kind is float and value is not None else value, one.help)


def _is_another_name(one: Flag) -> bool:
    """`--no-bf16` or `--use-flash-attn`, of a field that is written under its own flag."""
    return one.target == "config" and one.constant not in (True, TAKES_A_VALUE)


def _has_no_effect(one: Flag, config: RunConfig) -> bool:
    """Whether it is a flag of another method, as nobody typed it."""
    if one.section != "peft" or one.key in config.peft.spec.fields(config.peft):
        return False
    return getattr(config.peft, one.key) == getattr(PeftConfig, one.key, None)
