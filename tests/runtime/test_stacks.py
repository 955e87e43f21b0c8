"""Ranks that wait in vain: all end within the short timeout, with one message that names who is missing, and stacks."""

import ctypes
import datetime
import json
import re
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from megatron_peft.config import LoggingConfig
from megatron_peft.runtime import cpu, failure
from megatron_peft.runtime.failure import Stacks, run_together, written_after
from megatron_peft.runtime.launch import shorten_timeout
from megatron_peft.training.watchers import OwnWork
from tests.ranks import Ranks
from tests.time_limits import seconds

TIMEOUT_SECONDS = 3
HANGING, WITHOUT_RECORDER, SIZE = 1, 2, 3


def hangs_here() -> None:
    time.sleep(600)


def hangs_and_locks_the_interpreter() -> None:
    ctypes.PyDLL(None).sleep(12)


HANGS = {function.__name__: function for function in (hangs_here, hangs_and_locks_the_interpreter)}


def _program(hang: str, folder: str) -> None:
    """A rank's work is longer than the others'; then it hangs in a step, or none does."""
    shorten_timeout(TIMEOUT_SECONDS)
    work = OwnWork(LoggingConfig(log_straggler=True))
    with work.of_device():
        time.sleep(0.3 * (dist.get_rank() == HANGING))
    found = work.record(num_steps=1)["slowest_rank"]
    print(f"slowest: {found['rank']} {found['seconds'] > 0.2 > found['median_seconds']}", flush=True)
    print(f"began at {time.time()}", flush=True)
    if dist.get_rank() == WITHOUT_RECORDER:
        failure._last_collectives = lambda: {}["entries"]
    with Stacks(Path(folder), dist.get_rank()), written_after(TIMEOUT_SECONDS):
        if hang and dist.get_rank() == HANGING:
            HANGS[hang]()
        dist.all_reduce(torch.zeros(4))


def _rank(case: tuple[str, str]) -> None:
    cpu.install()
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=10))
    run_together(lambda: _program(*case), "program")


class Outcome(NamedTuple):
    exit_codes: list[int | None]
    output: str
    seconds: float
    stacks: list[str]


def run(hang: str, folder: Path) -> Outcome:
    with Ranks(SIZE, _rank, (hang, str(folder))) as ranks:
        for process in ranks.processes:  # none is ended from outside
            process.join(seconds(120))
        codes, output = ranks.exit_codes, "".join(map(ranks.output, range(SIZE)))
    files = [folder / f"rank_{rank}.txt" for rank in range(SIZE)]
    texts = [path.read_text() if path.exists() else "" for path in files]
    began_at = max(float(text) for text in re.findall(r"began at ([\d.]+)", output))
    return Outcome(codes, output, time.time() - began_at, texts)


@pytest.fixture(scope="module")
def hung(tmp_path_factory) -> Outcome:
    return run("hangs_here", tmp_path_factory.mktemp("hung"))


def test_all_ranks_end_with_one_message_that_says_who_is_missing_and_where(hung: Outcome) -> None:
    assert hung.exit_codes == [1] * SIZE, hung.output
    assert hung.seconds < seconds(60), "the timeout of 10 minutes counted"
    assert hung.output.count("program: rank") == 1 and "Traceback" not in hung.output, hung.output
    assert f"waited {TIMEOUT_SECONDS} s for another rank" in hung.output
    lines = hung.output.split("Where the ranks were:\n")[1].splitlines()
    assert lines[0].startswith(f"  rank {HANGING} (") and ": hangs_here (test_stacks.py:" in lines[0]
    assert lines[1].startswith("  rank 0 (") and ", 2 (" in lines[1] and "all_reduce" in lines[1]
    assert re.fullmatch(r"The stacks of all ranks are on their nodes, in /.*/hung0\.", lines[2]), lines[2]


def test_every_rank_writes_its_stacks_and_last_collectives(hung: Outcome) -> None:
    assert "in hangs_here" in hung.stacks[HANGING] and all("in _program" in text for text in hung.stacks)
    if hasattr(torch._C._distributed_c10d, "_dump_fr_trace_json"):
        assert "gloo:all_reduce" in hung.stacks[0], hung.stacks


NCCL, CPU = "_dump_nccl_trace_json", "_dump_fr_trace_json"  # torch built for CUDA has both
ENTRY = {"collective_seq_id": 7, "is_p2p": False, "input_sizes": [[4]], "state": "started"}


@pytest.mark.parametrize(
    ("recorded", "found"),
    [
        ({NCCL: ["nccl:all_gather"], CPU: ["gloo:barrier"]}, "nccl:all_gather"),
        ({NCCL: None, CPU: ["gloo:barrier"]}, "gloo:barrier"),
        ({NCCL: None, CPU: None}, "the last 0 collectives"),
    ],
)
def test_the_last_collectives_are_nccls_where_it_has_recorded_any(tmp_path, monkeypatch, recorded, found) -> None:
    """Without any, torch's JSON has no list of them."""

    def dump(names: list[str] | None) -> bytes:
        entries = [{**ENTRY, "process_group": ["0", "tensor"], "profiling_name": name} for name in names or ()]
        return json.dumps({"version": "2.10"} | ({"entries": entries} if names else {})).encode()

    recorder = type("c10d", (), {name: staticmethod(partial(dump, names)) for name, names in recorded.items()})
    monkeypatch.setattr(failure, "_distributed_c10d", recorder)
    with Stacks(tmp_path, 0) as written:
        written.write("asked")
    assert found in (tmp_path / "rank_0.txt").read_text()


@pytest.mark.slow
def test_a_rank_that_hangs_outside_of_python_has_its_stacks_written_too(tmp_path: Path) -> None:
    found = run("hangs_and_locks_the_interpreter", tmp_path)
    assert f"  rank {HANGING}: no answer" in found.output, found.output
    assert "in hangs_and_locks_the_interpreter" in found.stacks[HANGING]


def test_the_slowest_rank_is_named(hung: Outcome) -> None:
    assert hung.output.count(f"slowest: {HANGING} True\n") == SIZE, hung.output


def test_without_a_hang_nothing_is_left(tmp_path: Path) -> None:
    folder = tmp_path / "of this run"
    with Stacks(folder, 0), written_after(60):
        assert (folder / "rank_0.txt").exists() and folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists() and Stacks.current is None
    with written_after(0.01):  # without a file nothing is written
        time.sleep(0.05)


@pytest.mark.parametrize(("has_new_names", "name"), [(True, "FR_DUMP_TEMP_FILE"), (False, "NCCL_DEBUG_INFO_TEMP_FILE")])
def test_nccl_is_told_where_to_write_its_last_collectives(monkeypatch, has_new_names: bool, name: str) -> None:
    c10d = type("c10d", (), {"_dump_fr_trace_json": None} if has_new_names else {})
    monkeypatch.setattr(failure, "_distributed_c10d", c10d)
    environment: dict[str, str] = {"TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}
    monkeypatch.setattr(failure.os, "environ", environment)
    failure.record_collectives(Path("/tmp/a"))
    assert environment[f"TORCH_{name}"] == "/tmp/a/collectives_rank_"
    assert environment["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "0", "what the user has set stays"


def test_what_a_failure_leaves_is_on_the_node_in_a_folder_of_this_user_and_run(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(failure.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "4711-0/../../etc")
    monkeypatch.setenv("MASTER_PORT", "29500")
    folder = failure.folder_on_node()
    assert folder == tmp_path / f"megatron_peft_{failure.os.getuid()}_4711-0_.._.._etc_29500"
    folder.mkdir()
    monkeypatch.setattr(failure.os, "getuid", lambda: 4321)  # it is another user's
    with Stacks(folder, 0) as stacks:
        assert stacks.place == "above" and not [*folder.iterdir()]
