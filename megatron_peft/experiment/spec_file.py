"""Reads an experiment's YAML file into `spec.Experiment`. docs/experiments.md describes the format."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from megatron_peft.config import ConfigurationError
from megatron_peft.config.untrusted import parse_yaml, read_text
from megatron_peft.experiment.spec import Choice, Experiment, Metric, Score

KEYS = ("name", "title", "flags", "models", "tasks", "methods", "seeds", "tuning_seed", "prepare")
NEEDED = ("models", "tasks", "methods", "seeds")
CHOICE_KEYS = {
    "models": ("flags", "processes", "slurm", "paper"),
    "tasks": ("flags", "score", "paper"),
    "methods": ("flags", "grid", "paper"),
}
METRIC_KEYS = ("path", "higher_is_better", "scale")


class _Loader(yaml.SafeLoader):
    """A key that is written twice is an error: YAML's own rule, which PyYAML lets pass."""


def _mapping_once(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.constructor.ConstructorError(None, None, f"{key!r} is there twice", node.start_mark)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_once)


def read_experiment(path: Path) -> Experiment:
    """The experiment of a file; its name is the file's, unless it gives one.

    Raises:
        ConfigurationError: the file cannot be read, is not YAML, has a key that means nothing, or contradicts itself.
    """
    text = read_text(path)
    content = parse_yaml(text, str(path), _Loader)
    try:
        return replace(_experiment(content, path.stem), text=text)
    except ConfigurationError as error:
        raise ConfigurationError(*(f"{path}: {problem}" for problem in error.problems)) from error


def _experiment(content: Any, name: str) -> Experiment:
    top = _mapping(content, "the file")
    _check_keys(top, KEYS, "the file")
    missing = [key for key in NEEDED if not top.get(key)]
    if missing:
        raise ConfigurationError(*(f"the grid is empty: {key} names nothing." for key in missing))
    seeds = _whole_numbers(top["seeds"], "seeds")
    (tuning_seed,) = _whole_numbers([top.get("tuning_seed", seeds[0])], "tuning_seed")
    return Experiment(
        name=str(top.get("name", name)),
        title=str(top.get("title", top.get("name", name))),
        flags=_flags(top.get("flags"), "flags"),
        models=_choices(top, "models"),
        tasks=_choices(top, "tasks"),
        methods=_choices(top, "methods"),
        seeds=seeds,
        tuning_seed=tuning_seed,
        prepare=tuple(_words(command, "prepare") for command in _listed(top.get("prepare"))),
    )


def _choices(top: Mapping[str, Any], kind: str) -> tuple[Choice, ...]:
    common = _flags(top.get("flags"), "flags")
    return tuple(
        _choice(str(name), _mapping(values, f"{kind}.{name}"), kind, common)
        for name, values in _mapping(top[kind], kind).items()
    )


def _choice(name: str, values: Mapping[str, Any], kind: str, common: Mapping[str, Any]) -> Choice:
    """`common`: the flags of all cells; where they name no --peft-method, a method's own name is it."""
    place = f"{kind}.{name}"
    _check_keys(values, CHOICE_KEYS[kind], place)
    flags = _flags(values.get("flags"), f"{place}.flags")
    grid = {flag: _grid_values(points, f"{place}.grid.{flag}") for flag, points in _grid(values, place).items()}
    if kind == "methods" and "peft-method" not in {*flags, *grid, *common}:
        flags = {"peft-method": name, **flags}
    (processes,) = _whole_numbers([values.get("processes", 1)], f"{place}.processes")
    if processes < 1:
        raise ConfigurationError(f"{place}.processes is {processes}; a cell needs one at least.")
    score = _score(values["score"], f"{place}.score") if values.get("score") else None
    paper = None if values.get("paper") is None else str(values["paper"])
    return Choice(name, flags, grid, processes, score, _flags(values.get("slurm"), f"{place}.slurm"), paper)


def _grid(values: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    return _flags(values.get("grid"), f"{place}.grid")


def _grid_values(points: Any, place: str) -> tuple[Any, ...]:
    listed = points if isinstance(points, list) else [points]
    if not listed:
        raise ConfigurationError(f"{place} is empty: list the values to try, or leave the flag out.")
    words = [str(point) for point in listed]
    twice = sorted({word for word in words if words.count(word) > 1})
    if twice:
        raise ConfigurationError(f"{place} holds {', '.join(twice)} twice.")
    return tuple(listed)


def _score(content: Any, place: str) -> Score:
    values = _mapping(content, place)
    _check_keys(values, ("command", "metrics"), place)
    command = _words(values.get("command"), f"{place}.command")
    if "{output}" not in " ".join(command):
        raise ConfigurationError(f"{place}.command says nowhere where its JSON file goes: write {{output}} there.")
    metrics = _mapping(values.get("metrics"), f"{place}.metrics")
    if not metrics:
        raise ConfigurationError(f"{place}.metrics is empty: name the numbers of the score's file.")
    return Score(command, {str(name): _metric(one, f"{place}.metrics.{name}") for name, one in metrics.items()})


def _metric(content: Any, place: str) -> Metric:
    values = _mapping(content, place)
    _check_keys(values, METRIC_KEYS, place)
    paths = values.get("path") or []
    if not paths:
        raise ConfigurationError(f"{place} needs path: the keys to the number, joined by slashes, or a list of such.")
    scale = values.get("scale", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise ConfigurationError(f"{place}.scale is {scale!r}, not a number.")
    keys = tuple(map(str, paths)) if isinstance(paths, list) else (str(paths),)
    return Metric(keys, bool(values.get("higher_is_better", True)), float(scale))


def _words(content: Any, place: str) -> tuple[str, ...]:
    if isinstance(content, str) and content.strip():
        content = content.split()
    if not isinstance(content, Sequence) or isinstance(content, str) or not content:
        raise ConfigurationError(f"{place} is {content!r}; it is a command: a line, or a list of words.")
    return tuple(str(word) for word in content)


def _listed(commands: Any) -> list[Any]:
    """One command or several."""
    return commands if isinstance(commands, list) else [commands] if commands else []


def _flags(content: Any, place: str) -> dict[str, Any]:
    return {str(name).lstrip("-").replace("_", "-"): value for name, value in _mapping(content, place).items()}


def _mapping(content: Any, place: str) -> Mapping[str, Any]:
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise ConfigurationError(f"{place} is {content!r}; it is a mapping, `name: value` on each line.")
    return content


def _whole_numbers(content: Any, place: str) -> tuple[int, ...]:
    listed = content if isinstance(content, list) else [content]
    for number in listed:
        if not isinstance(number, int) or isinstance(number, bool):
            raise ConfigurationError(f"{place} holds {number!r}, which is not a whole number.")
    return tuple(listed)


def _check_keys(given: Iterable[Any], known: Sequence[str], place: str) -> None:
    for key in given:
        if key not in known:
            near = get_close_matches(str(key), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."
            raise ConfigurationError(f"{place} has the key {key!r}, which means nothing: {hint}")
