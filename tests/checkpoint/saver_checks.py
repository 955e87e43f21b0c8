"""What the tests of the saver and of damaged checkpoints look at, on two ranks."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter

from megatron_peft.checkpoint.folders import newest_checkpoint
from megatron_peft.checkpoint.load import load_checkpoint, load_trained_parameters
from megatron_peft.checkpoint.save import save_checkpoint
from megatron_peft.checkpoint.saver import Saver
from megatron_peft.checkpoint.whole import find_whole_checkpoint
from tests.checkpoint.runs import (
    Files,
    Run,
    attempt,
    configure,
    contents,
    differences,
    merged,
    start,
    stored_tensors,
    write_on_first_rank,
)

TP2 = {"parallel": {"tensor_model_parallel_size": 2}}


def saver_facts(files: Files) -> dict[str, Any]:
    at_once, behind = Path(files.work, "at-once"), Path(files.work, "behind")
    run = start(configure(files, merged(TP2, {"checkpoint": {"save": str(at_once)}})))
    run.train(1)
    save_checkpoint(run.state)
    settings = {"checkpoint": {"save": str(behind), "async_save": True, "keep_last_checkpoints": 2}}
    late = start(configure(files, merged(TP2, settings)))
    late.train(1)
    return {
        "behind": _behind(late, at_once, behind),
        "behind, failing": _behind_failing(late, behind),
        "left behind": _left_behind(late, behind),
        "gone back": _gone_back(files, late, behind),
    }


@contextmanager
def _writing(action: Any) -> Iterator[None]:
    """`action` comes before each rank's writing of data."""
    write_data = FileSystemWriter.write_data

    def delayed(self: Any, *arguments: Any) -> Any:
        action()
        return write_data(self, *arguments)

    with mock.patch.object(FileSystemWriter, "write_data", delayed):
        yield


def _behind(run: Run, at_once: Path, folder: Path) -> dict[str, Any]:
    """Iteration 1 is saved while iteration 2 runs; the files are held up until that has changed everything."""
    may_write = threading.Event()
    with Saver(run.state.config.checkpoint) as saver, _writing(may_write.wait):
        saver.start(run.state)
        run.train(1)
        outcome, published = saver.finish(wait=False), newest_checkpoint(folder)
        may_write.set()
        ended = saver.finish()
    assert ended is not None
    dist.barrier()
    return {
        "before": (outcome, published),
        "after": (ended.iteration, str(ended.error), newest_checkpoint(folder).name),
        "differences": differences(stored_tensors(at_once), stored_tensors(folder)),
        "nothing pending": saver.finish(),
    }


def _behind_failing(run: Run, folder: Path) -> dict[str, Any]:
    """On the second rank the disk is full; the next save of the same iteration finds room."""

    def full() -> None:
        if dist.get_rank() == 1:
            raise OSError(28, "No space left on device")

    before = contents(folder)
    with Saver(run.state.config.checkpoint) as saver:
        with _writing(full):
            saver.start(run.state)
            failed = saver.finish()
        assert failed is not None
        unchanged = {name: text for name, text in contents(folder).items() if not name.endswith(".lock")} == {
            name: text for name, text in before.items() if not name.endswith(".lock")
        }
        saver.start(run.state)
        again = saver.finish()
        assert again is not None
    return {"message": str(failed.error), "unchanged": unchanged, "again": (again.iteration, again.error)}


def _left_behind(run: Run, folder: Path) -> list[str]:
    """A save that was started when the run ends, by an exception even, is completed; older ones than two go."""
    run.train(1)
    try:
        with Saver(run.state.config.checkpoint) as saver:
            saver.start(run.state)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        dist.barrier()
    return sorted(path.name for path in folder.glob("iter_*"))


def _gone_back(files: Files, run: Run, folder: Path) -> dict[str, Any]:
    """One flipped byte in the newest of two; then one in the other as well."""
    newest = newest_checkpoint(folder)
    assert newest is not None
    found: dict[str, Any] = {}
    _flip_a_byte(newest / "__1_0.distcp")
    loading = merged(TP2, {"checkpoint": {"load": str(folder)}})
    resumed = start(configure(files, loading))
    with mock.patch.object(logging.getLogger("megatron_peft.checkpoint.whole"), "warning") as warning:
        load_checkpoint(resumed.state)
    found["iteration"] = resumed.state.position.iteration
    found["said"] = [call.args[0] % call.args[1:] for call in warning.call_args_list]
    found["explicit"] = attempt(lambda: find_whole_checkpoint(newest))
    chunks = [chunk.module for chunk in run.state.model_chunks]
    found["inference"] = attempt(lambda: load_trained_parameters(chunks, folder))
    _flip_a_byte(newest.with_name("iter_0000002") / ".metadata")
    found["none whole"] = attempt(lambda: find_whole_checkpoint(folder))
    return found


def _flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    write_on_first_rank(path, bytes(content))
