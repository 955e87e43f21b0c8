#!/usr/bin/env python3
"""Kill or interrupt a run again and again, and see that nothing is lost.

    python tests/stress/kill_runs.py --kills 200 --layout tp2
    python tests/stress/kill_runs.py --kills 200 --layout dp2 --async-save
    python tests/stress/kill_runs.py --kills 20 --signal INT

A run on two ranks saves after each step. It is killed at random instants, most of them while a draft is there, and
started again until it ends; then the next round begins. With --signal INT or TERM both ranks are asked to end instead,
at any instant from before the first step to after the last save; they must come to an end by themselves. After each
kill every published checkpoint must be whole and the newest that was seen must still be there; every restart must save
the step after it next; and at the end of each round every tensor of the last checkpoint (parameters, optimizer,
generators) must be that of a run that nobody killed, bit for bit. What was seen is counted and printed.
"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_peft.checkpoint.folders import TRACKER, checkpoints, damage, iteration_folder  # noqa: E402
from megatron_peft.config import RunConfig  # noqa: E402
from megatron_peft.runtime.failure import run_together  # noqa: E402
from megatron_peft.runtime.launch import world  # noqa: E402
from megatron_peft.training.run import finetune  # noqa: E402
from tests.golden.results import first_difference, saved_tensors  # noqa: E402
from tests.ranks import Ranks  # noqa: E402
from tests.time_limits import seconds  # noqa: E402
from tests.tiny_llama import save_llama, save_pairs  # noqa: E402
from tests.training.layout_runs import Job  # noqa: E402

NUM_RANKS = 2
START_SECONDS, SHARE_OF_SIGNALS_AT_THE_START = 3.0, 0.4  # in which weights are loaded
LONGEST_RUN_SECONDS = 12.0  # about what a round takes from its start
SECONDS_WITHOUT_END = seconds(300)  # of one attempt; it then counts as a hang
LONGEST_SAVE_SECONDS = 0.15
SHARE_OF_KILLS_AIMED_AT_SAVES = 0.7


class Broken(Exception):
    """Something was lost."""


@dataclass
class Tally:
    """What was seen so far."""

    kills: int = 0
    inside_a_save: int = 0  # kills that left a draft behind
    saved_and_ended: int = 0  # of ranks that were asked to end
    ended_before_a_step: int = 0
    rounds: int = 0
    restarts: int = 0  # runs begun where a checkpoint was; their first save was of a step after it
    checkpoints_verified: int = 0  # whose files all had the sums of their manifest
    tensors_equal: int = 0  # bit for bit, to those of the run that was not killed
    newest: int = 0  # the largest iteration that was seen published in this round


def main() -> int:
    options = _parser().parse_args()
    work = Path(tempfile.mkdtemp(prefix="kill_runs."))
    tally, draw = Tally(), random.Random(options.seed)
    try:
        save_llama(work / "base", num_hidden_layers=2)
        save_pairs(work / "pairs.jsonl")
        _run_to_its_end(_config(work, "whole", options, saves_each_step=False))
        while tally.kills < options.kills:
            tally.rounds, tally.newest = tally.rounds + 1, 0
            _one_round(work, f"round-{tally.rounds}", options, draw, tally)
    except Broken as broken:
        print(f"BROKEN: {broken} (seed {options.seed}; {tally}; checkpoints are in {work})")
        return 1
    shutil.rmtree(work)
    seen = {name: number for name, number in asdict(tally).items() if name != "newest"}
    print(json.dumps({**vars(options), **seen}))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--signal", choices=("KILL", "INT", "TERM"), default="KILL", help="what is sent (KILL)")
    parser.add_argument("--layout", choices=("tp2", "dp2"), default="tp2", help="dp2: with the distributed optimizer")
    parser.add_argument("--async-save", action="store_true")
    parser.add_argument("--iterations", type=int, default=60, help="steps of a round")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), help="of the instants (drawn)")
    return parser


def _config(work: Path, name: str, options: argparse.Namespace, saves_each_step: bool) -> RunConfig:
    """Of a run in `work/name` with dropout, which goes on from whatever is there."""
    layout = {"tensor_model_parallel_size": 2} if options.layout == "tp2" else {}
    saving = {"save_interval": 1, "keep_last_checkpoints": 3, "async_save": options.async_save}
    job = Job(
        name,
        str(work / "base"),
        str(work / "pairs.jsonl"),
        parallel={"distributed_timeout_minutes": math.ceil(seconds(120) / 60), **layout},
        peft={"lora_rank": 4, "lora_dropout": 0.1},
        optimizer={"use_distributed_optimizer": options.layout == "dp2"},
        transformer={"hidden_dropout": 0.1, "attention_dropout": 0.1},
        model={"bf16": True},
        training={"global_batch_size": 4, "train_iters": options.iterations, "eval_interval": None},
        checkpoint={"save": str(work / name), "load": str(work / name), **(saving if saves_each_step else {})},
        logging={"log_interval": 10},
    )
    return job.config(NUM_RANKS)


def _one_round(work: Path, name: str, options: argparse.Namespace, draw: random.Random, tally: Tally) -> None:
    """Kill and restart a run until it ends or there were kills enough, then let it end, and compare."""
    folder = work / name
    config = _config(work, name, options, saves_each_step=True)
    ended = False
    while not ended and tally.kills < options.kills:
        with Ranks(NUM_RANKS, _train, config) as ranks:
            if options.signal == "KILL":
                ended = not _kill_somewhen(ranks, folder, draw, tally)
            else:
                ended = not _ask_somewhen(ranks, getattr(signal, f"SIG{options.signal}"), draw, tally)
            if ended:
                _expect_end(ranks)
        if not ended:
            tally.kills += 1
            tally.inside_a_save += any(folder.glob(".iter_*.draft")) or any(folder.glob(".iter_*.replaced"))
        _check_folder(folder, tally)
    if not ended:
        _run_to_its_end(config)
        _check_folder(folder, tally)
    whole, killed = (saved_tensors(iteration_folder(end, options.iterations)) for end in (work / "whole", folder))
    if told := first_difference(whole, killed):
        raise Broken(f"{folder} ended otherwise than the run that nobody killed: {told.splitlines()[0]}")
    tally.tensors_equal += len(whole)
    shutil.rmtree(folder)


def _kill_somewhen(ranks: Ranks, folder: Path, draw: random.Random, tally: Tally) -> bool:
    """Returns whether it was killed; False if it ended before."""
    wanted = draw.randint(1, 4)
    aims_at_a_save = draw.random() < SHARE_OF_KILLS_AIMED_AT_SAVES
    if not _wait_for_drafts(ranks, folder, wanted, tally):
        return False
    time.sleep(draw.uniform(0, LONGEST_SAVE_SECONDS if aims_at_a_save else 4 * LONGEST_SAVE_SECONDS))
    if None not in ranks.exit_codes:
        return False
    for process in draw.sample(ranks.processes, NUM_RANKS):
        process.kill()
        time.sleep(draw.choice((0.0, 0.02)))
    return True


def _ask_somewhen(ranks: Ranks, number: int, draw: random.Random, tally: Tally) -> bool:
    """Send both ranks the signal. Returns False if the run ended before."""
    while not all("begun" in ranks.output(rank) for rank in range(NUM_RANKS)):  # what is before is not the program
        time.sleep(0.002)
    longest = START_SECONDS if draw.random() < SHARE_OF_SIGNALS_AT_THE_START else LONGEST_RUN_SECONDS
    give_up_at = time.monotonic() + draw.uniform(0, longest)
    while time.monotonic() < give_up_at:
        if None not in ranks.exit_codes:
            return False
        time.sleep(0.002)
    for process in draw.sample(ranks.processes, NUM_RANKS):
        if process.is_alive():
            os.kill(process.pid, number)
    for process in ranks.processes:
        process.join(SECONDS_WITHOUT_END)
    codes = set(ranks.exit_codes)
    told = "".join(map(ranks.output, range(NUM_RANKS)))
    if not codes <= {0, 128 + number, -number} or "Traceback" in told:
        raise Broken(f"asked to end by signal {number}, the ranks ended with {ranks.exit_codes}:\n{told[-2000:]}")
    tally.saved_and_ended += codes == {0}
    tally.ended_before_a_step += codes != {0}
    return True


def _wait_for_drafts(ranks: Ranks, folder: Path, wanted: int, tally: Tally) -> bool:
    """Until the `wanted`-th draft of this attempt appears. Returns False if the run has ended by itself."""
    seen = {path.name for path in folder.glob(".iter_*.draft")}  # of the attempt before
    found: set[str] = set()
    tracker, start = folder / TRACKER, tally.newest
    give_up_at = time.monotonic() + SECONDS_WITHOUT_END
    while len(found) < wanted:
        new = {path.name for path in folder.glob(".iter_*.draft")} - seen
        if new and not found and start:
            first = min(int(name.split(".")[1].removeprefix("iter_")) for name in new)
            if first <= start:
                raise Broken(f"a run that was started at iteration {start} saved iteration {first} first")
            tally.restarts += 1
        found |= new
        if tracker.exists():  # a checkpoint counts from when it is named there, not from its rename just before
            tally.newest = max(tally.newest, int(tracker.read_text()))
        if any(code is not None for code in ranks.exit_codes):
            return False
        if time.monotonic() > give_up_at:
            raise Broken(f"a run did not go on for {SECONDS_WITHOUT_END:.0f} s")
        time.sleep(0.002)
    return True


def _check_folder(folder: Path, tally: Tally) -> None:
    """Nobody writes now: the best checkpoint is no older than what was seen, and all of them are whole."""
    found = checkpoints(folder)
    newest = int(found[0].name.strip(".").removeprefix("iter_").removesuffix(".replaced")) if found else 0
    if newest < tally.newest:
        raise Broken(f"iteration {tally.newest} was published, but {newest} is the newest in {folder}")
    for checkpoint in found:
        if problems := damage(checkpoint):
            raise Broken(f"{checkpoint} is not whole: {problems}")
        tally.checkpoints_verified += 1
    tally.newest = newest


def _train(config: RunConfig) -> None:
    print("begun", flush=True)
    try:
        with world(config.parallel.distributed_backend, config.parallel.distributed_timeout_minutes):
            run_together(lambda: finetune(config), "kill_runs.py")
    except KeyboardInterrupt:  # as pretrain_peft.py does, before and after its run
        os._exit(128 + signal.SIGINT)


def _run_to_its_end(config: RunConfig) -> None:
    with Ranks(NUM_RANKS, _train, config) as ranks:
        _expect_end(ranks)


def _expect_end(ranks: Ranks) -> None:
    ranks.wait(SECONDS_WITHOUT_END)
    if any(ranks.exit_codes):
        raise Broken(f"a run could not go on; exit codes {ranks.exit_codes}:\n{ranks.output(0)[-2000:]}")


if __name__ == "__main__":
    sys.exit(main())
