"""A run as a configuration file: what `--print-config` prints, and `run.yaml` in the folder of `--save`."""

from collections.abc import Collection, Mapping, Sequence
from math import inf
from typing import Any

import yaml

from megatron_peft.cli.flags import TAKES_A_VALUE, Flag, served_flags
from megatron_peft.config import SECTIONS, PeftConfig, RunConfig

TITLE = "Repeat this run, in the folder where it was started: megatron-peft train --config FOLDER/run.yaml --save OTHER"


def run_file(config: RunConfig, launch: Mapping[str, Any], title: str = TITLE, unset: Collection[str] = ()) -> str:
    """The text of a file from which the run can be repeated: every flag with its value, under its help.

    Flags of other methods stand there only if they were given. A flag that is not set is a comment.

    Args:
        launch: typed values of `LaunchConfig`.
        title: the first line, a comment.
        unset: fields that are written as if they were not set.
    """
    sections: dict[str, list[tuple[Flag, Any]]] = {name: [] for name in ("launch", *SECTIONS)}
    for served in served_flags():
        if served.target == "launch" and served.key in launch:
            sections["launch"].append((served, launch[served.key]))
        # `--no-bf16` or `--use-flash-attn`, of a field that is written under its own flag
        is_another_name = served.target == "config" and served.constant not in (True, TAKES_A_VALUE)
        if served.section not in SECTIONS or is_another_name:
            continue
        if served.section == "peft" and served.key not in config.peft.spec.fields(config.peft):
            if getattr(config.peft, served.key) == getattr(PeftConfig, served.key, None):
                continue  # a flag of another method, as nobody typed it
        value = None if served.key in unset else _value(served, config)
        sections[served.section].append((served, float(value) if served.kind is float and value is not None else value))
    return text_of(title, {name: settings for name, settings in sections.items() if settings})


def text_of(title: str, sections: Mapping[str, Sequence[tuple[Flag, Any]]]) -> str:
    """The text of a configuration file that reads back to these flags and values (None: not set), each under its help.

    Args:
        title: the first line, a comment.
        sections: flags with their values, by section.
    """
    lines = [f"# {title}"]
    for section, settings in sections.items():
        lines += ["", f"{section}:"]
        for served, value in settings:
            is_set = value not in (None, ())
            lines.append(f"  # {served.help}")
            lines.append(f"  {'' if is_set else '# '}{served.names[0][2:]}:{f' {_scalar(value)}' if is_set else ''}")
        if all(value in (None, ()) for _, value in settings):
            lines.append("  {}")
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    if isinstance(value, float):
        return repr(value)
    plain = [*value] if isinstance(value, tuple) else value
    readable = str(value).isprintable()  # else it is escaped: a no-break space would be read as nothing
    text = yaml.safe_dump(plain, default_flow_style=True, width=inf, allow_unicode=readable)
    return text.removesuffix("...\n").strip()


def _value(served: Flag, config: RunConfig) -> Any:
    if served.target not in ("transformer", "shape"):
        return getattr(getattr(config, served.section), served.key)
    value = (config.model.transformer if served.target == "transformer" else config.model.shape_flags).get(served.key)
    if served.constant is TAKES_A_VALUE:
        return value
    return True if value == served.constant else None  # several switches may set one field
