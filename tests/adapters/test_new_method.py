"""A method costs two files and one line: the one of docs/new-method.md trains alike at every layout, merges and
exports, from inside the package and from one of its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_peft.config import ConfigurationError, PeftConfig, config_from_dict
from tests.adapters.new_method_runs import LAYOUTS
from tests.time_limits import seconds

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "new-method.md").read_text()
FILES = dict(re.findall(r"`([\w/]+\.py)`:\n\n```python\n(.*?)```", PAGE, re.DOTALL))
(LINE,) = re.findall(r'^(    "[\w.]+:GAINS",)$', PAGE, re.MULTILINE)
(ENTRY_POINT,) = re.findall(r"^    (\[project.entry-points.*)\n", PAGE, re.MULTILINE)
DECLARATION, ADAPTER = FILES


def in_tree(tree: Path, *command: str, **environ: str) -> str:
    """What a command prints whose package is the one in `tree`."""
    done = subprocess.run(
        command, cwd=tree, capture_output=True, text=True, env=os.environ | environ, timeout=seconds(300)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def train(tree: Path, folder: Path, *layouts: str, packages: Path | None = None) -> dict[str, Any]:
    path = os.pathsep.join(map(str, [tree, *([packages] if packages else [])]))
    program = "tests.adapters.new_method_runs"
    return json.loads(in_tree(tree, sys.executable, "-m", program, str(folder), *layouts, PYTHONPATH=path))


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A repository of the package in which the page's files and line are a change."""
    tree = tmp_path_factory.mktemp("tree")
    git = ("git", "-c", "user.name=n", "-c", "user.email=e")
    in_tree(tree, *git, "init", "-q")
    for name in ("megatron_peft", "pretrain_peft.py"):
        in_tree(tree, "cp", "-r", str(ROOT / name), ".")
    (tree / "tests").symlink_to(ROOT / "tests")
    (tree / ".gitignore").write_text("__pycache__\n")
    in_tree(tree, *git, "add", "-A")
    in_tree(tree, *git, "commit", "-qm", "before")
    for name, text in FILES.items():
        (tree / name).write_text(text)
    registry = tree / "megatron_peft/config/methods/__init__.py"
    before, end, after = registry.read_text().partition(':HYBRID",\n')
    registry.write_text(f"{before}{end}{LINE}\n{after}")
    in_tree(tree, *git, "add", "-A")
    return tree


@pytest.fixture(scope="module")
def found(tree, tmp_path_factory) -> dict[str, Any]:
    return train(tree, tmp_path_factory.mktemp("runs"), *LAYOUTS)


def test_it_is_two_new_files_and_one_line(tree):
    stat = in_tree(tree, "git", "diff", "--cached", "--numstat")
    changed = {line.split("\t")[2]: line.split("\t")[:2] for line in stat.splitlines()}
    assert changed.keys() == {DECLARATION, ADAPTER, "megatron_peft/config/methods/__init__.py"}
    assert changed["megatron_peft/config/methods/__init__.py"] == ["1", "0"]
    assert "new file mode" in in_tree(tree, "git", "diff", "--cached", "--", DECLARATION)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_trains_alike_at_every_layout(found, layout):
    alone, here = found["curves"]["alone"], found["curves"][layout]
    assert alone["losses"][-1] < alone["losses"][0] - 0.02
    np.testing.assert_allclose(here["losses"], alone["losses"], rtol=1e-5)
    np.testing.assert_allclose(here["grad_norms"], alone["grad_norms"], rtol=1e-4)


def test_it_merges_and_exports(found):
    assert found["merged"] < 1e-4 and found["exported"] < 1e-4 < found["moved"]
    assert found["as lora"] < 1e-4


def test_its_flags_are_in_the_help_and_checked(tree):
    told = in_tree(tree, sys.executable, "pretrain_peft.py", "--help", PYTHONPATH=str(tree))
    assert "hybrid,gains}" in told and "--gains-lr-ratio X" in told
    bad = "--peft-method gains --gains-bound 1.5 --gains-lr-ratio 0"
    done = subprocess.run(
        [sys.executable, "pretrain_peft.py", *bad.split()],
        **{"cwd": tree, "env": os.environ | {"PYTHONPATH": str(tree)}, "capture_output": True, "text": True},
    )
    assert done.returncode == 2 and "--gains-bound is 1.5; above 1" in done.stderr
    assert "--gains-lr-ratio is 0.0; it must be above 0." in done.stderr


def install(folder: Path, declaration: str = FILES[DECLARATION]) -> Path:
    """A package beside ours, as pip leaves it: modules, and the entry point in its metadata."""
    package, info = folder / "your_package", folder / "your_package-1.0.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").touch()
    (package / "declaration.py").write_text(declaration.replace("megatron_peft.adapters.gains", "your_package.adapter"))
    (package / "adapter.py").write_text(FILES[ADAPTER])
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: your-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[megatron_peft.methods]\ngains = your_package.declaration:GAINS\n")
    return folder


@pytest.mark.slow
def test_a_package_of_its_own_announces_it(tmp_path):
    assert ENTRY_POINT == '[project.entry-points."megatron_peft.methods"]'
    found = train(ROOT, tmp_path, packages=install(tmp_path / "packages"))
    assert found["curves"]["alone"]["losses"][-1] < found["curves"]["alone"]["losses"][0] - 0.02
    assert found["merged"] < 1e-4 and found["exported"] < 1e-4 < found["moved"]


SOURCE = FILES[DECLARATION]
PLAIN_FIELD = re.sub(r"(gains_bound: float = )option\(.*\)", r"\g<1>0.9", SOURCE)
BASES = "from megatron_peft.config.methods.low_rank import LoraGaOptions\n"
BASES += "from megatron_peft.config.methods.urnn import UrnnOptions\n"
OTHER_ORDER = BASES + SOURCE.replace("GainsOptions(PeftOptions)", "GainsOptions(LoraGaOptions, UrnnOptions)")
NO_DATACLASS = SOURCE.replace("@dataclass(frozen=True)\nclass GainsOptions(PeftOptions)", "class GainsOptions")
BROKEN = {
    "cannot be imported": ("import nowhere", "No module named 'nowhere'"),
    "another object": ("GAINS = 3", "declares 3, which is not a Method"),
    "a name twice": (SOURCE.replace('name = "gains"', 'name = "lora"'), "so has megatron_peft.config.methods.low_rank"),
    "a plain field": (PLAIN_FIELD, "its field gains_bound is not declared with option()"),
    "another's field": (SOURCE.replace("gains_lr_ratio: float", "lora_rank: int"), "its field lora_rank is one of"),
    "the run's field": (SOURCE.replace("gains_lr_ratio: float", "seed: int"), "its field seed is one of another"),
    "no dataclass": (NO_DATACLASS, "is not a dataclass derived from PeftOptions"),
    "another order": (OTHER_ORDER, "its options cannot be combined with those of other methods"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_package_that_cannot_be_used_is_an_error_only_for_its_method(tmp_path, kind):
    declaration, reason = BROKEN[kind]
    packages = install(tmp_path / "packages", declaration)
    program = """
from megatron_peft.config import ConfigurationError, PeftConfig
print(PeftConfig("boft").lora_rank, PeftConfig("boft").method)
try:
    PeftConfig(METHOD)
except ConfigurationError as error:
    print(error)
""".replace("METHOD", repr("lora" if kind == "a name twice" else "gains"))
    told = in_tree(ROOT, sys.executable, "-c", program, PYTHONPATH=os.pathsep.join([str(ROOT), str(packages)]))
    assert (
        told.startswith("16 boft\n--peft-method ") and "cannot be used: the installed package your-package has" in told
    )
    assert reason in told


def test_a_record_is_read_without_the_package_of_another_method(tmp_path):
    """And that of its own method names what is missing."""
    packages = install(tmp_path / "packages")
    write = (
        "import json; "
        "from megatron_peft.config import DataConfig as D, ModelConfig as M, ParallelConfig as P, RunConfig, "
        "PeftConfig, TrainingConfig as T, config_to_dict\n"
        "for method in ('lora', 'gains'): "
        "print(json.dumps(config_to_dict(RunConfig(P(), M('m'), PeftConfig(method), D(), T()))))"
    )
    path = os.pathsep.join([str(ROOT), str(packages)])
    lora, gains = map(json.loads, in_tree(ROOT, sys.executable, "-c", write, PYTHONPATH=path).splitlines())
    assert not any("gains" in name for name in lora["peft"]) and gains["peft"]["gains_bound"] == 0.9
    assert config_from_dict(lora).peft == PeftConfig("lora")
    with pytest.raises(ConfigurationError, match="--peft-method gains is not one of full, lora"):
        config_from_dict(gains)
