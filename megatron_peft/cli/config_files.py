"""Configuration files: YAML whose keys are flags without their dashes, flat or under the names of a run's sections.

    peft:
      method: hybrid
    lr: 2e-4
    train-data-path: [0.3, a.jsonl, 0.7, b.jsonl]

A file becomes words of a command line. Of several files the later ones override, and typed flags override them all.
`true` is a switch, `false` its absence, and `null` is as if the key were not there. A run is written as such a file
too: `--print-config` prints it, and it is `run.yaml` in the folder of `--save`.
"""

# Tried before writing this: ConfigArgParse 1.9 lets the last file replace the others, knows no sections and no lines;
# jsonargparse 4.53 knows a flag only under its section, names no line for an unknown key, and takes 0.19 s to import.

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import yaml

from megatron_peft.cli.flags import Flag, served_flags
from megatron_peft.config import SECTIONS, ConfigurationError, PeftConfig, RunConfig, require
from megatron_peft.config.untrusted import compose_yaml, read_text

TITLE = "Repeat this run, in the folder where it was started: megatron-peft train --config FOLDER/run.yaml --save OTHER"
CONFIG_FLAG = "--config"
TYPED_ONLY = (CONFIG_FLAG, "--print-config", "--help", "--version")
_YAML, _ON, _OFF = "tag:yaml.org,2002:", ("true", "yes", "on"), ("false", "no", "off")
_PLAIN = ("str", "int", "float", "bool", "null", "timestamp", "value", "merge")


@dataclass(frozen=True)
class FileFlag:
    """A flag with its words, and where it stands. `is_set` is false for `false` and `null`."""

    name: str
    words: tuple[str, ...]
    place: str
    is_set: bool = True


def file_entries(files: Sequence[str], known: Mapping[str, Flag], why_unknown: Callable[[str], str]) -> list[FileFlag]:
    """What all files together set, each flag once.

    Args:
        known: flags with their dashes, and words without a flag by their names.
        why_unknown: the message for a flag that is not known.

    Raises:
        ConfigurationError: with everything that is wrong in any of them, each with file, line and column.
    """
    merged: dict[str, FileFlag] = {}
    problems: list[str] = []
    sections = {flag.section for flag in known.values()} - {""}
    for file in files:
        try:
            table = _table(file)
        except ConfigurationError as error:
            problems += error.problems
            continue
        places: dict[str, str] = {}
        for outer_key, outer in table:
            nests = isinstance(outer_key, yaml.ScalarNode) and isinstance(outer, yaml.MappingNode)
            is_section = nests and outer_key.value in sections
            for key, value in outer.value if is_section else [(outer_key, outer)]:
                place = f"line {key.start_mark.line + 1}, column {key.start_mark.column + 1}"
                try:
                    name = _name(key, value, known, why_unknown)
                    its_section = known[name].section
                    belongs = f"under {its_section}" if its_section else "at the top"
                    told = f"{key.value} does not belong to {outer_key.value}: write it {belongs}."
                    require(not is_section or its_section == outer_key.value, told)
                    told = f"{key.value} stands here and in {places.get(name)}: leave one out."
                    require(name not in places, told)
                    places[name] = place
                    entry = _entry(name, value, known, f"{file}, {place}")
                    merged[entry.name.removeprefix("--no-").removeprefix("--")] = entry
                except ConfigurationError as error:
                    problems.append(f"{file}, {place}: {error}")
    if problems:
        raise ConfigurationError(*problems)
    return [entry for entry in merged.values() if entry.is_set]


def _table(file: str) -> list[tuple[yaml.Node, yaml.Node]]:
    root = compose_yaml(read_text(Path(file)), file)
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise ConfigurationError(f"{file} is not a table of flags: write `lr: 1e-4`, a line for each flag.")
    return root.value if root else []


def _name(key: yaml.Node, value: yaml.Node, known: Mapping[str, Flag], why_unknown: Callable[[str], str]) -> str:
    """The flag that a key names; or a ConfigurationError."""
    if not isinstance(key, yaml.ScalarNode):
        raise ConfigurationError("a key is the name of a flag.")
    dashed = key.value.replace("_", "-")
    name = next((name for name in (f"--{key.value}", f"--{dashed}", key.value) if name in known), None)
    if f"--{dashed}" in TYPED_ONLY or name is not None and known[name].target == "program":
        raise ConfigurationError(f"{key.value} is for the command line only: a file cannot hold it.")
    if name is None and isinstance(value, yaml.MappingNode):
        sections = ", ".join(sorted({flag.section for flag in known.values()} - {""}))
        raise ConfigurationError(f"{key.value} is not a section; the sections are {sections}.")
    if name is None:
        raise ConfigurationError(why_unknown(f"--{key.value}"))
    return name


def _entry(name: str, value: yaml.Node, known: Mapping[str, Flag], place: str) -> FileFlag:
    """A flag with its words. A switch that is turned off is the flag `--no-...` where there is one."""
    is_list = isinstance(value, yaml.SequenceNode) and value.tag == f"{_YAML}seq"
    words = [_text(node) for node in (value.value if is_list else [value])]
    if words == [None]:
        return FileFlag(name, (), place, is_set=False)
    texts = tuple(word for word in words if word is not None)
    if len(texts) < len(words) or not texts:
        raise ConfigurationError(f"{name.lstrip('-')} has a list with nothing in it, or an empty value in it.")
    if known[name].takes_value:
        return FileFlag(name, texts, place)
    (text, *more), opposite = texts, f"--no-{name[2:]}"
    if more or text.lower() not in (*_ON, *_OFF):
        raise ConfigurationError(f"{name[2:]} is a switch: true or false, not {' '.join(texts)}.")
    if text.lower() in _ON:
        return FileFlag(name, (), place)
    return FileFlag(opposite, (), place) if opposite in known else FileFlag(name, (), place, is_set=False)


def _text(node: yaml.Node) -> str | None:
    """What stands in the file, so that numbers keep their spelling; None for null."""
    if not isinstance(node, yaml.ScalarNode) or node.tag.removeprefix(_YAML) not in _PLAIN:
        raise ConfigurationError("a value is a string, a number, true, false, or a list of those.")
    return None if node.tag == f"{_YAML}null" else node.value


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
        is_another_name = served.target == "config" and not served.takes_value and served.constant is not True
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
    if served.takes_value:
        return value
    return True if value == served.constant else None  # several switches may set one field
