"""Fields of megatron-core's configuration classes, read from its source.

Importing those classes takes seconds, since torch and half of megatron-core come along; a wrong flag and `--help` are
answered from here at once. What is read (names, types, the docstring under a field, Megatron-LM's own flags for it) is
what the dataclasses themselves say: a test compares the two.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path

from megatron_peft.config import ConfigurationError, flag

# Class -> (file below megatron/core, classes in it and in its bases' files whose fields it has).
SOURCES = {
    "TransformerConfig": ("model_parallel_config.py", "transformer/transformer_config.py"),
    "OptimizerConfig": ("optimizer/optimizer_config.py",),
    "DistributedDataParallelConfig": ("distributed/distributed_data_parallel_config.py",),
}
BASES = {"TransformerConfig": ("ModelParallelConfig",)}


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
