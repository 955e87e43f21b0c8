"""Imports point one way, and a few things are done in one place only. Everything here reads source, runs none."""

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megatron_peft"
SHAPELESS_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}

# Which rooms a room may import from, from the ground up; docs/architecture.md draws it.
SHARED = {"config", "runtime", "parallel", "adapters", "models"}  # what most rooms stand on
ALLOWED: Mapping[str, set[str]] = {
    "config": set(),
    "runtime": {"config"},
    "parallel": {"config", "runtime"},
    "adapters": {"config", "runtime", "parallel"},
    "lora_ga": {"config", "runtime", "parallel", "adapters"},
    "models": {"config", "runtime", "parallel", "adapters"},
    "cli": {"config", "models"},
    "checkpoint": SHARED,
    "conversion": SHARED | {"checkpoint"},
    "serving": {"config", "runtime", "parallel", "models", "checkpoint", "conversion"},
    "data": {"config", "runtime", "checkpoint"},
    "tasks": {"config", "checkpoint", "data"},
    "training": SHARED | {"lora_ga", "checkpoint", "conversion", "serving", "data"},
    "evaluation": SHARED | {"cli", "checkpoint", "conversion", "serving", "tasks", "data"},
    "experiment": {"config", "models", "cli", "checkpoint", "training"},  # what a run would need, and what it wrote
    "demo": {"config", "runtime", "models", "cli"}
    | {"checkpoint", "data", "tasks", "training", "evaluation", "experiment"},
    "rehearsal": SHARED | {"checkpoint", "data", "training"},
    "certify": SHARED | {"checkpoint", "conversion", "serving", "data", "training", "rehearsal"},
    "plan": {"config", "runtime", "models", "training", "rehearsal"},
    "": {"config", "runtime", "training"},  # the package's public names, imported at their first use
    "__main__": {"commands"},
}
ROOMS = {*ALLOWED} - {"", "__main__"}
ALLOWED = {**ALLOWED, "benchmarks": ROOMS}  # they measure all of it
ALLOWED = {**ALLOWED, "commands": {*ROOMS, "benchmarks"} - {"adapters", "checkpoint", "lora_ga", "parallel"}}


# Calls that open or parse what others have written, and the modules that may make them. All else asks `untrusted`.
OPENERS = {
    *("json.load", "json.loads", "json.JSONDecoder", "yaml.load", "yaml.safe_load", "gzip.open", "gzip.decompress"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load", "numpy.load", "np.load"),
    *("safe_open", "load_file", "safetensors.torch.load_file", "safetensors.safe_open"),
}
MAY_OPEN: Mapping[str, set[str]] = {
    "config.untrusted": {"json.JSONDecoder", "yaml.load", "gzip.open"},
    "conversion.hf_files": {"safe_open", "torch.load"},  # weights, their pickles with weights_only
    # Other people's checkpoints, inertly.
    "checkpoint.safe_pickle": {"torch.load", "pickle.Unpickler"},
    "conversion.megatron_files": {"pickle.Unpickler"},  # descriptions of tensors; no name but those of a list
    "tasks.readers": {"gzip.open"},  # within a wheel
    "evaluation.sandbox_driver": {"json.load", "json.loads"},  # a script of its own: a job, and answers
    "runtime.ranks": {"pickle.loads"},  # what our own processes have written
    "experiment.report": {"json.loads"},  # a file of the package
    "plan.timing": {"json.loads"},  # another
    "serving.engine": {"json.loads"},  # what our script has written
    "serving.vllm_script": {"json.loads", "load_file"},  # and what it was asked
    "serving.llama_cpp_script": {"json.loads", "safe_open"},  # and the adapters that it converts
    "benchmarks.inference": {"json.loads"},  # a value that was written a moment ago
    "benchmarks.files": {"safe_open"},  # the yardstick is the library alone
}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def nodes_run_at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node outside functions and outside `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(tree):
        for_checkers = isinstance(child, ast.If) and ast.unparse(child.test).rpartition(".")[2] == "TYPE_CHECKING"
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not for_checkers:
            yield child
            yield from nodes_run_at_import(child)


def imported_names(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """`import a.b` gives a.b; `from a import b` gives a.b, be b a module or not; a relative import gives `.`."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            yield from (f"{start}.{alias.name}" for alias in node.names)


def imported_roots(*trees: ast.AST) -> set[str]:
    """Top-level names of what the trees import, anywhere in them."""
    return {full.partition(".")[0] for tree in trees for full in imported_names(ast.walk(tree))}


def imported_modules(nodes: Iterator[ast.AST], known: Mapping[str, ast.Module]) -> set[str]:
    """The package's own modules among the imports."""
    candidates = {name for full in imported_names(nodes) for name in (full, full.rpartition(".")[0])}
    return candidates & known.keys()


def part(module: str) -> str:
    """`megatron_peft.adapters.attach` -> `adapters`; the package itself -> ''."""
    return (module.split(".") + [""])[1]


def upward_arrows(modules: Mapping[str, ast.Module]) -> list[str]:
    """Imports that the table of layers does not allow, lazy ones and those for type checkers included."""
    arrows = []
    for module, tree in modules.items():
        for target in imported_modules(ast.walk(tree), modules):
            source_part, target_part = part(module), part(target)
            if target_part and source_part != target_part and target_part not in ALLOWED.get(source_part, set()):
                arrows.append(f"{module} imports {target}")
    return sorted(arrows)


def import_cycle(modules: Mapping[str, ast.Module]) -> list[str]:
    """The modules of one import cycle, or nothing."""
    graph = {name: imported_modules(nodes_run_at_import(tree), modules) for name, tree in modules.items()}
    for name, imported in graph.items():  # packages that it lies in come before it, always, and hold no code of ours
        graph[name] = {one for one in imported if not f"{name}.".startswith(f"{one}.")}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def patched_attributes(tree: ast.Module) -> list[str]:
    """Assignments to attributes of modules or classes of megatron-core and torch; torch.backends is for settings."""
    origins = dict(pair for node in ast.walk(tree) for pair in names_bound(node))
    patched = []
    for text in assigned_attributes(tree):
        root, _, rest = text.partition(".")
        full = f"{origins.get(root, '')}.{rest}"
        if full.startswith(("megatron.", "torch.")) and not full.startswith("torch.backends."):
            patched.append(text)
    return patched


def names_bound(node: ast.AST) -> Iterator[tuple[str, str]]:
    """What an import statement binds: (local name, what it stands for)."""
    if isinstance(node, ast.ImportFrom):
        yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)
    elif isinstance(node, ast.Import):
        for alias in node.names:
            root = alias.name.partition(".")[0]
            yield (alias.asname, alias.name) if alias.asname else (root, root)


def assigned_attributes(tree: ast.Module) -> Iterator[str]:
    """`a.b = x` and `setattr(a, "b", x)`, both as 'a.b'."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            yield from (ast.unparse(target) for target in node.targets if isinstance(target, ast.Attribute))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
            yield f"{ast.unparse(node.args[0])}.{ast.unparse(node.args[1])}"


def unsafe_loads(tree: ast.Module) -> list[str]:
    """Calls of torch.load that may run code from the file."""
    calls = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call for call in calls if call.startswith("torch.load(") and "weights_only=True" not in call]


def openers(tree: ast.Module) -> set[str]:
    """Those of OPENERS that are called, or inherited from."""
    used = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    bases = (base for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for base in node.bases)
    return {ast.unparse(one) for one in (*used, *bases)} & OPENERS


@cache
def parsed() -> dict[str, ast.Module]:
    """Module name -> syntax tree, for every file of the package."""
    return {module_name(path): ast.parse(path.read_text(), str(path)) for path in PACKAGE.rglob("*.py")}


@pytest.fixture
def modules() -> dict[str, ast.Module]:
    return parsed()


def test_rooms_import_what_the_table_draws_one_way_and_without_a_cycle(modules: dict[str, ast.Module]) -> None:
    imported = {name: imported_modules(ast.walk(tree), modules) for name, tree in modules.items()}
    drawn = {(part(name), part(to)) for name, targets in imported.items() for to in targets}
    assert {part(name) for name in modules} - {""} <= ALLOWED.keys()
    assert {(room, to) for room, rooms in ALLOWED.items() for to in rooms if room != "benchmarks"} <= drawn
    assert upward_arrows(modules) == [] and import_cycle(modules) == []
    relative = {name for name, tree in modules.items() for full in imported_names(ast.walk(tree)) if full[0] == "."}
    assert relative == set(), "the walk above follows absolute imports only"


def test_a_name_is_imported_from_where_it_is_defined_or_from_its_rooms_front(modules: dict[str, ast.Module]) -> None:
    bound = {name: {local for node in tree.body for local, _ in names_bound(node)} for name, tree in modules.items()}
    places = (full.rpartition(".") for tree in modules.values() for full in imported_names(ast.walk(tree)))
    passed_on = {(place, name) for place, _, name in places if name in bound.get(place, ())}
    fronts = {name.rpartition(".")[0] for name in modules}
    found = {one for one in passed_on if one[0] not in fronts}
    assert found == {("megatron_peft.cli.command", "ArgumentParser")}, "argparse is known to cli alone"


def test_a_few_things_are_done_in_one_place_only(modules: dict[str, ast.Module]) -> None:
    assert [name for name in modules if name.rpartition(".")[2] in SHAPELESS_NAMES] == []
    users = {name for name, tree in modules.items() if "argparse" in imported_roots(tree)}
    assert users == {"megatron_peft.cli.parser", "megatron_peft.cli.command"}
    patches = {name: found for name, tree in modules.items() if (found := patched_attributes(tree))}
    assert patches.keys() <= {"megatron_peft.runtime.cpu", "megatron_peft.runtime.fake_ranks"}, patches


def test_files_of_others_are_opened_by_the_modules_that_know_how(modules: dict[str, ast.Module]) -> None:
    assert [call for tree in modules.values() for call in unsafe_loads(tree)] == [], "it may run code of a file"
    found = {name.removeprefix("megatron_peft."): openers(tree) for name, tree in modules.items()}
    assert {name: calls for name, calls in found.items() if calls} == MAY_OPEN


FABRICATED = {
    "megatron_peft.runtime.cpu": "def late():\n    from megatron_peft.models import llama\n",
    "megatron_peft.models": "",
    "megatron_peft.models.llama": "from megatron_peft.models import attention\n",
    "megatron_peft.models.attention": "import megatron_peft.models.llama\n",
}


def test_walk_finds_an_upward_arrow_in_a_function_and_a_cycle() -> None:
    found = {name: ast.parse(text) for name, text in FABRICATED.items()}
    assert "megatron_peft.runtime.cpu imports megatron_peft.models.llama" in upward_arrows(found)
    assert set(import_cycle(found)) == {"megatron_peft.models.llama", "megatron_peft.models.attention"}


PATCHES = (
    "import torch\ntorch.cuda.synchronize = print",
    "import torch.cuda as cuda\ncuda.synchronize = print",
    "from torch import cuda\ncuda.synchronize = print",
    "import torch\ntorch.zeros = print",
    "import torch\nsetattr(torch.Tensor, 'cuda', print)",
    "from megatron.core import parallel_state as p\np.get_rank = print",
    "from megatron.core.transformer.mlp import MLP\nMLP.forward = print",
)


def test_walk_finds_patches_unsafe_loads_and_who_opens_a_file() -> None:
    assert [len(patched_attributes(ast.parse(source))) for source in PATCHES] == [1] * len(PATCHES)
    assert not patched_attributes(ast.parse("import torch\nself.weight = torch.zeros(1)\nparam.main_grad = None"))
    text = "import json\nclass A(pickle.Unpickler): ...\ndef f(): return json.loads('1'), json.dumps(1)"
    assert openers(ast.parse(text)) == {"json.loads", "pickle.Unpickler"}
    unsafe = ["torch.load(f)", "torch.load(f, weights_only=False)", "torch.load(f, None, p)"]
    assert unsafe_loads(ast.parse("\n".join([*unsafe, "torch.load(f, mmap=True, weights_only=True)"]))) == unsafe
