"""The flags that are served: a flag for each field of our dataclasses, and those of Megatron-LM in served.toml; what is
told of Megatron's other flags.

Nothing here parses. `served_flags()` is the whole list; `megatron_peft.cli.parser` turns it into a parser.
"""

import ast
import tomllib
import typing
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from itertools import zip_longest
from math import isfinite, nan
from pathlib import Path
from typing import Any, Literal, get_type_hints

from megatron_peft.cli.launch import LaunchConfig
from megatron_peft.config import METHODS, SECTIONS, ConfigurationError, flag, option, require
from megatron_peft.config.errors import value_type

# Megatron-LM's flags by where their values go, and the titles of --help in order. A field may name its title; others go
# to the one of their section, or of their table in the file.
MEGATRONS = tomllib.loads(Path(__file__).with_name("served.toml").read_text(encoding="utf-8"))
_TITLES = MEGATRONS.pop("titles")
GROUPS = (*_TITLES,)
GROUP_OF = {name: title for title, names in _TITLES.items() for name in names}


# Where the value of a flag goes; `command`: the settings of the command itself.
Target = Literal["config", "shape", "transformer", "nothing", "launch", "program", "command"]
TAKES_A_VALUE = object()


@dataclass(frozen=True)
class Flag:
    """One flag: its spellings, where its value goes (target and key), and how the value is read.

    `constant` is what a flag without a value stores; `default` is shown in the help only. `checks_choices`: the parser
    does; else the field's own class.
    """

    names: tuple[str, ...]
    target: Target
    key: str
    help: str
    group: str
    kind: type = str
    choices: tuple[str, ...] | None = None
    many: bool = False
    append: bool = False
    constant: Any = TAKES_A_VALUE
    default: Any = None
    metavar: str | None = None
    required: bool = False
    section: str = ""  # of a configuration file
    checks_choices: bool = True

    @property
    def takes_value(self) -> bool:
        return self.constant is TAKES_A_VALUE

    @property
    def is_option(self) -> bool:
        return self.names[0].startswith("-")

    def read(self, words: Sequence[str]) -> Any:
        """Return the value that the words give. Raises ConfigurationError."""
        name, text = self.names[0], " ".join(words)
        if not self.takes_value:
            require(not words, f"{name} takes no value, but {text} follows it.")
            return self.constant
        quotes = ": put a text with spaces into quotes" if self.kind is str and not self.choices else ""
        require(bool(words), f"{name} needs a value.")
        require(len(words) == 1 or self.many, f"{name} takes one value, but {text} follow it{quotes}.")
        values = tuple(map(self._value, words))
        return values if self.many else values[0]

    def _value(self, word: str) -> Any:
        name = self.names[0]
        if self.choices and self.checks_choices and word not in self.choices:
            hint = way_out(name, reason_of(name[2:]))
            choices = f"choose from {', '.join(self.choices)}{f'; {hint}' if hint else ''}"
            raise ConfigurationError(f"{name}: invalid choice: {word!r} ({choices}).")
        try:
            value = self.kind(word)
        except ValueError:
            value = nan
        kind = "number" if self.kind is float else self.kind.__name__
        require(not isinstance(value, float) or isfinite(value), f"{name}: invalid {kind} value: {word!r}.")
        return value

    def command_line(self, words: list[str]) -> list[str]:
        """Return the flag with its words as they are typed; joined by `=`, a value may start with a dash."""
        is_joined = len(words) == 1 and words[0].startswith("-")
        return [f"{self.names[0]}={words[0]}"] if is_joined else [self.names[0], *words]


@dataclass(frozen=True)
class ProgramSettings:
    """What every command that takes a run's flags understands besides them."""

    print_config: bool = option(False, "print what would run as a configuration file, and exit")
    dry_run: bool = option(
        False, "check flags, data, tokenizer and checkpoint in this process, show the plan of this layout, and exit"
    )
    cluster: str | None = option(
        None,
        "with --dry-run: plan for 8xa100, 8xh100, or the cluster of a YAML file (default: this machine's GPUs, if any)",
        metavar="NAME",
    )
    no_plan: bool = option(
        False, "on a GPU, do not rehearse rank 0 to print its planned peak of memory beside the measured one"
    )


_FILES = "YAML files with flags as keys; later files override earlier ones, and typed flags override all"
CONFIG = Flag(("--config",), "program", "config", _FILES, GROUP_OF["program"], many=True, append=True, metavar="FILE")


@cache
def served_flags() -> tuple[Flag, ...]:
    """Every flag that is served, in the order of `GROUPS`."""
    classes = {"program": ProgramSettings, **SECTIONS, "launch": LaunchConfig}
    of_fields = [served for section, config_class in classes.items() for served in flags_of(config_class, section)]
    every = [CONFIG, *of_fields, *_megatrons_flags()]
    return tuple(sorted(every, key=lambda served: GROUPS.index(served.group)))


def flags_of(config_class: type, section: str = "") -> Iterator[Flag]:
    """A flag for each field of a dataclass that is an option. A name without dashes is a word.

    `section` is that of a configuration file, empty for a command's own settings.
    """
    hints = get_type_hints(config_class)
    target: Target = section if section in ("launch", "program") else "config" if section else "command"
    for field in fields(config_class):
        if "help" not in field.metadata:
            continue
        kind, choices, many = value_type(hints[field.name])
        spellings = (flag(field.name), f"--{field.name}") if target == "launch" else (flag(field.name),)
        names = field.metadata["flags"] or tuple(dict.fromkeys(spellings))
        of_field: dict[str, Any] = {
            "target": target,
            "key": field.name,
            "group": field.metadata["group"] or GROUP_OF.get(section, "options"),
            "section": "" if target == "program" else section,
        }
        default, words = None if field.default is MISSING else field.default, field.metadata["help"]
        if kind is bool:
            yield Flag(names, help=words + (" (the default)" if default else ""), constant=True, **of_field)
            if default:
                yield Flag((f"--no-{names[0][2:]}",), help=f"disable {names[0]}", constant=False, **of_field)
            continue
        is_method = field.name == "method"  # PeftConfig says why a method cannot be used
        of_field |= {"kind": kind, "choices": tuple(METHODS) if is_method else choices, "many": many}
        of_field["append"] = field.metadata["append"]
        of_field |= {"required": field.default is MISSING, "checks_choices": not is_method}
        yield Flag(names, help=words, default=default, metavar=field.metadata["metavar"], **of_field)


def _megatrons_flags() -> Iterator[Flag]:
    """Flags of Megatron-LM: for fields of megatron-core's, for its spelled-out names, and what has no effect here."""
    kinds = {kind.__name__: kind for kind in (str, int, float)}
    target: Target
    for target in ("shape", "config", "transformer", "nothing"):
        for name, declared in MEGATRONS[target].items():
            key = declared.get("key", name.replace("-", "_"))
            settings: dict[str, Any] = {"group": GROUP_OF[target], "section": "" if target == "nothing" else "model"}
            if declared.keys().isdisjoint(("kind", "choices", "constant")):
                field = megatron_fields("TransformerConfig")[key]
                kind, choices, _ = value_type(eval(field.annotation, dict(vars(typing))))  # megatron-core's own source
                constant = True if kind is bool else TAKES_A_VALUE
                settings |= {"kind": kind, "choices": choices, "constant": constant, "help": field.help}
            settings |= {name: value for name, value in declared.items() if name != "key"}
            if "choices" in declared:
                settings["choices"] = tuple(declared["choices"])
            if "kind" in declared:
                settings["kind"] = kinds[declared["kind"]]
            yield Flag((f"--{name}",), target, key, **settings)


# What Megatron knows: the fields of megatron-core's configuration classes, and Megatron-LM's flags that are refused.
#
# Importing those classes takes seconds, since torch and half of megatron-core come along; a wrong flag and `--help` are
# answered from their source at once. What is read (names, types, the docstring under a field, Megatron-LM's own flags
# for it) is what the dataclasses themselves say: a test compares the two.
#
# A Megatron flag is refused by name, with the reason and the way out; a flag of Hugging Face's trainers gets what
# stands for it here, and any other the nearest flag. refused.toml has the words.

# Class -> (file below megatron/core, classes in it and in its bases' files whose fields it has).
SOURCES = {
    "TransformerConfig": ("model_parallel_config.py", "transformer/transformer_config.py"),
    "OptimizerConfig": ("optimizer/optimizer_config.py",),
    "DistributedDataParallelConfig": ("distributed/distributed_data_parallel_config.py",),
}
BASES = {"TransformerConfig": ("ModelParallelConfig",)}

TYPO, NEAR = 0.85, 0.6  # likeness to a flag: a slip of the finger; worth asking about
MIN_BEGINNING = 6  # letters of a flag's beginning that are not there by chance
FIELD_REASON = "a field of megatron-core that fine-tuning has no use for"
REFUSED_TOO = ", a Megatron flag that is not supported"
TOLD = tomllib.loads(Path(__file__).with_name("refused.toml").read_text(encoding="utf-8"))
REASONS = {name: reason for reason, names in TOLD["reasons"].items() for name in names.split()}
FAMILIES = {name[:-1]: reason for name, reason in REASONS.items() if name.endswith("*")}
EQUIVALENTS = {name: here for here, names in TOLD["equivalents"].items() for name in names.split()}


@dataclass(frozen=True)
class MegatronField:
    """One field: its annotation as source text, its first sentence of documentation, Megatron-LM's own flags."""

    name: str
    annotation: str
    help: str
    flags: tuple[str, ...]


@cache
def megatron_fields(class_name: str) -> dict[str, MegatronField]:
    """Name -> field of a class of `SOURCES`, the fields of its base classes included, without internal ones (`_x`)."""
    classes = (*BASES.get(class_name, ()), class_name)
    return {
        field.name: field
        for file in SOURCES[class_name]
        for node in ast.parse(_megatron_core(file).read_text()).body
        if isinstance(node, ast.ClassDef) and node.name in classes
        for field in _fields(node)
    }


def flags_of_fields() -> Iterator[tuple[str, str]]:
    """(flag, field): `--field`, Megatron's own names for it, and for a switch `--no-field` and `--disable-field`."""
    for class_name in SOURCES:
        for field in megatron_fields(class_name).values():
            prefixes = ("", "no_", "disable_") if field.annotation == "bool" else ("",)
            for name in (*(flag(prefix + field.name) for prefix in prefixes), *field.flags):
                yield name, field.name


def _megatron_core(file: str) -> Path:
    """Where a source file of megatron-core lies. `megatron` is a namespace package: finding it imports nothing."""
    spec = find_spec("megatron")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder, "core", file)
        if path.is_file():
            return path
    raise ConfigurationError(f"megatron-core is not installed (no megatron/core/{file}): pip install megatron-core.")


def _fields(node: ast.ClassDef) -> Iterator[MegatronField]:
    for statement, following in zip_longest(node.body, node.body[1:]):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        if statement.target.id.startswith("_"):
            continue
        text = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            text = " ".join(str(following.value.value).split())
        yield MegatronField(
            name=statement.target.id,
            annotation=ast.unparse(statement.annotation),
            help=text.split(". ")[0].rstrip("."),
            flags=_argument_names(statement.value),
        )


def _argument_names(value: ast.expr | None) -> tuple[str, ...]:
    """`field(metadata={"argparse_meta": {"arg_names": [...]}})`: the flags under which Megatron-LM serves a field.

    Nothing else is evaluated: what stands beside them may be computed.
    """
    dictionaries = (node for node in ast.walk(value) if isinstance(node, ast.Dict)) if value else ()
    pairs = (pair for node in dictionaries for pair in zip(node.keys, node.values, strict=True))
    names = (item for key, item in pairs if isinstance(key, ast.Constant) and key.value == "arg_names")
    return tuple(name for item in names for name in ast.literal_eval(item))


def known_flags(served: Iterable[str]) -> dict[str, str | None]:
    """Every flag that is known, with its dashes -> None if it is served, else why it is not.

    Besides Megatron-LM's own flags these are all fields of megatron-core's configuration classes, whatever its
    version: a field is served by a flag, or it is refused; there is no third state.
    """
    of_fields = {
        name: reason_of(name[2:]) or reason_of(field_name.replace("_", "-")) or FIELD_REASON
        for name, field_name in flags_of_fields()
    }
    refused = {f"--{name}": reason for name, reason in REASONS.items() if not name.endswith("*")}
    return of_fields | refused | dict.fromkeys(served)


def why_not_served(name: str, served: Collection[str]) -> str:
    """The error message for a Megatron flag that is not `served`, another library's flag, or an unknown one."""
    known = known_flags(served)
    if reason := known.get(name):
        return _refusal(name, reason)
    if advice := equivalent(name):
        return advice
    bare = name.lstrip("-")
    family = reason_of(bare) or reason_of(bare.removeprefix("no-"))
    if family and not nearest(name, served, TYPO):
        return _refusal(name, family)
    like = nearest(name, known, TYPO) or nearest(name, [*served, *EQUIVALENTS], NEAR)
    if like and (advice := equivalent(like)):  # a slip in another library's flag
        return f"{name} is not a known flag; {advice}"
    return not_known(name, like) if not like or known[like] is None else not_known(name, like, REFUSED_TOO)


def not_known(name: str, like: str | None, more: str = "") -> str:
    """The error message for a flag that nobody knows, with the one `like` it."""
    return f"{name} is not a known flag; {f'did you mean {like}{more}?' if like else '--help lists them.'}"


def nearest(name: str, others: Iterable[str], likeness: float = NEAR) -> str | None:
    """The only flag that begins with `name`, or else the one most like it, if it is at least so alike (0 to 1).

    Dashes in front do not count.
    """
    bare, flags = name.lstrip("-"), [other.lstrip("-") for other in others]
    longer = [flag for flag in flags if len(bare) >= MIN_BEGINNING and flag.startswith(f"{bare}-")]
    near = longer if len(longer) == 1 else get_close_matches(bare, flags, 1, likeness)
    return f"--{near[0]}" if near else None


def equivalent(flag: str) -> str | None:
    """What to tell about a flag (with its dashes) of Hugging Face's trainers; None if it is not one."""
    here = EQUIVALENTS.get(flag.lstrip("-").replace("_", "-"))
    return f"{flag} is a flag of Hugging Face's libraries; here it is {here}." if here else None


def reason_of(name: str) -> str | None:
    """Why Megatron-LM's flag `name` (no leading dashes) is not served; None if it is not known here."""
    beginnings = [start for start in FAMILIES if name.startswith(start)]
    return REASONS.get(name) or (FAMILIES[max(beginnings, key=len)] if beginnings else None)


def way_out(flag: str, reason: str | None) -> str | None:
    """What to do about a flag (with its dashes) that is not served, or not with its value; None: leave it out."""
    return TOLD["ways-out"].get(flag.lstrip("-")) or TOLD["ways-out-by-reason"].get(reason)


def _refusal(flag: str, reason: str) -> str:
    advice = way_out(flag, reason) or "remove it"
    return f"{flag} is a Megatron flag that megatron_peft does not support ({reason}); {advice}."
