"""Fields that explain and check themselves, and everything that is wrong with a configuration in one error."""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import MISSING, Field, field, fields
from functools import cache
from importlib import import_module
from math import inf, isfinite
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:  # takes long to import
    from pydantic import ValidationError

T = TypeVar("T")
Check = Literal["positive", "not_negative", "even", "fraction", "not_empty", "in_a_folder", "address", "plain_name"]
# Check -> (whether a value passes, what is told of another one).
CHECKS: Mapping[Check, tuple[Callable[[Any], bool], str]] = {
    "positive": (lambda value: value > 0, "is {}; it must be above 0."),
    "not_negative": (lambda value: value >= 0, "is {}; it cannot be negative."),
    "even": (lambda value: value > 0 and value % 2 == 0, "is {}; its halves are paired: use an even size."),
    "fraction": (lambda value: 0 <= value < 1, "is {}; it is a fraction, at least 0 and below 1."),
    "not_empty": (lambda value: value != "", "has an empty value (an unset variable?): give one, or leave it out."),
    "address": (lambda url: url.startswith(("http://", "https://")), "{}: give an address as http://localhost:8000."),
    "plain_name": (
        lambda name: re.fullmatch(r"[\w.-]+", name) is not None,
        "{}: give letters, digits, dots, dashes and underscores alone.",
    ),
    "in_a_folder": (lambda path: path.parent.is_dir(), "{0}: there is no folder {0.parent}; make it first."),
}


def option(
    default: T,
    help: str,
    *,
    check: Check | None = None,
    most: float = inf,
    needs: str = "",
    group: str | None = None,
    flags: tuple[str, ...] = (),
    metavar: str | None = None,
    may_change: bool = False,
    append: bool = False,
) -> T:
    """A dataclass field with everything that there is to say about its flag, whose default spelling is `--field-name`.

    default: None stands for "not set".
    check, most: what `Requirements.fields` requires of the value.
    needs: fields without which one that is not at its default has no effect; `a|b`: one of the two will do.
    group: title under which `--help` lists it; None: that of the section.
    may_change: of a method's flag: a resumed run may have another value.
    append: values that are typed one by one are all taken; else the last one holds, as with Megatron.
    """
    described = {"help": help, "check": check, "most": most, "needs": needs.split(), "group": group, "flags": flags}
    described |= {"metavar": metavar, "may_change": may_change, "append": append}
    return field(default=default, metadata=described)  # pyright: ignore[reportReturnType]


def required_option(help: str, **settings: Any) -> Any:
    """Like `option`, for a field that has no default: its flag must be given."""
    return option(MISSING, help, **settings)


# Control characters, and marks that turn text around.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class ConfigurationError(ValueError):
    """Settings are invalid or contradict each other. Each message names the flag, the numbers and the way out.

    `problems` holds the messages one by one; the text of the exception is all of them, a line each. Names of files and
    tensors stand in them: what a terminal would obey is escaped. `on_all_ranks`: all ranks of a run raise it, so that
    rank 0 alone reports it.
    """

    on_all_ranks = False

    def __init__(self, *problems: str) -> None:
        self.problems = tuple(map(not_obeyed, problems))
        super().__init__("\n".join(self.problems))


def not_obeyed(text: str) -> str:
    """The text, in which what a terminal would obey is escaped."""
    return _OBEYED.sub(lambda match: ascii(match[0])[1:-1], text)


def require(condition: bool, message: str) -> None:
    """Raise `ConfigurationError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigurationError(message)


@contextmanager
def writing(what: str = "", way_out: str = "", fails: str = "cannot be written") -> Iterator[None]:
    """Make an OSError a ConfigurationError that says what fails, by default the file of the error, and the way out."""
    try:
        yield
    except OSError as error:
        problem = f"{what or error.filename or 'a file'} {fails} ({error.strerror or error})"
        raise ConfigurationError(f"{problem}: {way_out}." if way_out else f"{problem}.") from error


def validation_problems(error: "ValidationError") -> Iterator[str]:
    """Yield a sentence for each thing that pydantic found wrong in a file, with the field's place in it."""
    for found in error.errors():
        place = ".".join(map(str, found["loc"]))
        known = {"missing": "is missing", "unexpected_keyword_argument": "is not a field"}
        otherwise = f"is {str(found['input'])[:40]}: {found['msg'].removeprefix('Value error, ')}"
        yield f"{place} {known.get(found['type'], otherwise)}."


def require_packages(extra: str, *names: str) -> None:
    """Import packages that are not core dependencies. ConfigurationError, with pip's command, if one is missing."""
    for name in names:
        try:
            import_module(name)
        except ImportError as error:
            message = f"the package {name} cannot be imported ({error}): pip install 'megatron-peft[{extra}]'."
            raise ConfigurationError(message) from error


def flag(name: str) -> str:
    """`lora_rank` -> `--lora-rank`."""
    return "--" + name.replace("_", "-")


def flag_of(field: Field[Any]) -> str:
    """The flag of a dataclass's field."""
    return (field.metadata.get("flags") or (flag(field.name),))[0]


def spelled(name: str, value: Any) -> str:
    """A flag and its value as they are typed."""
    return name if value is True else f"{name} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"


def value_type(annotation: Any) -> tuple[Any, tuple[str, ...] | None, bool]:
    """(type of one value, choices, whether it takes several) of a field's type: `int | None`, `tuple[str, ...]`..."""
    if get_origin(annotation) in (UnionType, Union):
        return value_type(next(member for member in get_args(annotation) if member is not NoneType))
    if get_origin(annotation) is tuple:
        return (*value_type(get_args(annotation)[0])[:2], True)
    if get_origin(annotation) is Literal:
        return str, get_args(annotation), False
    return annotation, None, False


_type_hints = cache(get_type_hints)
_TYPES: Mapping[Any, tuple[type, str]] = {
    str: (str, "a string"),
    bool: (bool, "True or False"),
    int: (Integral, "a whole number"),
    float: (Real, "a finite number"),
}


def _what_it_must_be(value: Any, annotation: Any) -> str:
    """What a field of this type takes; empty if this value is right."""
    kind, choices, many = value_type(annotation)
    if kind not in _TYPES or (value is None and NoneType in get_args(annotation)):
        return ""
    accepted, name = _TYPES[kind]
    name = f"one of {', '.join(choices)}" if choices else name

    def is_right(item: Any) -> bool:
        if choices:
            return item in choices
        is_number_too = isinstance(item, bool) and kind is not bool
        return isinstance(item, accepted) and not is_number_too and (not isinstance(item, float) or isfinite(item))

    if many:
        return "" if isinstance(value, tuple | list) and all(map(is_right, value)) else f"a tuple, each {name}"
    return "" if is_right(value) else name


def mistyped(config: object) -> dict[str, str]:
    """The fields of a dataclass whose values are not of their types, and what those must be."""
    hints = _type_hints(type(config))
    expected = {name: _what_it_must_be(value, hints[name]) for name, value in vars(config).items()}
    return {name: wanted for name, wanted in expected.items() if wanted}


class Requirements:
    """Collects failed checks inside a `with` block and raises them together, as one `ConfigurationError`, at its end.

    A ConfigurationError that is raised inside joins them. `config` is the dataclass whose fields the methods look at.
    """

    def __init__(self, config: object) -> None:
        self.config = config
        self.problems: list[str] = []

    def __enter__(self) -> "Requirements":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self.problems += getattr(error, "problems", ())
        if self.problems and kind in (None, ConfigurationError):
            raise ConfigurationError(*self.problems) from error

    def __call__(self, condition: bool, message: str) -> None:
        if not condition:
            self.problems.append(message)

    def fields(self, names: Collection[str] | None = None) -> None:
        """The type of every field, since all are recorded, and what `option` says of all, or of those that are named.

        Raises ConfigurationError: a value is not of its field's type, so that it cannot be compared with anything.
        """
        config, wrong = self.config, mistyped(self.config)
        for declared in fields(config):  # pyright: ignore[reportArgumentType]
            name, value, rules = declared.name, getattr(config, declared.name), declared.metadata
            if name in wrong:
                self(False, f"{flag_of(declared)} is {value!r}; it must be {wrong[name]}.")
            elif rules and value is not None and (names is None or name in names):
                if rules["check"]:
                    self.each(rules["check"], name)
                most, needs = rules["most"], rules["needs"]
                self(most == inf or value <= most, f"{flag(name)} is {value}; it must be at most {most:,}.")
                is_set = value not in (declared.default, "")
                for others in (need.split("|") for need in needs if is_set):
                    ways_out = " or ".join(map(flag, others))
                    is_met = any(getattr(config, other) for other in others)
                    self(is_met, f"{spelled(flag(name), value)} needs {ways_out}.")
        if wrong:
            raise ConfigurationError

    def each(self, check: Check, *names: str) -> None:
        holds, text = CHECKS[check]
        for name in names:
            value = getattr(self.config, name)
            self(value is None or holds(value), f"{flag(name)} {text.format(value)}")


class Checked:
    """A dataclass that checks its fields as they are declared, and whatever else `check` requires, as it is made.

    Raises ConfigurationError: with everything that is wrong.
    """

    def __post_init__(self) -> None:
        with Requirements(self) as require:
            require.fields()
            self.check(require)

    def check(self, require: Requirements) -> None:
        """What is required beyond the checks of the fields."""


def print_failure(message: str, environ: Mapping[str, str] = os.environ) -> None:
    """Print to stderr what ends this process; also where torchrun looks for it, so that its own report ends with it."""
    print(message, file=sys.stderr, flush=True)
    if path := environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):
            text = json.dumps({"message": message, "timestamp": int(time.time())})
            Path(path).write_text(text, encoding="utf-8")
