"""When one rank fails, all ranks end at once, with one message; and if they have waited in vain, with their stacks.

Otherwise the other ranks would wait in a collective until the distributed timeout. The first rank to fail prints its
message and writes to the rendezvous store, which a thread on the first rank of every node polls twice a second. If that
timeout is what failed, each rank writes its Python stacks and says where it was, and the message names the ranks that
are missing.
"""

import datetime
import faulthandler
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from traceback import FrameSummary, StackSummary
from typing import NoReturn, TextIO

import torch.distributed as dist
from torch._C import _distributed_c10d

from megatron_peft.config import ConfigurationError, print_failure
from megatron_peft.config.untrusted import parse_json
from megatron_peft.runtime.exit_signals import CLOSED_OUTPUT, SAVE_AND_EXIT, EndedBySignal, is_output_closed
from megatron_peft.runtime.launch import FailedOnAnotherRank, connect_to_store, name_in_store, place_on_node

LOST_CONNECTION = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
TIMED_OUT = ("Timed out waiting", "collective operation timeout")  # of gloo and of NCCL
STORE_TIMEOUT = datetime.timedelta(seconds=20)  # its host may have ended; torch's default is five minutes
LEAVE_TIMEOUT_SECONDS = 10.0  # a killed rank never reports that it leaves
PLACES_TIMEOUT_SECONDS = 5.0  # in which each rank says where it is
_POLL_SECONDS = 0.5
WATCHED = "watched"  # the file of a node that its first rank touches while it watches the store
STALE_SECONDS = 5.0  # after which the others of its node look themselves


def run_together(main: Callable[[], object], program: str) -> None:
    """Run `main` in a started world. When it raises on one rank, all processes end with the same exit code, without
    clean-up (a process group that waits in a collective cannot be destroyed).

    The exit code is 2 for a ConfigurationError, 130 for Ctrl-C, 128 + the signal for another one that ends a run before
    its training, 141 without a message if the reader of standard output has left, and 1 for anything else. Only the
    latter prints a traceback, unless it is a FloatingPointError (a loss that is not finite) or the ranks have lost one
    another. `program` is the prefix of the message.
    """
    board = _FailureBoard()
    try:
        main()
        board.close()
    except (ConfigurationError, FloatingPointError) as error:  # the message of a training step is enough
        board.fail(2 if isinstance(error, ConfigurationError) else 1, f"{program}: error: {error}")
    except FailedOnAnotherRank as error:
        board.fail(1, f"{program}: {error}", is_effect=True)
    except EndedBySignal as ended:
        board.fail(ended.exit_code, f"{program}: {ended}")
    except KeyboardInterrupt:
        board.fail(128 + signal.SIGINT, f"{program}: interrupted")
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must not wait for this one
        # torch's own message for a lost connection is ninety lines of C++ frames, on each rank that waits.
        if isinstance(error, BrokenPipeError) and is_output_closed():
            board.fail(CLOSED_OUTPUT, "")
        who, text, stack = f"{program}: rank {dist.get_rank()}", str(error), traceback.extract_tb(error.__traceback__)
        if _is_from_peer(error, TIMED_OUT):
            milliseconds = re.search(r"(\d+) ?ms", text)
            waited = f"{int(milliseconds[1]) / 1000:g} s" if milliseconds else "too long"
            flags = "--distributed-timeout-minutes; after the first step --distributed-timeout-seconds-after-init"
            board.fail(1, f"{who} waited {waited} for another rank, as long as it may ({flags}).", stack)
        if lost_a_rank(error):
            lost = "lost its connection to another rank: that one was killed, or its node failed."
            board.fail(1, f"{who} {lost}", stack, is_effect=True)
        board.fail(1, f"{who} failed:\n{traceback.format_exc()}")


def lost_a_rank(error: BaseException | None) -> bool:
    """Return True if a collective or the store failed because another rank is gone."""
    return _is_from_peer(error, LOST_CONNECTION) or _is_from_peer(error, ("",), dist.DistNetworkError)


def waits_in_vain(error: BaseException | None) -> bool:
    """Return True if another rank is gone or hangs, so that a wait for it may never end."""
    return lost_a_rank(error) or _is_from_peer(error, TIMED_OUT)


def _is_from_peer(error: BaseException | None, texts: Sequence[str], kind: type[BaseException] = RuntimeError) -> bool:
    """Return True if a backend raised `error` with one of `texts`; gloo has no exception type of its own.

    One rank has no peers, and an OSError is about a file, a pipe or a server.
    """
    has_peers = dist.is_initialized() and dist.get_world_size() > 1
    return has_peers and isinstance(error, kind) and any(text in str(error) for text in texts)


class _FailureBoard:
    """The first failure of the world, in the rendezvous store (torchrun's, else rank 0's).

    Its host has a connection to every rank already. A second one is kept by the first rank of each node only, which
    touches a file there; the others connect when that is gone or grows old: a rank has failed, or the first one hangs.
    """

    def __init__(self) -> None:
        self._closed = threading.Event()
        self._leaving = threading.Lock()
        self._world_size = dist.get_world_size()
        if self._world_size == 1:
            return
        self._name = name_in_store()
        self._watches, self._sign = place_on_node().rank == 0, folder_on_node() / WATCHED
        if self._watches:
            self._give_sign()
        dist.barrier()
        if not self._is_watched():
            _ = self._store  # now, as its host may be what fails
        threading.Thread(target=self._watch, daemon=True).start()

    @cached_property
    def _store(self) -> dist.Store:
        return connect_to_store(self._name, STORE_TIMEOUT)

    def _give_sign(self) -> None:
        with suppress(OSError):  # the others of the node then look themselves
            make_own(self._sign.parent)
            self._sign.touch()

    def _remove_sign(self) -> None:
        if self._watches:
            with suppress(OSError):
                self._sign.unlink()
                self._sign.parent.rmdir()  # if it is empty

    def _is_watched(self) -> bool:
        """Whether the node's first rank looks for this one."""
        try:
            return not self._watches and abs(time.time() - self._sign.stat().st_mtime) < STALE_SECONDS
        except OSError:
            return False

    def close(self) -> None:
        """Wait for the other ranks, then stop polling: the store may end with the first rank that leaves."""
        dist.barrier()
        self._closed.set()
        if self._world_size > 1:
            dist.barrier()  # nobody looks at the file any longer
            self._remove_sign()

    def fail(
        self, exit_code: int, message: str, stack: StackSummary | None = None, is_effect: bool = False
    ) -> NoReturn:
        """End this process with all others; print `message` unless another rank failed first.

        stack: of a rank that has waited in vain: the message says where each rank was, and all write their stacks.
        is_effect: a rank that fails may make others fail so; its own message is better, and may come in a moment.
        """
        self._closed.set()
        # A launcher ends the ranks that are still here when the first has left: that is no cause.
        with suppress(ValueError):  # not the main thread, which alone gets signals
            for number in SAVE_AND_EXIT:
                signal.signal(number, signal.SIG_IGN)
        if self._leaving.locked():
            self._leave(exit_code)  # with the other thread, which has seen that another rank failed
        if self._world_size == 1:
            _exit_with(message, exit_code)
        self._remove_sign()
        try:
            give_up = time.monotonic() + 2 * _POLL_SECONDS
            while is_effect and time.monotonic() < give_up and not self._store.check(["exit_code"]):
                time.sleep(_POLL_SECONDS / 5)
            if self._store.add("failures", 1) > 1:
                exit_code = int(self._store.get("exit_code"))
                self._write_if_asked(stack)
                self._leave(exit_code)
            if stack is not None and not is_effect:
                self._store.set("asks_where", "1")
                self._write_if_asked(stack)
        except dist.DistError:  # the rank that hosted the store has ended
            _exit_with(message, exit_code)
        with suppress(Exception):
            self._store.set("exit_code", str(exit_code))
            message += self._places() if stack is not None and not is_effect else ""
        _print_failure(message)
        self._leave(exit_code)

    def _write_if_asked(self, stack: StackSummary | None = None) -> None:
        """This rank's stacks, and for the message where its main thread is; `stack` if that has left it already."""
        with suppress(Exception):  # the rank ends with its message all the same
            if not self._store.check(["asks_where"]):
                return
            if Stacks.current is not None:
                Stacks.current.write("the ranks do not wait for one another any longer", stack)
            main = sys._current_frames()[threading.main_thread().ident or 0]
            place = place_in(stack or traceback.extract_stack(main))
            self._store.set(f"place/{dist.get_rank()}", f"{os.uname().nodename}\t{place}")

    def _places(self) -> str:
        """Lines that say which ranks were where, those with the fewest ranks first: the others wait for them."""
        give_up = time.monotonic() + PLACES_TIMEOUT_SECONDS
        ranks = {rank: f"place/{rank}" for rank in range(self._world_size)}
        while not self._store.check([*ranks.values()]) and time.monotonic() < give_up:
            time.sleep(_POLL_SECONDS / 5)
        by_place: dict[str, list[str]] = {}
        for rank, key in ranks.items():
            label, place = str(rank), "no answer: it hangs outside of Python, or its node is lost"
            if self._store.check([key]):
                host, place = self._store.get(key).decode().split("\t")
                label = f"{rank} ({host})"
            by_place.setdefault(place, []).append(label)
        lines = [
            f"  rank {', '.join(ranks_there[:8])}{', ...' if len(ranks_there) > 8 else ''}: {place}"
            for place, ranks_there in sorted(by_place.items(), key=lambda item: len(item[1]))
        ]
        written = [f"The stacks of all ranks are {Stacks.current.place}."] if Stacks.current else []
        return "\n".join([" Where the ranks were:", *lines, *written])

    def _watch(self) -> None:
        while not self._closed.wait(_POLL_SECONDS):
            if self._is_watched():
                continue
            try:
                failed = self._store.check(["exit_code"])
            except dist.DistError:  # the rank that hosted the store has ended
                if not self._closed.wait(_POLL_SECONDS):  # the main thread may be about to print a better message
                    _exit_with(f"rank {dist.get_rank()}: rank 0 is gone: it was killed, or its node failed.", 1)
                return
            if failed and not self._closed.is_set():
                self._remove_sign()
                self._write_if_asked()
                self._leave(int(self._store.get("exit_code")))
            if self._watches and not self._closed.is_set():
                self._give_sign()

    def _leave(self, exit_code: int) -> NoReturn:
        """Exit when all ranks are ready: when one process ends, a launcher kills the others, which changes their exit
        codes.
        """
        self._leaving.acquire()  # only one of this process's two threads leaves
        give_up = time.monotonic() + LEAVE_TIMEOUT_SECONDS
        try:
            self._store.add("leaving", 1)
            while self._store.add("leaving", 0) < self._world_size and time.monotonic() < give_up:
                time.sleep(_POLL_SECONDS / 5)
        except dist.DistError:
            pass  # the rank that hosted the store saw all others leave, and has ended
        if dist.get_rank() == 0:
            time.sleep(_POLL_SECONDS)  # it may host the store that the others poll
        _exit(exit_code)


def _exit_with(message: str, exit_code: int) -> NoReturn:
    _print_failure(message)
    _exit(exit_code)


def _print_failure(message: str) -> None:
    if message:
        with suppress(BrokenPipeError):  # standard error has no reader either
            print_failure(message)


def _exit(exit_code: int) -> NoReturn:
    if Stacks.current is not None:
        Stacks.current.close()
    for stream in (sys.stdout, sys.stderr):
        with suppress(BrokenPipeError):
            stream.flush()
    os._exit(exit_code)


# The stacks of a rank, in a file. Three things write them, since a rank that hangs cannot be asked to: a timer in C for
# a step that takes longer than a collective may (also while the interpreter is locked), Python's handler of fatal
# signals (NCCL's watchdog ends a process by SIGABRT), and the thread that watches for failures of other ranks.

PACKAGE = str(Path(__file__).parents[1])
NUM_COLLECTIVES = 16  # of the last ones, in the file
RECORDERS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")  # NCCL's; gloo's, which a torch built for CUDA has too
NUM_RECORDED = 2000  # by torch's flight recorder


def folder_on_node() -> Path:
    """What ranks write for a failure stays on their node, as nobody reads it in a run that goes well; see TMPDIR.

    A thousand ranks would make as many files at each start, and after a timeout write tens of gigabytes.
    """
    run = f"{os.environ.get('TORCHELASTIC_RUN_ID', 'run')}_{os.environ.get('MASTER_PORT', os.getpid())}"
    return Path(tempfile.gettempdir(), re.sub(r"[^\w.-]", "_", f"megatron_peft_{os.getuid()}_{run}"))


def make_own(folder: Path) -> None:
    """Make a folder that only this user can read. OSError: it cannot be made, or another user has."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.lstat().st_uid != os.getuid():
        raise PermissionError(f"{folder} is another user's")


class Stacks:
    """The file of this rank, FOLDER/rank_3.txt; if it cannot be made, standard error. A context manager."""

    current: "Stacks | None" = None  # of this process, as faulthandler itself

    def __init__(self, folder: Path, rank: int) -> None:
        self._path = folder / f"rank_{rank}.txt"
        self._file: TextIO | None = None

    @property
    def file(self) -> TextIO:
        """Where they are written."""
        return self._file or sys.stderr

    @property
    def place(self) -> str:
        """Where those of all ranks are, as words of a sentence."""
        return "above" if self._file is None else f"on their nodes, in {self._path.parent}"

    def __enter__(self) -> "Stacks":
        with suppress(OSError):  # a full disk is no reason not to train
            make_own(self._path.parent)
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
        if self._file is not None:
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


def record_collectives(folder: Path) -> None:
    """Have torch keep each rank's last collectives, and NCCL write them to `folder` when one times out.

    Before the world is made. What the user has set in torch's own variables stays.
    """
    is_renamed = hasattr(_distributed_c10d, "_dump_fr_trace_json")  # torch warns of its older names
    os.environ.setdefault(f"TORCH_{'FR' if is_renamed else 'NCCL_TRACE'}_BUFFER_SIZE", str(NUM_RECORDED))
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault(
        f"TORCH_{'FR_DUMP' if is_renamed else 'NCCL_DEBUG_INFO'}_TEMP_FILE", f"{folder}/collectives_rank_"
    )


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
