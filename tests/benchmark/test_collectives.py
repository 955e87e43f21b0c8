"""A LoRA step adds one full call without sequence parallelism, and r-wide ones only with it."""

from __future__ import annotations

from megatron_peft.benchmark import collectives
from megatron_peft.benchmark.collective_log import Collective
from megatron_peft.benchmark.subjects import Setting

WIDE = Collective("allreduce_", 1000, 4000, 100)
NARROW = Collective("_allgather_base_", 160, 640, 16)


def test_equal_calls_cancel_one_by_one() -> None:
    assert collectives.extra_calls([WIDE], [WIDE, NARROW, WIDE]) == [WIDE, NARROW]


def test_real_steps_reach_the_targets(tiny: Setting) -> None:
    figures = {figure.name: figure for figure in collectives.collectives_figures(tiny)}
    calls = [figure for name, figure in figures.items() if "bytes" not in name]
    assert [figure.measured for figure in calls] == [1, 0, 1 + 8, 0, 1, 0, 1 + 2 * 8, 0]
    assert all(figure.reached for figure in calls)
    # 4 layers: 2 row-parallel layers each forward, 2 column-parallel ones back, embedding and output, 3 for the loss.
    assert "frozen 21 calls" in figures["TP2: LoRA's all-reduces above the frozen base's"].note
    assert "8 allgather_base" in figures["TP2+SP: LoRA's other calls wider than r"].note
