"""Eq. (2) by small Gram matrices, against the dense change of the weight."""

from __future__ import annotations

import pytest
import torch

from megatron_peft.adapters.low_rank import LowRank
from megatron_peft.adapters.norm_bound import gram_matrices, shrink, shrinkage
from megatron_peft.config import PeftConfig
from megatron_peft.parallel.layout import LinearLayout
from tests.one_rank import Place, one_rank, places

OUT, IN, RANK = 24, 12, 4
INITS = ("aligned", "original")


@pytest.fixture(scope="module", autouse=True)
def world():
    with one_rank():
        yield


def draw(name: str, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(name)))


def moved(init: str, split: str = "column", place: Place | None = None) -> LowRank:
    """An adapter away from its start, in float64; s = 1."""
    layout = LinearLayout(split, OUT, IN, place or Place(0, 1))
    peft = PeftConfig("lora-ga", lora_rank=RANK, lora_alpha=RANK, lora_ga_init=init)
    low_rank = LowRank(layout, peft, "layer.adapter", 1, torch.float64)
    with torch.no_grad():
        low_rank.start_at(layout.slice_input(draw("A", RANK, IN)), layout.slice_output(draw("B.", OUT, RANK)))
        low_rank.A.add_(layout.slice_input(draw("dA.", RANK, IN)))
        low_rank.B.add_(layout.slice_output(draw("dB..", OUT, RANK)))
    return low_rank


def bounded(low_rank: LowRank, limit: float) -> float:
    """t; the adapter is scaled by it."""
    left, right = (gram.unsqueeze(0) for gram in gram_matrices(low_rank))
    (t,) = shrinkage(left, right, torch.tensor([limit], dtype=torch.float64), low_rank.A0 is not None)
    pairs = [(low_rank.B, low_rank.B0), *([(low_rank.A, low_rank.A0)] if low_rank.A0 is not None else [])]
    for factor, start in pairs:
        shrink(factor, start, t)
    return float(t)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("part", [0.999, 0.3, 1e-3])
def test_a_change_above_the_limit_comes_down_to_it(init, part):
    low_rank = moved(init)
    limit = part * float(low_rank.delta_weight().norm())
    bounded(low_rank, limit)
    norm = float(low_rank.delta_weight().norm())
    assert norm <= limit * (1 + 1e-9)
    assert norm > (0.999 if init == "aligned" else 0.6) * limit


def test_a_change_along_its_own_start_comes_down_to_the_limit_exactly():
    """P and Q then point the same way, and nothing of |P| + |Q| is lost in |P + Q|."""
    low_rank = moved("original")
    with torch.no_grad():
        low_rank.A.copy_(3 * low_rank.A0)
        low_rank.B.copy_(2 * low_rank.B0)
    limit = 0.3 * float(low_rank.delta_weight().norm())
    bounded(low_rank, limit)
    assert float(low_rank.delta_weight().norm()) == pytest.approx(limit, rel=1e-9)


@pytest.mark.parametrize("init", INITS)
def test_a_change_within_the_limit_is_left_bit_for_bit(init):
    low_rank = moved(init)
    before = low_rank.A.clone(), low_rank.B.clone()
    assert bounded(low_rank, 1.001 * float(low_rank.delta_weight().norm())) == 1
    assert torch.equal(low_rank.A, before[0]) and torch.equal(low_rank.B, before[1])


def test_no_change_at_all_is_within_every_limit():
    low_rank = moved("original")
    low_rank.restart()
    assert bounded(low_rank, 1e-3) == 1


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize(("split", "side"), [("column", 0), ("row", 1)])
def test_gram_matrices_of_the_split_side_add_up(init, split, side):
    whole, parts = gram_matrices(moved(init)), [gram_matrices(moved(init, split, place)) for place in places(2)]
    torch.testing.assert_close(parts[0][side] + parts[1][side], whole[side])
    torch.testing.assert_close(parts[0][1 - side], whole[1 - side])
