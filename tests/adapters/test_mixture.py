"""lambda from the norms of the gradients before mixing."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from megatron_peft.adapters.mixture import update_mixtures
from megatron_peft.config import ConfigurationError, PeftConfig
from megatron_peft.parallel.layout import LinearLayout
from tests.adapters.test_boft import Place


def adapter(mix: float, low: float, rotation: float) -> Any:
    """An adapter whose two raw gradients have these norms."""

    def part(norm: float, size: int) -> nn.Module:
        module = nn.Linear(size, 1, bias=False)
        module.weight.main_grad = torch.full((1, size), norm / size**0.5)  # type: ignore[attr-defined]
        module.weight.tensor_model_parallel = False  # type: ignore[attr-defined]
        return module

    return SimpleNamespace(
        mix=torch.tensor(mix),
        num_kept=torch.tensor(0),
        low_rank=part(low, LOW_SIZE),
        rotation=part(rotation, ROTATION_SIZE),
        layout=LinearLayout("row", 4, 4, Place()),  # type: ignore[arg-type]
    )


LOW_SIZE, ROTATION_SIZE = 4, 9


def updated(mix: float, low: float, rotation: float, **settings: Any) -> float:
    one = adapter(mix, low, rotation)
    peft = PeftConfig("hybrid", **{"hybrid_lambda_ema": 0.0, **settings})
    own: Any = lambda parameter: parameter.main_grad  # noqa: E731
    update_mixtures([one], peft, own, Place(), rotation_rate=0.125)  # type: ignore[arg-type]
    assert int(one.num_kept) == (not math.isfinite(low) or low == rotation == 0)
    return float(one.mix)


def test_norms_are_divided_by_the_mixture_that_they_carry():
    low, rotation = 3.0, 1.0  # before mixing: 3 / 0.25 = 12 and 1 / 0.75 = 4 / 3
    assert updated(0.25, low, rotation) == pytest.approx(12 / (12 + 4 / 3))


def test_equal_norms_before_mixing_are_a_fixed_point_of_one_half():
    assert updated(0.3, 0.3, 0.7) == pytest.approx(0.5)


def test_rms_divides_by_the_roots_of_the_numbers_of_parameters():
    assert updated(0.5, 3.0, 1.0, hybrid_lambda="rms") == pytest.approx(1.5 / (1.5 + 1 / 3))


def test_descent_weighs_sums_of_absolute_values_by_the_rates():
    """A part of n equal numbers and norm g has them sum to g sqrt(n)."""
    low, rotation = 3.0 * 2 / 0.25, 0.125 * 1.0 * 3 / 0.75
    assert updated(0.25, 3.0, 1.0, hybrid_lambda="descent") == pytest.approx(low / (low + rotation))


def test_raw_is_the_papers_formula():
    assert updated(0.25, 3.0, 1.0, hybrid_lambda="raw") == pytest.approx(0.75)


def test_the_average_moves_slowly():
    assert updated(0.5, 1.0, 3.0, hybrid_lambda_ema=0.9) == pytest.approx(0.9 * 0.5 + 0.1 * 0.25)


def test_lambda_is_clamped():
    assert updated(0.5, 1.0, 1e-6) == pytest.approx(0.98)
    assert updated(0.5, 1e-6, 1.0) == pytest.approx(0.02)
    assert updated(0.5, 1.0, 1e-6, hybrid_lambda_max=0.75) == 0.75
    assert updated(0.5, 1e-6, 1.0, hybrid_lambda_min=0.25) == 0.25


@pytest.mark.parametrize("low", [float("nan"), float("inf")])
def test_without_a_finite_gradient_lambda_stays(low):
    assert updated(0.4, low, 1.0) == pytest.approx(0.4)
    assert updated(0.4, 0.0, 0.0) == pytest.approx(0.4)


def test_fixed_stays_where_it_is_put():
    assert updated(0.3, 5.0, 1.0, hybrid_lambda="fixed:0.3") == pytest.approx(0.3)
    assert PeftConfig("hybrid", hybrid_lambda="fixed:1").initial_mix == 1.0
    assert PeftConfig("hybrid", hybrid_lambda_init=0.7).initial_mix == 0.7


@pytest.mark.parametrize("value", ["fixed:1.5", "fixed:", "fixed:-0.1", "norms"])
def test_other_rules_are_refused(value):
    with pytest.raises(ConfigurationError, match="gradient, raw, rms, descent, or fixed:X with X between 0 and 1"):
        PeftConfig("hybrid", hybrid_lambda=value)
