"""tools/report.py: what it writes where, and exit codes."""

from __future__ import annotations

from tests.reporting.small_results import write_cells
from tools import report


def test_report_elsewhere_takes_the_cells_along(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("megatron_peft.reporting.report.svg", lambda figure: "<svg/>")  # takes seconds
    monkeypatch.setattr("megatron_peft.reporting.report.save", lambda *_: None)
    write_cells(tmp_path)
    assert report.main([str(tmp_path), "--output", str(tmp_path / "there")]) == 0
    assert str(tmp_path / "there" / "report.html") in capsys.readouterr().out
    first = (tmp_path / "there" / "report.md").read_text()
    assert report.main([str(tmp_path / "there")]) == 0
    assert (tmp_path / "there" / "report.md").read_text() == first


def test_unknown_method_exits_with_2_and_writes_nothing(tmp_path, capsys):
    write_cells(tmp_path)
    assert report.main([str(tmp_path), "--against", "lorra", "--output", str(tmp_path / "there")]) == 2
    assert "--against lorra" in capsys.readouterr().err and not (tmp_path / "there").exists()
