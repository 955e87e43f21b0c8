"""Adapted layers on 4 and 16 tensor-parallel ranks equal the same layers on one, in float64 and in one process."""

from collections.abc import Iterator
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_peft.adapters import low_rank, urnn
from megatron_peft.adapters.rotation import BlockRotation
from megatron_peft.config import LinearSizes, PeftConfig
from tests.adapters.many_ranks import drawn, fake_groups, given_dropout, run_layer, spread

pytest.importorskip("torch.distributed._local_tensor", reason="this torch has no LocalTensorMode")

H, FEW_RANKS, MOST_RANKS = 64, 4, 16  # a rank has at least 4 features, one group of the rotations below

HEAD = H // MOST_RANKS
KINDS: dict[str, tuple[LinearSizes, int]] = {  # with the batch
    "qkv": (LinearSizes("column", 3 * H, H, 1, head_features=HEAD), 5),  # more tokens than features: the weight turns
    "fc1": (LinearSizes("column", 4 * H, H, 1, num_parts=2), 3),  # fewer: the activations turn
    "proj": (LinearSizes("row", H, H, 1), 3),
    "fc2": (LinearSizes("row", H, 2 * H, 1), 3),
}
BOFT: dict[str, Any] = {"method": "boft", "boft_block_size": 2, "boft_factors": 2}
URNN: dict[str, Any] = {"method": "urnn", "urnn_block_size": 4}
HYBRID = BOFT | URNN | {"method": "hybrid", "lora_rank": 3, "hybrid_lambda": "fixed:0.3"}
METHODS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "lora": {"method": "lora", "lora_rank": 3, "lora_dropout": 0.0},
    "lora, dropout": {"method": "lora", "lora_rank": 3, "lora_dropout": 0.5},
    "lora-ga, start subtracted": {"method": "lora-ga", "lora_rank": 3, "lora_ga_init": "paper"},
    **{
        f"{name}, {side} side": {**settings, "rotation_side": side}
        for side in ("output", "input")
        for name, settings in {
            "boft": BOFT,
            "boft projection": {**BOFT, "boft_parametrization": "projection"},
            "urnn": URNN,
            "urnn by Fourier transforms": URNN,
            "urnn riemannian": {**URNN, "urnn_update": "riemannian"},
        }.items()
    },
    "urnn replace": {**URNN, "urnn_mode": "replace"},
    "urnn riemannian replace": {**URNN, "urnn_mode": "replace", "urnn_update": "riemannian"},
    "hybrid": HYBRID,
    "hybrid, dropout": {**HYBRID, "lora_dropout": 0.5},
    "hybrid with urnn, start subtracted": {**HYBRID, "hybrid_rotation": "urnn", "lora_ga_init": "paper"},
}


def cases() -> Iterator[Any]:
    for method, settings in METHODS.items():
        only_square = settings.get("urnn_mode") == "replace"
        for kind in ("proj",) if only_square else KINDS:
            for size in (FEW_RANKS, MOST_RANKS):
                is_quick = size == FEW_RANKS and (kind in ("fc1", "fc2") or only_square)
                marks = [] if is_quick else [pytest.mark.slow]
                yield pytest.param(method, kind, size, marks=marks, id=f"{method}-{kind}-TP{size}")


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[dict[int, dist.ProcessGroup]]:
    """Of 1, 4 and 16 ranks, by size; this process is the first of each."""
    with fake_groups(FEW_RANKS, MOST_RANKS) as found:
        yield found
    on_one_rank.cache_clear()


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "SP"])
@pytest.mark.parametrize(("method", "kind", "size"), cases())
def test_many_ranks_equal_one(groups, monkeypatch, method, kind, size, sequence_parallel):
    """Output, the input's gradient and, after the sum over the ranks, the gradient of every factor."""
    monkeypatch.setattr(urnn, "DENSE_UP_TO", 0 if "Fourier" in method else 512)
    length = 16 if sequence_parallel else 15  # what every rank sees whole need not divide by the ranks
    expected = on_one_rank(method, kind, groups[1], length)
    found = run(method, kind, groups[size], length, sequence_parallel)
    assert found.keys() == expected.keys()
    for name, whole in expected.items():
        largest = whole.abs().max()
        assert largest > 0, f"{name} is zero: it says nothing"
        error = (found[name] - whole).abs().max() / largest
        assert error < 1e-12, f"{name}: {error:.1e} of its largest number"


class _Skewed(torch.autograd.Function):
    """The same numbers, and the same gradient, in another order in memory."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[override]
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    backward = forward


@pytest.mark.parametrize("case", [("boft, input side", "fc1"), ("lora", "fc2")], ids=["gradient", "output"])
def test_what_is_not_contiguous_is_summed(groups, monkeypatch, case):
    """megatron-core's `_reduce` adds up a contiguous copy and gives back what it was given."""
    turn, plus = BlockRotation.rotated_by_transpose, low_rank.frozen_linear_plus_low_rank
    monkeypatch.setattr(BlockRotation, "rotated_by_transpose", lambda self, x: turn(self, _Skewed.apply(x)))
    monkeypatch.setattr(low_rank, "frozen_linear_plus_low_rank", lambda *args: _Skewed.apply(plus(*args)))
    test_many_ranks_equal_one(groups, monkeypatch, *case, FEW_RANKS, sequence_parallel=False)


@cache
def on_one_rank(method: str, kind: str, group: dist.ProcessGroup, length: int) -> dict[str, Tensor]:
    """Also the first to ask for the constants that adapters keep, which so belong to no rank."""
    return run(method, kind, group, length, sequence_parallel=False)


def run(method: str, kind: str, group: dist.ProcessGroup, length: int, sequence_parallel: bool) -> dict[str, Tensor]:
    """Of `run_layer`."""
    sizes, batch = KINDS[kind]
    peft = PeftConfig(**METHODS[method]) if METHODS[method] else None
    split = (2, 1) if sizes.split == "row" else (0, 1) if sequence_parallel else None  # as the layer's input is
    mask = spread((drawn("mask", length, batch, sizes.in_features) > 0) / 0.5, split, group.size())
    dropout = given_dropout(mask)
    with mock.patch.object(low_rank.LowRank, "input_dropout", lambda self, _: dropout if self.dropout else None):
        return run_layer(kind, sizes, peft, group, (length, batch), sequence_parallel)
