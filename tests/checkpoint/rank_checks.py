"""What the tests of this folder check, gathered in one world: a function for each fact."""

import dataclasses
import errno
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter

from megatron_peft.checkpoint import tensors as sharded_files
from megatron_peft.checkpoint.folders import newest_checkpoint
from megatron_peft.checkpoint.load import find_whole_checkpoint, load_checkpoint, load_trained_parameters
from megatron_peft.checkpoint.run_record import read_run_record
from megatron_peft.checkpoint.save import Saver, draft_checkpoint
from megatron_peft.checkpoint.tensors import sharded_parameters
from megatron_peft.runtime.launch import start_world
from tests.checkpoint.runs import Files, Run, Settings, attempt, configure, differences, merged, start, stored_tensors
from tests.conversion.megatron_folders import flip_a_byte
from tests.time_limits import wait_until
from tests.training.recorded_saves import small_files_only

DROPOUT: Settings = {"transformer": {"hidden_dropout": 0.1, "attention_dropout": 0.1}, "peft": {"lora_dropout": 0.1}}
# A run's name says what it is: each word is some settings, and later words win.
WORDS: dict[str, Settings] = {
    **dict.fromkeys(("lora", "DP2"), {}),
    "TP2": {"parallel": {"tensor_model_parallel_size": 2}},
    "SP": {"parallel": {"sequence_parallel": True}},
    "PP2": {"parallel": {"pipeline_model_parallel_size": 2}},
    "interleaved": {"parallel": {"num_layers_per_virtual_pipeline_stage": 1}},
    # With interleaved stages there is a chunk without a layer on both ranks.
    "accounted": {
        "parallel": {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}
    },
    "PP4": {
        "parallel": {"pipeline_model_parallel_size": 4, "pipeline_model_parallel_layout": "E|t|t||t|t||L"},
        "training": {"micro_batch_size": 1},
    },
    "distributed": {"optimizer": {"use_distributed_optimizer": True}},
    "sgd": {"optimizer": {"optimizer": "sgd"}},
    "bf16": {"model": {"bf16": True}},
    "tied": {"model": {"pretrained_checkpoint": "tied"}},
    "odd-rows": {"model": {"make_vocab_size_divisible_by": 7}},  # 1,008 rows of the vocabulary at TP2, else 1,001
    "last-layer": {"peft": {"target_modules": ("decoder.layers.3.*",)}},  # none on the first of 2 stages
    "full": {"peft": {"method": "full"}, "optimizer": {"lr": 1e-3}},
    "lora+": {"peft": {"lora_plus_ratio": 4.0}},
    "boft": {"peft": {"method": "boft", "boft_block_size": 2, "boft_factors": 2}},
    "projected": {"peft": {"boft_parametrization": "projection"}},
    "hybrid": {"peft": {"method": "hybrid", "boft_block_size": 2, "boft_factors": 2}},
    "urnn": {"peft": {"method": "urnn", "urnn_block_size": 4}},
    "riemannian": {"peft": {"urnn_update": "riemannian", "peft_lr_rotation": 0.02}},
    # Merged just before the save.
    "merging": {"peft": {"method": "hybrid", "hybrid_rotation": "urnn", "hybrid_merge_interval": 2}},
}
TWO = "lora TP2, lora+ DP2 distributed bf16, hybrid TP2 SP bf16, full TP2 SP odd-rows bf16, full PP2 tied"
RESUMED_ON_TWO = TWO.split(", ")
# `make test-all` adds these, in a world of their own.
SLOWLY_RESUMED = (
    *("lora PP2 bf16 last-layer", "urnn merging TP2", "urnn riemannian DP2 distributed bf16", "lora TP2 SP bf16"),
    *("lora PP2 interleaved", "lora PP2 interleaved accounted distributed", "full PP2 interleaved accounted bf16"),
    *("lora TP2 sgd", "boft projected PP2", "full DP2 distributed bf16", "full TP2 bf16", "full TP2 SP odd-rows"),
)
RESHARDED = (  # from, to
    ("full TP2 SP odd-rows bf16", "full PP2 odd-rows bf16"),  # fewer padded rows
    ("full TP2 SP odd-rows bf16", "full DP2 distributed bf16"),
    ("full PP2 tied", "full TP2 tied"),
    ("lora+ DP2 distributed bf16", "lora+ PP2 bf16"),
    ("hybrid TP2 SP bf16", "hybrid DP2 distributed bf16"),
    ("lora TP2", "lora PP2 interleaved accounted"),
)
SLOWLY_RESHARDED = (
    ("urnn merging TP2", "urnn merging PP2"),
    ("urnn riemannian DP2 distributed bf16", "urnn riemannian TP2 bf16"),
    ("lora PP2 bf16 last-layer", "lora TP2 bf16 last-layer"),
    ("full DP2 distributed bf16", "full TP2 bf16"),
    ("lora PP2 interleaved", "lora TP2"),
    ("lora PP2 interleaved accounted distributed", "lora TP2"),
    ("lora TP2 sgd", "lora PP2 sgd"),
    ("lora PP2 interleaved", "lora DP2 distributed"),
    ("full TP2 bf16", "full DP2 distributed bf16"),
    ("full TP2 SP odd-rows", "full PP2 odd-rows"),
)
READ_ONCE = (  # from, to: what tensor-parallel ranks, replicas, or both have in common
    ("lora TP2", "lora TP2"),
    ("hybrid TP2 SP bf16", "hybrid DP2 bf16"),
    ("lora+ DP2 distributed bf16", "lora+ DP2 distributed bf16"),
    ("full PP2 tied", "full TP2 tied"),
)
ON_FOUR = (
    ("lora TP2 PP2", "lora PP4"),
    ("full TP2 distributed", "full TP2 PP2"),
    ("lora PP4", "lora TP2 SP PP2 distributed"),
)


def named(name: str) -> Settings:
    return merged(*(WORDS[word] for word in name.split()))


def on_two_ranks(files: Files) -> dict[str, Any]:
    """Every fact by name. The folders of the resumed runs serve the others."""
    start_world()
    return {
        "resumed": {name: resumed(files, name) for name in RESUMED_ON_TWO},
        "resharded": {pair: _resharded(files, *pair) for pair in RESHARDED},
        "bf16 to float32": _bf16_to_float32(files),
        "read once": {pair: _read_once(files, *pair) for pair in READ_ONCE},
        **_saver_facts(files),
    }


def slowly_on_two_ranks(files: Files) -> dict[str, Any]:
    start_world()
    facts = {name: resumed(files, name) for name in SLOWLY_RESUMED}
    return {"resumed": facts, "resharded": {pair: _resharded(files, *pair) for pair in SLOWLY_RESHARDED}}


def on_four_ranks(argument: tuple[Files, tuple[str, str]]) -> list[str]:
    files, pair = argument
    start_world()
    return resumed(files, pair[0]) + _resharded(files, *pair)


def _folder(files: Files, name: str) -> str:
    return str(Path(files.work, name.replace(" ", "-")))


def _run(files: Files, settings: Settings, disturbed: bool = False, **checkpoint: Any) -> Run:
    return start(configure(files, merged(settings, {"checkpoint": checkpoint})), disturbed)


def resumed(files: Files, name: str, more: Settings | None = None, async_save: bool = False) -> list[str]:
    """What differs at the end between a run that saves after two steps and goes on, and one that resumes there."""
    folder, settings = _folder(files, name + " async" * async_save), merged(DROPOUT, named(name), more or {})
    whole = _run(files, settings, save=folder, async_save=async_save)
    whole.train(2)
    with Saver(whole.state.config.checkpoint) as saver:
        saver.start(whole.state)
        losses, ended = whole.train(1), whole.snapshot()  # with --async-save it is written meanwhile
        outcome = saver.finish()
    assert outcome is not None and outcome.error is None, outcome
    second = _run(files, settings, disturbed=True, load=folder)
    assert load_checkpoint(second.state)
    unequal = ["losses"] * (second.train(1) != losses) + ["position"] * (second.state.position != whole.state.position)
    return unequal + differences(ended, second.snapshot())


def _loaded(files: Files, source: str, name: str, **flags: Any) -> Run:
    run = _run(files, merged(DROPOUT, named(name)), disturbed=True, load=_folder(files, source), **flags)
    assert load_checkpoint(run.state)
    return run


def _resharded(files: Files, source: str, name: str) -> list[str]:
    """What differs between a checkpoint and one that another layout makes of it, padded rows aside."""
    folder, copy = _folder(files, source), _folder(files, f"{source} to {name}")
    draft_checkpoint(_loaded(files, source, name, save=copy).state).complete()
    before, after = read_run_record(folder), read_run_record(copy)
    same = before.optimizer_steps == after.optimizer_steps and before.schedule == after.schedule
    tensors, copies = stored_tensors(folder, shared=True), stored_tensors(copy, shared=True)
    rows = {key: min(len(tensors[key]), len(copies[key])) for key in tensors.keys() & copies.keys()}  # but the padding
    cut = ({key: values[key][: rows.get(key)] for key in values} for values in (tensors, copies))
    return differences(*cut) + ["record"] * (not same)


def _bf16_to_float32(files: Files) -> list[str]:
    source = "full TP2 SP odd-rows bf16"
    run, stored = _loaded(files, source, source.removesuffix(" bf16")), stored_tensors(_folder(files, source))
    norms = {e.key: e.data for e in sharded_parameters(run.chunks, only_adapters=False) if "layernorm" in e.key}
    assert norms
    return differences(norms, {key: stored[f"optimizer.master.{key}"] for key in norms})


def _read_once(files: Files, source: str, name: str) -> tuple[int, int, int]:
    """Bytes of tensors that this rank reads to resume, and that the checkpoint holds; how often it reads the index."""
    read: list[int] = []
    commit = sharded_files._LoadPlanner.commit_tensor

    def counted(planner: Any, item: Any, tensor: Any) -> None:
        read.append(tensor.nbytes if not item.storage_index.fqn.startswith("rng.") else 0)
        commit(planner, item, tensor)

    index = mock.Mock(side_effect=sharded_files.read_metadata)
    with (
        mock.patch.object(sharded_files._LoadPlanner, "commit_tensor", counted),
        mock.patch.object(sharded_files, "read_metadata", index),
    ):
        _loaded(files, source, name)
    stored = stored_tensors(_folder(files, source))
    return sum(read), sum(tensor.nbytes for tensor in stored.values()), index.call_count


def _contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, while no rank writes."""
    dist.barrier()
    found = {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    dist.barrier()
    return found


@contextmanager
def _disk_full(rank: int, owner: Any, name: str) -> Iterator[None]:
    full = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    with mock.patch.object(owner, name, full if dist.get_rank() == rank else getattr(owner, name)):
        yield


def _failed_saves(run: Run, folder: Path) -> dict[str, Any]:
    """Saves that fail in each phase: messages and whether the folder is as before; and a good save afterwards."""
    before, found = _contents(folder), {}
    phases = {
        "data on rank 1": (1, FileSystemWriter, "write_data"),
        "metadata": (0, FileSystemWriter, "finish"),
        "common file": (0, sharded_files, "save_config"),
        "record": (0, Path, "write_text"),
    }
    failures: dict[str, Any] = {phase: _disk_full(*where) for phase, where in phases.items()}
    failures["data on rank 1, for real"] = small_files_only(4096) if dist.get_rank() == 1 else nullcontext()
    for phase, failure in failures.items():
        with failure:
            message = attempt(lambda: draft_checkpoint(run.state).complete())
        found[phase] = message, _contents(folder) == before
    draft_checkpoint(run.state).complete()
    found["afterwards"] = read_run_record(folder).position["iteration"]
    return found


def _saver_facts(files: Files) -> dict[str, Any]:
    """Of a run that saves after a step, one that does so in the background, and one that never does."""
    at_once, behind = (Path(_folder(files, name)) for name in ("at once", "behind"))
    settings = merged(DROPOUT, named("TP2"))
    never = _run(files, settings)
    losses, end = never.train(2), never.snapshot()
    run = _run(files, settings, save=str(at_once))
    losses_at_once = run.train(1)
    draft_checkpoint(run.state).complete()
    losses_at_once += run.train(1)
    disturbed = differences(run.snapshot(), end)
    late = _run(files, settings, save=str(behind), async_save=True, keep_last_checkpoints=2)
    losses_behind = late.train(1)
    facts = {"behind": _behind(late, losses_behind, at_once, behind)}
    disturbed += differences(late.snapshot(), end) + ["losses"] * (not losses == losses_at_once == losses_behind)
    return facts | {
        "saves disturb": disturbed,
        "failed saves": _failed_saves(run, at_once),
        "behind, failing": _behind_failing(late, behind),
        "left behind": _left_behind(late, behind),
        "gone back": _gone_back(files, late, behind),
    }


def _behind(run: Run, losses: list[float], at_once: Path, folder: Path) -> dict[str, Any]:
    """Iteration 1 is saved while iteration 2 runs; the files are held up until that has changed everything."""
    may_write, write_data = threading.Event(), FileSystemWriter.write_data

    def write_when_told(*arguments: Any) -> Any:
        may_write.wait()
        return write_data(*arguments)

    patched = mock.patch.object(FileSystemWriter, "write_data", write_when_told)
    with Saver(run.state.config.checkpoint) as saver, patched:
        saver.start(run.state)
        losses += run.train(1)
        before = saver.finish(wait=False), newest_checkpoint(folder)
        may_write.set()
        ended = saver.finish()
    dist.barrier()
    return {
        "before": before,
        "after": (ended.iteration, str(ended.error), newest_checkpoint(folder).name),
        "differences": differences(stored_tensors(at_once, shared=True), stored_tensors(folder, shared=True)),
        "nothing pending": saver.finish(),
    }


def _behind_failing(run: Run, folder: Path) -> dict[str, Any]:
    """On the second rank the disk is full; the next save of the same iteration finds room."""
    before = _contents(folder)
    with _saver_that_goes_on(run) as saver:
        with _disk_full(1, FileSystemWriter, "write_data"):
            saver.start(run.state)
            failed = saver.finish()
        changed = _contents(folder).items() ^ before.items()
        unchanged = all(name.endswith(".lock") for name, _ in changed)
        saver.start(run.state)
        again = saver.finish()
    return {"message": str(failed.error), "unchanged": unchanged, "again": (again.iteration, again.error)}


def _saver_that_goes_on(run: Run) -> Saver:
    """As that of the run when it is started again with --load."""
    settings = run.state.config.checkpoint
    return Saver(dataclasses.replace(settings, load=settings.save))


def _left_behind(run: Run, folder: Path) -> list[str]:
    """A save that was started when the run ends, by an exception even, is completed; older ones than two go.

    Their removal is not waited for after an exception, since other ranks may wait for this one's message.
    """
    run.train(1)
    try:
        with _saver_that_goes_on(run) as saver:
            saver.start(run.state)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        dist.barrier()
    wait_until(lambda: not (folder / "iter_0000001").exists(), "the removal of the oldest checkpoint", limit=10)
    return sorted(path.name for path in folder.glob("iter_*"))


def _gone_back(files: Files, run: Run, folder: Path) -> dict[str, Any]:
    """One flipped byte in the newest of two; then one in the other as well."""
    newest = newest_checkpoint(folder)
    found: dict[str, Any] = {}
    _flip_a_byte(newest / "__1_0.distcp")
    resumed = _run(files, merged(DROPOUT, named("TP2")), load=str(folder))
    with mock.patch.object(logging.getLogger("megatron_peft.checkpoint.load"), "warning") as warning:
        load_checkpoint(resumed.state)
    found["iteration"] = resumed.state.position.iteration
    found["said"] = [call.args[0] % call.args[1:] for call in warning.call_args_list]
    found["by name"] = attempt(lambda: find_whole_checkpoint(newest))
    found["to score"] = attempt(lambda: load_trained_parameters(run.chunks, folder))
    _flip_a_byte(newest.with_name("iter_0000002") / ".metadata")
    found["none is whole"] = attempt(lambda: find_whole_checkpoint(folder))
    return found


def _flip_a_byte(path: Path) -> None:
    """Seen by all ranks when it returns."""
    dist.barrier()
    if dist.get_rank() == 0:
        flip_a_byte(path)
    dist.barrier()
