"""The first rank looks, the others are told; what it raises reaches them as one error (ranks: test_saver.py)."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from megatron_peft.checkpoint.agreement import _on_first_rank, from_first_rank
from megatron_peft.config import ConfigurationError


def test_what_is_found_is_returned(alone) -> None:
    assert from_first_rank(lambda: {"iteration": 3}) == {"iteration": 3}


def test_a_folder_that_cannot_be_read_is_an_error_of_the_user(alone, tmp_path) -> None:
    with pytest.raises(ConfigurationError, match="No such file or directory: .*gone"):
        from_first_rank(lambda: (tmp_path / "gone").read_text())


def test_others_do_not_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    assert _on_first_rank(lambda: pytest.fail("looked")) is None
