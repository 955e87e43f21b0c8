"""Only its own files know a method: all others ask its declaration. Everything here reads source, runs none."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from megatron_peft.config import METHODS
from tests.test_imports import PACKAGE, imported_names, parsed

ADAPTERS = {spec.adapter for spec in METHODS.values() if spec.adapter}
SHARED = {"megatron_peft.adapters.rotation", "megatron_peft.config.methods.rotation"}  # of BOFT, uRNN and the Hybrid
DECLARATIONS = {type(spec).__module__ for spec in METHODS.values()} - {"megatron_peft.config.methods"}
OWN_MODULES = ADAPTERS | DECLARATIONS | SHARED
NAMES = set(METHODS) - {"full"}  # a word of other things too
KNOW_ALL = ("megatron_peft.benchmarks",)  # a figure for each method

# File -> what it knows of methods, and why it has to.
KNOWS = {
    "adapters.hybrid": {"adapters.low_rank", "adapters.boft", "adapters.urnn", "boft", "urnn"},  # it is made of them
    "config.methods.hybrid": {"config.methods.low_rank", "boft", "urnn"},
    "config.methods.rotation": {"hybrid"},  # help of --peft-lr-rotation, which it reads otherwise
    "config.methods": {"lora", "hybrid"},  # the registry, and the default
    "adapters.change": {"adapters.rotation"},  # R W without R - I in memory
    "lora_ga.initialize": {"adapters.low_rank", "lora"},  # the start of A and B; the method that needs no such start
    "training.update": {"adapters.low_rank"},  # --lora-max-norm-ratio bounds every method's low rank
    "conversion.peft_export": {"adapters.low_rank"},  # whatever was trained is written as a LoRA
    "conversion.model_card": {"lora"},  # a tag of the Hub
    "conversion.peft_import": {"adapters.low_rank", "adapters.boft", "lora", "boft"},  # reads Hugging Face PEFT's
    "serving.llama_cpp_script": {"lora"},  # a field of a request to its server
    "experiment.report": NAMES,  # the paper's tables
}


def classes_of(module: str) -> set[str]:
    """Those that a module defines."""
    return {node.name for node in parsed()[module].body if isinstance(node, ast.ClassDef)}


CLASSES = set().union(*map(classes_of, OWN_MODULES)) - {"Hybrid"}  # a word of other things too
WORDS = re.compile(rf"(?<![\w-])({'|'.join(sorted(NAMES))})(?![\w-])")


def docstrings(tree: ast.AST) -> Iterator[ast.AST]:
    """Texts that stand alone as a statement."""
    return (node.value for node in ast.walk(tree) if isinstance(node, ast.Expr))


def known_methods(tree: ast.AST) -> set[str]:
    """Methods' modules that the code imports, and methods' names and classes in its texts."""
    names = {name for full in imported_names(ast.walk(tree)) for name in (full, full.rpartition(".")[0])}
    modules = {name.removeprefix("megatron_peft.") for name in names & OWN_MODULES}
    prose = {id(node) for node in docstrings(tree)}
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in prose)
    texts = [str(node.value) for node in constants]
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    return modules | {word for text in texts for word in WORDS.findall(text)} | CLASSES.intersection(texts) - defined


def of_its_own(module: str) -> set[str]:
    """What a method's module may know: the other module, the name, its own classes and what rotations share."""
    mine = {spec.name: {spec.adapter, type(spec).__module__} for spec in METHODS.values()}
    mine = {name: modules for name, modules in mine.items() if module in modules}
    modules = (one.removeprefix("megatron_peft.") for one in SHARED.union(*mine.values()))
    return {*modules, *mine, *classes_of(module)} if module in OWN_MODULES else set()


def test_no_code_but_a_methods_own_knows_it() -> None:
    others = {name: tree for name, tree in parsed().items() if not name.startswith(KNOW_ALL)}
    known = {name: known_methods(tree) - of_its_own(name) for name, tree in others.items()}
    assert {name.removeprefix("megatron_peft."): found for name, found in known.items() if found} == KNOWS


def test_no_script_knows_a_method() -> None:
    root = PACKAGE.parent
    scripts: list[Path] = [root / "pretrain_peft.py", *(root / "tools").glob("*.py")]
    known = {str(path.relative_to(root)): known_methods(ast.parse(path.read_text())) for path in scripts}
    del known["tools/kept.py"]  # beside ours it measures each method's formula in torch's operations
    assert {name: found for name, found in known.items() if found} == {
        "tools/headlines.py": NAMES,  # the paper's methods side by side
        "tools/published.py": {"lora"},  # what a published run trained
        "tools/hf_peft.py": {"lora"},  # another library's, beside ours
        "tools/widths.py": {"lora", "lora-ga"},  # whose rates it compares
    }


SEEN = {
    "import megatron_peft.adapters.boft as b": {"adapters.boft"},
    "def f():\n    from megatron_peft.adapters import urnn": {"adapters.urnn"},
    "from megatron_peft.adapters.rotation import BlockRotation": {"adapters.rotation"},
    "from megatron_peft.config.methods.hybrid import HYBRID": {"config.methods.hybrid"},
    "import_module('megatron_peft.adapters.boft')": {"boft"},
    "rates = [('lora-ga', 2e-3)]": {"lora-ga"},
    "is_one = type(adapter).__name__ == 'BlockRotation'": {"BlockRotation"},
    "message = f'{x} has none; hybrid has.'": {"hybrid"},
    "match method:\n    case 'urnn': pass": {"urnn"},
    "def f(method='lora'): ...": {"lora"},
    "'''What lora does.'''\nflag = '--lora-rank of hybrid-attention, xlora'": set(),
}


def test_what_code_knows_is_seen() -> None:
    assert {source: known_methods(ast.parse(source)) for source in SEEN} == SEEN
