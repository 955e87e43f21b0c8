"""Which tasks of lm-evaluation-harness there are, from the first words of their files: no torch, no harness, no YAML.

The harness parses its 14,000 files to answer that, for nine seconds. Only lines that begin with `task:`, `group:`,
`tag:`, `class:` or `include:` are read here, so that an unknown name is refused at once and a known one is looked for
in the folders that have it.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from megatron_peft.config import ConfigurationError, require
from megatron_peft.config.untrusted import parse_yaml, read_text
from megatron_peft.tasks.prepare import TaskLoader

# A key at the beginning of a line, and its value: the rest of the line, or the items of a list on the next ones.
_KEY = re.compile(r"""^["']?(task|group|tag|include|class)["']?[ ]*:(.*(?:\n(?:[ \t]*-.*|[ \t]*|[ \t]*#.*)$)*)""", re.M)
_COMMENT = re.compile(r"(?:^|(?<=\s))#.*", re.M)
_BETWEEN_WORDS = re.compile(r"""[\s"'\[\]{},]+|(?<!\S)-(?=\s)""")

Values = dict[str, list[str]]  # key of a task file -> its words


class DeclaredTask(NamedTuple):
    """What one file of tasks declares: a task with its tags, or a group, whose tags the harness ignores."""

    path: str
    name: str
    tags: Sequence[str]
    is_group: bool


def require_known_tasks(names: Sequence[str], include_paths: Sequence[str]) -> None:
    """Raises ConfigurationError unless each name is a task, a group or a tag of the harness or of `include_paths`."""
    missing = [path for path in include_paths if not Path(path).is_dir()]
    require(not missing, f"--include-path {' '.join(missing)}: no such folder.")
    known = {*own_files(include_paths)}
    if known.issuperset(names):
        return
    known |= harness_files().keys()
    problems = []
    for name in (name for name in names if name not in known):
        nearest = " or ".join(get_close_matches(name, known))
        proposal = f"did you mean {nearest}? Or " if nearest else ""
        problems.append(f"--tasks {name}: no task has this name; {proposal}give its folder with --include-path FOLDER.")
    if problems:
        raise ConfigurationError(*problems)


def harness_folders(names: Sequence[str], include_paths: Sequence[str]) -> list[str]:
    """The harness's folders in which `names`, and all that groups among them consist of, are declared.

    The files of `include_paths` come before those of the harness.
    """
    own = own_files(include_paths)
    folders, seen, wanted = set[Path](), set[str](), {*names}
    while wanted := wanted - seen:
        seen |= wanted
        declared = [file for name in wanted for file in own.get(name) or harness_files().get(name, ())]
        folders |= {Path(file.path).parent for file in declared if file.name not in own}
        # Every word of a group's file may name a member. A word too many costs a folder more.
        groups = {file.path for file in declared if file.is_group}
        words = {word for path in groups for word in _words(Path(path).read_text(encoding="utf-8"))}
        wanted = {word for word in words if word in own or word in harness_files()}  # not read without need
    return sorted(str(folder) for folder in folders if not folders & {*folder.parents})


def own_files(include_paths: Iterable[str]) -> Mapping[str, Sequence[DeclaredTask]]:
    """What `harness_files` is for the user's folders: they have few files, which may be written in any way."""

    def read(path: str) -> Values:
        values = parse_yaml(read_text(Path(path)), path, TaskLoader)
        return {key: texts_of(value) for key, value in values.items()} if isinstance(values, dict) else {}

    return _declared([path for folder in include_paths for path in sorted(Path(folder).rglob("*.yaml"))], read)


@cache
def harness_files() -> Mapping[str, Sequence[DeclaredTask]]:
    """The harness's files by the names of the tasks, groups and tags that they declare."""

    def read(path: str) -> Values:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
        return {key: _words(value) for key, value in _KEY.findall(text)}

    spec = find_spec("lm_eval")
    roots = (spec and spec.submodule_search_locations) or ()
    return _declared([path for root in roots for path in Path(root, "tasks").rglob("*.yaml")], read)


def _declared(paths: Iterable[Path], read: Callable[[str], Values]) -> Mapping[str, Sequence[DeclaredTask]]:
    """What files declare, by the harness's rules; `read` gives the values of one without those that it includes."""
    known: dict[str, Values] = {}

    def values_of(path: str) -> Values:
        known[path] = {}  # while it is being read: files may include one another
        own = read(path)
        for name in own.get("include", ()):
            inner = os.path.normpath(os.path.join(os.path.dirname(path), name))
            if os.path.isfile(inner):
                known[path] |= known[inner] if inner in known else values_of(inner)
        known[path] |= own
        return known[path]

    declared: dict[str, list[DeclaredTask]] = {}
    for path in map(str, paths):
        values = values_of(path)
        is_group = "group" in values and "class" not in values
        for name in values.get("group" if is_group else "task", ())[:1]:
            file = DeclaredTask(path, name, () if is_group else values.get("tag", ()), is_group)
            for each in (name, *file.tags):
                declared.setdefault(each, []).append(file)
    return declared


def _words(text: str) -> list[str]:
    """`a`, `"a"  # first`, `[a, b]`, or the items of a list on lines of their own."""
    return [word for word in _BETWEEN_WORDS.split(_COMMENT.sub("", text)) if word]


def texts_of(value: Any) -> list[str]:
    """The value of a task file that is a text, or the texts of its list."""
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)]
