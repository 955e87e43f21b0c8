"""Factors of one adapted layer: initial values that no layout changes, scale, dropout, refusals.

And eq. (2), the bound of its norm, by small Gram matrices against the dense change of the weight.
"""

import math

import pytest
import torch

from megatron_peft.adapters.frozen_linear import FrozenLinearCall
from megatron_peft.adapters.low_rank import LowRank, gram_matrices, shrink, shrinkage
from megatron_peft.config import ConfigurationError, PeftConfig
from megatron_peft.config.methods.low_rank import IS_NOT_DECAYED
from megatron_peft.parallel.layout import LinearLayout
from tests.adapters.many_ranks import drawn as draw
from tests.one_rank import Place, one_rank

OUT, IN, RANK = 24, 12, 4
NAME = "decoder.layers.0.mlp.linear_fc1.adapter"


@pytest.fixture(scope="module", autouse=True)
def world():
    with one_rank():
        yield


def _adapter(split="column", name=NAME, seed=1, **settings):
    layout = LinearLayout(split, OUT, IN, Place(0, 1))
    peft = PeftConfig(**{"lora_rank": RANK, **settings})
    peft.spec.check_layer(peft, layout, name.removesuffix(".adapter"))
    return LowRank(layout, peft, name, seed, torch.float32)


def _forward(adapter, x, splits_sequence=False):
    torch.manual_seed(0)
    call = FrozenLinearCall(torch.zeros(OUT, IN), None, False, splits_sequence, Place(0, 1))
    return adapter(x, call)


def test_initial_values_depend_on_seed_and_name_and_are_uniform_within_the_inverse_root_of_the_input():
    adapter, others = _adapter(), [_adapter(seed=2), _adapter(name=NAME.replace("0", "1"))]
    assert len({one.A.flatten()[0].item() for one in (adapter, *others)}) == 3
    bound = 1 / math.sqrt(IN)
    assert 0.8 * bound < adapter.A.abs().max().item() <= bound
    assert adapter.A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2)
    assert not adapter.B.any()


@pytest.mark.parametrize("settings, scale", [({}, 8 / RANK), ({"lora_rs": True}, 8 / math.sqrt(RANK))])
def test_scale_is_alpha_over_the_rank_or_over_its_root(settings, scale):
    adapter = _adapter(lora_alpha=8, **settings)
    adapter.B.data.normal_()
    x = torch.randn(3, 2, IN)
    torch.testing.assert_close(_forward(adapter, x), scale * (x @ adapter.A.T @ adapter.B.T))
    torch.testing.assert_close(_forward(adapter, x), x @ adapter.delta_weight().T)


SIDE = rf"the smaller side of .*linear_fc1 \({OUT} x {IN}\)"
TWICE = rf"takes 2 x --lora-rank 7 = 14 singular vectors, more than 12, {SIDE}: use a rank of at most 6, or --lora-ga"


@pytest.mark.parametrize(
    ("most", "settings", "message"),
    [
        (12, {}, f"--lora-rank 13 is above 12, {SIDE}: use at most 12"),
        (12, {"method": "lora-ga", "lora_ga_init": "paper"}, "--lora-rank 13 is above 12"),
        (6, {"method": "lora-ga", "lora_ga_init": "original"}, f"--lora-ga-init original {TWICE}"),
    ],
)
def test_a_rank_above_the_matrix_or_half_of_it_for_the_published_start_is_refused(most, settings, message):
    assert _adapter(lora_rank=most, **settings).A.shape == (most, IN)
    with pytest.raises(ConfigurationError, match=message):
        _adapter(lora_rank=most + 1, **settings)


def _started(init="paper", **settings):
    """At random A and B, which are subtracted but for `aligned`."""
    adapter = _adapter(method="lora-ga", lora_ga_init=init, **settings)
    adapter.start_at(draw("A", RANK, IN).float(), draw("B", OUT, RANK).float())
    return adapter


def test_only_what_is_trained_beyond_the_start_changes_the_layer():
    adapter, x = _started(), torch.randn(3, 2, IN)
    assert _forward(adapter, x).abs().max() < 3e-5  # of two products of up to 170
    assert {name for name, _ in adapter.named_parameters()} == {"A", "B"}
    A0, B0 = adapter.A0.clone(), adapter.B0.clone()
    with torch.no_grad():
        adapter.A.add_(1.0)
        adapter.B.mul_(0.5)
    change = adapter.scale * (adapter.B @ adapter.A - B0 @ A0)
    torch.testing.assert_close(_forward(adapter, x), x @ change.T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(adapter.delta_weight(), change, atol=1e-5, rtol=1e-4)
    adapter.restart()
    assert _forward(adapter, x).abs().max() < 3e-5  # of two products of up to 170


@pytest.mark.parametrize(
    ("adapter", "starts"), [(_adapter, set()), (lambda: _adapter(method="lora-ga"), set()), (_started, {"A0", "B0"})]
)
def test_the_frozen_start_is_in_the_state_where_there_is_one_and_its_factors_are_not_decayed(adapter, starts):
    assert set(adapter().state_dict()) == {"A", "B"} | starts
    assert all(hasattr(parameter, IS_NOT_DECAYED) == bool(starts) for parameter in adapter().parameters())


def _with_dropout(split="column"):
    """An adapter whose output shows which inputs were dropped: y = x on the first IN outputs."""
    adapter = _adapter(split, lora_rank=IN, lora_alpha=IN, lora_dropout=0.25)
    adapter.A.data.copy_(torch.eye(IN))
    adapter.B.data[:IN].copy_(torch.eye(IN))
    return adapter


def test_dropout_zeroes_inputs_and_scales_the_rest_but_in_evaluation():
    x = torch.ones(50, 4, IN)
    y = _forward(_with_dropout(), x)[..., :IN]
    assert y.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert (y == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(_forward(_with_dropout().eval(), x)[..., :IN], x)


@pytest.mark.parametrize(
    "split, splits_sequence, common", [("column", False, True), ("column", True, True), ("row", False, False)]
)
def test_ranks_drop_the_same_where_they_hold_the_same(split, splits_sequence, common):
    """Common: drawn from the default generator; otherwise it stays where it was, the ranks' own is used.

    With the sequence split the default one is the rank's own, for as long as megatron-core's block runs.
    """
    x = torch.ones(5, 4, IN)
    _forward(_with_dropout(split), x, splits_sequence)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(after, torch.get_rng_state()) != common


INITS = ("aligned", "original")


def moved(init: str) -> LowRank:
    """An adapter away from its start, in float64; s = 1."""
    low_rank = _started(init, lora_alpha=RANK).double()
    with torch.no_grad():
        low_rank.A.add_(draw("dA", RANK, IN))
        low_rank.B.add_(draw("dB", OUT, RANK))
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
def test_a_change_above_the_limit_comes_down_to_it(init):
    for part in (0.999, 0.3, 1e-3):
        low_rank = moved(init)
        limit = part * float(low_rank.delta_weight().norm())
        bounded(low_rank, limit)
        assert (0.999 if init == "aligned" else 0.6) < float(low_rank.delta_weight().norm()) / limit <= 1 + 1e-9


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
def test_a_change_within_the_limit_is_left_bit_for_bit_and_none_at_all_is_within_every_limit(init):
    low_rank = moved(init)
    before = low_rank.A.clone(), low_rank.B.clone()
    assert bounded(low_rank, 1.001 * float(low_rank.delta_weight().norm())) == 1
    assert torch.equal(low_rank.A, before[0]) and torch.equal(low_rank.B, before[1])
    low_rank.restart()
    assert bounded(low_rank, 1e-3) == 1
