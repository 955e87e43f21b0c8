"""Fields of megatron-core's configuration classes, read from its source.

Importing those classes takes seconds, since torch and half of megatron-core come along; a wrong flag and `--help` are
answered from here at once. What is read (names, types, defaults, the docstring under a field) is what the dataclasses
themselves say: a test compares the two.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path

from megatron_peft.config import ConfigurationError

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

    @property
    def type_and_choices(self) -> tuple[type, tuple[str, ...] | None]:
        """`Optional[Literal['a', 'b']]` -> (str, ("a", "b")); `float` -> (float, None)."""
        return _type_and_choices(ast.parse(self.annotation, mode="eval").body)


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
        yield MegatronField(
            name=statement.target.id,
            annotation=ast.unparse(statement.annotation),
            help=_first_sentence(_docstring(following)),
            flags=_argument_names(statement.value),
        )


def _docstring(statement: ast.stmt | None) -> str:
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return str(statement.value.value)
    return ""


def _first_sentence(text: str) -> str:
    return " ".join(text.split()).split(". ")[0].rstrip(".")


def _argument_names(value: ast.expr | None) -> tuple[str, ...]:
    """`field(metadata={"argparse_meta": {"arg_names": [...]}})`: the flags under which Megatron-LM serves a field.

    Nothing else is evaluated: what stands beside them may be computed.
    """
    dictionaries = (node for node in ast.walk(value) if isinstance(node, ast.Dict)) if value else ()
    pairs = (pair for node in dictionaries for pair in zip(node.keys, node.values, strict=True))
    names = (item for key, item in pairs if isinstance(key, ast.Constant) and key.value == "arg_names")
    return tuple(name for item in names for name in ast.literal_eval(item))


def _type_and_choices(annotation: ast.expr) -> tuple[type, tuple[str, ...] | None]:
    simple = {"int": int, "float": float, "bool": bool, "str": str}
    if isinstance(annotation, ast.Name) and annotation.id in simple:
        return simple[annotation.id], None
    if isinstance(annotation, ast.BinOp):  # float | None
        return _type_and_choices(annotation.left)
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Optional":
        return _type_and_choices(annotation.slice)
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Literal":
        choices = ast.literal_eval(annotation.slice)
        return str, choices if isinstance(choices, tuple) else (choices,)
    raise TypeError(f"no flag can be made of a field of type {ast.unparse(annotation)}")
