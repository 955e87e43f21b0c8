"""Files that were cut short are named on every rank, and nothing hangs."""

from __future__ import annotations

import pickle

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_peft.checkpoint.sharded_files import PlannedFiles, read_tensors, stored_shapes
from megatron_peft.config import ConfigurationError
from tests.conversion.megatron_folders import save_distributed
from tests.one_rank import one_rank
from tests.recorded_calls import recorded_calls


@pytest.mark.parametrize("name", ["__1_0.distcp", ".metadata", "run_record.json"])
def test_a_file_cut_short_is_reported_on_all_ranks(two_ranks, name):
    messages = {facts["damaged"][name] for facts in two_ranks}
    (message,) = messages
    assert message.startswith("ConfigurationError")
    assert "is damaged" in message or "cannot be read" in message


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (print, ("it ran",))


@pytest.mark.parametrize("read", ["shapes", "tensors"])
def test_an_index_that_would_run_code_is_refused_and_runs_nothing(tmp_path, capsys, read):
    folder = save_distributed(tmp_path / "run", {"w": torch.ones(4)})
    index = pickle.loads((folder / ".metadata").read_bytes())
    index.planner_data = Evil()
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    wanted = ShardedTensor.from_rank_offsets("w", torch.zeros(4))
    with one_rank(), pytest.raises(ConfigurationError, match="is refused: to unpickle it would call builtins.print"):
        stored_shapes(folder) if read == "shapes" else read_tensors([wanted], folder)
    assert "it ran" not in capsys.readouterr().out


def test_a_ranks_files_are_on_the_disk_when_it_says_so(tmp_path, monkeypatch):
    """The first rank, which publishes them, may be another machine: it cannot sync what this one has not sent."""
    with one_rank():
        files = PlannedFiles([ShardedTensor.from_rank_offsets("w", torch.ones(4))], tmp_path)
        calls = recorded_calls(monkeypatch)
        written = files.write()
    assert set(written.sums) == {"__0_0.distcp"}
    assert ("fsync", tmp_path / "__0_0.distcp") in calls
