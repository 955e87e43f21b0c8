"""Write what declarations say into the documents, so that no table of flags or methods is typed.

    tools/reference.py README.md docs/*.md

rewrites what stands between `<!-- flags: TITLE -->` and `<!-- end of flags -->` (the flags that --help lists under
this title; `all` for all titles), between `<!-- methods -->` and `<!-- end of methods -->`, and between
`<!-- scripts -->` and `<!-- end of scripts -->` (docs/megatron-scripts.toml). A test compares.
"""

import re
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_peft.cli.flags import GROUPS, TAKES_A_VALUE, Flag, served_flags
from megatron_peft.cli.parser import read_config
from megatron_peft.config import METHODS, ConfigurationError, PeftConfig

FLAGS = re.compile(r"(<!-- flags: ([^>]+) -->\n).*?(<!-- end of flags -->)", re.DOTALL)
SCRIPT_TABLES = re.compile(r"(<!-- scripts -->\n).*?(<!-- end of scripts -->)", re.DOTALL)
SCRIPTS = Path(__file__).parents[1] / "docs" / "megatron-scripts.toml"
REPOSITORY = "https://github.com/NVIDIA/Megatron-LM/blob"
METHOD_TABLE = re.compile(r"(<!-- methods -->\n).*?(<!-- end of methods -->)", re.DOTALL)


def filled(text: str) -> str:
    """The document with its marked places as the declarations have it."""
    text = FLAGS.sub(lambda place: f"{place[1]}{flag_tables(place[2])}{place[3]}", text)
    text = SCRIPT_TABLES.sub(lambda place: f"{place[1]}{script_tables()}{place[2]}", text)
    return METHOD_TABLE.sub(lambda place: f"{place[1]}{method_table()}{place[2]}", text)


def flag_tables(title: str) -> str:
    """Of one title, or of all."""
    if title == "all":
        return "\n".join(f"### {one[0].upper()}{one[1:]}\n\n{flag_tables(one)}" for one in GROUPS)
    rows = [
        (_spelled(one), _default(one), _cell(one.help), *_readers(one)) for one in served_flags() if one.group == title
    ]
    return table(("flag", "default", "meaning", *(["methods"] if title == "PEFT" else [])), rows)


def method_table() -> str:
    """The methods, and what they train."""
    rows = [(f"`{name}`", _cell(method.summary), _cell(method.cost)) for name, method in METHODS.items()]
    return table(("method", "weight of an adapted layer", "trained parameters of a layer, out x in"), rows)


def scripts() -> list[dict[str, Any]]:
    """Megatron-LM's scripts and what becomes of their flags."""
    return tomllib.loads(SCRIPTS.read_text())["script"]


def script_tables() -> str:
    """Counts by script, then the accepted flags and the refused ones with what is said."""
    served = {name: one for one in served_flags() for name in one.names}
    counted = ("served", "accepted", "refused")
    counts = [(_source(one), *(str(len(one[outcome])) for outcome in counted)) for one in scripts()]
    accepted = dict.fromkeys(flag for one in scripts() for flag in one["accepted"])
    reasons = [(f"`{flag}`", _cell(served[flag.split()[0]].help)) for flag in accepted]
    refused: dict[str, list[str]] = {}
    for flag in dict.fromkeys(flag for one in scripts() for flag in one["refused"]):
        refused.setdefault(_refusal(flag), []).append(f"`{flag.split()[0]}`")
    answers = [(", ".join(flags), _cell(answer)) for answer, flags in refused.items()]
    heads = (("script", *counted), ("accepted", "reason"), ("refused", "what is said"))
    return "\n".join(table(head, rows) for head, rows in zip(heads, (counts, reasons, answers), strict=True))


def _source(script: Mapping[str, Any]) -> str:
    link = f"[`{script['path']}`]({REPOSITORY}/{script['commit']}/{script['path']})"
    return f"{link}, {script['variant']}" if "variant" in script else link


def _refusal(flag: str) -> str:
    """What is told about a refused flag, after its name."""
    try:
        read_config(flag.split(), {})
    except ConfigurationError as error:
        return error.problems[0].partition(" ")[2]
    raise AssertionError("a run needs a model")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _spelled(one: Flag) -> str:
    name = one.names[0]
    if one.constant is not TAKES_A_VALUE:
        return f"`{name}`"
    value = "\\|".join(one.choices) if one.choices else one.metavar or {int: "N", float: "X", str: "TEXT"}[one.kind]
    return f"`{name} {value}{' ...' if one.many else ''}`"


def _default(one: Flag) -> str:
    shown = " ".join(map(str, one.default)) if one.many and one.default else one.default
    return "" if shown in (None, "", ()) else f"`{shown}`"


def _readers(one: Flag) -> Iterator[str]:
    """For a flag of PeftConfig: the methods that read it."""
    if one.group == "PEFT":
        configs = [PeftConfig(name, **fields) for name, method in METHODS.items() for fields in method.variants()]
        names = dict.fromkeys(peft.method for peft in configs if one.key in peft.spec.fields(peft))
        yield "all" if len(names) == len(METHODS) else ", ".join(names)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main(files: Sequence[str]) -> int:
    """Exit code 2, with the usage, where a word is no file."""
    if not files or not all(Path(name).is_file() for name in files):
        print(__doc__, file=sys.stdout if {"--help", "-h"} & set(files) else sys.stderr)
        return 0 if {"--help", "-h"} & set(files) else 2
    for path in map(Path, files):
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
