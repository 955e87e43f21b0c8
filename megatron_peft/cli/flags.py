"""The flags that are served: a flag for each field of our dataclasses, for fields of megatron-core's, and Megatron-LM's
spelled-out names.

Nothing here parses. `served_flags()` is the whole list; `megatron_peft.cli.parser` turns it into a parser.
"""

from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron_peft.argument_help import HELP
from megatron_peft.argument_tables import (
    ACCEPTED,
    ACCEPTED_GROUP,
    ACCEPTED_VALUES,
    FIELD_GROUPS,
    FLAG_NAMES,
    GROUPS,
    NO_FLAG,
    PREFIX_GROUPS,
    RECOMPUTE,
    RUN_DEFAULTS,
    RUN_FIELDS,
    RUN_SWITCHES,
    SECTION_GROUPS,
    SHAPE,
    SHAPE_CLAIMS,
    SHAPE_FIELDS,
    SHAPE_VALUES,
)
from megatron_peft.config import PEFT_METHODS, RunConfig, flag
from megatron_peft.megatron_fields import SOURCES, MegatronField, megatron_fields

Target = Literal["config", "shape", "transformer", "nothing"]
TAKES_A_VALUE = object()


@dataclass(frozen=True)
class Flag:
    """One flag: its spellings, where its value goes (target and key), and how the value is read.

    `constant` is what a flag without a value stores; `default` is shown in the help only.
    """

    names: tuple[str, ...]
    target: Target
    key: str
    help: str
    group: str
    kind: type = str
    choices: tuple[str, ...] | None = None
    many: bool = False
    constant: Any = TAKES_A_VALUE
    default: Any = None


def served_flags() -> tuple[Flag, ...]:
    """Every flag that is served, in the order of `GROUPS`."""
    found = [*_config_flags(), *_shape_flags(), *_run_flags(), *_accepted_flags()]
    return tuple(sorted(found, key=lambda flag: GROUPS.index(flag.group)))


def sections() -> dict[str, type]:
    """Name of a part of RunConfig -> its dataclass."""
    return get_type_hints(RunConfig)


def _config_flags() -> Iterator[Flag]:
    """A flag for each field of our dataclasses; one that stands in two of them (seed) is one flag that sets both."""
    seen = set(NO_FLAG)
    for section, config_class in sections().items():
        hints = get_type_hints(config_class)
        for field in fields(config_class):
            if field.name not in seen:
                yield from _field_flags(section, field, hints[field.name])
            seen.add(field.name)


def _field_flags(section: str, field: Field[Any], annotation: Any) -> Iterator[Flag]:
    kind, choices, many = _value_of(annotation)
    names = FLAG_NAMES.get(field.name, (flag(field.name),))
    group, words = _group_of(section, field.name), _help_of(field.name)
    default = None if field.default is MISSING else field.default
    if kind is not bool:
        choices = tuple(PEFT_METHODS) if field.name == "method" else choices
        yield Flag(names, "config", field.name, words, group, kind, choices, many, default=default)
        return
    yield Flag(names, "config", field.name, words + (" (the default)" if default else ""), group, constant=True)
    if default:
        yield Flag((f"--no-{names[0][2:]}",), "config", field.name, f"not {names[0]}", group, constant=False)


def _group_of(section: str, field_name: str) -> str:
    if field_name in FIELD_GROUPS:
        return FIELD_GROUPS[field_name]
    prefix = next((prefix for prefix in PREFIX_GROUPS if field_name.startswith(prefix)), None)
    if prefix and section != "peft":
        return PREFIX_GROUPS[prefix]
    return SECTION_GROUPS.get(section, section)


def _help_of(field_name: str) -> str:
    documented = (megatron_fields(name).get(field_name) for name in SOURCES)
    return HELP.get(field_name) or next((field.help for field in documented if field), "")


def _value_of(annotation: Any) -> tuple[type, tuple[str, ...] | None, bool]:
    """(type of one value, choices, whether it takes several) of a field's type: `int | None`, `tuple[str, ...]`..."""
    if get_origin(annotation) in (UnionType, Union):
        return _value_of(next(member for member in get_args(annotation) if member is not NoneType))
    if get_origin(annotation) is tuple:
        return get_args(annotation)[0], None, True
    if get_origin(annotation) is Literal:
        return str, get_args(annotation), False
    return annotation, None, False


def _shape_flags() -> Iterator[Flag]:
    transformer = megatron_fields("TransformerConfig")
    for name in SHAPE_FIELDS:
        yield _transformer_flag("shape", transformer[name], SHAPE)
    for name, (value, words) in SHAPE_VALUES.items():
        choices = value if isinstance(value, tuple) else None
        kind = value if isinstance(value, type) else str
        yield Flag((flag(name),), "shape", name, words, SHAPE, kind, choices)
    for name, words in SHAPE_CLAIMS.items():
        yield Flag((flag(name),), "shape", name, words, SHAPE, constant=True)


def _run_flags() -> Iterator[Flag]:
    transformer = megatron_fields("TransformerConfig")
    for name in RUN_FIELDS:
        group = "optimizer and regularization" if name.endswith("_dropout") else RECOMPUTE
        yield _transformer_flag("transformer", transformer[name], group)
    for name, (key, value, words) in RUN_SWITCHES.items():
        yield Flag((name,), "transformer", key, words, RECOMPUTE, constant=value)


def _transformer_flag(target: Target, field: MegatronField, group: str) -> Flag:
    kind, choices = field.type_and_choices
    constant = True if kind is bool else TAKES_A_VALUE
    default = RUN_DEFAULTS.get(field.name)
    words = HELP.get(field.name, field.help)
    return Flag((flag(field.name),), target, field.name, words, group, kind, choices, False, constant, default)


def _accepted_flags() -> Iterator[Flag]:
    for name, reason in ACCEPTED.items():
        yield Flag((name,), "nothing", name, reason, ACCEPTED_GROUP, constant=True)
    for name, choices in ACCEPTED_VALUES.items():
        yield Flag((name,), "nothing", name, "the only format", ACCEPTED_GROUP, choices=choices)
