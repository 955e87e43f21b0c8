"""tools/report.py: what it writes where, and exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.reporting.small_results import write_cells
from tools import report


def test_report_elsewhere_takes_the_cells_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megatron_peft.reporting.report.svg", lambda figure: "<svg/>")  # takes seconds
    monkeypatch.setattr("megatron_peft.reporting.report.save", lambda *_: None)
    write_cells(tmp_path)
    assert report.main([str(tmp_path), "--output", str(tmp_path / "there")]) == 0
    assert str(tmp_path / "there" / "report.html") in capsys.readouterr().out
    first = (tmp_path / "there" / "report.md").read_text()
    assert report.main([str(tmp_path / "there")]) == 0
    assert (tmp_path / "there" / "report.md").read_text() == first


def test_nothing_to_report_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path)]) == 2
    assert "report: error: " in capsys.readouterr().err


def test_unknown_method_exits_with_2_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_cells(tmp_path)
    assert report.main([str(tmp_path), "--against", "lorra", "--output", str(tmp_path / "there")]) == 2
    assert "--against lorra" in capsys.readouterr().err and not (tmp_path / "there").exists()
