"""A long wait is never silent."""

import io
import time

from rich.console import Console

from megatron_peft.demo import data as module
from megatron_peft.demo.data import waiting


def test_in_a_file_a_line_tells_every_few_seconds_how_far_it_is(monkeypatch, capsys) -> None:
    assert module.SECONDS_OF_SILENCE < 5
    monkeypatch.setattr(module, "SECONDS_OF_SILENCE", 0.05)
    with waiting("scoring", total=8) as advance:
        advance(3)
        time.sleep(0.5)
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0] == "demo: scoring"
        and len(lines) > 2
        and lines[-1] == f"demo: scoring: {lines[-1].split()[2]} s, 3 of 8"
    )
    with waiting("on another rank", enabled=False) as advance:
        advance(1)
    assert capsys.readouterr().out == ""


def test_at_a_terminal_a_bar_moves(monkeypatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(module, "Console", lambda: Console(file=terminal, force_terminal=True, width=80))
    with waiting("scoring", total=2) as advance:
        advance(1)
        time.sleep(0.3)
    assert "demo: scoring" in terminal.getvalue() and "━" in terminal.getvalue()
