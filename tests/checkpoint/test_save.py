"""A failed save is one message on all ranks and loses nothing, also in the background; generators repeat."""

import os
import random
import re
import shutil
import signal
import threading
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_peft.checkpoint import folders, safe_pickle, save
from megatron_peft.checkpoint.folders import MANIFEST, publish, start_draft
from megatron_peft.checkpoint.save import Saver
from megatron_peft.checkpoint.state import Position, random_targets, random_tensors, restore_random
from megatron_peft.checkpoint.tensors import RankFiles, complete_files
from megatron_peft.config import CheckpointConfig, ConfigurationError
from megatron_peft.parallel.collectives import from_first_rank, gathered_by_first_rank
from megatron_peft.runtime.failure import run_together
from megatron_peft.runtime.launch import start_world
from tests.checkpoint.runs import SHAPE, make_config
from tests.checkpoint.test_folders import holder
from tests.ranks import Ranks
from tests.recorded_calls import recorded_calls
from tests.time_limits import seconds


@pytest.mark.parametrize("phase", ["data on rank 1", "data on rank 1, for real", "metadata", "common file", "record"])
def test_a_full_disk_loses_nothing(two_ranks, phase):
    assert [facts["failed saves"]["afterwards"] for facts in two_ranks] == [2, 2], "a later save works"
    (message, as_before), other = (facts["failed saves"][phase] for facts in two_ranks)
    assert other == (message, True) and as_before, "the folder's files changed, or the draft is still there"
    assert message.startswith("CheckpointNotSaved: --save") and "iteration 2 was not saved" in message
    assert ("File too large" if "for real" in phase else "No space left on device") in message


def test_a_save_does_not_disturb_the_run(two_ranks):
    assert [facts["saves disturb"] for facts in two_ranks] == [[], []]


def test_training_continues_while_the_state_at_the_save_is_written(two_ranks):
    for behind in (facts["behind"] for facts in two_ranks):
        assert (behind["before"], behind["after"]) == ((None, None), (1, "None", "iter_0000001"))
        assert behind["differences"] == [] and behind["nothing pending"] is None  # each save is told once


def test_the_thread_of_a_background_save_is_on_the_device_of_its_rank(alone, tmp_path, monkeypatch):
    """torch starts threads on device 0. `runtime/test_launch.py` has the function that sets it."""
    where: list[str] = []
    monkeypatch.setattr(save, "device_setter", lambda: lambda: where.append(threading.current_thread().name))
    with Saver(CheckpointConfig(save=str(tmp_path), async_save=True)) as saver:
        assert saver._executor is not None
        saver._executor.submit(int).result()
    assert where == ["checkpoint_0"]


def test_a_full_disk_in_the_background_is_reported_on_all_ranks(two_ranks):
    for failing in (facts["behind, failing"] for facts in two_ranks):
        assert "iteration 2 was not saved" in failing["message"] and "No space left" in failing["message"]
        assert failing["unchanged"] and failing["again"] == (2, None)


def _waits_for_a_save(folder: str, own: Callable[[], object]) -> None:
    """Both ranks wait for a save, of which rank 1 writes its share by `own`."""

    def main() -> None:
        with Saver(CheckpointConfig(save=folder, async_save=True)) as saver:
            draft = mock.Mock()
            draft.complete = lambda: gathered_by_first_rank(own if dist.get_rank() == 1 else int, list, saver._group)
            saver._pending = 1, saver._executor.submit(saver._complete, draft)
            saver.finish()

    start_world()
    run_together(main, "program")


def _dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _fails() -> None:
    raise RuntimeError("out of memory")


@pytest.mark.parametrize(
    ("own", "codes", "told"),
    [
        (_dies, [1, -signal.SIGKILL], ["program: rank 0 lost its connection to another rank: that one was killed", ""]),
        (_fails, [1, 1], ["program: rank 1: RuntimeError: out of memory", "program: rank 1 failed:"]),
    ],
)
def test_rank_that_fails_while_others_wait_for_a_save_ends_them(tmp_path, own, codes, told):
    with Ranks(2, partial(_waits_for_a_save, own=own), str(tmp_path)) as ranks:
        for process in ranks.processes:
            process.join(seconds(100))
        assert ranks.exit_codes == codes
        assert all(text in ranks.output(rank) for rank, text in enumerate(told)), ranks.output(0)


def test_old_checkpoints_are_removed_while_the_run_goes_on_and_before_it_ends(alone, tmp_path, monkeypatch):
    for iteration in (1, 2):
        publish(start_draft(tmp_path / f"iter_{iteration:07d}"), tmp_path, iteration)
    may_remove, rmtree = threading.Event(), shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **words: may_remove.wait(10) and rmtree(*args, **words))
    settings = CheckpointConfig(save=str(tmp_path), load=str(tmp_path), keep_last_checkpoints=1)
    record = SimpleNamespace(config=SimpleNamespace(checkpoint=settings))
    draft = SimpleNamespace(complete=lambda: None, record=record, iteration=2, best_iteration=None)
    monkeypatch.setattr(save, "draft_checkpoint", lambda *_, **__: draft)
    may_remove.set()
    with Saver(settings) as saver:
        may_remove.clear()
        saver.start(SimpleNamespace(position=SimpleNamespace(iteration=2)))
        assert saver.finish().error is None
        while not (removed := tmp_path / ".iter_0000001.removed").exists():
            assert not may_remove.wait(0.01)
        may_remove.set()
    assert not removed.exists() and (tmp_path / "iter_0000002").exists()


def test_a_pending_save_is_completed_when_the_run_ends_and_the_last_two_are_kept(two_ranks):
    assert [facts["left behind"] for facts in two_ranks] == [["iter_0000002", "iter_0000003"]] * 2


def test_a_run_into_the_folder_of_another_is_refused_and_touches_nothing(alone, tmp_path, monkeypatch):
    draft = start_draft(tmp_path / "iter_0000050")
    take = folders.FolderLock
    monkeypatch.setattr(folders, "FolderLock", lambda folder: take(folder, grace_seconds=0.1))
    with holder(tmp_path), pytest.raises(ConfigurationError, match="another run is saving there"):
        Saver(CheckpointConfig(save=str(tmp_path)))
    assert draft.exists()


def test_a_moved_folder_is_locked_again_unless_another_run_has_it(alone, tmp_path):
    with Saver(CheckpointConfig(save=str(tmp_path / "run"))) as saver:
        held = saver._lock
        saver.hold_folder()
        assert saver._lock is held
        (tmp_path / "run" / ".lock").unlink()
        publish(start_draft(tmp_path / "run" / "iter_0000050"), tmp_path / "run", 50)
        draft = start_draft(tmp_path / "run" / "iter_0000060")  # which a thread of this run is writing
        saver.hold_folder()  # the lock's file alone is gone, and the checkpoints are this run's
        assert draft.is_dir()
        (tmp_path / "run").rename(tmp_path / "moved")
        with holder(tmp_path / "run"), pytest.raises(ConfigurationError, match="another run has that folder now"):
            saver.hold_folder()
        saver.hold_folder()  # it has ended without a checkpoint
        assert saver._lock.is_in_place and saver._lock is not held
        (tmp_path / "run").rename(tmp_path / "moved again")
        (tmp_path / "moved").rename(tmp_path / "run")
        with pytest.raises(ConfigurationError, match="another run has that folder now"):
            saver.hold_folder()


def test_a_folder_that_cannot_be_read_is_a_configuration_error(alone, tmp_path):
    with pytest.raises(ConfigurationError, match="No such file or directory: .*gone"):
        from_first_rank(lambda: (tmp_path / "gone").read_text())


@pytest.mark.parametrize("is_locked", [True, False])
def test_drafts_of_a_killed_run_are_removed_under_the_lock_only(alone, tmp_path, monkeypatch, is_locked):
    draft = start_draft(tmp_path / "iter_0000050")
    if not is_locked:
        monkeypatch.setattr(folders, "locked", lambda *_: False)
    with Saver(CheckpointConfig(save=str(tmp_path))) as unused:
        assert unused.finish() is None
    assert draft.exists() != is_locked


def test_a_ranks_files_are_synced_when_write_returns_and_a_torn_one_is_told_in_words(alone, tmp_path, monkeypatch):
    """The first rank, which publishes them, may be another machine: it cannot sync what this one has not sent."""
    files = RankFiles([ShardedTensor.from_rank_offsets("w", torch.ones(4))], tmp_path)
    calls = recorded_calls(monkeypatch)
    written = files.write()
    assert set(written.sums) == {"__0_0.distcp"} and ("fsync", tmp_path / "__0_0.distcp") in calls
    torn = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    monkeypatch.setattr(torch, "save", mock.Mock(side_effect=torn))
    with pytest.raises(ConfigurationError, match="could not be written: a file was cut short; is the disk full.$"):
        complete_files(tmp_path, [written])


def test_index_with_a_slice_twice_is_not_saved(alone, tmp_path):
    files = RankFiles([ShardedTensor.from_rank_offsets("w", torch.ones(4))], tmp_path)
    with pytest.raises(ConfigurationError, match="could not be written: .*slices of a tensor are missing or overlap"):
        complete_files(tmp_path, [files.write()] * 2)
    with pytest.raises(ConfigurationError, match="slices of a tensor are missing or overlap"):
        safe_pickle.read_metadata(tmp_path)


def test_what_only_a_resumed_run_needs_has_a_file_of_its_own_and_no_file_is_synced_twice(alone, tmp_path, monkeypatch):
    named = {"w": torch.ones(4), "optimizer.exp_avg.w": torch.ones(4), "rng.tp0.all": torch.ones(2)}
    draft = start_draft(tmp_path / "iter_0000001")
    files = RankFiles([ShardedTensor.from_rank_offsets(key, data) for key, data in named.items()], draft)
    calls = recorded_calls(monkeypatch)
    written = files.write()
    files_of = {one.index.fqn: one.storage_data.relative_path for one in written.results}
    assert files_of == {key: "__0_0.distcp" if key == "w" else "__0_optimizer_0.distcp" for key in named}
    publish(draft, tmp_path, 1, complete_files(draft, [written]))
    synced = [path.name for name, path in calls if name == "fsync"]
    assert [synced.count(name) for name in ("__0_0.distcp", "__0_optimizer_0.distcp", "common.pt")] == [1, 1, 1]


def test_a_folder_of_tensors_is_on_the_disk_before_it_has_its_name_and_that_after(alone, tmp_path, monkeypatch):
    monkeypatch.setattr(save, "RankFiles", lambda tensors, draft: SimpleNamespace(write=lambda: None))
    monkeypatch.setattr(save, "complete_files", lambda draft, by_rank: {})
    calls = recorded_calls(monkeypatch)
    save.write_new_folder([], tmp_path / "new")
    told = " ".join(f"{name} {path.name}" for name, path in calls)
    assert re.search(rf"fsync {MANIFEST} fsync \.new\.\w+\.draft rename new fsync {tmp_path.name}$", told)


def test_a_record_names_tokenizer_and_chat_template_so_that_other_folders_find_them(alone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tokens", "a.jinja"):
        (tmp_path / name).touch()
    found = []
    for tokenizer, template in (("tokens", "a.jinja"), ("org/name", "{{ messages }}" * 300)):
        data = {"tokenizer_model": tokenizer, "chat_template": template}
        state = SimpleNamespace(
            config=make_config(data_settings=data, checkpoint={"no_save_optim": True}),
            **{"shape": SHAPE, "schedule": None, "position": Position(), "best": None},
            **{"data_digest": None, "tokenizer_digest": "12", "longest_sample": 7},
        )
        record = save.record_of(state, (), [])
        assert record.longest_sample == 7
        found += [record.config.data.tokenizer_model, record.config.data.chat_template, record.tokenizer_digest]
    expected = [str(tmp_path / "tokens"), str(tmp_path / "a.jinja"), "12", "org/name", "{{ messages }}" * 300, "12"]
    assert found == expected


def draws():
    with tensor_parallel.get_cuda_rng_tracker().fork():
        tracked = torch.rand(1).item()
    return [random.gauss(0, 1), float(np.random.normal()), torch.rand(1).item(), tracked]


@pytest.mark.parametrize("form", ["all in one", "a tensor each, as once"])
def test_restored_generators_repeat_their_numbers_and_belong_to_a_layout(alone, monkeypatch, form):
    draws()  # an odd number of normal draws: a second one waits in Python's and in numpy's generator
    (packed,) = random_tensors()
    stored = {packed.key: packed.data.clone()}
    if form != "all in one":
        states = safetensors.torch.load(bytes(packed.data.numpy()))
        stored = {packed.key.removesuffix("all") + name: state for name, state in states.items()}
        assert len(stored) > 4
    first = draws()
    targets = random_targets({key: tuple(data.shape) for key, data in stored.items()})
    for target in targets:
        target.tensor.copy_(stored[target.slices[0].key])
    restore_random(targets)
    assert draws() == first
    targets[0].tensor.zero_()
    with pytest.raises(ConfigurationError, match="the checkpoint's random state"):
        restore_random(targets)
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_world_size", lambda: 2)
    assert random_targets({key: tuple(data.shape) for key, data in stored.items()}) == []
