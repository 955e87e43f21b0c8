"""Calls into Transformer Engine: the table of its releases, and that it lists the calls that are made today."""

import ast
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

from tools.cuda.signatures import (
    CORES,
    EXTENSION,
    OUR_NORM,
    TABLE,
    Call,
    Declarations,
    as_toml,
    calls,
    installed_core,
    our_imports,
    our_problem,
    table,
)

ROOT = Path(__file__).parents[2]
NORM = """
from .base import Base as _Base
class RMSNorm(_Base):
    def __init__(self, size=None, eps=1e-5, *, hidden_size=None, **kwargs):
        super().__init__(size or hidden_size, eps=eps, **kwargs)
    def forward(self, x, /): ...
"""
BASE = """
import torch
class Base(torch.nn.Module):
    def __init__(self, size, *, eps, device=None): ...
"""
LOSS = """
class Loss:
    @staticmethod
    def forward(ctx, logits, target, smoothing=0.0): ...
loss = Loss.apply
"""
SMALL = Declarations(
    {
        "te/__init__.py": "try:\n    from te.norms import *\nexcept ImportError:\n    pass\nfrom .loss import loss",
        "te/norms/__init__.py": "from .norm import RMSNorm",
        "te/norms/norm.py": NORM,
        "te/norms/base.py": BASE,
        "te/loss.py": LOSS,
    }
)
RECORDED = tomllib.loads(TABLE.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (Call("te.RMSNorm", 0, ("device", "eps", "hidden_size")), ""),
        (Call("te.RMSNorm", 0, ("dtype", "hidden_size")), "unexpected keyword argument 'dtype'"),
        (Call("te.RMSNorm", 3, ()), "too many positional arguments"),
        (Call("te.RMSNorm.forward", 1, ()), ""),
        (Call("te.RMSNorm.forward", 0, ("x",)), "positional only"),
        (Call("te.loss", 3, ()), ""),
        (Call("te.loss", 1, ()), "missing a required argument"),
        (Call("te.LayerNorm", 0, ()), "is not there"),
    ],
)
def test_a_call_is_bound_to_the_declaration_through_imports_and_bases(call, problem):
    found = SMALL.problem(call)
    assert problem in found and bool(found) == bool(problem)


def test_every_release_has_a_row_for_every_callable_and_all_of_them_bind():
    assert set(RECORDED["binds"]) == set(RECORDED["calls"]) == set(CORES)
    releases = [list(map(Version, rows)) for rows in RECORDED["binds"].values()]
    assert releases[0] == releases[1] == sorted(releases[0]) and len(releases[0]) >= 21
    assert min(releases[0]) == Version("2.4.0")
    for core, rows in RECORDED["binds"].items():
        for release, cells in rows.items():
            assert cells == dict.fromkeys(RECORDED["calls"][core], True), (core, release)


def test_the_table_lists_the_calls_of_the_installed_megatron_core():
    core = version("megatron-core")
    if core not in RECORDED["calls"]:
        pytest.skip(f"the table has no megatron-core {core}")
    oldest, *_, newest = map(Version, RECORDED["binds"][core])
    releases: dict[Version, dict[str, str]] = {oldest: {}, newest: {}}
    made = tomllib.loads(as_toml(table(releases, {core: installed_core()})))
    assert made["calls"][core] == RECORDED["calls"][core]


def test_the_table_is_as_it_is_written():
    """Its comments too, or `make cuda-signatures` says that it differs."""
    outcome: dict = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    for rows in outcome["binds"].values():
        for problems in rows.values():
            problems.update({name: "" for name, why in problems.items() if why is True})
    assert as_toml(outcome) == TABLE.read_text(encoding="utf-8")


def test_packed_samples_are_passed_on_without_our_own_fields():
    """Our PackedSamples has more fields than megatron-core's class: Transformer Engine would refuse them."""
    packed = [call for call in calls(installed_core(), Version("2.20")) if "qkv_format" in call.keywords]
    assert packed and not {"lengths", "position_ids"} & set(packed[0].keywords)


def test_our_own_calls_are_those_that_the_program_makes():
    assert our_imports(ROOT) == {"TEDotProductAttention", "TENorm"}
    tree = ast.parse((ROOT / "megatron_peft" / "models" / "gpt.py").read_text(encoding="utf-8"))
    built = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "norm")
    assert [tuple(keyword.arg for keyword in call.keywords) for call in built] == [OUR_NORM]
    core = installed_core()
    assert not our_problem(core)
    renamed = re.sub(r"(class TENorm:.*?)hidden_size: int", r"\1size: int", core[EXTENSION], count=1, flags=re.DOTALL)
    other = {**core, EXTENSION: renamed}
    assert other != core and "'size'" in our_problem(other)
