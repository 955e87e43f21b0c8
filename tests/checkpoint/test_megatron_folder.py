"""Files in Megatron's form are found below the tracker that names them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_peft.checkpoint.megatron_folder import megatron_files
from tests.conversion.megatron_folders import save_random


@pytest.mark.parametrize(("tracker", "place"), [("10\n", "iter_0000010"), ("release", "release"), (None, "")])
def test_the_tracker_leads_to_the_files(tracker: str | None, place: str, tmp_path: Path) -> None:
    for name in ("iter_0000010", "iter_0000020", "release") if tracker else ("",):
        (tmp_path / name / "mp_rank_00").mkdir(parents=True)
    if tracker:
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(tracker)
    assert megatron_files(tmp_path) == tmp_path / place


def test_a_hugging_face_folder_holds_none(tmp_path: Path) -> None:
    assert megatron_files(save_random(tmp_path / "hf")) is None
    assert megatron_files(tmp_path / "nowhere") is None
