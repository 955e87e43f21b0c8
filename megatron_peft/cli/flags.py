"""The flags that are served: a flag for each field of our dataclasses, and those of Megatron-LM in served.toml.

Nothing here parses. `served_flags()` is the whole list; `megatron_peft.cli.parser` turns it into a parser.
"""

import tomllib
import typing
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

from megatron_peft.cli.launch import LaunchConfig
from megatron_peft.cli.megatron import megatron_fields
from megatron_peft.config import METHODS, SECTIONS, flag, option
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
    constant: Any = TAKES_A_VALUE
    default: Any = None
    metavar: str | None = None
    required: bool = False
    section: str = ""  # of a configuration file
    checks_choices: bool = True

    @property
    def takes_value(self) -> bool:
        return self.constant is TAKES_A_VALUE


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
CONFIG = Flag(("--config",), "program", "config", _FILES, GROUP_OF["program"], many=True, metavar="FILE")


def served_flags() -> tuple[Flag, ...]:
    """Every flag that is served, in the order of `GROUPS`."""
    classes = {"program": ProgramSettings, **SECTIONS, "launch": LaunchConfig}
    of_fields = [served for section, config_class in classes.items() for served in flags_of(config_class, section)]
    every = [CONFIG, *of_fields, *_megatrons_flags()]
    return tuple(sorted(every, key=lambda served: GROUPS.index(served.group)))


def flags_of(config_class: type, section: str = "") -> Iterator[Flag]:
    """A flag for each field of a dataclass that is an option. A name without dashes is a word.

    Args:
        section: of a configuration file; empty for a command's own settings.
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
