"""Adapters that no run has trained, as a folder that a run loads: see also test_peft_import.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_peft.checkpoint.folders import newest_checkpoint
from megatron_peft.checkpoint.record import read_record
from megatron_peft.checkpoint.sharded_files import stored_shapes
from megatron_peft.config import ConfigurationError
from megatron_peft.conversion import adapter_save
from megatron_peft.conversion.adapter_save import save_adapters
from tests.checkpoint.records import make_record
from tests.one_rank import one_rank


def test_megatron_core_loads_the_tensors_and_we_the_record(tmp_path: Path) -> None:
    A = torch.arange(6.0).view(2, 3)
    save_adapters(tmp_path / "run", make_record(), {"x.adapter.A": A})
    checkpoint = newest_checkpoint(tmp_path / "run")
    assert checkpoint == tmp_path / "run" / "iter_0000000"
    assert read_record(checkpoint) == make_record()
    assert stored_shapes(checkpoint) == {"x.adapter.A": (2, 3)}
    wanted: Any = {"A": ShardedTensor.from_rank_offsets("x.adapter.A", torch.zeros(2, 3))}
    with one_rank():
        loaded = dist_checkpointing.load(wanted, str(checkpoint), validate_access_integrity=False)
    assert torch.equal(loaded["A"], A)


def test_nothing_is_left_of_a_folder_that_could_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapter_save, "publish", full)
    with pytest.raises(ConfigurationError, match=r"--output .*run could not be written \(No space left on device\)"):
        save_adapters(tmp_path / "run", make_record(), {"x.adapter.A": torch.zeros(2, 3)})
    assert not list(tmp_path.iterdir())
