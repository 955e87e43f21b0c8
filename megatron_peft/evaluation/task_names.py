"""Which tasks of lm-evaluation-harness there are, from the first words of their files: no torch, no harness, no YAML.

The harness parses its 14,000 files to answer that, for nine seconds. Only lines that begin with `task:`, `group:`,
`tag:`, `class:` or `include:` are read here, so that an unknown name is refused at once and a known one is looked for
in the folders that have it.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from megatron_peft.config import ConfigurationError, require
from megatron_peft.config.untrusted import parse_yaml, read_text
from megatron_peft.tasks.template import TASKS, TaskLoader, split_task_file

# A key at the beginning of a line, and its value: the rest of the line, or the items of a list on the next ones.
_KEY = re.compile(r"""^["']?(task|group|tag|include|class)["']?[ ]*:(.*(?:\n(?:[ \t]*-.*|[ \t]*|[ \t]*#.*)$)*)""", re.M)
_COMMENT = re.compile(r"(?:^|(?<=\s))#.*", re.M)
_BETWEEN_WORDS = re.compile(r"""[\s"'\[\]{},]+|(?<!\S)-(?=\s)""")
NUM_PROPOSALS, LIKENESS = 3, 0.6


class DeclaredTask(NamedTuple):
    """What one file of tasks declares: a task with its tags, or a group, whose tags the harness ignores."""

    path: str
    name: str
    tags: tuple[str, ...]
    is_group: bool

    def members(self) -> set[str]:
        """Every word of a group's file, any of which may name a member. A word too many costs a folder more."""
        return set(_words(Path(self.path).read_text(encoding="utf-8"))) if self.is_group else set()


def require_known_tasks(names: Sequence[str], include_paths: Sequence[str]) -> None:
    """Check that each name is a task, a group or a tag of the harness or of a folder of `include_paths`.

    Raises:
        ConfigurationError: a folder that does not exist; a name that nothing has, with the nearest ones.
    """
    missing = [path for path in include_paths if not Path(path).is_dir()]
    require(not missing, f"--include-path {' '.join(missing)}: no such folder.")
    known = {name for file in own_files(include_paths) for name in (file.name, *file.tags)}
    if known.issuperset(names):
        return
    known |= harness_files().keys()
    # The tasks that megatron-peft data prepare writes, after which the user may well ask.
    texts = (split_task_file(path.read_text(encoding="utf-8"))[1] for path in TASKS.glob("*.yaml"))
    values = (value for text in texts for key, value in _KEY.findall(text) if key in ("task", "tag"))
    prepared = {name for value in values for name in _words(value)}
    problems = [_unknown(name, known, prepared) for name in names if name not in known]
    if problems:
        raise ConfigurationError(*problems)


def _unknown(name: str, known: set[str], prepared: set[str]) -> str:
    if name in prepared:
        return f"--tasks {name}: megatron-peft data prepare writes this task: give its folder to --include-path."
    nearest = get_close_matches(name, known | prepared, NUM_PROPOSALS, LIKENESS)
    if not nearest:
        return f"--tasks {name}: no task has this name; give the folder of its file with --include-path FOLDER."
    *others, last = [f"{near} (of megatron-peft data prepare)" if near in prepared else near for near in nearest]
    return f"--tasks {name}: no task has this name; did you mean {', '.join(others)}{' or ' * bool(others)}{last}?"


def harness_folders(names: Sequence[str], include_paths: Sequence[str]) -> list[str]:
    """The harness's folders in which `names`, and all that groups among them consist of, are declared.

    Args:
        names: of tasks, groups or tags.
        include_paths: the user's folders; what is declared there is not looked for.
    """
    of_user = list(own_files(include_paths))
    wanted = {*names}.union(*(file.members() for file in of_user))
    seen = {name for file in of_user for name in (file.name, *file.tags)}
    folders: set[Path] = set()
    while wanted := wanted - seen:
        seen |= wanted
        declared = [file for name in wanted for file in harness_files().get(name, ())]
        folders |= {Path(file.path).parent for file in declared}
        wanted = set().union(*(file.members() for file in declared)) & harness_files().keys()
    return sorted(str(folder) for folder in folders if not folders & {*folder.parents})


def own_files(include_paths: Iterable[str]) -> Iterator[DeclaredTask]:
    """The files of the user's folders, which are few and may be written in any way: read as YAML."""
    for path in (path for folder in include_paths for path in sorted(Path(folder).rglob("*.yaml"))):
        values = _parsed(path.resolve(), {})
        if file := _declared(path, {key: texts_of(value) for key, value in values.items()}):
            yield file


@cache
def harness_files() -> Mapping[str, Sequence[DeclaredTask]]:
    """The harness's files by the names of the tasks, groups and tags that they declare."""
    spec = find_spec("lm_eval")
    roots = (spec and spec.submodule_search_locations) or ()
    inside = chain.from_iterable(os.walk(os.path.join(root, "tasks")) for root in roots)
    declared: dict[str, list[DeclaredTask]] = {}
    for path in (os.path.join(folder, name) for folder, _, names in inside for name in names if name.endswith(".yaml")):
        if file := _declared(path, _first_words(path)):
            for name in (file.name, *file.tags):
                declared.setdefault(name, []).append(file)
    return declared


def _declared(path: str | Path, values: Mapping[str, Sequence[str]]) -> DeclaredTask | None:
    """What a file with these values declares, by the harness's rules."""
    is_group = "group" in values and "class" not in values
    name = values.get("group" if is_group else "task")
    tags = () if is_group else tuple(values.get("tag", ()))
    return DeclaredTask(str(path), name[0], tags, is_group) if name else None


@cache
def _first_words(path: str, depth: int = 0) -> dict[str, list[str]]:
    """Values of the keys that count, with those of included files under those of the file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    in_file = {key: _words(value) for key, value in _KEY.findall(text)}
    values: dict[str, list[str]] = {}
    for name in in_file.pop("include", ()) if depth < 8 else ():
        values |= _first_words(os.path.normpath(os.path.join(os.path.dirname(path), name)), depth + 1)
    return values | in_file


def _words(text: str) -> list[str]:
    """`a`, `"a"  # first`, `[a, b]`, or the items of a list on lines of their own."""
    return [word for word in _BETWEEN_WORDS.split(_COMMENT.sub("", text)) if word]


def _parsed(path: Path, known: dict[Path, dict[str, Any]]) -> dict[str, Any]:
    """Values with those of included files; `known` has files that were read before, and {} for those being read."""
    known[path] = {}
    values = parse_yaml(read_text(path), str(path), TaskLoader)
    if isinstance(values, dict):
        for inner in ((path.parent / name).resolve() for name in texts_of(values.get("include"))):
            if inner.is_file():
                known[path] |= known[inner] if inner in known else _parsed(inner, known)
        known[path] |= values
    return known[path]


def texts_of(value: Any) -> list[str]:
    """The value of a task file that is a text, or the texts of its list."""
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)]
