"""What a log sees of a long list of requests."""

from __future__ import annotations

from megatron_peft.evaluation.progress import request_bar


def test_a_log_has_a_line_at_each_tenth(capsys):
    with request_bar("scoring", 40, done=2) as advance:
        for _ in range(19):
            advance(2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "scoring: 4 of 40" and lines[-1] == "scoring: 40 of 40"
    assert len(lines) == 10


def test_nothing_to_do_is_no_error(capsys):
    with request_bar("scoring", 0):
        pass
    assert capsys.readouterr().err == ""
