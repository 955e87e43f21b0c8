"""The flags that are served: one for each field of our dataclasses, and those of Megatron-LM in served.toml; the
messages about Megatron's other flags.

`served_flags()` is the whole list; `megatron_peft.cli.parser` builds an argparse parser of it, and `Flag.read` turns
the words of one flag, typed or out of a file, into its value.
"""

import tomllib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from functools import cache
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
    """Return every flag that is served, in the order of `GROUPS`."""
    classes = {"program": ProgramSettings, **SECTIONS, "launch": LaunchConfig}
    of_fields = [served for section, config_class in classes.items() for served in flags_of(config_class, section)]
    every = [CONFIG, *of_fields, *_megatrons_flags()]
    return tuple(sorted(every, key=lambda served: GROUPS.index(served.group)))


def flags_of(config_class: type, section: str = "") -> Iterator[Flag]:
    """Yield a flag for each field of a dataclass that is an option. A name without dashes is a positional argument.

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
    """Yield flags of Megatron-LM: for fields of megatron-core's, for its spelled-out names, and without effect here."""
    kinds = {"kind": {kind.__name__: kind for kind in (str, int, float)}.get, "choices": tuple}
    for target in ("shape", "config", "transformer", "nothing"):
        for name, declared in MEGATRONS[target].items():
            settings = {"group": GROUP_OF[target], "section": "" if target == "nothing" else "model"}
            settings |= {"key": name.replace("-", "_"), **declared}
            for each in kinds.keys() & declared.keys():
                settings[each] = kinds[each](declared[each])
            yield Flag((f"--{name}",), target, **settings)


# A Megatron flag is refused by name, with the reason and the way out; a flag of Hugging Face's trainers gets what
# stands for it here, and any other the nearest flag. refused.toml has the words. With those in served.toml it names
# every field of megatron-core's configuration classes: a test compares.

TYPO, NEAR = 0.85, 0.6  # likeness to a flag: a slip of the finger; worth asking about
MIN_BEGINNING = 6  # letters of a flag's beginning that are not there by chance
REFUSED_TOO = ", a Megatron flag that is not supported"
TOLD = tomllib.loads(Path(__file__).with_name("refused.toml").read_text(encoding="utf-8"))
REASONS = {name: reason for reason, names in TOLD["reasons"].items() for name in names.split()}
FAMILIES = {name[:-1]: reason for name, reason in REASONS.items() if name.endswith("*")}
EQUIVALENTS = {name: here for here, names in TOLD["equivalents"].items() for name in names.split()}


def why_not_served(name: str, served: Collection[str]) -> str:
    """Return the message for a Megatron flag that is not `served`, another library's flag, or an unknown one."""
    bare = name.lstrip("-")
    if reason := REASONS.get(bare):
        return _refusal(name, reason)
    if advice := equivalent(name):
        return advice
    reasons = (reason_of(bare.removeprefix(start)) for start in ("", "no-", "disable-"))
    if (reason := next(filter(None, reasons), None)) and not nearest(name, served, TYPO):
        return _refusal(name, reason)
    refused = [f"--{each}" for each in REASONS if not each.endswith("*")]
    like = nearest(name, [*served, *refused], TYPO) or nearest(name, [*served, *EQUIVALENTS], NEAR)
    if like and (advice := equivalent(like)):  # a slip in another library's flag
        return f"{name} is not a known flag; {advice}"
    return not_known(name, like, REFUSED_TOO if like in refused else "")


def not_known(name: str, like: str | None, more: str = "") -> str:
    """Return the message for an unknown flag, with the one `like` it."""
    return f"{name} is not a known flag; {f'did you mean {like}{more}?' if like else '--help lists them.'}"


def nearest(name: str, others: Iterable[str], likeness: float = NEAR) -> str | None:
    """Return the only flag that begins with `name`, or else the one most like it, at least so alike (0 to 1).

    Dashes in front do not count.
    """
    bare, flags = name.lstrip("-"), [other.lstrip("-") for other in others]
    longer = [flag for flag in flags if len(bare) >= MIN_BEGINNING and flag.startswith(f"{bare}-")]
    near = longer if len(longer) == 1 else get_close_matches(bare, flags, 1, likeness)
    return f"--{near[0]}" if near else None


def equivalent(flag: str) -> str | None:
    """Return the answer to a flag (with its dashes) of Hugging Face's trainers; None if it is not one."""
    here = EQUIVALENTS.get(flag.lstrip("-").replace("_", "-"))
    return f"{flag} is a flag of Hugging Face's libraries; here it is {here}." if here else None


def reason_of(name: str) -> str | None:
    """Return why Megatron-LM's flag `name` (no leading dashes) is not served; None if it is not known here."""
    beginnings = [start for start in FAMILIES if name.startswith(start)]
    return REASONS.get(name) or (FAMILIES[max(beginnings, key=len)] if beginnings else None)


def way_out(flag: str, reason: str | None) -> str | None:
    """Return a hint about a flag (with its dashes) that is not served, or not with its value; None: leave it out."""
    return TOLD["ways-out"].get(flag.lstrip("-")) or TOLD["ways-out-by-reason"].get(reason)


def _refusal(flag: str, reason: str) -> str:
    advice = way_out(flag, reason) or "remove it"
    return f"{flag} is a Megatron flag that megatron_peft does not support ({reason}); {advice}."
