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

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import yaml

from megatron_peft.cli.flags import Flag, served_flags
from megatron_peft.config import SECTIONS, ConfigurationError, PeftConfig, RunConfig, require
from megatron_peft.config.untrusted import compose_yaml, read_text

TITLE = "Repeat this run, in the folder where it was started: megatron-peft train --config FOLDER/run.yaml --save OTHER"
TYPED_ONLY = ("--config", "--print-config", "--help", "--version")
_YAML, _ON, _OFF = "tag:yaml.org,2002:", ("true", "yes", "on"), ("false", "no", "off")
_PLAIN = ("str", "int", "float", "bool", "null", "timestamp", "value", "merge")


@dataclass(frozen=True)
class FileFlag:
    """A flag with its words, and where it stands. `words` is None for `null`, and for `false` of a switch."""

    flag: Flag
    words: list[str] | None
    place: str


def file_entries(file: str, known: Mapping[str, Flag], why_unknown: Callable[[str], str]) -> list[FileFlag]:
    """Return what a file sets.

    `known` are flags with their dashes, and words without a flag by their names; `why_unknown` explains another one.
    Raises ConfigurationError with everything that is wrong in the file, each with line and column.
    """
    problems, entries = list[str](), dict[str, FileFlag]()
    sections = {flag.section for flag in known.values()} - {""}
    for section, key, value in _settings(file, sections):
        place = f"{file}, line {key.start_mark.line + 1}, column {key.start_mark.column + 1}"
        try:
            name = _name(key, known)
            if name is None and isinstance(value, yaml.MappingNode):
                raise ConfigurationError(
                    f"{key.value} is not a section; the sections are {', '.join(sorted(sections))}."
                )
            if name is None:
                raise ConfigurationError(why_unknown(f"--{key.value}"))
            flag = known[name]
            belongs = f"under {flag.section}" if flag.section else "at the top"
            require(section in ("", flag.section), f"{key.value} does not belong to {section}: write it {belongs}.")
            if name in entries:
                before = entries[name].place.removeprefix(f"{file}, ")
                raise ConfigurationError(f"{key.value} stands here and in {before}: leave one out.")
            entries[name] = FileFlag(*_flag_and_words(name, value, known), place)
        except ConfigurationError as error:
            problems.append(f"{place}: {error}")
    if problems:
        raise ConfigurationError(*problems)
    return [*entries.values()]


def _settings(file: str, sections: Collection[str]) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    """Yield (section or "", key, value) of everything in a file."""
    root = compose_yaml(read_text(Path(file)), file)
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise ConfigurationError(f"{file} is not a table of flags: write `lr: 1e-4`, a line for each flag.")
    for key, value in root.value if root else []:
        nests = isinstance(key, yaml.ScalarNode) and isinstance(value, yaml.MappingNode)
        if nests and key.value in sections:
            yield from ((key.value, *inner) for inner in value.value)
        else:
            yield "", key, value


def _name(key: yaml.Node, known: Mapping[str, Flag]) -> str | None:
    """Return the flag that a key names, if it is known. ConfigurationError: a file cannot hold it."""
    if not isinstance(key, yaml.ScalarNode):
        raise ConfigurationError("a key is the name of a flag.")
    dashed = f"--{key.value.replace('_', '-')}"
    name = next((name for name in (f"--{key.value}", dashed, key.value) if name in known), None)
    if dashed in TYPED_ONLY or name is not None and known[name].target == "program":
        raise ConfigurationError(f"{key.value} is for the command line only: a file cannot hold it.")
    return name


def _flag_and_words(name: str, value: yaml.Node, known: Mapping[str, Flag]) -> tuple[Flag, list[str] | None]:
    """Return the flag and its words. A switch that is turned off is the flag `--no-...` where there is one."""
    flag = known[name]
    is_list = isinstance(value, yaml.SequenceNode) and value.tag == f"{_YAML}seq"
    words = [_text(node) for node in (value.value if is_list else [value])]
    if words == [None]:
        return flag, None
    if not words or None in words:
        raise ConfigurationError(f"{name.lstrip('-')} has a list with nothing in it, or an empty value in it.")
    texts = [word for word in words if word is not None]
    if flag.takes_value:
        return flag, texts
    text = " ".join(texts).lower()
    require(text in (*_ON, *_OFF), f"{name[2:]} is a switch: true or false, not {' '.join(texts)}.")
    opposite = known.get(f"--no-{name[2:]}")
    return (flag, []) if text in _ON else (opposite, []) if opposite else (flag, None)


def _text(node: yaml.Node) -> str | None:
    """Return what stands in the file, so that numbers keep their spelling; None for null."""
    if not isinstance(node, yaml.ScalarNode) or node.tag.removeprefix(_YAML) not in _PLAIN:
        raise ConfigurationError("a value is a string, a number, true, false, or a list of those.")
    return None if node.tag == f"{_YAML}null" else node.value


def run_file(config: RunConfig, launch: Mapping[str, Any], title: str = TITLE, unset: Collection[str] = ()) -> str:
    """The text of a file from which the run can be repeated: every flag with its value, under its help.

    Flags of other methods stand there only if they were given. A flag that is not set, or of a field in `unset`, is a
    comment. `launch` has typed values of `LaunchConfig`.
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

    The title is the first line, a comment.
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
