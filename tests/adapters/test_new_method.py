"""A method costs two files and one line: that of docs/new-method.md, two more, and packages that cannot be loaded."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from safetensors.torch import load_file

from megatron_peft.config import ConfigurationError, PeftConfig, config_from_dict, methods
from tests.adapters import plugin_runs
from tests.ranks import run_ranks
from tests.time_limits import seconds

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "new-method.md").read_text()
FILES = dict(re.findall(r"`([\w/]+\.py)`:\n\n```python\n(.*?)```", PAGE, re.DOTALL))
(LINE,) = re.findall(r'^(    "[\w.]+:GAINS",)$', PAGE, re.MULTILINE)
(ENTRY_POINT,) = re.findall(r"^    (\[project.entry-points.*)\n", PAGE, re.MULTILINE)
DECLARATION, ADAPTER = FILES
ADAPTERS_OWN = {"build", "change", "merge", "rotation"}  # names that every adapter's module defines
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
SOURCE = FILES[DECLARATION]

# The page's method and two more, each a package of its own: one like DoRA (`dora/`), whose layers need norms of their
# changed weights once a step, and VeRA (`vera/`), whose layers share frozen matrices, and which trains a vector that
# every rank has whole.
PLUG_INS: dict[str, dict[str, Any]] = {
    "gains": {"method": "gains", "gains_lr_ratio": 10.0, "gains_bound": 0.8},
    "dora": {"method": "dora", "dora_rank": 4},
    "vera": {"method": "vera", "vera_rank": 4},
}


def run(*command: str, path: Path = ROOT, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        **{"cwd": cwd, "env": os.environ | {"PYTHONPATH": os.pathsep.join(dict.fromkeys([str(path), str(cwd)]))}},
        **{"capture_output": True, "text": True, "timeout": seconds(300)},
    )


# In the package itself.


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the package with the page's two files and its line."""
    tree = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / "megatron_peft", tree / "megatron_peft", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pretrain_peft.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tree)
    for name, text in FILES.items():
        with (tree / name).open("x") as file:
            file.write(text)
    registry = tree / "megatron_peft/config/methods/__init__.py"
    before, end, after = registry.read_text().partition(':HYBRID",\n')
    registry.write_text(f"{before}{end}{LINE}\n{after}")
    return tree


def test_it_keeps_the_rules_of_the_repository(tree):
    for command in (["check"], ["format", "--check"]):
        done = run("-m", "ruff", *command, DECLARATION, ADAPTER, cwd=tree)
        assert done.returncode == 0, done.stdout
    things = [node for text in FILES.values() for node in ast.parse(text).body if isinstance(node, Definition)]
    assert things and all(map(ast.get_docstring, things))
    package = "".join(path.read_text() for path in (ROOT / "megatron_peft").rglob("*.py"))
    taken = {*re.findall(r"^(?:class|def) (\w+)", package, re.MULTILINE)} - ADAPTERS_OWN
    assert not taken & {node.name for node in things}


def test_its_flags_are_in_the_help_and_checked(tree):
    told = run("pretrain_peft.py", "--help", path=tree, cwd=tree).stdout
    assert "hybrid,gains}" in told and "--gains-lr-ratio X" in told
    bad = "--peft-method gains --gains-bound 1.5 --gains-lr-ratio 0"
    done = run("pretrain_peft.py", *bad.split(), path=tree, cwd=tree)
    assert done.returncode == 2 and "--gains-bound is 1.5; above 1" in done.stderr
    assert "--gains-lr-ratio is 0.0; it must be above 0." in done.stderr


def test_a_typo_in_a_declaration_of_our_own_is_raised(monkeypatch):
    monkeypatch.setattr(methods, "BUILT_IN", (*methods.BUILT_IN, "megatron_peft.config.methods.low_rank:LORRA"))
    with pytest.raises(AttributeError, match="LORRA"):
        methods._load_methods()


# From packages of their own.


def install(folder: Path, **declarations: str) -> Path:
    """A package beside ours, as pip leaves it: modules, and entry points in its metadata, `name = declaration`."""
    package = folder / "your_package"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    for name, text in declarations.items():
        (package / f"{name}.py").write_text(text.replace("megatron_peft.adapters.gains", "your_package.adapter"))
    (package / "adapter.py").write_text(
        FILES[ADAPTER].replace("megatron_peft.config.methods.gains", f"your_package.{[*declarations][-1]}")
    )
    announce(folder, "your-package", *(f"{name} = your_package.{name}:GAINS" for name in declarations))
    return folder


def announce(folder: Path, package: str, *points: str) -> None:
    """The metadata of a package with these entry points."""
    info = folder / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("\n".join(["[megatron_peft.methods]", *points, ""]))


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    folder = install(tmp_path_factory.mktemp("packages") / "installed", gains=SOURCE)
    for name in ("dora", "vera"):
        announce(folder, name, f"{name} = tests.adapters.{name}.declaration:{name.upper()}")
    return folder


BROKEN = {
    "cannot be imported": ("import nowhere", ModuleNotFoundError, "No module named 'nowhere'"),
    "lacks the object": ("OTHER = 3", AttributeError, "GAINS"),
    "has a name of ours": (
        SOURCE.replace('name = "gains"', 'name = "lora"'),
        ConfigurationError,
        "there is a method lora already",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_package_that_cannot_be_loaded_raises_and_is_named(tmp_path, monkeypatch, kind):
    text, error, told = BROKEN[kind]
    monkeypatch.syspath_prepend(install(tmp_path, broken=text))
    with mock.patch.dict(sys.modules), pytest.raises(error, match=told) as raised:
        methods._load_methods()
    notes = getattr(raised.value, "__notes__", [])
    assert notes == ["This is of the method broken of the installed package your-package."]


def test_a_record_is_read_without_the_package_of_another_method(packages):
    """And that of its own method names what is missing."""
    assert ENTRY_POINT == '[project.entry-points."megatron_peft.methods"]'
    write = (
        "import json; "
        "from megatron_peft.config import DataConfig as D, ModelConfig as M, ParallelConfig as P, RunConfig, "
        "PeftConfig, TrainingConfig as T, config_to_dict\n"
        "for method in ('lora', 'gains'): "
        "print(json.dumps(config_to_dict(RunConfig(P(), M('m'), PeftConfig(method), D(), T()))))"
    )
    lora, gains = map(json.loads, run("-c", write, path=packages).stdout.splitlines())
    assert not any("gains" in name for name in lora["peft"]) and gains["peft"]["gains_bound"] == 0.9
    assert config_from_dict(lora).peft == PeftConfig("lora")
    with pytest.raises(ConfigurationError, match="--peft-method gains is not one of full, lora"):
        config_from_dict(gains)


@pytest.fixture(scope="module")
def seen(packages, tmp_path_factory) -> dict[str, Any]:
    """What one process sees that has all of them."""
    return run_ranks(1, plugin_runs.see, (packages, PLUG_INS, tmp_path_factory.mktemp("seen")), afresh=True)[0]


@pytest.mark.parametrize(
    ("name", "whole"), [("dora", "linear_fc2 adapter.m"), ("vera", "linear_fc1 adapter.d"), ("gains", None)]
)
def test_layers_at_tp2_are_those_of_one_rank(seen, name, whole):
    found = seen["layers"][name]
    assert whole is None or whole in found
    assert max(found.values()) < 1e-11, found


def test_what_layers_share_is_held_once(seen):
    """A and B for the sizes of each of the four kinds of linear layers, in float32."""
    assert seen["vera's bytes"] - seen["lora's bytes"] == 4 * 4 * sum((64 + 128, 64 + 64, 64 + 256, 128 + 64))


def test_norms_are_computed_once_a_step(seen):
    assert seen["norms"] == seen["adapters"] == 4


@pytest.fixture(scope="module", params=PLUG_INS)
def life(request, packages, tmp_path_factory) -> tuple[str, dict[str, Any]]:
    """A plug-in's name, and what became of its run."""
    asked = packages, PLUG_INS[request.param], tmp_path_factory.mktemp(request.param)
    return request.param, run_ranks(1, plugin_runs.life, asked, limit=600, afresh=True)[0]


@pytest.mark.slow
def test_a_plug_in_trains_resumes_and_is_resharded(life):
    _, found = life
    losses = found["losses"]
    assert len(losses) == plugin_runs.STEPS and losses[-1] != losses[0]
    assert found["resumed"] == losses
    np.testing.assert_allclose(found["resharded"], losses[plugin_runs.SAVED :], rtol=1e-5)


@pytest.mark.slow
def test_a_plug_in_merges_and_is_exported(life):
    """As a LoRA, and in HF PEFT's own format where it has one."""
    name, found = life
    assert found["merged"] < 1e-4 and found["as lora"] < 1e-4 < found["moved"]
    assert name != "gains" or found["exported"] < 1e-4


@pytest.mark.slow
def test_a_plug_in_is_planned_and_what_fit_reckons_is_what_a_rehearsal_finds(life):
    name, found = life
    assert found["plan ended with"] == found["fit ended with"] == 0
    assert found["plan"]["order"] == "every rank's calls fit together"
    sizes = ((96, 200), (120, 96), (96, 320), (160, 96))  # input and output features of a layer's four
    count = {"gains": lambda i, o: i, "dora": lambda i, o: 4 * (i + o) + o, "vera": lambda i, o: 4 + o}[name]
    assert found["plan"]["parameters"]["trained"] == 2 * sum(count(*size) for size in sizes)
    (rehearsed,), layout = found["fit"]["rehearsed"], found["fit"]["layouts"][0]
    assert layout["time"]["seconds"] == pytest.approx(rehearsed["time"]["seconds"], rel=0.02)
    assert layout["peak_bytes"] == pytest.approx(rehearsed["peak_bytes"], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLUG_INS)
def test_a_plug_in_is_certified(packages, name):
    (found,) = run_ranks(1, plugin_runs.certificates, (packages, PLUG_INS[name]), limit=900, afresh=True)
    for certificate in found:
        problems = {one.name: (one.problems, one.error) for one in certificate.comparisons if not one.passed}
        assert certificate.verdict == "CERTIFIED" and problems == {}, problems
        lines = {one.name: one for one in certificate.comparisons}
        assert lines["merged model in transformers"].num_compared and lines["trained tensors"].num_compared >= 8


@pytest.mark.slow
def test_vera_is_exported_as_hf_pefts_own(packages, tmp_path):
    """The matrices that all layers share are there once."""
    (difference,) = run_ranks(
        1, plugin_runs.exported_alone, (packages, PLUG_INS["vera"], tmp_path), limit=600, afresh=True
    )
    assert difference < 1e-4
    tensors = load_file(tmp_path / "exported" / "adapter_model.safetensors")
    assert {name: (*tensors[name].shape,) for name in tensors if "lambda" not in name} == {
        "base_model.vera_A": (4, 160),
        "base_model.vera_B": (96, 4),
    }
