"""Text for users, comments and names are plain English: phrases and words that a Megatron user would have to guess are
not there."""

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path

from tests.test_documentation import PAGES, ROOT, page_id

CODE = [*(ROOT / "megatron_peft").rglob("*.py"), *(ROOT / "tools").glob("*.py"), ROOT / "pretrain_peft.py"]
# What stood there once -> what is written instead.
PHRASES = {
    r"exclude (one another|each other)": "are mutually exclusive",
    r"belongs? to no flag": "unexpected argument",
    r"look by the host": "no host-device sync",
    r"call the answer": "returns a function that waits and returns the result",
    r"\bfor who\b": "consumers ...",
    r"turns? (a|the) direction around": "has an eigenvalue of -1",
    r"that the frozen base's \d+ lack": "one more collective than the frozen base",
    r"\bwho needs (it|y|the)\b": "consumers ...",
    r"\bmade again\b|\bmake again\b": "recomputed",
    r"by the host\b|has? the host wait|the host looks": "host-device sync",
    r"\bexclude each the other": "are mutually exclusive",
    r"\bthe crew\b|\ba stretch of\b|is a stretch\b|\bthe stretch\b": "dispatcher; shard",
    r"slip of the pen": "typo",
    r"\btakes? (it|them) away\b": "removes",
    r"\bis no section\b": "is not a section",
    r"\bwhat will be trained\b": "what a run trains on",
    r"\bends a step on\b": "updates ... at the end of a step",
    r"\bmakes texts\b|` a text\b": "string",
}
WORDS = set(
    "askedmodel crew dismiss slot slots stretch stretches companion companions piece pieces region regions".split()
)
WORDS |= {"box", "boxes", "fold", "folds", "folded"}  # as a part of a name
NAMES = {"here", "order", "say", "part", "parts", "starts", "make_again", "made_again"}  # as a name


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def in_one_line(text: str) -> str:
    """Without line ends and marks of comments, which may cut a phrase."""
    return re.sub(r"\s*\n\s*#?\s*", " ", text)


def test_phrases_are_plain() -> None:
    texts = {page_id(path): in_one_line(path.read_text()) for path in (*PAGES, *CODE)}
    found = [
        (name, phrase, said)
        for name, text in texts.items()
        for phrase, said in PHRASES.items()
        if re.search(phrase, text, re.IGNORECASE)
    ]
    assert found == []


def odd(name: str) -> bool:
    """Whether a name of a class, function or module has one of the words in it."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.replace("SentencePiece", "Sentencepiece")).lower().strip("_")
    return words in NAMES or bool(set(words.split("_")) & WORDS) or "asked_model" in words


CONVENTIONS = {"main", "add_arguments", "run"}  # of programs and commands
ADAPTERS_OWN = {"build", "change", "merge", "rotation"}  # what the module of every adapter has
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def test_names_are_the_fields_own() -> None:
    trees = {page_id(path): tree_of(path) for path in CODE}
    defined = [
        (file, node.name) for file, tree in trees.items() for node in ast.walk(tree) if isinstance(node, Definition)
    ]
    assert [(file, name) for file, name in (*defined, *((file, Path(file).stem) for file in trees)) if odd(name)] == []


def public_things(package: Path) -> list[tuple[Path, Definition]]:
    """Classes and functions at the top of the package's modules."""
    trees = ((path, tree_of(path).body) for path in sorted(package.rglob("*.py")))
    things = ((path, node) for path, tree in trees for node in tree if isinstance(node, Definition))
    return [(path, node) for path, node in things if not node.name.startswith("_")]


def namesakes(package: Path) -> list[str]:
    """Names of several classes or functions of the package."""
    named = ((path.parent.name, node.name) for path, node in public_things(package) if node.name not in CONVENTIONS)
    names = Counter(name for room, name in named if not (room == "adapters" and name in ADAPTERS_OWN))
    return [name for name, count in names.items() if count > 1]


def test_one_name_is_one_thing_and_has_a_docstring() -> None:
    assert namesakes(ROOT / "megatron_peft") == []
    things = public_things(ROOT / "megatron_peft")
    assert [f"{path.name}: {node.name}" for path, node in things if not ast.get_docstring(node)] == []


def test_namesakes_and_what_has_no_docstring_are_found(tmp_path: Path) -> None:
    for room in ("data", "adapters"):
        (tmp_path / room).mkdir()
        text = "def read(): ...\ndef build(): ...\ndef main(): ...\nclass _Own: ...\n"
        (tmp_path / room / f"{room}.py").write_text(text)
    assert namesakes(tmp_path) == ["read"]
    assert [node.name for _, node in public_things(tmp_path)] == ["read", "build", "main"] * 2


def test_odd_names_and_phrases_across_lines_are_seen() -> None:
    assert all(map(odd, ("Crew", "make_crew", "StoredBox", "fold_if_due", "say", "_parts")))
    assert not any(map(odd, ("Sandbox", "SampleOrder", "part_of", "read_folder", "RankDispatcher")))
    assert re.search("exclude one another", in_one_line("# --a and --b exclude\n    # one another."))
