"""Factors of a fused layer and of its modules make the same change of the weight."""

from __future__ import annotations

import pytest
import torch

from megatron_peft.conversion.adapter_factors import Factors, fuse, layer_of, modules_of, split
from megatron_peft.conversion.families import rules_for
from megatron_peft.conversion.rules import Rule
from tests.checkpoint.records import SHAPE

RULES = {name: rule for name, rule in rules_for(SHAPE).items() if ".layers.1." in name and name.endswith("weight")}
LINEAR = [rule for name, rule in RULES.items() if ".linear_" in name]


def draw(out: int, columns: int, rank: int, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(rank, columns, generator=generator), torch.randn(out, rank, generator=generator))


def change(factors: Factors) -> torch.Tensor:
    return factors.B.double() @ factors.A.double()


@pytest.mark.parametrize("rule", LINEAR, ids=layer_of)
def test_split_makes_the_change_that_the_weights_rule_takes_apart(rule: Rule) -> None:
    fused = draw(*rule.local_shape(1), rank=3, seed=0)
    expected = rule.write([change(fused)])
    found = {f"{module}.weight": change(factors) for module, factors in split(rule, fused).items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("rule", LINEAR, ids=layer_of)
def test_fuse_undoes_split_bit_for_bit(rule: Rule) -> None:
    fused = draw(*rule.local_shape(1), rank=3, seed=0)
    again = fuse(rule, split(rule, fused))
    assert torch.equal(again.A, fused.A) and torch.equal(again.B, fused.B)


@pytest.mark.parametrize("rule", LINEAR, ids=layer_of)
@pytest.mark.parametrize("left_out", [0, 1])
def test_modules_with_an_A_of_their_own_keep_their_change(rule: Rule, left_out: int) -> None:
    modules = list(modules_of(rule).items())
    found = {module: draw(*shape, rank=2, seed=seed) for seed, (module, shape) in enumerate(modules)}
    kept = {module: found[module] for module in list(found)[: max(1, len(found) - left_out)]}
    fused = fuse(rule, kept)
    assert fused.rank == 2 * len(kept)
    for module, factors in split(rule, fused).items():
        expected = change(kept[module]) if module in kept else torch.zeros_like(change(factors))
        torch.testing.assert_close(change(factors), expected, rtol=1e-12, atol=1e-12)


def test_padding_changes_nothing() -> None:
    factors = draw(5, 7, rank=2, seed=0)
    padded = factors.padded(6)
    assert padded.A.shape == (6, 7) and padded.B.shape == (5, 6)
    torch.testing.assert_close(change(padded), change(factors))
