"""Adapters out of a --save folder as whole tensors; factors of a fused layer make the change of its modules."""

from pathlib import Path

import pytest
import torch

from megatron_peft.config import ConfigurationError
from megatron_peft.conversion.trained_adapters import (
    LowRankFactors,
    fuse,
    open_adapters,
    rows_of_modules,
    save_adapters,
)
from megatron_peft.models.families import rules_for
from tests.checkpoint.runs import SHAPE, make_record

LAYER, OTHER = "decoder.layers.0.mlp.linear_fc1", "decoder.layers.1.mlp.linear_fc1"
A, B = torch.arange(6.0).view(2, 3), -torch.ones(5, 2)
BOTH = {f"{LAYER}.adapter.A": A, f"{LAYER}.adapter.B": B}


def save(folder: Path, tensors: dict[str, torch.Tensor], **changes) -> Path:
    save_adapters(folder, make_record(**changes), tensors)
    return folder


def test_copies_in_float32_are_preferred(tmp_path):
    """Under --bf16 a run goes on from them, so they are what it has trained."""
    tensors = {f"{LAYER}.adapter.A": A.bfloat16(), f"optimizer.master.{LAYER}.adapter.A": A + 1e-6}
    adapters = open_adapters(save(tmp_path / "run", tensors))
    assert torch.equal(adapters.of(LAYER)["A"], A + 1e-6)
    with pytest.raises(ConfigurationError, match=rf"lacks {LAYER}.adapter.B"):
        adapters.of(LAYER)["B"]


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        (BOTH | {f"{OTHER}.adapter.A": A}, rf"it lacks {OTHER}.adapter.B, which belong"),
        ({"rng.torch": A}, rf"it lacks {LAYER}.adapter.\*, {OTHER}.adapter.\*, which belong"),
    ],
)
def test_layer_without_its_tensors_is_named(tensors, told, tmp_path):
    run = save(tmp_path / "run", tensors, adapted_layers=(LAYER, OTHER))
    with pytest.raises(ConfigurationError, match=f"iter_0000000 is damaged: {told}"):
        open_adapters(run)


def test_torn_file_is_named(tmp_path):
    (file,) = save(tmp_path / "run", BOTH).glob("iter_*/*.distcp")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigurationError, match=rf"{file.name} has \d+ bytes instead .* an older iter_\* folder\."):
        open_adapters(tmp_path / "run")


RULES = {name: rule for name, rule in rules_for(SHAPE).items() if ".layers.1." in name and name.endswith("weight")}
LINEAR = [rule for name, rule in RULES.items() if ".linear_" in name]


def draw(out: int, columns: int, rank: int, seed: int) -> LowRankFactors:
    generator = torch.Generator().manual_seed(seed)
    return LowRankFactors(torch.randn(rank, columns, generator=generator), torch.randn(out, rank, generator=generator))


def split(rule, fused: LowRankFactors) -> dict[str, LowRankFactors]:
    """As an export to HF PEFT: every module has A, and its own rows of B."""
    return {module: LowRankFactors(fused.A, B) for module, B in rows_of_modules(rule, fused.B).items()}


def change(factors: LowRankFactors) -> torch.Tensor:
    return factors.B.double() @ factors.A.double()


@pytest.mark.parametrize("rule", LINEAR, ids=lambda rule: rule.layer)
def test_split_makes_the_change_that_the_weights_rule_takes_apart_and_fuse_undoes_it(rule):
    fused = draw(*rule.local_shape(1), rank=3, seed=0)
    expected, modules = rule.write([change(fused)]), split(rule, fused)
    found = {f"{module}.weight": change(factors) for module, factors in modules.items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    again = fuse(rule, modules)
    assert torch.equal(again.A, fused.A) and torch.equal(again.B, fused.B)


@pytest.mark.parametrize("rule", LINEAR, ids=lambda rule: rule.layer)
@pytest.mark.parametrize("left_out", [0, 1])
def test_modules_with_an_A_of_their_own_keep_their_change(rule, left_out):
    found = {name: draw(*shape, rank=2, seed=seed) for seed, (name, shape) in enumerate(rule.modules.items())}
    kept = {module: found[module] for module in list(found)[: max(1, len(found) - left_out)]}
    fused = fuse(rule, kept)
    assert fused.rank == 2 * len(kept)
    for module, factors in split(rule, fused).items():
        expected = change(kept[module]) if module in kept else torch.zeros_like(change(factors))
        torch.testing.assert_close(change(factors), expected, rtol=1e-12, atol=1e-12)
