"""A rank that fails prints one message and exits; its launcher (torchrun, --nproc-per-node, srun) ends the others.

A process group that waits in a collective cannot be destroyed, so the process exits without clean-up. Ranks that lose
their connection to a failed rank wait a moment to be ended, since its own message and the launcher's report are better.
"""

import faulthandler
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, NoReturn, TextIO

import torch.distributed as dist

from megatron_peft.config import ConfigurationError, print_failure
from megatron_peft.runtime.exit_signals import CLOSED_OUTPUT, SAVE_AND_EXIT, EndedBySignal, is_output_closed
from megatron_peft.runtime.launch import FailedOnAnotherRank, place_on_node

LOST_CONNECTION = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
TIMED_OUT = ("Timed out waiting", "collective operation timeout")  # of gloo and of NCCL
LAUNCHER_SECONDS = 1.0  # in which a launcher that sees a rank fail ends the others
NUM_FRAMES = 3  # of a rank that has waited too long


class _Report(NamedTuple):
    """How a process ends."""

    exit_code: int
    message: str
    is_effect: bool = False  # of another rank's failure
    on_all_ranks: bool = False  # rank 0 alone prints the message


def run_together(main: Callable[[], object], program: str) -> None:
    """Run `main` in a started world. If it raises, print why and exit.

    The exit code is 2 for a ConfigurationError, 130 for Ctrl-C, 128 + the signal for another one that ends a run before
    its training, 141 without a message if the reader of standard output has left, and 1 for anything else. Only the
    latter prints a traceback, unless it is a FloatingPointError (a loss that is not finite) or the ranks have lost one
    another. An error whose `on_all_ranks` is true is reported by rank 0 alone.

    Args:
        main: The program, which all ranks run.
        program: The prefix of the message.
    """
    try:
        main()
        dist.barrier()  # the rendezvous store ends with rank 0, which would leave first
    except (Exception, KeyboardInterrupt) as error:
        _end_process(_report_of(error, program))


def _report_of(error: BaseException, program: str) -> _Report:
    who, is_lost = f"{program}: rank {dist.get_rank()}", is_lost_peer(error)
    on_all_ranks = getattr(error, "on_all_ranks", False)
    if (is_lost or isinstance(error, BrokenPipeError)) and is_output_closed():  # the ranks of a node have one output
        return _Report(CLOSED_OUTPUT, "")
    if isinstance(error, ConfigurationError | FloatingPointError):  # the message of a training step is enough
        code = 2 if isinstance(error, ConfigurationError) else 1
        return _Report(code, f"{program}: error: {error}", on_all_ranks=on_all_ranks)
    if isinstance(error, FailedOnAnotherRank):
        return _Report(1, f"{program}: {error}", is_effect=True, on_all_ranks=True)
    if isinstance(error, EndedBySignal):
        by_launcher = is_lost_peer(error.__context__)  # which ends this rank since another one has failed
        return _Report(error.exit_code, "" if by_launcher else f"{program}: {error}", on_all_ranks=True)
    if isinstance(error, KeyboardInterrupt):
        return _Report(128 + signal.SIGINT, f"{program}: interrupted", on_all_ranks=True)
    if _is_from_peer(error, TIMED_OUT):
        milliseconds = re.search(r"(\d+) ?ms", str(error))
        waited = f"{int(milliseconds[1]) / 1000:g} s" if milliseconds else "too long"
        flags = "--distributed-timeout-minutes; after the first step --distributed-timeout-seconds-after-init"
        frames = "".join(traceback.format_tb(error.__traceback__)[-NUM_FRAMES:])
        message = f"{who} waited {waited} for another rank, as long as it may ({flags}):\n{frames}"
        if (stacks_folder() / f"rank_{dist.get_rank()}.txt").exists():
            message += f"The stacks of the ranks are on their nodes, in {stacks_folder()}."
        return _Report(1, message)
    if is_lost:  # torch's own message is ninety lines of C++ frames
        lost = "lost its connection to another rank: that one was killed, or its node failed."
        return _Report(1, f"{who} {lost}", is_effect=True)
    return _Report(1, f"{who} failed:\n{''.join(traceback.format_exception(error))}")


def is_lost_peer(error: BaseException | None) -> bool:
    """Return True if a collective or the store failed because another rank is gone."""
    return _is_from_peer(error, LOST_CONNECTION) or _is_from_peer(error, ("",), dist.DistNetworkError)


def is_peer_failure(error: BaseException | None) -> bool:
    """Return True if another rank is gone or hangs, so that a wait for it may never end."""
    return is_lost_peer(error) or _is_from_peer(error, TIMED_OUT)


def _is_from_peer(error: BaseException | None, texts: Sequence[str], kind: type[BaseException] = RuntimeError) -> bool:
    """Return True if a backend raised `error` with one of `texts`; gloo has no exception type of its own.

    One rank has no peers, and an OSError is about a file, a pipe or a server.
    """
    has_peers = dist.is_initialized() and dist.get_world_size() > 1
    return has_peers and isinstance(error, kind) and any(text in str(error) for text in texts)


def _end_process(report: _Report) -> NoReturn:
    """Print the report and exit.

    The first rank of a node reports first: the others may have failed alike, and its launcher then ends them.
    """
    seconds = LAUNCHER_SECONDS * (2 * report.is_effect + (place_on_node().rank > 0)) * (dist.get_world_size() > 1)
    if seconds:
        _handle_signals(lambda *_: _exit(report.exit_code))
        time.sleep(seconds)
    _handle_signals(signal.SIG_IGN)  # nothing follows the cause
    if report.message and (dist.get_rank() == 0 or not report.on_all_ranks):
        with suppress(BrokenPipeError):  # standard error has no reader either
            print_failure(report.message)
    _exit(report.exit_code)


def _handle_signals(handler: Callable[..., object] | signal.Handlers) -> None:
    with suppress(ValueError):  # not the main thread, which alone gets signals
        for number in SAVE_AND_EXIT:
            signal.signal(number, handler)


def _exit(exit_code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with suppress(BrokenPipeError):
            stream.flush()
    os._exit(exit_code)


# The stacks of a rank, in a file: by a timer in C for a step that takes longer than a collective may (also while the
# interpreter is locked), and by Python's handler of fatal signals (NCCL's watchdog ends a process by SIGABRT).


def stacks_folder() -> Path:
    """Return the folder of this run in TMPDIR, on the rank's node: nobody reads the files of a run that goes well."""
    run = f"{os.environ.get('TORCHELASTIC_RUN_ID', 'run')}_{os.environ.get('MASTER_PORT', os.getpid())}"
    return Path(tempfile.gettempdir(), re.sub(r"[^\w.-]", "_", f"megatron_peft_{os.getuid()}_{run}"))


_file: TextIO | None = None  # of this process, as faulthandler itself


@contextmanager
def stacks_written(folder: Path, rank: int) -> Iterator[None]:
    """Write Python's stacks to FOLDER/rank_3.txt after a fatal signal, and where `written_after` says so.

    Without the file (the disk is full, or the folder is another user's) there are none. No empty file remains.
    """
    global _file
    path = folder / f"rank_{rank}.txt"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8") if folder.lstat().st_uid == os.getuid() else None
    except OSError:
        file = None
    if file is None:
        yield
        return
    was_enabled, _file = faulthandler.is_enabled(), file
    faulthandler.enable(file)
    try:
        yield
    finally:
        _file = None
        faulthandler.disable()
        if was_enabled:
            with suppress(ValueError, OSError):  # a standard error that is no file, as pytest's
                faulthandler.enable(sys.__stderr__ or sys.stderr)
        file.close()
        with suppress(OSError):
            if not path.stat().st_size:
                path.unlink()
            folder.rmdir()  # if it is empty


@contextmanager
def written_after(seconds: float) -> Iterator[None]:
    """If what happens inside takes longer, write this rank's stacks at that moment, and go on."""
    if _file is None:
        yield
        return
    faulthandler.dump_traceback_later(seconds, file=_file)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
