"""Which tasks of lm-evaluation-harness there are, from the first words of their files: no torch, no harness, no YAML.

The harness parses its 14,000 files to answer that. Only lines that begin with `task:`, `group:`, `tag:` or `include:`
are read here, which takes half a second, so that an unknown name is refused at once and a known one is looked for in
the folders that have it.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_peft.config import ConfigurationError, require
from megatron_peft.config.untrusted import parse_yaml, read_text
from megatron_peft.tasks.template import TASKS, TaskLoader, split_task_file

# A key at the beginning of a line, and its value: the rest of the line, or the items of a list on the next ones.
_KEY = re.compile(r"""^["']?(task|group|tag|include|class)["']?[ ]*:(.*(?:\n(?:[ \t]*-.*|[ \t]*|[ \t]*#.*)$)*)""", re.M)
_ITEM = re.compile(r"^[ \t]*-[ \t]*(.*)$", re.M)
_MEMBER = re.compile(r"""^[ \t]*(?:-[ \t]+)*["']?(?:task|group)?["']?(?:[ \t]*:)?[ \t]*(.*)$""", re.M)
_SKIPPED = {"__pycache__", ".ipynb_checkpoints"}  # as the harness skips them
NUM_PROPOSALS, LIKENESS = 3, 0.6


@dataclass(frozen=True)
class DeclaredTask:
    """What one file of tasks declares.

    Args:
        path: of the file.
        name: of its task or group.
        tags: of a task; the harness ignores those of groups.
        is_group: whether it lists other tasks.
    """

    path: str
    name: str
    tags: tuple[str, ...] = ()
    is_group: bool = False


def require_known_tasks(names: Sequence[str], include_paths: Sequence[str]) -> None:
    """Each name is a task, a group or a tag of a folder of `include_paths`, or one of the harness's own.

    Raises:
        ConfigurationError: a folder that does not exist; a name that nothing has, with the nearest ones.
    """
    missing = [path for path in include_paths if not Path(path).is_dir()]
    require(not missing, f"--include-path {' '.join(missing)}: no such folder.")
    own = {name for file in own_files(include_paths) for name in (file.name, *file.tags)}
    unknown = [name for name in names if name not in own]
    if not unknown:
        return
    every = own | harness_files().keys()
    problems = [_unknown(name, every) for name in unknown if name not in every]
    if problems:
        raise ConfigurationError(*problems)


def harness_folders(names: Sequence[str], include_paths: Sequence[str]) -> list[str]:
    """The harness's own folders in which `names`, and all that groups among them consist of, are declared.

    Args:
        names: of tasks, groups or tags.
        include_paths: the user's folders; what is declared there is not looked for.
    """
    of_user = list(own_files(include_paths))
    own = {name for file in of_user for name in (file.name, *file.tags)}
    wanted = {*names, *(name for file in of_user if file.is_group for name in _members(file))} - own
    folders: set[Path] = set()
    seen: set[str] = set()
    while wanted := wanted - seen:
        seen |= wanted
        known = harness_files()
        found = [file for name in wanted for file in known.get(name, ())]
        folders |= {Path(file.path).parent for file in found}
        wanted = {name for file in found if file.is_group for name in _members(file)} & known.keys()
    inner = {one for one in folders if folders & {*one.parents}}
    return sorted(map(str, folders - inner))


def own_files(include_paths: Iterable[str]) -> Iterator[DeclaredTask]:
    """The files of the user's folders, which are few and may be written in any way: read as YAML."""
    for folder in include_paths:
        for path in sorted(Path(folder).rglob("*.yaml")):
            values = _parsed(path.resolve(), {})
            name, is_group = _name_of(values)
            if isinstance(name, str):
                yield DeclaredTask(str(path), name, () if is_group else tuple(_strings(values.get("tag"))), is_group)


@cache
def harness_files() -> Mapping[str, Sequence[DeclaredTask]]:
    """The harness's own files by the names of the tasks, groups and tags that they declare."""
    spec = find_spec("lm_eval")
    places = (spec and spec.submodule_search_locations) or []
    found: dict[str, list[DeclaredTask]] = {}
    for root in places:
        for path in _yaml_files(os.path.join(root, "tasks")):
            file = _declared(path)
            for name in (file.name, *file.tags) if file else ():
                found.setdefault(name, []).append(file)  # pyright: ignore[reportArgumentType]
    return found


def _yaml_files(folder: str) -> Iterator[str]:
    for at, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _SKIPPED]
        yield from (os.path.join(at, name) for name in files if name.endswith(".yaml"))


def _declared(path: str) -> DeclaredTask | None:
    values = _first_words(path)
    name, is_group = _name_of(values)
    if not name:
        return None
    return DeclaredTask(path, name[0], () if is_group else tuple(values.get("tag", ())), is_group)


def _name_of(values: Mapping[str, Any]) -> tuple[Any, bool]:
    """(name, whether it is a group's), by the harness's rules."""
    is_group = "group" in values and "class" not in values
    return values.get("group" if is_group else "task"), is_group


@cache
def _first_words(path: str, depth: int = 0) -> dict[str, list[str]]:
    """Values of the keys that count, with those of included files under the file's own."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError):
        return {}
    own = {key: list(_scalars(value)) for key, value in _KEY.findall(text)}
    values: dict[str, list[str]] = {}
    for name in own.pop("include", ()) if depth < 8 else ():
        values |= _first_words(os.path.normpath(os.path.join(os.path.dirname(path), name)), depth + 1)
    return values | own


def _scalars(value: str) -> Iterator[str]:
    """`a`, `"a"`, `[a, b]`, or the items of the lines below."""
    first, _, rest = value.partition("\n")
    first = _bare(first)
    if first.startswith("["):
        yield from (_bare(item) for item in first.strip("[]").split(",") if item.strip())
    elif first:
        yield first
    else:
        yield from (_bare(item) for item in _ITEM.findall(rest))


def _bare(word: str) -> str:
    """Without quotes and comments."""
    word = word.strip()
    if word[:1] in ("'", '"'):
        return word[1:].partition(word[0])[0]
    return "" if word.startswith("#") else word.partition(" #")[0].rstrip()


def _members(file: DeclaredTask) -> set[str]:
    """Every word of a group's file that may be the name of a member. A word too many costs a folder more."""
    words = _MEMBER.findall(Path(file.path).read_text(encoding="utf-8"))
    return {_bare(one) for word in words for one in (word, *word.strip("[]{} ").split(","))}


def _parsed(path: Path, known: dict[Path, dict[str, Any]]) -> dict[str, Any]:
    """With what it includes; `known` has files that were read before, and nothing yet for those that are being read."""
    known[path] = {}
    values = parse_yaml(read_text(path), str(path), TaskLoader)
    if not isinstance(values, dict):
        return {}
    included: dict[str, Any] = {}
    for inner in ((path.parent / name).resolve() for name in _strings(values.get("include"))):
        if inner.is_file():
            included |= known[inner] if inner in known else _parsed(inner, known)
    known[path] = included | values
    return known[path]


def _strings(value: Any) -> list[str]:
    return [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]


def _unknown(name: str, known: Iterable[str]) -> str:
    """The message: the nearest names that there are, and those of tasks that megatron-peft data prepare writes."""
    written = {word for path in TASKS.glob("*.yaml") for word in _written_names(path)}
    if name in written:
        return f"--tasks {name}: megatron-peft data prepare writes this task: give its folder to --include-path."
    nearest = get_close_matches(name, {*known, *written}, NUM_PROPOSALS, LIKENESS)
    if not nearest:
        return f"--tasks {name}: no task has this name; give the folder of its file with --include-path FOLDER."
    *others, last = [f"{one} (of megatron-peft data prepare)" if one in written else one for one in nearest]
    return f"--tasks {name}: no task has this name; did you mean {', '.join(others)}{' or ' * bool(others)}{last}?"


def _written_names(path: Path) -> list[str]:
    _, task = split_task_file(path.read_text(encoding="utf-8"))
    return [name for key, value in _KEY.findall(task) if key in ("task", "tag") for name in _scalars(value)]
