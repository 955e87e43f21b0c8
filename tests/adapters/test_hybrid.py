"""The Hybrid's layers are their formula, gradients included; lambda follows the norms of gradients before mixing."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from megatron_peft.adapters.frozen_linear import FrozenLinearCall
from megatron_peft.adapters.hybrid import Hybrid, update_mixtures
from megatron_peft.adapters.low_rank import LowRank
from megatron_peft.config import PeftConfig
from megatron_peft.models.layers import _SwiGLU
from megatron_peft.parallel.layout import LinearLayout
from megatron_peft.runtime import cpu
from tests.adapters.many_ranks import drawn as draw
from tests.adapters.many_ranks import given_dropout
from tests.kept import kept_for_backward
from tests.one_rank import Place

IN, OUT = 12, 16
ALONE: Any = Place(0, 1)


def hybrid(split: str, **settings: Any) -> Hybrid:
    cpu.install()
    peft = PeftConfig("hybrid", lora_rank=3, boft_block_size=2, boft_factors=2, **settings)
    return Hybrid(LinearLayout(split, OUT, IN, ALONE), peft, "layer.adapter", 0, torch.float64).double()


def moved(split: str) -> Hybrid:
    made = hybrid(split, hybrid_lambda="fixed:0.3")
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(draw(name, *parameter.shape))
    return made


def call_of(weight: torch.Tensor, split: str = "row", size: int = 1) -> FrozenLinearCall:
    """With `size` 2 as on one of two ranks, the other of which holds nothing."""
    place: Any = Place(0, size)
    return _WithoutPeers(weight, None, False, False, place, "none" if split == "column" else "own tokens")


class _WithoutPeers(FrozenLinearCall):
    def reduce(self, y: torch.Tensor) -> torch.Tensor:
        return y


@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize("num_tokens", [IN - 2, IN], ids=["activations turn", "the weight turns"])
@pytest.mark.parametrize(("split", "size"), [("column", 1), ("row", 1), ("row", 2)])
def test_it_is_the_formula(monkeypatch, split, size, num_tokens, dropout):
    """Of SwiGLU's output, which a row-parallel layer recomputes."""
    adapter, weight, tokens = moved(split), draw("W", OUT, IN), (num_tokens // 2, 2)
    low_rank, D = adapter.low_rank, torch.block_diag(*adapter.rotation.changes())
    mask = (draw("mask", *tokens, IN) > 0) / 0.5 if dropout else None
    monkeypatch.setattr(LowRank, "input_dropout", lambda *_: given_dropout(mask))
    h, direction = draw("h", *tokens, 2 * IN).requires_grad_(), draw("dy", *tokens, OUT)
    x, call = _SwiGLU.apply(h), call_of(weight, split, size)
    assert call.needs_no_sum == (size == 1)
    z, branch = x @ weight.T, (x if mask is None else x * mask) @ low_rank.A.T @ low_rank.B.T
    plain = z + 0.7 * z @ D.T + 0.3 * low_rank.scale * branch
    ours = adapter(x, call)
    torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-6)
    trained = [h, *adapter.parameters()]
    gradients = [torch.autograd.grad((y * direction).sum(), trained, retain_graph=True) for y in (ours, plain)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


def test_it_starts_as_the_base():
    adapter, weight, x = hybrid("column"), draw("W", OUT, IN), draw("x", 5, 2, IN)
    torch.testing.assert_close(adapter(x, call_of(weight, "column")), x @ weight.T)
    assert float(adapter.mix) == 0.5


@pytest.mark.parametrize("size", [1, 2])
def test_a_row_parallel_layer_keeps_nothing_of_what_swiglu_gives(size):
    x = _SwiGLU.apply(draw("h", 5, 2, 2 * IN).requires_grad_())
    with kept_for_backward() as kept:
        moved("row")(x, call_of(draw("W", OUT, IN), size=size))
    assert kept and x.data_ptr() not in {tensor.data_ptr() for tensor in kept}


LOW_SIZE, ROTATION_SIZE = 4, 9


def updated(mix: float, low: float, rotation: float, **settings: Any) -> float:
    """lambda after the step of an adapter whose two raw gradients have these norms."""

    def part(norm: float, size: int) -> nn.Module:
        module = nn.Linear(size, 1, bias=False)
        module.weight.main_grad = torch.full((1, size), norm / size**0.5)  # type: ignore[attr-defined]
        module.weight.tensor_model_parallel = False  # type: ignore[attr-defined]
        return module

    adapter: Any = SimpleNamespace(
        mix=torch.tensor(mix),
        num_kept=torch.tensor(0),
        low_rank=part(low, LOW_SIZE),
        rotation=part(rotation, ROTATION_SIZE),
        layout=LinearLayout("row", 4, 4, ALONE),
    )
    peft = PeftConfig("hybrid", **{"hybrid_lambda_ema": 0.0, **settings})
    own: Any = lambda parameter: parameter.main_grad  # noqa: E731
    update_mixtures([adapter], peft, own, ALONE, rotation_rate=0.125)
    assert int(adapter.num_kept) == (not math.isfinite(low + rotation) or low == rotation == 0)
    return float(adapter.mix)


RULES = {  # settings; lambda before, the two norms; lambda after
    "norms are divided by the mixture that they carry": ({}, 0.25, 3.0, 1.0, 12 / (12 + 4 / 3)),
    "equal norms before mixing are a fixed point": ({}, 0.3, 0.3, 0.7, 0.5),
    "rms divides by the roots of the sizes": ({"hybrid_lambda": "rms"}, 0.5, 3.0, 1.0, 1.5 / (1.5 + 1 / 3)),
    # A part of n equal numbers and norm g has them sum to g sqrt(n); the rates weigh the sums.
    "descent weighs absolute values": ({"hybrid_lambda": "descent"}, 0.25, 3.0, 1.0, 24 / (24 + 0.125 * 3 / 0.75)),
    "raw is the paper's formula": ({"hybrid_lambda": "raw"}, 0.25, 3.0, 1.0, 0.75),
    "fixed stays where it is put": ({"hybrid_lambda": "fixed:0.3"}, 0.3, 5.0, 1.0, 0.3),
    "the average moves slowly": ({"hybrid_lambda_ema": 0.9}, 0.5, 1.0, 3.0, 0.9 * 0.5 + 0.1 * 0.25),
    "clamped above": ({}, 0.5, 1.0, 1e-6, 0.98),
    "clamped below": ({}, 0.5, 1e-6, 1.0, 0.02),
    "clamped above by the flag": ({"hybrid_lambda_max": 0.75}, 0.5, 1.0, 1e-6, 0.75),
    "clamped below by the flag": ({"hybrid_lambda_min": 0.25}, 0.5, 1e-6, 1.0, 0.25),
    "the average is clamped, not the new value": (
        {"hybrid_lambda_ema": 0.5, "hybrid_lambda_max": 0.75},
        0.5,
        1.0,
        1e-6,
        0.75,
    ),
    "NaN": ({}, 0.4, math.nan, 1.0, 0.4),
    "infinite": ({}, 0.4, math.inf, 1.0, 0.4),
    "infinite beside a finite one": ({}, 0.4, 1.0, math.inf, 0.4),
    "both infinite": ({"hybrid_lambda": "raw"}, 0.4, math.inf, math.inf, 0.4),
    "no gradient": ({}, 0.4, 0.0, 0.0, 0.4),
}


@pytest.mark.parametrize(("settings", "mix", "low", "rotation", "expected"), RULES.values(), ids=RULES.keys())
def test_lambda_follows_its_rule(settings, mix, low, rotation, expected):
    assert updated(mix, low, rotation, **settings) == pytest.approx(expected)


def test_lambda_starts_where_it_is_put():
    assert PeftConfig("hybrid", hybrid_lambda="fixed:1").initial_mix == 1.0
    assert PeftConfig("hybrid", hybrid_lambda_init=0.7).initial_mix == 0.7
