"""The bar of long work at a terminal, and its lines in a log."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from megatron_peft.runtime import progress
from megatron_peft.runtime.progress import progress_bar


def test_a_log_has_a_line_every_ten_seconds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with progress_bar("Rehearsing") as advance:
        for now[0], done, more in ((0.0, 0, 5), (9.0, 1, 0), (11.0, 1, 0), (20.0, 1, 2), (21.5, 1, 0)):
            advance(done, more)
    assert capsys.readouterr().err == "Rehearsing: 2 of 5\nRehearsing: 4 of 7\n"
    now[0] = 0.0
    with progress_bar("Loading", 3_000_000, done=500_000, in_bytes=True) as advance:
        now[0] = 11.0
        advance(1_000_000)
    assert capsys.readouterr().err == "Loading: 1.5 MB of 3.0 MB\n"


def test_a_terminal_has_a_bar_and_other_ranks_show_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=terminal, force_terminal=True, width=80))
    with progress_bar("scoring", 2, enabled=False) as advance:
        advance(1)
    assert terminal.getvalue() == ""
    with progress_bar("scoring", 2) as advance:
        advance(1)
    assert "scoring" in terminal.getvalue() and "1/2" in terminal.getvalue()
