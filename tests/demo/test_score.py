from __future__ import annotations

import pytest

from megatron_peft.demo.score import Score

SCORE = Score(12.5, "nrefs:1|version:2", 1.75, 1000, ("Ouvrir le fichier", "Fermé"))


def test_a_score_reads_back_as_it_was_written(tmp_path):
    SCORE.write(tmp_path / "after.json")
    assert Score.read(tmp_path / "after.json") == SCORE
    assert [path.name for path in tmp_path.iterdir()] == ["after.json"]


def test_a_score_that_is_cut_short_leaves_no_file(tmp_path, monkeypatch):
    def fail(self, target):
        raise OSError("killed")

    monkeypatch.setattr(type(tmp_path), "replace", fail)
    with pytest.raises(OSError, match="killed"):
        SCORE.write(tmp_path / "after.json")
    assert not (tmp_path / "after.json").exists()
