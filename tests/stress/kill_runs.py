#!/usr/bin/env python3
"""Kill a run with SIGKILL again and again, and see that nothing is lost.

    python tests/stress/kill_runs.py --kills 200 --layout tp2
    python tests/stress/kill_runs.py --kills 200 --layout dp2 --async-save

A run on two ranks saves after each step. It is killed at random instants, most of them while a draft is there, and
started again until it ends; then the next round begins. After each kill every published checkpoint must be whole and
the newest that was seen must still be there; every restart must save the step after it next; and at the end of each
round every tensor of the last checkpoint (parameters, optimizer, generators) must be that of a run that nobody killed,
bit for bit. What was seen is counted and printed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_peft.checkpoint.folders import TRACKER, checkpoints, iteration_folder  # noqa: E402
from megatron_peft.checkpoint.manifest import damage  # noqa: E402
from megatron_peft.config import RunConfig  # noqa: E402
from megatron_peft.runtime.launch import free_port, world  # noqa: E402
from megatron_peft.training.finetune import finetune  # noqa: E402
from tests.stress.killed_run import compared_tensors, make_files, run_config  # noqa: E402

NUM_RANKS = 2
SECONDS_WITHOUT_END = 300.0  # of one attempt; it then counts as a hang
LONGEST_SAVE_SECONDS = 0.15
SHARE_OF_KILLS_AIMED_AT_SAVES = 0.7


class Broken(Exception):
    """Something was lost."""


@dataclass
class Tally:
    """What was seen so far.

    Attributes:
        inside_a_save: kills that left a draft behind.
        restarts: runs begun where a checkpoint was that came to a save.
        restarts_that_went_on: those whose first save was of the step after that checkpoint.
        checkpoints_verified: whose files all had the sums of their manifest.
        tensors_equal: bit for bit, to those of the run that was not killed.
        newest: the largest iteration that was seen published in this round.
    """

    kills: int = 0
    inside_a_save: int = 0
    rounds: int = 0
    restarts: int = 0
    restarts_that_went_on: int = 0
    checkpoints_verified: int = 0
    tensors_equal: int = 0
    newest: int = 0


def main() -> int:
    options = _parser().parse_args()
    work = Path(tempfile.mkdtemp(prefix="kill_runs."))
    tally = Tally()
    try:
        _in_processes([lambda: make_files(work)], work / "files.log")
        _expect_end(_start(run_config(work, "whole", options, saves_each_step=False), work / "whole.log"))
        draw = random.Random(options.seed)
        while tally.kills < options.kills:
            tally.rounds, tally.newest = tally.rounds + 1, 0
            _one_round(work, f"round-{tally.rounds}", options, draw, tally)
    except Broken as broken:
        print(f"BROKEN: {broken} (seed {options.seed}; {tally}; logs and checkpoints are in {work})")
        return 1
    shutil.rmtree(work)
    seen = {name: number for name, number in asdict(tally).items() if name != "newest"}
    print(json.dumps({"layout": options.layout, "async_save": options.async_save, "seed": options.seed, **seen}))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--layout", choices=("tp2", "dp2"), default="tp2", help="dp2: with the distributed optimizer")
    parser.add_argument("--async-save", action="store_true")
    parser.add_argument("--iterations", type=int, default=60, help="steps of a round")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), help="of the instants (drawn)")
    return parser


def _one_round(work: Path, name: str, options: argparse.Namespace, draw: random.Random, tally: Tally) -> None:
    """Kill and restart a run until it ends or there were kills enough, then let it end, and compare."""
    folder, log = work / name, work / f"{name}.log"
    config = run_config(work, name, options, saves_each_step=True)
    ended = False
    while not ended and tally.kills < options.kills:
        ranks = _start(config, log)
        ended = not _kill_somewhen(ranks, folder, draw, tally)
        if ended:
            _expect_end(ranks)
        else:
            tally.kills += 1
            tally.inside_a_save += any(folder.glob(".iter_*.draft")) or any(folder.glob(".iter_*.replaced"))
        _check_folder(folder, tally)
    if not ended:
        _expect_end(_start(config, log))
        _check_folder(folder, tally)
    ends = [iteration_folder(end, options.iterations) for end in (work / "whole", folder)]
    _in_processes([lambda: _compare(*ends, work / "compared")], work / "compare.log")
    tally.tensors_equal += int((work / "compared").read_text())
    shutil.rmtree(folder)


def _kill_somewhen(ranks: list[Rank], folder: Path, draw: random.Random, tally: Tally) -> bool:
    """Returns whether it was killed; False if it ended before."""
    wanted = draw.randint(1, 4)
    aims_at_a_save = draw.random() < SHARE_OF_KILLS_AIMED_AT_SAVES
    if not _wait_for_drafts(ranks, folder, wanted, tally):
        return False
    time.sleep(draw.uniform(0, LONGEST_SAVE_SECONDS if aims_at_a_save else 4 * LONGEST_SAVE_SECONDS))
    if all(rank.exit_code() is not None for rank in ranks):
        return False
    for rank in draw.sample(ranks, len(ranks)):
        rank.kill()
        time.sleep(draw.choice((0.0, 0.02)))
    for rank in ranks:
        rank.wait()
    return True


def _wait_for_drafts(ranks: list[Rank], folder: Path, wanted: int, tally: Tally) -> bool:
    """Until the `wanted`-th draft of this attempt appears. Returns False if the run has ended by itself."""
    seen: set[str] = {path.name for path in folder.glob(".iter_*.draft")}  # of the attempt before
    found: set[str] = set()
    start = tally.newest
    give_up_at = time.monotonic() + SECONDS_WITHOUT_END
    while len(found) < wanted:
        new = {path.name for path in folder.glob(".iter_*.draft")} - seen
        if new and not found and start:
            _note_restart(new, start, tally)
        found |= new
        tally.newest = max(tally.newest, _published(folder))
        if any(rank.exit_code() is not None for rank in ranks):
            return False
        if time.monotonic() > give_up_at:
            raise Broken(f"a run did not go on for {SECONDS_WITHOUT_END:.0f} s")
        time.sleep(0.002)
    return True


def _note_restart(drafts: set[str], start: int, tally: Tally) -> None:
    """One that began afresh would save its first step, or go on from an older checkpoint than there was."""
    tally.restarts += 1
    first = min(int(name.split(".")[1].removeprefix("iter_")) for name in drafts)
    if first <= start:
        raise Broken(f"a run that was started at iteration {start} saved iteration {first} first")
    tally.restarts_that_went_on += 1


def _published(folder: Path) -> int:
    """What the tracker names: a checkpoint counts from then on, not from its rename just before."""
    tracker = folder / TRACKER
    return int(tracker.read_text()) if tracker.exists() else 0


def _check_folder(folder: Path, tally: Tally) -> None:
    """Nobody writes now: the best checkpoint is no older than what was seen, and all of them are whole."""
    found = checkpoints(folder)
    newest = int(found[0].name.strip(".").removeprefix("iter_").removesuffix(".replaced")) if found else 0
    if newest < tally.newest:
        raise Broken(f"iteration {tally.newest} was published, but {newest} is the newest in {folder}")
    for checkpoint in found:
        problems = damage(checkpoint)
        if problems:
            raise Broken(f"{checkpoint} is not whole: {problems}")
        tally.checkpoints_verified += 1
    tally.newest = newest


def _compare(whole: Path, killed: Path, result: Path) -> None:
    """Every tensor: parameters, the optimizer's state, generators. Their number goes to the file `result`."""
    equal, differing = compared_tensors(whole, killed)
    if differing:
        raise Broken(f"{killed} differs from {whole} in {len(differing)} tensors: {differing[:3]}")
    result.write_text(str(len(equal)))


class Rank:
    """A forked process: everything is imported once, by the parent."""

    def __init__(self, action: Callable[[], object], log: Path, environment: dict[str, str]) -> None:
        self._exit_code: int | None = None
        self._log = log
        self._pid = os.fork()
        if self._pid == 0:
            os._exit(_run(action, log, environment))

    def exit_code(self) -> int | None:
        """None while it runs."""
        if self._exit_code is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            self._exit_code = os.waitstatus_to_exitcode(status) if pid else None
        return self._exit_code

    def kill(self) -> None:
        if self.exit_code() is None:
            os.kill(self._pid, signal.SIGKILL)

    def wait(self) -> int:
        if self._exit_code is None:
            self._exit_code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        return self._exit_code

    @property
    def last_words(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]


def _run(action: Callable[[], object], log: Path, environment: dict[str, str]) -> int:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    warnings.simplefilter("ignore", FutureWarning)  # megatron-core calls names that torch has renamed
    try:
        action()
    except BaseException:  # noqa: BLE001 - the child must not return into the parent's code
        traceback.print_exc()
        sys.stderr.flush()
        return 1
    sys.stdout.flush()
    return 0


def _in_processes(actions: list[Callable[[], object]], log: Path) -> None:
    _expect_end([Rank(action, log, {}) for action in actions])


def _start(config: RunConfig, log: Path) -> list[Rank]:
    def run() -> None:
        with world(config.parallel):
            finetune(config)

    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(NUM_RANKS)}
    return [Rank(run, log, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(NUM_RANKS)]


def _expect_end(ranks: list[Rank]) -> None:
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        raise Broken(f"a run could not go on; exit codes {codes}:\n{ranks[0].last_words}")


if __name__ == "__main__":
    sys.exit(main())
