"""Seconds become figures with the right one below the line."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_peft.benchmark import steps
from megatron_peft.benchmark.memory import Peak
from megatron_peft.benchmark.subjects import Setting

SECONDS = {
    "frozen": [1.0],
    "lora": [1.5],
    "boft": [1.8],
    "urnn": [1.2],
    "hf-peft-lora": [2.0],
    "hybrid": [2.1],
    "full": [3.0],
}


@pytest.fixture(autouse=True)
def fabricated(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(num_ranks: int, target: str, job: Any, timeout: float) -> list[dict[str, list[float]]]:
        assert target == "megatron_peft.benchmark.timing:time_turns"
        return [{name: SECONDS[name] for name in job.names}] * num_ranks

    monkeypatch.setattr(steps, "run_ranks", answer)
    monkeypatch.setattr(steps, "peak_of_steps", lambda setting, name: Peak(int(10 * SECONDS[name][0]), 0))


def test_lora_over_frozen_at_three_layouts() -> None:
    figures = steps.lora_ratio_figures(Setting("nowhere"), num_turns=1)
    assert [(f.name.split(":")[0], f.measured, f.target) for f in figures] == [
        ("TP1", 1.5, 1.08),
        ("TP2", 1.5, 1.10),
        ("TP2+SP", 1.5, 1.12),
    ]


def test_everything_over_full() -> None:
    figures = {f.name: f for f in steps.lora_full_figures(Setting("nowhere"), num_turns=1)}
    assert figures["lora step / full step"].measured == 0.5 and figures["lora step / full step"].target == 0.72
    peer = figures["lora step / hf-peft-lora step"]
    assert (peer.measured, peer.target) == (0.75, 1.0)
    assert figures["frozen: peak memory / full's"].measured == pytest.approx(1 / 3)
    assert len(figures) == 7


def test_hybrid_over_frozen_and_over_full() -> None:
    (over_frozen,) = steps.hybrid_ratio_figures(Setting("nowhere"), num_turns=1)
    assert (over_frozen.measured, over_frozen.target) == (2.1, 1.20)
    time, memory = steps.hybrid_full_figures(Setting("nowhere"), num_turns=1)
    assert (time.measured, time.target) == (pytest.approx(0.7), 0.80)
    assert (memory.measured, memory.target) == (pytest.approx(0.7), 0.60)


def test_rotations() -> None:
    boft, urnn = steps.rotation_figures(Setting("nowhere"), num_turns=1)
    assert (boft.measured, boft.target, urnn.measured, urnn.target) == (pytest.approx(1.2), 1.10, 1.2, 1.30)
