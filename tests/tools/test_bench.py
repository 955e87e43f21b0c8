"""tools/bench.py: names, files and exit codes."""

from __future__ import annotations

import json

import pytest

from megatron_peft.benchmark import registry
from megatron_peft.benchmark.figures import Figure
from tools import bench


@pytest.mark.parametrize(("names", "code", "files"), [(["a"], 0, {"a.json"}), ([], 1, {"a.json", "b.json"})])
def test_exit_code_says_whether_all_was_reached(tmp_path, monkeypatch, names, code, files):
    good, bad = [Figure("good", 1.0, 2.0)], [Figure("bad", 3.0, 2.0)]
    benchmarks = {"a": registry.Benchmark("A", lambda place: good), "b": registry.Benchmark("B", lambda place: bad)}
    monkeypatch.setattr(registry, "BENCHMARKS", benchmarks)
    assert bench.main([*names, "--output", str(tmp_path)]) == code
    assert {path.name for path in tmp_path.iterdir()} == files
    assert json.loads((tmp_path / "a.json").read_text())[0]["reached"] is True
