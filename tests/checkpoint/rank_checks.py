"""What the tests of this folder check, gathered in one world: a function for each fact."""

import dataclasses
import errno
import logging
import threading
from collections.abc import Callable, Iterator
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
from tests.training.recorded_saves import small_files_only

DROPOUT: Settings = {"transformer": {"hidden_dropout": 0.1, "attention_dropout": 0.1}, "peft": {"lora_dropout": 0.1}}
BF16: Settings = {"model": {"bf16": True}}
TP2: Settings = {"parallel": {"tensor_model_parallel_size": 2}}
TP2_SP = merged(TP2, {"parallel": {"sequence_parallel": True}})
PP2: Settings = {"parallel": {"pipeline_model_parallel_size": 2}}
PP2_INTERLEAVED = merged(PP2, {"parallel": {"num_layers_per_virtual_pipeline_stage": 1}})
ACCOUNTED = {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}
PP2_ACCOUNTED = merged(PP2_INTERLEAVED, {"parallel": ACCOUNTED})  # on both ranks a chunk without a layer
PP4: Settings = {
    "parallel": {"pipeline_model_parallel_size": 4, "pipeline_model_parallel_layout": "E|t|t||t|t||L"},
    "training": {"micro_batch_size": 1},
}
DISTRIBUTED: Settings = {"optimizer": {"use_distributed_optimizer": True}}

FULL: Settings = {"peft": {"method": "full"}, "optimizer": {"lr": 1e-3}}
TIED: Settings = {"model": {"pretrained_checkpoint": "tied"}}
ODD_ROWS: Settings = {"model": {"make_vocab_size_divisible_by": 7}}  # 1,008 rows of the vocabulary at TP2, else 1,001
LAST_LAYER: Settings = {"peft": {"target_modules": ("decoder.layers.3.*",)}}  # none on the first of 2 stages
LORA_PLUS: Settings = {"peft": {"lora_plus_ratio": 4.0}}
BOFT: Settings = {"peft": {"method": "boft", "boft_block_size": 2, "boft_factors": 2}}
PROJECTED = merged(BOFT, {"peft": {"boft_parametrization": "projection"}})
HYBRID = merged(BOFT, {"peft": {"method": "hybrid"}})
URNN: Settings = {"peft": {"method": "urnn", "urnn_block_size": 4}}
RIEMANNIAN = merged(URNN, {"peft": {"urnn_update": "riemannian", "peft_lr_rotation": 0.02}})
FOLDS: Settings = {"peft": {"method": "hybrid", "hybrid_rotation": "urnn", "hybrid_merge_interval": 2}}
FOLDED = merged(URNN, FOLDS)  # just before the save

RESUMED_ON_TWO = {
    "lora TP2": TP2,
    "lora+ DP2 distributed bf16": merged(DISTRIBUTED, BF16, LORA_PLUS),
    "hybrid TP2+SP bf16": merged(HYBRID, TP2_SP, BF16),
    "full TP2 bf16": merged(FULL, TP2, BF16),
    "full TP2+SP": merged(FULL, TP2_SP, ODD_ROWS),
    "full PP2 tied": merged(FULL, PP2, TIED),
}
# `make test-all` adds these, in a world of their own.
SLOWLY_RESUMED = {
    "lora PP2 bf16, last layer": merged(PP2, BF16, LAST_LAYER),
    "hybrid folded TP2": merged(FOLDED, TP2),
    "riemannian DP2 distributed bf16": merged(RIEMANNIAN, DISTRIBUTED, BF16),
    "lora TP2+SP bf16": merged(TP2_SP, BF16),
    "lora PP2 interleaved": PP2_INTERLEAVED,
    "lora PP2 accounted": merged(PP2_ACCOUNTED, DISTRIBUTED),
    "full PP2 accounted bf16": merged(FULL, PP2_ACCOUNTED, BF16),
    "lora TP2 sgd": merged(TP2, {"optimizer": {"optimizer": "sgd"}}),
    "projected PP2": merged(PROJECTED, PP2),
    "full DP2 distributed bf16": merged(FULL, DISTRIBUTED, BF16),
}
RESUMED_ON_FOUR = {
    "lora TP2xPP2": merged(TP2, PP2),
    "full TP2xDP2 distributed": merged(FULL, TP2, DISTRIBUTED),
    "lora PP4 layout": PP4,
}
# Of each of the above, a layout on four ranks that its checkpoint is opened at.
RESHARDED_ON_FOUR = {
    "lora TP2xPP2": PP4,
    "full TP2xDP2 distributed": merged(FULL, TP2, PP2),
    "lora PP4 layout": merged(TP2_SP, PP2, DISTRIBUTED),
}
RESHARDED = {  # from, to
    "full TP2 to PP2, fewer padded rows": ("full TP2+SP", merged(FULL, PP2, ODD_ROWS)),
    "full TP2 to DP2 distributed, bf16": ("full TP2 bf16", merged(FULL, DISTRIBUTED, BF16)),
    "full PP2 to TP2, tied": ("full PP2 tied", merged(FULL, TP2, TIED)),
    "lora+ DP2 distributed to PP2, bf16": ("lora+ DP2 distributed bf16", merged(PP2, BF16, LORA_PLUS)),
    "hybrid TP2+SP to DP2 distributed, bf16": ("hybrid TP2+SP bf16", merged(HYBRID, DISTRIBUTED, BF16)),
    "lora TP2 to PP2 accounted": ("lora TP2", PP2_ACCOUNTED),
    "lora TP2 to DP2 distributed": ("lora TP2", DISTRIBUTED),
}
SLOWLY_RESHARDED = {
    "hybrid folded TP2 to PP2": ("hybrid folded TP2", merged(FOLDED, PP2)),
    "riemannian DP2 distributed to TP2, bf16": ("riemannian DP2 distributed bf16", merged(RIEMANNIAN, TP2, BF16)),
    "lora PP2 to TP2, last layer, bf16": ("lora PP2 bf16, last layer", merged(TP2, BF16, LAST_LAYER)),
    "full DP2 distributed to TP2, bf16": ("full DP2 distributed bf16", merged(FULL, TP2, BF16)),
    "lora PP2 interleaved to TP2": ("lora PP2 interleaved", TP2),
    "lora PP2 accounted to TP2": ("lora PP2 accounted", TP2),
}


def on_two_ranks(files: Files) -> dict[str, Any]:
    """Every fact by name. The folders of the resumed runs serve the others."""
    start_world()
    return {
        "resumed": _each(files, RESUMED_ON_TWO, resumed),
        "saves disturb": _saves_disturb(files),
        "resharded": _each(files, RESHARDED, _resharded),
        "bf16 to float32": _bf16_to_float32(files),
        "failed saves": _failed_saves(files),
        **_saver_facts(files),
    }


def slowly_on_two_ranks(files: Files) -> dict[str, Any]:
    start_world()
    facts = _each(files, SLOWLY_RESUMED, resumed)
    return {"resumed": facts, "resharded": _each(files, SLOWLY_RESHARDED, _resharded)}


def on_four_ranks(argument: tuple[Files, str]) -> list[str]:
    files, name = argument
    start_world()
    differing = resumed(files, name, RESUMED_ON_FOUR[name])
    return differing + _resharded(files, f"{name} elsewhere", (name, RESHARDED_ON_FOUR[name]))


def _each(files: Files, table: dict[str, Any], check: Callable[[Files, str, Any], Any]) -> dict[str, Any]:
    return {name: check(files, name, value) for name, value in table.items()}


def _folder(files: Files, name: str) -> str:
    return str(Path(files.work, name.replace(" ", "-")))


def _run(files: Files, settings: Settings, disturbed: bool = False, **checkpoint: Any) -> Run:
    return start(configure(files, merged(settings, {"checkpoint": checkpoint})), disturbed)


def resumed(files: Files, name: str, settings: Settings, async_save: bool = False) -> list[str]:
    """What differs at the end between a run that saves after two steps and goes on, and one that resumes there."""
    folder, settings = _folder(files, name), merged(DROPOUT, settings)
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


def _saves_disturb(files: Files) -> list[str]:
    """What a save in between, at once or in the background, changes in a run."""

    def save_behind(state: Any) -> None:
        draft_checkpoint(state, snapshot=True).complete()

    ends = []
    for name, save in {
        "saves at once": lambda state: draft_checkpoint(state).complete(),
        "saves behind": save_behind,
        "never": lambda state: None,
    }.items():
        run = _run(files, merged(DROPOUT, TP2), save=_folder(files, name))
        run.train(1)
        save(run.state)
        ends.append((run.train(1), run.snapshot()))
    *saved, (losses, never) = ends
    return [name for other, end in saved for name in [*differences(end, never), *["losses"] * (other != losses)]]


def _loaded(files: Files, name: str, settings: Settings, **flags: Any) -> Run:
    run = _run(files, merged(DROPOUT, settings), disturbed=True, load=_folder(files, name), **flags)
    assert load_checkpoint(run.state)
    return run


def _resharded(files: Files, name: str, value: tuple[str, Settings]) -> list[str]:
    """What differs between a checkpoint and one that another layout makes of it, padded rows aside."""
    source, copy = (_folder(files, one) for one in (value[0], name))
    draft_checkpoint(_loaded(files, *value, save=copy).state).complete()
    before, after = read_run_record(source), read_run_record(copy)
    same = before.optimizer_steps == after.optimizer_steps and before.schedule == after.schedule
    tensors, copies = stored_tensors(source, shared=True), stored_tensors(copy, shared=True)
    rows = {key: min(len(tensors[key]), len(copies[key])) for key in tensors.keys() & copies.keys()}  # but the padding
    cut = ({key: values[key][: rows.get(key)] for key in values} for values in (tensors, copies))
    return differences(*cut) + ["record"] * (not same)


def _bf16_to_float32(files: Files) -> list[str]:
    run = _loaded(files, "full TP2 bf16", merged(FULL, TP2))
    stored = stored_tensors(_folder(files, "full TP2 bf16"))
    norms = {e.key: e.data for e in sharded_parameters(run.chunks, only_adapters=False) if "layernorm" in e.key}
    assert norms
    return differences(norms, {key: stored[f"optimizer.master.{key}"] for key in norms})


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


def _failed_saves(files: Files) -> dict[str, Any]:
    """Saves that fail in each phase: messages and whether the folder is as before; and a good save afterwards."""
    folder = Path(files.work, "full-disk")
    run = _run(files, TP2, save=str(folder))
    run.train(1)
    draft_checkpoint(run.state).complete()
    before = _contents(folder)
    run.train(1)
    found: dict[str, Any] = {}
    phases = {
        "data on rank 1": (1, FileSystemWriter, "write_data"),
        "metadata": (0, FileSystemWriter, "finish"),
        "common file": (0, sharded_files, "save_config"),
        "record": (0, Path, "write_text"),
    }
    failures = {phase: _disk_full(*where) for phase, where in phases.items()}
    failures["data on rank 1, for real"] = small_files_only(4096) if dist.get_rank() == 1 else nullcontext()
    for phase, failure in failures.items():
        with failure:
            message = attempt(lambda: draft_checkpoint(run.state).complete())
        found[phase] = message, _contents(folder) == before
    draft_checkpoint(run.state).complete()
    found["afterwards"] = read_run_record(folder).position["iteration"]
    return found


def _saver_facts(files: Files) -> dict[str, Any]:
    at_once, behind = (Path(_folder(files, name)) for name in ("at once", "behind"))
    run = _run(files, TP2, save=str(at_once))
    run.train(1)
    draft_checkpoint(run.state).complete()
    late = _run(files, TP2, save=str(behind), async_save=True, keep_last_checkpoints=2)
    late.train(1)
    return {
        "behind": _behind(late, at_once, behind),
        "behind, failing": _behind_failing(late, behind),
        "left behind": _left_behind(late, behind),
        "gone back": _gone_back(files, late, behind),
    }


def _behind(run: Run, at_once: Path, folder: Path) -> dict[str, Any]:
    """Iteration 1 is saved while iteration 2 runs; the files are held up until that has changed everything."""
    may_write, write_data = threading.Event(), FileSystemWriter.write_data

    def write_when_told(*arguments: Any) -> Any:
        may_write.wait()
        return write_data(*arguments)

    patched = mock.patch.object(FileSystemWriter, "write_data", write_when_told)
    with Saver(run.state.config.checkpoint) as saver, patched:
        saver.start(run.state)
        run.train(1)
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
    """A save that was started when the run ends, by an exception even, is completed; older ones than two go."""
    run.train(1)
    try:
        with _saver_that_goes_on(run) as saver:
            saver.start(run.state)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        dist.barrier()
    return sorted(path.name for path in folder.glob("iter_*"))


def _gone_back(files: Files, run: Run, folder: Path) -> dict[str, Any]:
    """One flipped byte in the newest of two; then one in the other as well."""
    newest = newest_checkpoint(folder)
    found: dict[str, Any] = {}
    _flip_a_byte(newest / "__1_0.distcp")
    resumed = _run(files, TP2, load=str(folder))
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
