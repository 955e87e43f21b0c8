"""What a rank was doing when the ranks stopped waiting for one another: its Python stacks, in a file.

Three things write them, since a rank that hangs cannot be asked to: a timer in C for a step that takes longer than a
collective may (also while the interpreter is locked), Python's handler of fatal signals (NCCL's watchdog ends a process
by SIGABRT), and the thread that watches for failures of other ranks (`runtime/failure.py`).
"""

import faulthandler
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from traceback import FrameSummary, StackSummary
from typing import TextIO

from torch._C import _distributed_c10d

from megatron_peft.config import ConfigurationError
from megatron_peft.config.untrusted import parse_json

FOLDER = "stacks"  # in the folder of --save
PACKAGE = str(Path(__file__).parents[1])
NUM_COLLECTIVES = 16  # of the last ones, in the file
RECORDERS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")  # NCCL's; gloo's, which a torch built for CUDA has too
NUM_RECORDED = 2000  # by torch's flight recorder


class Stacks:
    """The file of this rank, SAVE/stacks/rank_3.txt; without a folder standard error. A context manager."""

    current: "Stacks | None" = None  # of this process, as faulthandler itself

    def __init__(self, folder: str | Path | None, rank: int) -> None:
        self._path = folder and Path(folder, FOLDER, f"rank_{rank}.txt")
        self._file: TextIO | None = None

    @property
    def file(self) -> TextIO:
        """Where they are written."""
        return self._file or sys.stderr

    @property
    def place(self) -> str:
        """Where those of all ranks are, as words of a sentence."""
        return "above" if self._file is None else f"in {Path(self._file.name).parent}"

    def __enter__(self) -> "Stacks":
        with suppress(OSError):  # a full disk is no reason not to train
            if self._path:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("a", encoding="utf-8")
        self._was_enabled = faulthandler.is_enabled()
        with suppress(ValueError, OSError):  # a standard error that is no file, as pytest's
            faulthandler.enable(self.file)
        Stacks.current = self
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or not issubclass(kind, Exception) or issubclass(kind, ConfigurationError):
            self.close()  # else the ranks may have lost one another, and the file is still needed

    def close(self) -> None:
        """Leave no empty file behind."""
        Stacks.current = None
        faulthandler.disable()
        if self._was_enabled:
            with suppress(ValueError, OSError):
                faulthandler.enable(sys.__stderr__ or sys.stderr)
        if self._file is not None and self._path:
            self._file.close()
            with suppress(OSError):
                if not self._path.stat().st_size:
                    self._path.unlink()
                self._path.parent.rmdir()  # if it is empty

    def write(self, why: str, stack: StackSummary | None = None) -> None:
        """Write them now, and `stack`, which the main thread has left already. What fails in it is left out."""
        with suppress(Exception):
            now, host = time.strftime("%Y-%m-%d %H:%M:%S"), os.uname().nodename
            self.file.write(f"{now}, {host}, process {os.getpid()}: {why}\n")
            self.file.writelines(stack.format() if stack else ())
            self.file.flush()
            faulthandler.dump_traceback(self.file)
            self.file.write(_last_collectives())
            self.file.flush()


@contextmanager
def written_after(seconds: float) -> Iterator[None]:
    """If what happens inside takes longer, this rank's stacks are written at that moment, and it goes on."""
    if Stacks.current is None:
        yield
        return
    with suppress(ValueError, OSError):
        faulthandler.dump_traceback_later(seconds, file=Stacks.current.file)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def place_in(stack: StackSummary) -> str:
    """The innermost frame and, if it is not ours, the innermost one of ours, each with file and line."""
    last = stack[-1]
    ours = next((frame for frame in reversed(stack) if frame.filename.startswith(PACKAGE)), last)
    caller = "" if ours is last else f", called by {ours.name} ({_line(ours)})"
    return f"{last.name} ({_line(last)}){caller}"


def _line(frame: FrameSummary) -> str:
    return f"{Path(frame.filename).name}:{frame.lineno}"


def record_collectives(folder: str | Path | None) -> None:
    """Have torch keep each rank's last collectives, and NCCL write them when one times out. Before the world is made.

    They go to `folder` (--save) beside the stacks; None: where torch writes them, in /tmp.
    """
    is_renamed = hasattr(_distributed_c10d, "_dump_fr_trace_json")  # torch warns of its older names
    os.environ.setdefault(f"TORCH_{'FR' if is_renamed else 'NCCL_TRACE'}_BUFFER_SIZE", str(NUM_RECORDED))
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    if folder is not None:
        file = "FR_DUMP" if is_renamed else "NCCL_DEBUG_INFO"
        os.environ.setdefault(f"TORCH_{file}_TEMP_FILE", f"{folder}/{FOLDER}/collectives_rank_")


def _last_collectives() -> str:
    """A line each: group, number, name, sizes, state; an empty string where torch cannot say."""
    dumps = [getattr(_distributed_c10d, name) for name in RECORDERS if hasattr(_distributed_c10d, name)]
    if not dumps:
        return ""
    recorded = (parse_json(dump(), "torch's flight recorder").get("entries", []) for dump in dumps)
    lines = []
    for entry in next(filter(None, recorded), [])[-NUM_COLLECTIVES:]:
        group, number = entry["process_group"][-1], entry["collective_seq_id" if not entry["is_p2p"] else "p2p_seq_id"]
        lines.append(f"  {group} {number} {entry['profiling_name']} {entry['input_sizes']} {entry['state']}\n")
    return f"the last {len(lines)} collectives (group, number, name, sizes, state):\n{''.join(lines)}"
