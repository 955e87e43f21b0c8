"""Configuration files: YAML whose keys are flags without their dashes, flat or under the names of a run's sections.

    peft:
      method: hybrid
    lr: 2e-4
    train-data-path: [0.3, a.jsonl, 0.7, b.jsonl]

A file becomes words of a command line. Of several files the later ones override, and typed flags override them all.
`true` is a switch, `false` its absence, and `null` is as if the key were not there.
"""

# Tried before writing this: ConfigArgParse 1.9 lets the last file replace the others, knows no sections and no lines;
# jsonargparse 4.53 knows a flag only under its section, names no line for an unknown key, and takes 0.19 s to import.

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_peft.config import ConfigurationError, require
from megatron_peft.config.untrusted import compose_yaml, read_text

CONFIG_FLAG = "--config"
TYPED_ONLY = (CONFIG_FLAG, "--print-config", "--help", "--version")
_YAML, _ON, _OFF = "tag:yaml.org,2002:", ("true", "yes", "on"), ("false", "no", "off")
_PLAIN = ("str", "int", "float", "bool", "null", "timestamp", "value", "merge")
WhyUnknown = Callable[[str], str]


@dataclass(frozen=True)
class KnownFlag:
    """What a file needs to know of a flag: whether a value follows it, and the section it may stand under."""

    takes_value: bool
    section: str = ""


@dataclass(frozen=True)
class FileFlag:
    """A flag with its words, and where it stands. `is_set` is false for `false` and `null`."""

    name: str
    words: tuple[str, ...]
    place: str
    is_set: bool = True


def split_off_files(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files of every `--config FILE ...`, in order, and the other words. ConfigurationError: no file follows."""
    files, rest, takes = [], [], False
    for word in argv:
        name, equals, value = word.partition("=")
        if name == CONFIG_FLAG:
            takes = not equals
            files += [value] if equals else []
        elif takes and not word.startswith("-"):
            files.append(word)
        else:
            takes = False
            rest.append(word)
    named = sum(word.partition("=")[0] == CONFIG_FLAG for word in argv)
    if "" in files or len(files) < named:
        raise ConfigurationError(f"{CONFIG_FLAG} needs a file: {CONFIG_FLAG} run.yaml.")
    return files, rest


def file_entries(files: Sequence[str], known: Mapping[str, KnownFlag], why_unknown: WhyUnknown) -> list[FileFlag]:
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


def _name(key: yaml.Node, value: yaml.Node, known: Mapping[str, KnownFlag], why_unknown: WhyUnknown) -> str:
    """The flag that a key names; or a ConfigurationError."""
    if not isinstance(key, yaml.ScalarNode):
        raise ConfigurationError("a key is the name of a flag.")
    dashed = key.value.replace("_", "-")
    if f"--{dashed}" in TYPED_ONLY:
        raise ConfigurationError(f"{key.value} is for the command line only: a file cannot hold it.")
    name = next((name for name in (f"--{key.value}", f"--{dashed}", key.value) if name in known), None)
    if name is None and isinstance(value, yaml.MappingNode):
        sections = ", ".join(sorted({flag.section for flag in known.values()} - {""}))
        raise ConfigurationError(f"{key.value} is not a section; the sections are {sections}.")
    if name is None:
        raise ConfigurationError(why_unknown(f"--{key.value}"))
    return name


def _entry(name: str, value: yaml.Node, known: Mapping[str, KnownFlag], place: str) -> FileFlag:
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
