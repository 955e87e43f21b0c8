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

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import yaml

from megatron_peft.config import ConfigurationError
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
    for file in files:
        try:
            entries = [*_Reader(file, known, why_unknown).entries()]
        except ConfigurationError as error:
            problems += error.problems
        else:
            merged |= {one.name.removeprefix("--no-").removeprefix("--"): one for one in entries}
    if problems:
        raise ConfigurationError(*problems)
    return [one for one in merged.values() if one.is_set]


class _Reader:
    """Reads one file and gathers what is wrong with it."""

    def __init__(self, file: str, known: Mapping[str, KnownFlag], why_unknown: WhyUnknown) -> None:
        self.file, self.known, self.why_unknown = file, known, why_unknown
        self.sections = {one.section for one in known.values()} - {""}
        self.problems: list[str] = []
        self.places: dict[str, str] = {}

    def entries(self) -> Iterator[FileFlag]:
        """Each key. ConfigurationError with all problems of the file, at its end."""
        for key, value in self._table():
            is_section = isinstance(value, yaml.MappingNode) and key.value in self.sections
            for inner_key, inner in value.value if is_section else [(key, value)]:
                yield from self._entry(inner_key, inner, str(key.value) if is_section else "")
        if self.problems:
            raise ConfigurationError(*self.problems)

    def _table(self) -> list[tuple[yaml.Node, yaml.Node]]:
        text = read_text(Path(self.file))
        root = compose_yaml(text, self.file)
        if root is not None and not isinstance(root, yaml.MappingNode):
            raise ConfigurationError(f"{self.file} is not a table of flags: write `lr: 1e-4`, a line for each flag.")
        return root.value if root else []

    def _entry(self, key: yaml.Node, value: yaml.Node, section: str) -> Iterator[FileFlag]:
        place = f"{self.file}, line {key.start_mark.line + 1}, column {key.start_mark.column + 1}"
        try:
            name = self._name(key, value, section)
            if name in self.places:
                raise ConfigurationError(f"{key.value} stands here and in {self.places[name]}: leave one out.")
            self.places[name] = place.removeprefix(f"{self.file}, ")
            yield self._with_value(name, value, place)
        except ConfigurationError as error:
            self.problems.append(f"{place}: {error}")

    def _name(self, key: yaml.Node, value: yaml.Node, section: str) -> str:
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigurationError("a key is the name of a flag.")
        dashed = key.value.replace("_", "-")
        if f"--{dashed}" in TYPED_ONLY:
            raise ConfigurationError(f"{key.value} is for the command line only: a file cannot hold it.")
        name = next((one for one in (f"--{key.value}", f"--{dashed}", key.value) if one in self.known), None)
        if name is None:
            if isinstance(value, yaml.MappingNode):
                sections = ", ".join(sorted(self.sections))
                raise ConfigurationError(f"{key.value} is not a section; the sections are {sections}.")
            raise ConfigurationError(self.why_unknown(f"--{key.value}"))
        own = self.known[name].section
        if section and own != section:
            belongs = f"under {own}" if own else "at the top"
            raise ConfigurationError(f"{key.value} does not belong to {section}: write it {belongs}.")
        return name

    def _with_value(self, name: str, value: yaml.Node, place: str) -> FileFlag:
        is_list = isinstance(value, yaml.SequenceNode) and value.tag == f"{_YAML}seq"
        words = [_text(one) for one in (value.value if is_list else [value])]
        if words == [None]:
            return FileFlag(name, (), place, is_set=False)
        texts = tuple(word for word in words if word is not None)
        if len(texts) < len(words) or not texts:
            raise ConfigurationError(f"{name.lstrip('-')} has a list with nothing in it, or an empty value in it.")
        if self.known[name].takes_value:
            return FileFlag(name, texts, place)
        return self._switch(name, texts, place)

    def _switch(self, name: str, texts: tuple[str, ...], place: str) -> FileFlag:
        """A switch that is turned off is the flag `--no-...` where there is one."""
        (text, *more), opposite = texts, f"--no-{name[2:]}"
        if more or text.lower() not in (*_ON, *_OFF):
            raise ConfigurationError(f"{name[2:]} is a switch: true or false, not {' '.join(texts)}.")
        if text.lower() in _ON:
            return FileFlag(name, (), place)
        return FileFlag(opposite, (), place) if opposite in self.known else FileFlag(name, (), place, is_set=False)


def _text(node: yaml.Node) -> str | None:
    """What stands in the file, so that numbers keep their spelling; None for null."""
    if not isinstance(node, yaml.ScalarNode) or node.tag.removeprefix(_YAML) not in _PLAIN:
        raise ConfigurationError("a value is a string, a number, true, false, or a list of those.")
    return None if node.tag == f"{_YAML}null" else node.value


@dataclass(frozen=True)
class WrittenFlag:
    """A line of a written file: the flag without dashes, its value (None: not set) and its help."""

    key: str
    value: Any
    help: str


def written(title: str, sections: Mapping[str, Sequence[WrittenFlag]]) -> str:
    """The text of a configuration file that reads back to these settings, each under its help.

    Args:
        title: the first line, a comment.
        sections: settings by section; those of "" stand at the top.
    """
    lines = [f"# {title}"]
    for section, settings in sections.items():
        indent = "  " if section else ""
        lines += ["", f"{section}:"] if section and settings else []
        for one in settings:
            lines.append(f"{indent}# {one.help}")
            lines.append(f"{indent}{'# ' if one.value in (None, ()) else ''}{one.key}: {_scalar(one.value)}".rstrip())
        if section and settings and all(one.value in (None, ()) for one in settings):
            lines.append("  {}")
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    if value in (None, ()):
        return ""
    if isinstance(value, float):
        return repr(value)
    plain = [*value] if isinstance(value, tuple) else value
    readable = str(value).isprintable()  # else it is escaped: a no-break space would be read as nothing
    text = yaml.safe_dump(plain, default_flow_style=True, width=inf, allow_unicode=readable)
    return text.removesuffix("...\n").strip()
