"""A place that no file can be written to is told; a folder that is missing is made."""

from __future__ import annotations

import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.evaluation.output import check_output


def test_a_place_that_cannot_hold_results_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="is a folder: give a file"):
        check_output(str(tmp_path))
    with pytest.raises(ConfigurationError, match="cannot be written"):
        check_output(str(tmp_path / "file" / "out.json"))


def test_the_folder_is_made_and_nothing_is_asked_of_the_terminal(tmp_path):
    check_output(None)
    check_output(str(tmp_path / "new" / "out.json"))
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
