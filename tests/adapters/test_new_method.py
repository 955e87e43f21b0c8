"""A method costs two files and one line: the one of docs/new-method.md trains alike at every layout, merges and
exports, from inside the package and from one of its own."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from megatron_peft.config import ConfigurationError, PeftConfig, config_from_dict, methods
from tests.adapters import plugin_runs
from tests.adapters.new_method_runs import LAYOUTS
from tests.ranks import run_ranks
from tests.test_plain_english import namesakes, public_things
from tests.time_limits import seconds

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "new-method.md").read_text()
FILES = dict(re.findall(r"`([\w/]+\.py)`:\n\n```python\n(.*?)```", PAGE, re.DOTALL))
(LINE,) = re.findall(r'^(    "[\w.]+:GAINS",)$', PAGE, re.MULTILINE)
(ENTRY_POINT,) = re.findall(r"^    (\[project.entry-points.*)\n", PAGE, re.MULTILINE)
DECLARATION, ADAPTER = FILES
SOURCE = FILES[DECLARATION]


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
    for name in ("megatron_peft", "pretrain_peft.py", "pyproject.toml"):
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


def test_it_keeps_the_rules_of_the_repository(tree):
    for command in (["check"], ["format", "--check"]):
        in_tree(tree, sys.executable, "-m", "ruff", *command, DECLARATION, ADAPTER)
    assert namesakes(tree / "megatron_peft") == []
    assert [node.name for _, node in public_things(tree / "megatron_peft") if not ast.get_docstring(node)] == []


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_trains_alike_at_every_layout(found, layout):
    alone, here = found["curves"]["alone"], found["curves"][layout]
    assert alone["losses"][-1] < alone["losses"][0] - 0.02
    np.testing.assert_allclose(here["losses"], alone["losses"], rtol=1e-5)
    np.testing.assert_allclose(here["grad_norms"], alone["grad_norms"], rtol=1e-4)


@pytest.mark.slow
def test_it_merges_and_exports(found):
    assert found["merged"] < 1e-4 and found["exported"] < 1e-4 < found["moved"]
    assert found["as lora"] < 1e-4


@pytest.mark.slow
def test_layouts_are_fitted_to_it_and_the_best_is_what_its_rehearsal_finds(tree, tmp_path):
    model, found = ROOT / "tests" / "examples" / "models" / "llama-3.1-8b", tmp_path / "fit.json"
    flags = "--fit --rehearsed 1 --world-size 1 --peft-method gains --bf16 --seq-length 512 --global-batch-size 8"
    words = [*flags.split(), "--pretrained-checkpoint", str(model), "--json", str(found)]
    in_tree(tree, sys.executable, "-m", "megatron_peft", "plan", *words, PYTHONPATH=str(tree))
    [fitted, *_], [rehearsed] = json.loads(found.read_text()).values()
    assert fitted["time"]["seconds"] == pytest.approx(rehearsed["time"]["seconds"], rel=0.01)
    peak = max(sum(rank["peak_bytes"]["step"].values()) for rank in rehearsed["ranks"])
    assert fitted["peak_bytes"] == pytest.approx(peak, rel=0.01)


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


def install(folder: Path, **declarations: str) -> Path:
    """A package beside ours, as pip leaves it: modules, and entry points in its metadata, `name = declaration`."""
    package, info = folder / "your_package", folder / "your_package-1.0.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").touch()
    for name, text in declarations.items():
        (package / f"{name}.py").write_text(text.replace("megatron_peft.adapters.gains", "your_package.adapter"))
    (package / "adapter.py").write_text(
        FILES[ADAPTER].replace("megatron_peft.config.methods.gains", f"your_package.{[*declarations][-1]}")
    )
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: your-package\nVersion: 1.0\n")
    points = [f"{name} = your_package.{name}:GAINS" for name in declarations]
    (info / "entry_points.txt").write_text("\n".join(["[megatron_peft.methods]", *points, ""]))
    return folder


@pytest.mark.slow
def test_a_package_of_its_own_announces_it(tmp_path):
    assert ENTRY_POINT == '[project.entry-points."megatron_peft.methods"]'
    found = train(ROOT, tmp_path, packages=install(tmp_path / "packages", gains=SOURCE))
    assert found["curves"]["alone"]["losses"][-1] < found["curves"]["alone"]["losses"][0] - 0.02
    assert found["merged"] < 1e-4 and found["exported"] < 1e-4 < found["moved"]


BROKEN = {
    "cannot be imported": ("import nowhere", "ModuleNotFoundError: No module named 'nowhere'"),
    "lacks the object": ("OTHER = 3", "AttributeError: "),
    "has a name of ours": (SOURCE.replace('name = "gains"', 'name = "lora"'), "there is a method lora already"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_package_that_cannot_be_loaded_raises_and_is_named(tmp_path, kind):
    text, raised = BROKEN[kind]
    path = os.pathsep.join([str(ROOT), str(install(tmp_path, broken=text))])
    command = [sys.executable, "-m", "megatron_peft", "train", "--help"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 1 and raised in done.stderr
    assert done.stderr.endswith("This is of the method broken of the installed package your-package.\n")


def test_a_typo_in_a_declaration_of_our_own_is_raised(monkeypatch):
    monkeypatch.setattr(methods, "BUILT_IN", (*methods.BUILT_IN, "megatron_peft.config.methods.low_rank:LORRA"))
    with pytest.raises(AttributeError, match="LORRA"):
        methods._load_methods()


def test_a_record_is_read_without_the_package_of_another_method(tmp_path):
    """And that of its own method names what is missing."""
    packages = install(tmp_path / "packages", gains=SOURCE)
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


# The page's method and two more, each a package of its own: one like DoRA (`dora/`), whose layers need norms of their
# changed weights once a step, and VeRA (`vera/`), whose layers share frozen matrices, and which trains a vector that
# every rank has whole.

PLUG_INS: dict[str, dict[str, Any]] = {
    "gains": {"method": "gains", "gains_lr_ratio": 10.0, "gains_bound": 0.8},
    "dora": {"method": "dora", "dora_rank": 4},
    "vera": {"method": "vera", "vera_rank": 4},
}


def asked(name: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The package as pip leaves it, and the method's settings."""
    if name == "gains":
        return install(folder / "packages", gains=SOURCE), PLUG_INS[name]
    info = folder / "packages" / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    point = f"{name} = tests.adapters.{name}.declaration:{name.upper()}"
    (info / "entry_points.txt").write_text(f"[megatron_peft.methods]\n{point}\n")
    return folder / "packages", PLUG_INS[name]


@pytest.mark.parametrize(
    ("name", "whole"), [("dora", "linear_fc2 adapter.m"), ("vera", "linear_fc1 adapter.d"), ("gains", None)]
)
def test_layers_at_tp2_are_those_of_one_rank(tmp_path, name, whole):
    (found,) = run_ranks(1, plugin_runs.layers_of_many_ranks, asked(name, tmp_path))
    assert whole is None or whole in found
    assert max(found.values()) < 1e-11, found


def test_what_layers_share_is_held_once(tmp_path):
    """A and B for the sizes of each of the four kinds of linear layers, in float32."""
    (found,) = run_ranks(1, plugin_runs.bytes_that_layers_share, asked("vera", tmp_path))
    assert found[0] - found[1] == 4 * 4 * sum((64 + 128, 64 + 64, 64 + 256, 128 + 64))


@pytest.fixture(scope="module")
def lives(tmp_path_factory) -> Callable[[str], dict[str, Any]]:
    """What became of a plug-in's run, made once."""

    @cache
    def life(name: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp(name)
        return run_ranks(1, plugin_runs.life, (*asked(name, folder), folder), limit=600)[0]

    return life


@pytest.mark.slow
@pytest.mark.parametrize("name", PLUG_INS)
def test_a_plug_in_trains_resumes_and_is_resharded(lives, name):
    found = lives(name)
    losses = found["losses"]
    assert len(losses) == plugin_runs.STEPS and losses[-1] != losses[0]
    assert found["resumed"] == losses
    np.testing.assert_allclose(found["resharded"], losses[plugin_runs.SAVED :], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLUG_INS)
def test_a_plug_in_merges_and_is_exported_as_lora(lives, name):
    found = lives(name)
    assert found["merged"] < 1e-4 and found["as lora"] < 1e-4 < found["moved"]


@pytest.mark.slow
@pytest.mark.parametrize("name", PLUG_INS)
def test_a_plug_in_is_planned(lives, name):
    found = lives(name)
    assert found["plan ended with"] == found["fit ended with"] == 0
    assert found["plan"]["order"] == "every rank's calls fit together"
    sizes = ((96, 200), (120, 96), (96, 320), (160, 96))  # input and output features of a layer's four
    count = {"gains": lambda i, o: i, "dora": lambda i, o: 4 * (i + o) + o, "vera": lambda i, o: 4 + o}[name]
    assert found["plan"]["parameters"]["trained"] == 2 * sum(count(*size) for size in sizes)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLUG_INS)
def test_what_fit_reckons_of_a_plug_in_is_what_a_rehearsal_finds(lives, name):
    (rehearsed,), layout = lives(name)["fit"]["rehearsed"], lives(name)["fit"]["layouts"][0]
    assert layout["time"]["seconds"] == pytest.approx(rehearsed["time"]["seconds"], rel=0.02)
    assert layout["peak_bytes"] == pytest.approx(rehearsed["peak_bytes"], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLUG_INS)
def test_a_plug_in_is_certified(tmp_path, name):
    (found,) = run_ranks(1, plugin_runs.certificates, asked(name, tmp_path), limit=900)
    for certificate in found:
        problems = {one.name: (one.problems, one.error) for one in certificate.comparisons if not one.passed}
        assert certificate.verdict == "CERTIFIED" and problems == {}, problems
        lines = {one.name: one for one in certificate.comparisons}
        assert lines["merged model in transformers"].num_compared and lines["trained tensors"].num_compared >= 8


def test_norms_are_computed_once_a_step(tmp_path):
    (found,) = run_ranks(1, plugin_runs.norms_of_a_step, (*asked("dora", tmp_path), tmp_path))
    computed, adapters = found
    assert computed == adapters == 4


@pytest.mark.slow
def test_vera_is_exported_as_hf_pefts_own(tmp_path):
    """The matrices that all layers share are there once."""
    (difference,) = run_ranks(1, plugin_runs.exported_alone, (*asked("vera", tmp_path), tmp_path), limit=600)
    assert difference < 1e-4
    tensors = load_file(tmp_path / "exported" / "adapter_model.safetensors")
    assert {name: (*tensors[name].shape,) for name in tensors if "lambda" not in name} == {
        "base_model.vera_A": (4, 160),
        "base_model.vera_B": (96, 4),
    }


@pytest.mark.slow
def test_gains_are_exported_as_hf_pefts_own(lives):
    assert lives("gains")["exported"] < 1e-4
