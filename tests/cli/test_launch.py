"""Which processes are started, and how their end is told."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousError

from megatron_peft.cli import launch
from megatron_peft.cli.launch import LaunchConfig, running_processes, start_processes
from megatron_peft.commands import train
from megatron_peft.config import ConfigurationError
from tests.time_limits import seconds

ROOT = Path(__file__).parents[2]
RANK = r"""
import os, sys
rank = int(os.environ["RANK"])
os.write(1, f"rank {rank} of {os.environ['WORLD_SIZE']} {' '.join(sys.argv[1:])}\n".encode())
sys.exit(int(sys.argv[1]) * rank)
"""


def test_one_node_finds_a_port_by_itself_and_several_are_told_where() -> None:
    assert LaunchConfig(nproc_per_node="4").torchrun_words()[:3] == ["--standalone", "--nproc-per-node", "4"]
    words = LaunchConfig(nproc_per_node="8", nnodes=2, node_rank=1, master_addr="a", master_port=5).torchrun_words()
    assert "--standalone" not in words and " ".join(words).endswith(
        "--nnodes 2 --node-rank 1 --master-addr a --master-port 5 --max-restarts 0"
    )


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"nproc_per_node": "many"}, "--nproc-per-node is many; it is a number of processes, or gpu."),
        ({"nproc_per_node": "0"}, "--nproc-per-node is 0"),
        ({"nnodes": 2}, "--nnodes 2 needs --master-addr and --node-rank .--rdzv-backend static., or --rdzv-endpoint"),
        ({"nnodes": 2, "master_addr": "a"}, "--nnodes 2 needs --master-addr and --node-rank"),
        ({"nnodes": 2, "rdzv_endpoint": "a:1", "rdzv_backend": "static"}, "--nnodes 2 needs --master-addr and --no"),
        ({"nnodes": 2, "node_rank": 0, "master_addr": "a", "rdzv_backend": "c10d"}, "--nnodes 2 needs --master-addr"),
        ({"max_restarts": -1}, "--max-restarts is -1"),
        ({"launcher": "ft_launcher"}, "needs the package nvidia-resiliency-ext, which is not installed"),
    ],
)
def test_what_cannot_be_started_is_refused(values: dict, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        LaunchConfig(**values)


def test_nodes_without_a_number_meet_where_they_are_given_one(monkeypatch) -> None:
    meeting: dict = {"nnodes": 2, "rdzv_endpoint": "a:1"}
    assert "--rdzv-backend c10d" in " ".join(LaunchConfig(**meeting).torchrun_words())
    assert "--rdzv-backend" not in LaunchConfig(**meeting, node_rank=1).torchrun_words(), "torchrun's is static"
    monkeypatch.setenv("PET_NODE_RANK", "1")  # torchrun reads it
    assert "--rdzv-backend" not in LaunchConfig(nnodes=2, master_addr="a").torchrun_words()


def test_ft_launcher_takes_the_place_of_torchrun(monkeypatch) -> None:
    monkeypatch.setattr(launch, "find_spec", lambda name: name == "nvidia_resiliency_ext")
    monkeypatch.setattr(launch.os, "execv", lambda *words: started.append(words))
    started: list[tuple[str, list[str]]] = []
    values = {"launcher": "ft_launcher", "nproc_per_node": "2", "max_restarts": 3}
    monkeypatch.setattr(launch, "_run_by_torchrun", lambda *_: 0)
    start_processes("m", ["--lr", "1"], values, "p")
    program, words = started[0]
    assert program == sys.executable and words[1:3] == ["-m", "nvidia_resiliency_ext.fault_tolerance.launcher"]
    expected = "--standalone --nproc-per-node 2 --nnodes 1 --max-restarts 3 --module m --lr 1"
    assert " ".join(words[3:]) == expected and "ft_launcher" not in words


@pytest.mark.parametrize("chosen", [None, "8"])
def test_compute_and_communication_are_issued_in_order_unless_the_user_says_otherwise(monkeypatch, chosen) -> None:
    monkeypatch.setattr(launch.os, "environ", {} if chosen is None else {"CUDA_DEVICE_MAX_CONNECTIONS": chosen})
    start_processes("m", [], {}, "p")
    assert launch.os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == (chosen or "1")


def test_nothing_is_started_where_processes_run_already(monkeypatch) -> None:
    assert start_processes("m", [], {}, "p") is None
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert start_processes("m", [], {"nproc_per_node": "4"}, "p") is None
    assert running_processes(os.environ) == {"nproc_per_node": "4"}
    with pytest.raises(ConfigurationError, match="^--nproc-per-node 2 contradicts the 4 processes that run"):
        start_processes("m", [], {"nproc_per_node": "2"}, "p")
    monkeypatch.delenv("LOCAL_WORLD_SIZE")  # of another launcher, or of a pod
    assert start_processes("m", [], {"nproc_per_node": "4"}, "p") is None
    with pytest.raises(ConfigurationError, match="^--nproc-per-node 2 starts nothing where WORLD_SIZE is set .4."):
        start_processes("m", [], {"nproc_per_node": "2"}, "p")


def test_flags_are_checked_for_all_processes_before_any_is_started(monkeypatch, capsys) -> None:
    monkeypatch.setattr(launch, "_run_by_torchrun", lambda *_: pytest.fail("started"))
    words = "--nproc-per-node 3 --nnodes 2 --rdzv-endpoint a:1 --tensor-model-parallel-size 4"
    assert train.main(words.split()) == 2
    assert "6 processes cannot hold" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("failure", "code", "told"),
    [
        (77, 77, "p: rank 1 ended with exit code 77.\n"),
        (1, 1, ""),  # it has said why
        (128 + signal.SIGPIPE, 128 + signal.SIGPIPE, ""),  # nobody reads
        (-signal.SIGKILL, 128 + signal.SIGKILL, "p: rank 1 was ended by SIGKILL.\n"),
        (SignalException("", signal.SIGTERM), 128 + signal.SIGTERM, ""),
        (RendezvousError("late\nmore"), 1, "p: the nodes have not found one another: late\n"),
    ],
)
def test_the_end_of_ranks_is_one_line(monkeypatch, capsys, failure, code, told) -> None:
    def run(*_: object) -> None:
        if isinstance(failure, Exception):
            raise failure
        raise ChildFailedError("p", {1: ProcessFailure(local_rank=1, pid=7, exitcode=failure, error_file="none")})

    monkeypatch.setattr("torch.distributed.run.run", run)
    monkeypatch.setattr(launch.os, "environ", {**os.environ})
    assert start_processes("m", [], {"nproc_per_node": "2"}, "p") == code
    assert capsys.readouterr().err == f"starting 2 processes\n{told}"


@pytest.mark.parametrize(("end", "code"), [pytest.param("0", 0, marks=pytest.mark.slow), ("2", 2)])
def test_ranks_are_started_and_their_end_is_the_launchers(tmp_path: Path, end: str, code: int) -> None:
    (tmp_path / "a_rank.py").write_text(RANK)
    program = (
        "import sys; from megatron_peft.cli.launch import start_processes; "
        f"sys.exit(start_processes('a_rank', ['{end}', '--x'], {{'nproc_per_node': '2'}}, 'p'))"
    )
    (tmp_path / "temporary").mkdir()
    environ = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}", "TMPDIR": str(tmp_path / "temporary")}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=seconds(120))
    assert (done.returncode, done.stderr) == (code, "starting 2 processes\n")
    assert f"rank 1 of 2 {end} --x" in done.stdout.splitlines()
    assert end != "0" or f"rank 0 of 2 {end} --x" in done.stdout.splitlines()  # else it may have been ended before
    assert not list((tmp_path / "temporary").iterdir())
