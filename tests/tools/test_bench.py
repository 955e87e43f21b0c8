"""tools/bench.py: names, files and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_peft.benchmark import registry
from megatron_peft.benchmark.figures import Figure
from tools import bench


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = [Figure("good", 1.0, 2.0)], [Figure("bad", 3.0, 2.0)]
    benchmarks = {"a": registry.Benchmark("A", lambda place: good), "b": registry.Benchmark("B", lambda place: bad)}
    monkeypatch.setattr(registry, "BENCHMARKS", benchmarks)


@pytest.mark.parametrize(("names", "code", "files"), [(["a"], 0, {"a.json"}), ([], 1, {"a.json", "b.json"})])
def test_exit_code_says_whether_all_was_reached(
    two: None, tmp_path: Path, names: list[str], code: int, files: set[str]
) -> None:
    assert bench.main([*names, "--output", str(tmp_path)]) == code
    assert {path.name for path in tmp_path.iterdir()} == files
    assert json.loads((tmp_path / "a.json").read_text())[0]["reached"] is True


def test_unknown_name_lists_the_known(two: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(["c"])
    assert "no benchmark is called c: there are a, b" in capsys.readouterr().err
