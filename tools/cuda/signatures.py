"""Whether the calls into Transformer Engine fit the signatures of its releases, though none is installed.

    python -m tools.cuda.signatures --write

takes the wheel of every release from the package index and reads it as text. It then runs those functions of
megatron-core's `extensions/transformer_engine.py` that our models use (norms, core attention, rope, SwiGLU and loss)
with stand-ins that note their arguments, and binds these to the signatures. `signatures.toml` has the outcome; without
--write the program compares and exits with code 1 if something differs or does not bind.
"""

import argparse
import ast
import builtins
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import util
from inspect import Parameter, Signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import MagicMock

from packaging.version import Version

from tools.cuda.index import files, releases

TABLE = Path(__file__).with_name("signatures.toml")
EXTENSION = "megatron/core/extensions/transformer_engine.py"
PACKING = "megatron/core/packed_seq_params.py"
FIRST_RELEASE = "2.4"
CORES = ("0.16.1", "0.19.2")  # of megatron-core: the versions that the tests were run with
BLOCKS = (ast.If, ast.Try)
OUR_NORM = ("config", "hidden_size", "eps")  # how models/gpt.py builds a norm, and megatron-core's layers too
# What our layer spec and flags reach of the extension.
USED = {
    "_get_extra_te_kwargs",
    "TENorm",
    "TEActivationOp",
    "TEDotProductAttention",
    "fused_apply_rotary_pos_emb",
    "fused_apply_rotary_pos_emb_thd",
    "te_parallel_cross_entropy",
}


# --- What is called


@dataclass(frozen=True)
class Call:
    """A call of something of Transformer Engine: its dotted name, and the arguments by number and by keyword."""

    name: str
    num_positional: int
    keywords: tuple[str, ...]

    def __str__(self) -> str:
        return ", ".join([*["*"] * self.num_positional, *(f"{keyword}=" for keyword in self.keywords)])


@dataclass
class StandIns:
    """Modules and classes of Transformer Engine of one release; calls of them are noted."""

    release: Version
    calls: list[Call] = field(default_factory=list)

    def module(self, name: str) -> Any:
        """Attributes starting with a small letter are modules, unless megatron-core calls them."""
        stand_ins = self

        class Module:
            def __getattr__(self, attribute: str) -> Any:
                inner = f"{name}.{attribute}"
                is_module = attribute in ("pytorch", "ops", "attention", "rope", "cross_entropy")
                return stand_ins.module(inner) if is_module else stand_ins.callable(inner)

        return Module()

    def callable(self, name: str) -> Any:
        """A class whose construction is the call; `forward` of an object is another."""

        def note(suffix: str) -> Callable[..., None]:
            return lambda self, *args, **kwargs: self.stand_ins.calls.append(
                Call(name + suffix, len(args), tuple(sorted(kwargs)))
            )

        return type(name, (), {"stand_ins": self, "__init__": note(""), "forward": note(".forward")})

    def import_(self, name: str, globals_: Any, locals_: Any, names: Any = (), level: int = 0) -> Any:
        """In place of the import statement."""
        if name.partition(".")[0] == "transformer_engine":
            return self.module(name)
        return MagicMock() if name.partition(".")[0] in ("megatron", "torch") else builtins.__import__(name)

    def at_least(self, version: str, check_equality: bool = True) -> bool:
        """megatron-core's `is_te_min_version`."""
        return self.release >= Version(version) if check_equality else self.release > Version(version)


class Settings(SimpleNamespace):
    """A TransformerConfig as our models make it. What is not named here is off."""

    OURS: ClassVar[dict[str, Any]] = {
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": "silu",
        "softmax_type": "vanilla",
        "context_parallel_size": 1,
        "apply_query_key_layer_scaling": False,
        "num_query_groups": 2,
        "num_attention_heads": 4,
    }

    def __getattr__(self, name: str) -> Any:
        return self.OURS.get(name)


def calls(sources: Mapping[str, str], release: Version) -> list[Call]:
    """What megatron-core passes to this release of Transformer Engine when it runs a model of ours.

    Args:
        sources: of megatron-core, at least EXTENSION and PACKING.
    """
    stand_ins = StandIns(release)
    core = _executed(sources, stand_ins)
    packing = core["PackedSeqParams"](qkv_format="thd")
    for norm in ("RMSNorm", "LayerNorm"):
        core["TENorm"](config=Settings(normalization=norm), hidden_size=8, eps=1e-5)
    core["TEActivationOp"](config=Settings())
    attention = core["TEDotProductAttention"](Settings(), 1, MagicMock(), "self", pg_collection=MagicMock())
    for packed in (None, packing):
        attention.forward(*"qkv", None, attn_mask_type=MagicMock(), attention_bias=None, packed_seq_params=packed)
    core["fused_apply_rotary_pos_emb"]("t", "freqs", interleaved=False)
    core["fused_apply_rotary_pos_emb_thd"]("t", "cu_seqlens", "freqs", cp_size=1, cp_rank=0)
    core["te_parallel_cross_entropy"]("logits", "labels", "group", False)
    return stand_ins.calls


def _executed(sources: Mapping[str, str], stand_ins: StandIns) -> dict[str, Any]:
    """The statements of megatron-core that define what we use, executed."""
    names: dict[str, Any] = {
        "__builtins__": {**vars(builtins), "__import__": stand_ins.import_},
        "__name__": __name__,  # dataclasses looks it up
        "te": stand_ins.module("transformer_engine"),
        "HAVE_TE": True,
        "F": SimpleNamespace(silu="silu", gelu="gelu"),
        "is_te_min_version": stand_ins.at_least,
        "get_te_version": lambda: stand_ins.release,
        "PkgVersion": Version,
        "is_layer_window_attention": lambda *_: False,
        "Tensor": SimpleNamespace,  # a type for isinstance
        "get_cuda_rng_tracker": MagicMock(),
    }
    packing, extension = (_parsed(sources[path]) for path in (PACKING, EXTENSION))
    imports = [node for node in extension.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    for node in [*packing.body, *imports, *(node for node in extension.body if _defines(node, USED))]:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            taken = {alias.asname or alias.name for alias in node.names} & names.keys()
            if taken or getattr(node, "module", "") == "__future__":
                continue
        _run(node, names)
    return names


@cache
def _parsed(text: str) -> ast.Module:
    return ast.parse(text)


def _run(node: ast.stmt, names: dict[str, Any]) -> None:
    import __future__

    flags = __future__.annotations.compiler_flag  # no annotation is evaluated
    exec(compile(ast.Module([node], []), EXTENSION, "exec", flags, dont_inherit=True), names)


def _defines(statement: ast.stmt, names: set[str]) -> bool:
    definitions = (node for node in ast.walk(statement) if isinstance(node, (ast.ClassDef, ast.FunctionDef)))
    return any(node.name in names for node in definitions)


# --- What is declared


@dataclass(frozen=True)
class Declarations:
    """A release of Transformer Engine as text.

    Args:
        sources: by path in the wheel.
    """

    sources: Mapping[str, str]
    _trees: dict[str, ast.Module] = field(default_factory=dict)

    def problem(self, call: Call) -> str:
        """Why the call does not bind, or ""."""
        name, is_forward = call.name.removesuffix(".forward"), call.name.endswith(".forward")
        found = self._find(*name.rsplit(".", 1))
        if found is None:
            return "is not there"
        module, node = found
        try:
            method = "forward" if is_forward else "__init__"
            self._bind(module, node, method, call.num_positional, dict.fromkeys(call.keywords))
        except TypeError as error:
            return str(error)
        return ""

    def _bind(self, module: str, node: ast.stmt, method: str, num_positional: int, keywords: dict[str, None]) -> None:
        """Raises TypeError if the arguments do not fit the function, or this method of the class."""
        if isinstance(node, ast.FunctionDef):
            signature_of(node).bind(*[None] * num_positional, **keywords)
        elif isinstance(node, ast.ClassDef):
            if declared := _method(node, method):
                signature = signature_of(declared, skip_first=True)
                bound = signature.bind(*[None] * num_positional, **keywords)
                rest = next((p.name for p in signature.parameters.values() if p.kind is Parameter.VAR_KEYWORD), "")
                self._bind_rest(module, node, method, bound.arguments.get(rest, {}))
            else:
                bind = lambda module, node: self._bind(module, node, method, num_positional, keywords)  # noqa: E731
                self._bind_base(module, node, bind)

    def _bind_rest(self, module: str, node: ast.ClassDef, method: str, keywords: dict[str, None]) -> None:
        """What **kwargs took must be taken by the same method of the base class, which is given the rest by name."""
        if not keywords:
            return

        def bind(module: str, base: ast.ClassDef) -> None:
            declared = _method(base, method)
            if declared is None:
                self._bind_rest(module, base, method, keywords)
                return
            signature = signature_of(declared, skip_first=True)
            signature.bind_partial(**keywords)
            names = signature.parameters.keys()
            if any(p.kind is Parameter.VAR_KEYWORD for p in signature.parameters.values()):
                self._bind_rest(module, base, method, {name: None for name in keywords if name not in names})

        self._bind_base(module, node, bind)

    def _bind_base(self, module: str, node: ast.ClassDef, bind: Callable[[str, ast.ClassDef], None]) -> None:
        for base in node.bases:
            found = self._find(module, base.id) if isinstance(base, ast.Name) else None
            if found and isinstance(found[1], ast.ClassDef):
                return bind(found[0], found[1])
        raise TypeError(f"the base of {node.name} is of another package")

    def _find(self, module: str, name: str) -> tuple[str, ast.stmt] | None:
        """Where a class or function is defined that `module` has under this name."""
        path = next((p for p in self._paths(module) if p in self.sources), None)
        if path is None:
            return None
        package = module if path.endswith("__init__.py") else module.rpartition(".")[0]
        for node in self._names_of(path):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
                return module, node
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
                return self._applied(module, node.value)
            if isinstance(node, ast.ImportFrom):
                parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                source = ".".join([*parents, *([node.module] if node.module else [])])
                names = (
                    alias.name for alias in node.names if alias.name == "*" or (alias.asname or alias.name) == name
                )
                for imported in names:
                    found = source != module and self._find(source, name if imported == "*" else imported)
                    if found:
                        return found
        return None

    def _applied(self, module: str, value: ast.expr) -> tuple[str, ast.stmt] | None:
        """`name = X.apply` of an autograd function: X.forward without ctx."""
        if not (isinstance(value, ast.Attribute) and value.attr == "apply" and isinstance(value.value, ast.Name)):
            return None
        found = self._find(module, value.value.id)
        forward = _method(found[1], "forward") if found and isinstance(found[1], ast.ClassDef) else None
        if forward is None:
            return None
        plain = ast.parse(ast.unparse(forward)).body[0]
        assert isinstance(plain, ast.FunctionDef)
        del plain.args.args[0]
        return module, plain

    def _names_of(self, path: str) -> Iterator[ast.stmt]:
        """Statements that may give a module a name: its own, and those within its if and try."""
        if path not in self._trees:
            self._trees[path] = ast.parse(self.sources[path])
        waiting: list[Any] = list(self._trees[path].body)
        while waiting:
            node = waiting.pop(0)
            yield node
            waiting += [*getattr(node, "body", []), *getattr(node, "orelse", [])] if isinstance(node, BLOCKS) else []

    @staticmethod
    def _paths(module: str) -> Iterator[str]:
        yield module.replace(".", "/") + ".py"
        yield module.replace(".", "/") + "/__init__.py"


def _method(node: ast.ClassDef, name: str) -> ast.FunctionDef | None:
    return next((f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == name), None)


def signature_of(function: ast.FunctionDef, skip_first: bool = False) -> Signature:
    """Of a function that is only text; defaults are None."""
    args = function.args
    positional = [*((a, Parameter.POSITIONAL_ONLY) for a in args.posonlyargs)]
    positional += [(a, Parameter.POSITIONAL_OR_KEYWORD) for a in args.args]
    num_required = len(positional) - len(args.defaults)
    parameters = [
        Parameter(a.arg, kind, default=Parameter.empty if i < num_required else None)
        for i, (a, kind) in enumerate(positional)
    ][int(skip_first) :]
    if args.vararg:
        parameters.append(Parameter(args.vararg.arg, Parameter.VAR_POSITIONAL))
    for argument, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        kept = Parameter.empty if default is None else None
        parameters.append(Parameter(argument.arg, Parameter.KEYWORD_ONLY, default=kept))
    if args.kwarg:
        parameters.append(Parameter(args.kwarg.arg, Parameter.VAR_KEYWORD))
    return Signature(parameters)


# --- The table


def our_imports(root: Path) -> set[str]:
    """Names that our package takes from megatron-core's extension."""
    module = EXTENSION.removesuffix(".py").replace("/", ".")
    texts = (path.read_text(encoding="utf-8") for path in (root / "megatron_peft").rglob("*.py"))
    trees = (ast.parse(text) for text in texts if module in text)
    imports = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
    return {alias.name for node in imports if node.module == module for alias in node.names}


def our_problem(core: Mapping[str, str]) -> str:
    """Why megatron-core's TENorm does not take what `models/gpt.py` gives it, or "".

    Args:
        core: the sources of megatron-core.
    """
    norm = next(n for n in _parsed(core[EXTENSION]).body if isinstance(n, ast.ClassDef) and n.name == "TENorm")
    constructor = _method(norm, "__new__")
    assert constructor is not None
    try:
        signature_of(constructor, skip_first=True).bind(**dict.fromkeys(OUR_NORM))
    except TypeError as error:
        return str(error)
    return ""


def table(releases_: Mapping[Version, Mapping[str, str]], cores: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """What signatures.toml holds, from the sources of all releases.

    Returns:
        `calls`: per version of megatron-core, each callable with the forms in which it is called, over all releases;
        `binds`: per version and release, each callable with "" or why a call does not bind.
    """
    outcome: dict[str, Any] = {"calls": {}, "binds": {}}
    declared = {release: Declarations(sources) for release, sources in releases_.items()}
    for core, core_sources in cores.items():
        forms: dict[str, dict[str, None]] = {}
        rows = {}
        for release, declarations in declared.items():
            problems: dict[str, str] = {}
            for call in calls(core_sources, release):
                forms.setdefault(call.name, {})[str(call)] = None
                problem = declarations.problem(call)
                problems[call.name] = problems.get(call.name) or problem
            rows[str(release)] = problems
        outcome["calls"][core] = {name: list(form) for name, form in forms.items()}
        outcome["binds"][core] = rows
    return outcome


def as_toml(outcome: Mapping[str, Any]) -> str:
    """The table, a line for each release."""
    program = "python -m tools.cuda.signatures --write"
    lines = [f"# Written by `{program}`. A call that does not bind has a reason, not true."]
    for core, forms in outcome["calls"].items():
        lines += ["", f'[calls."{core}"] # of megatron-core {core}: positional arguments are stars']
        lines += [f'"{name}" = [{", ".join(map(_quoted, form))}]' for name, form in forms.items()]
    for core, rows in outcome["binds"].items():
        lines += ["", f'[binds."{core}"]']
        for release, problems in rows.items():
            cells = (f'"{name}" = {_quoted(problem) if problem else "true"}' for name, problem in problems.items())
            lines.append(f'"{release}" = {{ {", ".join(cells)} }}')
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", '"') + "'"


def installed_core() -> dict[str, str]:
    """Sources of the megatron-core that is installed, without an import of it."""
    found = util.find_spec("megatron")
    folders = list(found.submodule_search_locations or []) if found else []
    root = next(Path(folder).parent for folder in folders if (Path(folder).parent / EXTENSION).is_file())
    return {path: (root / path).read_text(encoding="utf-8") for path in (EXTENSION, PACKING)}


def _core_from_index(version: str) -> dict[str, str]:
    wheels = (file for file in files("megatron-core") if str(file.version) == version and file.tags)
    return next(wheels).sources()


def main() -> int:
    """Read the releases, bind, and write or compare the table."""
    parser = argparse.ArgumentParser(prog="python -m tools.cuda.signatures", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write signatures.toml instead of comparing with it")
    arguments = parser.parse_args()
    cores = {version: _core_from_index(version) for version in CORES}
    engines = {file.version: file.sources() for file in releases("transformer-engine", FIRST_RELEASE)}
    text = as_toml(table(engines, cores))
    if arguments.write:
        TABLE.write_text(text, encoding="utf-8")
    binds = tomllib.loads(text)["binds"]
    bad = [
        f"megatron-core {core}, Transformer Engine {release}: {name} {why}"
        for core, rows in binds.items()
        for release, cells in rows.items()
        for name, why in cells.items()
        if why is not True
    ]
    bad += [f"megatron-core {core}: TENorm {why}" for core in cores if (why := our_problem(cores[core]))]
    num_cells = sum(len(cells) for rows in binds.values() for cells in rows.values())
    print(f"{len(engines)} releases, {min(engines)} to {max(engines)}; {num_cells - len(bad)} of {num_cells} bind")
    print("\n".join(bad))
    is_same = TABLE.read_text(encoding="utf-8") == text
    if not is_same:
        print(f"{TABLE.name} differs: run with --write.")
    return int(bool(bad) or not is_same)


if __name__ == "__main__":
    sys.exit(main())
