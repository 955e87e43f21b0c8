"""A figure is judged by its target, in the table and in the file."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from megatron_peft.benchmark.figures import Figure, print_table, write_json


@pytest.mark.parametrize(("measured", "target", "reached"), [(1.0, 1.0, True), (1.01, 1.0, False), (9.0, None, None)])
def test_target_is_the_largest_good_value(measured: float, target: float | None, reached: bool | None) -> None:
    assert Figure("x", measured, target).reached is reached


def test_table_tells_pass_from_fail() -> None:
    printed = io.StringIO()
    figures = [Figure("slow", 2.0, 1.5, "s", "why"), Figure("fast", 1.0, 1.5, "s"), Figure("beside", 3.0)]
    print_table("speed", figures, Console(file=printed, width=100))
    lines = {
        name: next(line for line in printed.getvalue().splitlines() if name in line)
        for name in ("slow", "fast", "beside")
    }
    assert "FAIL" in lines["slow"] and "2 s" in lines["slow"] and "<= 1.5 s" in lines["slow"] and "why" in lines["slow"]
    assert "pass" in lines["fast"]
    assert "pass" not in lines["beside"] and "FAIL" not in lines["beside"] and "<=" not in lines["beside"]


def test_json_holds_numbers_and_verdict(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "a.json", [Figure("x", 1.5, 2.0, "s", "note")])
    (row,) = json.loads((tmp_path / "new" / "a.json").read_text())
    assert row == {"name": "x", "measured": 1.5, "target": 2.0, "unit": "s", "note": "note", "reached": True}
