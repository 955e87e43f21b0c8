"""The metadata says what the code needs: no dependency is missing or unused, and only some programs need extras."""

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from megatron_peft.cli.launch import LOADING
from megatron_peft.commands import certify, demo, evaluate, report
from megatron_peft.config import ConfigurationError
from megatron_peft.demo import scoring
from tests.test_imports import imported_modules, imported_names, imported_roots, nodes_run_at_import, parsed, part

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

DISTRIBUTIONS = {"megatron": "megatron-core", "yaml": "pyyaml"}  # where a distribution is not named like its module
OPTIONAL = {"transformer_engine", "apex", "wandb"}  # imported where they are installed, each with another way out
PATH = "/usr/local/bin:/usr/bin:/bin"
IGNORES = (".gitignore", ".dockerignore")
FOR_TESTS = {"pytest"}  # check-gpu runs tests


def distribution_name(requirement: str) -> str:
    """`megatron-core>=0.16.1,<0.20` -> `megatron-core`."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match, requirement
    return match.group().lower()


DEPENDENCIES = {distribution_name(requirement) for requirement in PROJECT["dependencies"]}
EXTRAS = {
    name: {distribution_name(requirement) for requirement in requirements}
    for name, requirements in PROJECT["optional-dependencies"].items()
}
PROGRAM_EXTRAS = EXTRAS["eval"] | EXTRAS["report"] | EXTRAS["demo"] | EXTRAS["peft"]
SCRIPTS = [*(ROOT / "tools").glob("*.py"), ROOT / "pretrain_peft.py"]


@cache
def imported_distributions() -> set[str]:
    roots = imported_roots(*parsed().values(), *(ast.parse(path.read_text()) for path in SCRIPTS))
    roots -= {*sys.stdlib_module_names, "megatron_peft", "pretrain_peft", "tools", *OPTIONAL, *FOR_TESTS}
    return {DISTRIBUTIONS.get(root, root).lower().replace("_", "-") for root in roots}


def test_every_import_is_a_declared_dependency_and_the_other_way_round() -> None:
    of_others = {"vllm", "xllamacpp", "conversion"}  # of scripts that run in their environments
    assert imported_distributions() - DEPENDENCIES - PROGRAM_EXTRAS == of_others
    # torch.utils.tensorboard imports tensorboard for us, and transformers the other two.
    assert (DEPENDENCIES | PROGRAM_EXTRAS) - imported_distributions() - {"accelerate", "gguf", "tensorboard"} == set()
    imported = (name for tree in parsed().values() for name in imported_names(ast.walk(tree)))
    assert any(name.startswith("torch.utils.tensorboard") for name in imported)


def test_tests_need_the_extras_of_the_programs_and_core_none_of_their_packages() -> None:
    assert "megatron-peft[demo,eval,nf4,peft,report]" in PROJECT["optional-dependencies"]["test"]
    assert PROJECT["optional-dependencies"]["dev"] == ["megatron-peft[lint,test]"]
    assert DEPENDENCIES & PROGRAM_EXTRAS == set()
    assert EXTRAS["report"] <= EXTRAS["demo"], "README shows the report of the demo's run"


THREE_ROOMS = ("evaluation", "experiment", "demo")
BLOCKED = {name.replace("-", "_") for name in PROGRAM_EXTRAS}
IMPORT_ALL = """
import importlib, sys
sys.modules.update(dict.fromkeys(sys.argv[1].split()))  # None: an import of it fails
for name in sys.argv[2:]:
    importlib.import_module(name)
"""


def imported_without_extras() -> dict[str, ast.Module]:
    """All modules but those of three rooms, and what they and `megatron-peft generate` import as they are imported."""
    modules = parsed()
    waiting = [name for name in modules if part(name) not in THREE_ROOMS] + ["megatron_peft.evaluation.answers"]
    found: dict[str, ast.Module] = {}
    while waiting:
        if (name := waiting.pop()) not in found:
            found[name] = modules[name]
            waiting += imported_modules(nodes_run_at_import(modules[name]), modules)
    return found


def test_training_conversion_and_generation_import_nothing_of_an_extra() -> None:
    assert {"matplotlib", "sacrebleu", "scipy", "lm_eval"} <= BLOCKED
    for name, tree in imported_without_extras().items():
        assert {full.partition(".")[0] for full in imported_names(nodes_run_at_import(tree))} & BLOCKED == set(), name


@pytest.mark.slow
def test_no_library_that_they_import_needs_an_extra() -> None:
    command = [sys.executable, "-W", "ignore", "-c", IMPORT_ALL, " ".join(BLOCKED), *imported_without_extras()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


EVALUATION = "--tasks a --output x.json --load nowhere"
MODEL = ROOT / "examples" / "models" / "llama-3.1-8b" / "config.json"
NEEDS = {  # program, its words -> extra and packages
    (evaluate, EVALUATION): ("eval", "lm_eval rouge_score sacrebleu"),
    (report, "."): ("report", "matplotlib pandas scipy"),
    (certify, f"--pretrained-checkpoint {MODEL}"): ("peft", "peft"),
    (demo, "--output out"): ("demo", "accelerate gguf matplotlib pandas sacrebleu scipy"),
}


@pytest.mark.parametrize(
    ("program", "line", "extra", "package"),
    [(*called, extra, package) for called, (extra, packages) in NEEDS.items() for package in packages.split()],
)
def test_a_program_names_the_extra_that_it_lacks(tmp_path, monkeypatch, capsys, program, line, extra, package) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match="2"):
        sys.exit(program.main(line.split()))
    out, err = capsys.readouterr()
    assert out in ("", "demo: starting\n") and len(err.removeprefix(LOADING).splitlines()) == 1
    assert f"error: the package {package} cannot be imported" in err
    assert err.endswith(f"pip install 'megatron-peft[{extra}]'.\n")
    assert list(tmp_path.iterdir()) == []


def test_a_score_of_the_demo_names_the_extra_that_it_lacks(tmp_path, monkeypatch) -> None:
    """In experiments it is a program of its own."""
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    config: Any = None  # it is not reached
    with pytest.raises(ConfigurationError, match=r"pip install 'megatron-peft\[demo\]'\.$"):
        scoring.score(config, tmp_path / "score.json")


def test_help_needs_no_extra(monkeypatch, capsys) -> None:
    for name in BLOCKED:
        monkeypatch.setitem(sys.modules, name, None)
    for program in (evaluate, report, demo):
        assert program.main(["--help"]) == 0
        assert "usage:" in capsys.readouterr().out


def test_dependencies_are_ranges_and_apex_of_pypi_is_none_of_them() -> None:
    everything = [*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra)]
    everything = [one for one in everything if not one.startswith("megatron-peft[")]  # this project's own extras
    assert [one for one in everything if "==" in one or ">=" not in one or ",<" not in one] == []
    assert "apex" not in {distribution_name(requirement) for requirement in everything}


# Which build of torch an index has decides these, so they are in no lock file.
OF_TORCHS_BUILD = re.compile(r"torch|triton|(nvidia|cuda)-.*")
LOCKS = {name: (ROOT / "requirements" / f"{name}.txt").read_text() for name in ("build", "install", "test", "lint")}


def locked(text: str) -> dict[str, list[Requirement]]:
    """Of each package its lines, several where Pythons differ."""
    found: dict[str, list[Requirement]] = {}
    for line in text.replace("\\\n", "").splitlines():
        words, *hashes = line.split("--hash=sha256:")
        assert hashes and all(re.fullmatch(r"[0-9a-f]{64}\s*", one) for one in hashes), words
        found.setdefault(canonicalize_name(Requirement(words).name), []).append(Requirement(words))
    return found


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_lock_files_hold_a_tested_version_of_every_dependency(python: str) -> None:
    """`make lock` was run after the last change of pyproject.toml."""
    environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux", "extra": ""}
    torch = Requirement((ROOT / "requirements" / "torch.txt").read_text().splitlines()[-1])
    installed = {"torch": [torch], **locked(LOCKS["build"]), **locked(LOCKS["install"])}
    extras = PROJECT["optional-dependencies"]
    programs = [*PROJECT["dependencies"], *extras["demo"], *extras["eval"], *extras["report"]]
    for name, wanted in (("build", []), ("install", programs), ("test", extras["test"]), ("lint", extras["lint"])):
        found = installed | locked(LOCKS[name])
        for need in map(Requirement, ["setuptools", *wanted]):
            if need.name == "megatron-peft":
                continue
            named = found[canonicalize_name(need.name)]
            pins = [one for one in named if not one.marker or one.marker.evaluate(environment)]
            assert len(pins) == 1, f"{need} on Python {python}: {pins}"
            [pin] = pins[0].specifier
            assert pin.operator == "==" and need.specifier.contains(pin.version), f"{need}, but {pins[0]}: make lock"
        assert [name for name in found if OF_TORCHS_BUILD.fullmatch(name)] == ["torch"]


def test_the_lock_files_agree_and_name_no_index_and_the_changelog_knows_the_version() -> None:
    first: dict[str, set[str]] = {}
    for name, pins in ((name, {*map(str, pins)}) for text in LOCKS.values() for name, pins in locked(text).items()):
        assert first.setdefault(name, pins) == pins, "two versions in one environment"
    assert len(first) > 100
    assert not [text for text in LOCKS.values() if "//" in text or "index" in text.partition("\n")[0]]
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()


def plan(*arguments: str, cwd: Path = ROOT) -> str:
    """The commands that `make` would run, free of the settings of a make around the tests."""
    command = ["make", "-n", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True, env={"PATH": PATH}).stdout


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What make reads, without .venv."""
    for name in ("Makefile", "pyproject.toml", "setup.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    return tmp_path


def test_make_targets_make_the_environment_first(clone: Path) -> None:
    for target in ("demo", "test", "test-all", "golden", "mutations", "lint", "bench", "check-gpu"):
        planned = plan(target, cwd=clone)
        assert planned.index("-m venv .venv") < planned.index(" install --") < planned.rindex(".venv/bin/python")


@pytest.mark.parametrize(
    ("arguments", "files"),
    [
        (["install"], ["build", "install", "torch"]),
        (["demo"], ["build", "install", "torch"]),
        (["test"], ["build", "install", "torch", "test"]),
        (["check-gpu"], ["build", "install", "torch", "test"]),
        (["lint"], ["build", "install", "torch", "lint"]),
        (["install", "LATEST=1"], []),
        (["test-latest"], []),
    ],
    ids=" ".join,
)
def test_what_a_target_installs(arguments: list[str], files: list[str], clone: Path) -> None:
    """Tested versions, in an environment; the newest in another. Nobody who runs a demo gets pyright and Node."""
    planned = plan(*arguments, cwd=clone)
    assert re.findall(r"requirements/(\w+).txt", planned) == files
    hashed = [line for line in planned.splitlines() if "requirements/" in line and "torch.txt" not in line]
    assert all("--require-hashes --no-deps" in line for line in hashed)
    assert ("-m venv .venv-latest" in planned) is (not files) and ("--upgrade" in planned) is (not files)


def test_an_interpreter_that_is_named_has_an_environment_of_its_own_and_the_method_is_passed_on() -> None:
    folder = f".venv-{sys.version_info.major}.{sys.version_info.minor}"
    assert plan("test", f"HOST_PYTHON={sys.executable}").splitlines()[-1].startswith(f"{folder}/bin/python -m pytest")
    assert all(".venv*" in (ROOT / name).read_text().splitlines() for name in IGNORES)
    assert "tools/demo.py --method full --more" in plan("demo", "METHOD=full", "ARGS=--more")


def test_make_targets_run_one_thread_a_process_and_offline(tmp_path: Path) -> None:
    (tmp_path / "probe.mk").write_text(f"include {ROOT / 'Makefile'}\nprobe:\n\t@env\n")
    command = ["make", "-s", "-f", "probe.mk", "probe"]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, env={"PATH": PATH})
    assert {"OMP_NUM_THREADS=1", "OMP_WAIT_POLICY=PASSIVE", "HF_HUB_OFFLINE=1"} <= set(printed.stdout.splitlines())
