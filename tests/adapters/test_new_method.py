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


PLAIN_FIELD = re.sub(r"(gains_bound: float = )option\(.*\)", r"\g<1>0.9", SOURCE)
BASES = "from megatron_peft.config.methods.low_rank import LoraGaOptions\n"
BASES += "from megatron_peft.config.methods.urnn import UrnnOptions\n"
OTHER_ORDER = BASES + SOURCE.replace("GainsOptions(PeftOptions)", "GainsOptions(LoraGaOptions, UrnnOptions)")
NO_DATACLASS = SOURCE.replace("@dataclass(frozen=True)\nclass GainsOptions(PeftOptions)", "class GainsOptions")


def ratio(declared: str) -> str:
    """The declaration with another second field."""
    return re.sub(r"gains_lr_ratio: .*", declared, SOURCE)


def bound(**more: Any) -> str:
    """The declaration with more said of the first field."""
    said = ", ".join(f"{name}={value!r}" for name, value in more.items())
    return SOURCE.replace('check="positive")\n', f"{said})\n", 1)


BROKEN = {
    "cannot be imported": ("import nowhere", "No module named 'nowhere'"),
    "another object": ("GAINS = 3", "declares 3, which is not a Method"),
    "a name twice": (SOURCE.replace('name = "gains"', 'name = "lora"'), "so has megatron_peft.config.methods.low_rank"),
    "a name of a number": (SOURCE.replace('name = "gains"', "name = 3"), "its name is 3, not a string"),
    "no adapter": (re.sub("adapter = .*", "adapter = 3", SOURCE), "its adapter is 3, not a string"),
    "options": (SOURCE.replace("(GainsOptions,)", "GainsOptions"), "not a tuple of type"),
    "a plain field": (PLAIN_FIELD, "its field gains_bound is not declared with option()"),
    "another's field": (ratio('lora_rank: int = option(1, "it")'), "its field lora_rank is one of"),
    "the run's field": (ratio('seed: int = option(1, "it")'), "its field seed is one of another"),
    "PeftConfig's name": (ratio('spec: int = option(1, "it")'), "its field spec is one of another"),
    "another's property": (ratio('lora_scale: int = option(1, "it")'), "its field lora_scale is one of another"),
    "a bogus check": (bound(check="bogus"), "its field gains_bound has the check 'bogus'; there are positive"),
    "a type": (ratio('gains_x: dict = option(None, "it")'), "its field gains_x is of type"),
    "a help": (ratio("gains_x: int = option(1, 2)"), "its field gains_x has a help, group or metavar"),
    "no dataclass": (NO_DATACLASS, "is not a dataclass derived from PeftOptions"),
    "another order": (OTHER_ORDER, "its options cannot be combined with those of other methods"),
}
# What only the command line knows; in Python such a method can be used.
UNFIT_FLAGS = {
    "a flag of the shape": (ratio('hidden_size: int = option(1, "it")'), "its flag --hidden-size is one of pretrain"),
    "a flag of the run": (bound(flags=("--lr",)), "its flag --lr is one of pretrain_peft.py"),
    "a switch of the run": (bound(flags=("--no-masked-softmax-fusion",)), "is one of pretrain_peft.py"),
    "a flag of Megatron's": (ratio('fp8: str = option("", "it")'), "its flag --fp8 is one of Megatron's"),
    "a word": (bound(flags=("gains",)), "has the flag 'gains': use dashes"),
    "a title": (bound(group="my group"), "its flag --gains-bound stands under 'my group', which is no title of --help"),
}
NAMES = {kind: f"gains{i}" for i, kind in enumerate([*BROKEN, *UNFIT_FLAGS])}
LAST = "import sys\nassert 'megatron_peft.cli' not in sys.modules\n"


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[str, Any]:
    """What is said of each of these declarations, all of one package, by PeftConfig and by pretrain_peft.py."""
    texts = {NAMES[kind]: text for kind, (text, _) in (BROKEN | UNFIT_FLAGS).items()}
    renamed = {
        name: text.replace("gains", name).replace(f"adapters.{name}", "adapters.gains") for name, text in texts.items()
    }
    packages = install(tmp_path_factory.mktemp("broken"), **renamed, usable=SOURCE)
    program = """
import contextlib, io, json
from megatron_peft.config import ConfigurationError, PeftConfig
from megatron_peft.cli.parser import parse_arguments, read_config
from megatron_peft.config.methods import METHODS

def error_of(read, *words):
    try:
        read(*words)
    except ConfigurationError as error:
        return str(error)

found = {"usable": METHODS.keys() > {"boft", "gains"}, "boft": PeftConfig("boft").lora_rank}
found["python"] = {name: error_of(PeftConfig, name) for name in NAMES}
with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
    parse_arguments(["--help"])
found["help"] = printed.getvalue()
found["command line"] = {name: error_of(read_config, ["--peft-method", name]) for name in NAMES}
print(json.dumps(found))
""".replace("NAMES", repr([*NAMES.values(), "lora", "nothing"]))
    path = os.pathsep.join([str(ROOT), str(packages)])
    return json.loads(in_tree(ROOT, sys.executable, "-c", program, PYTHONPATH=path))


@pytest.mark.parametrize("kind", [*BROKEN, *UNFIT_FLAGS])
def test_a_package_that_cannot_be_used_is_an_error_only_for_its_method(told, kind):
    name = "lora" if kind == "a name twice" else NAMES[kind]
    reason = (BROKEN | UNFIT_FLAGS)[kind][1].replace("gains", NAMES[kind])
    errors = [told["command line"][name], *([told["python"][name]] if kind in BROKEN else [])]
    for error in errors:
        assert f"--peft-method {name} cannot be used: the installed package your-package has it, but" in error
        assert reason in error


def test_help_and_other_methods_do_without_the_packages_that_cannot_be_used(told):
    assert told["usable"] and told["boft"] == 16
    assert "{full,lora,lora-ga,boft,urnn,hybrid,gains}" in told["help"] and "--gains-bound X" in told["help"]
    assert not any(f"--{name}-" in told["help"] for name in NAMES.values())


def test_an_unknown_method_is_told_which_packages_cannot_be_used(told):
    """Their entry points may have other names than their methods."""
    for error in (told["python"]["nothing"], told["command line"]["nothing"]):
        assert "--peft-method nothing is not one of full, lora" in error
        assert f"{NAMES['cannot be imported']} cannot be used: the installed package your-package has it" in error


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
