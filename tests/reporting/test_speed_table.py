from __future__ import annotations

from pathlib import Path

import pytest

from megatron_peft.reporting.speed_table import table
from tests.reporting import small_results
from tests.reporting.small_results import METHODS, results


def test_factors_are_against_lora(tmp_path: Path) -> None:
    """LoRA-GA has LoRA's losses after 40 steps after 19.8, 19.6 and 18.8."""
    found = table(results(tmp_path), "tiny", "talk")
    assert found is not None and found.columns == ("method", "N = 10", "N = 20", "N = 40")
    assert [row[0] for row in found.rows] == ["lora-ga", "hybrid"]
    assert found.rows[0][1] == "≥ 1.00" and found.rows[0][3] == "2.06"


def test_without_lora_there_is_no_table(tmp_path: Path) -> None:
    methods = {name: METHODS[name] for name in ("lora-ga", "hybrid")}
    assert table(results(tmp_path, methods=methods), "tiny", "talk") is None


def test_loss_that_is_never_reached_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = {"lora": METHODS["lora"], "slow": {"flags": {"peft-method": "boft"}, "grid": {"lr": [0.1, 0.4]}}}
    monkeypatch.setitem(small_results.LOSSES, "slow", 9.0)
    monkeypatch.setitem(small_results.BETTER, "slow", "0.4")
    found = table(results(tmp_path, methods=methods), "tiny", "talk")
    assert found is not None and found.rows[0][1:] == ("not reached (0/3)",) * 3
