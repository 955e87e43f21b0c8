"""`--nproc-per-node 4` starts the processes of a run as torchrun does, and ends with one message, not with a trace."""

import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any, Literal

from megatron_peft.config import Checked, Requirements, flag, option, require

# The loggers of the agent do not inherit their level.
TORCHRUN_LOGGERS = (
    "torch.distributed.elastic",
    "torch.distributed.elastic.agent.server.api",
    "torch.distributed.elastic.agent.server.local_elastic_agent",
)
LOADING = "loading torch and megatron-core\n"
SECONDS_TO_SAVE = 600  # then ranks are killed; as long as a collective may wait (--distributed-timeout-minutes)
FT_LAUNCHER = "nvidia_resiliency_ext.fault_tolerance.launcher"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# Exit codes of a rank that has said why, or whose output nobody reads any longer (SIGPIPE).
PROGRAM_FAILED = (1, 2, *(128 + number for number in (*SIGNALS, signal.SIGPIPE)))


@dataclass(frozen=True)
class LaunchConfig(Checked):
    """The processes to start. Names and meanings are torchrun's, which spells them with dashes or underscores."""

    launcher: Literal["torchrun", "ft_launcher"] = option(
        "torchrun", "what starts the processes: torchrun, or ft_launcher of the package nvidia-resiliency-ext"
    )
    nproc_per_node: str | None = option(
        None, "start this many processes on this node, or one for each GPU (gpu)", metavar="N|gpu"
    )
    nnodes: int = option(1, "number of nodes; the same command is started on each", check="positive")
    node_rank: int | None = option(None, "number of this node, from 0", check="not_negative")
    master_addr: str | None = option(None, "address of node 0", metavar="HOST")
    master_port: int | None = option(None, "port of node 0", check="not_negative")
    rdzv_backend: str | None = option(
        None, "how nodes find one another (default: c10d with --rdzv-endpoint alone, else static)", metavar="NAME"
    )
    rdzv_endpoint: str | None = option(None, "where nodes find one another", metavar="HOST:PORT")
    rdzv_id: str | None = option(None, "name of the job, the same on every node", metavar="NAME")
    max_restarts: int = option(0, "restarts after a failure", check="not_negative")

    def check(self, require: Requirements) -> None:
        number = self.nproc_per_node or "1"
        require(
            number == "gpu" or number.isdecimal() and int(number) > 0,
            f"--nproc-per-node is {number}; it is a number of processes, or gpu.",
        )
        is_static = self._backend() in (None, "static")
        meeting = self._has_rank() and (self.master_addr or self.rdzv_endpoint) if is_static else self.rdzv_endpoint
        require(
            self.nnodes == 1 or bool(meeting),
            f"--nnodes {self.nnodes} needs --master-addr and --node-rank (--rdzv-backend static), or --rdzv-endpoint "
            "(c10d).",
        )
        require(
            self.launcher == "torchrun" or find_spec(FT_LAUNCHER.partition(".")[0]) is not None,
            f"--launcher {self.launcher} needs the package nvidia-resiliency-ext, which is not installed: pip "
            f"install nvidia-resiliency-ext, or leave the flag out.",
        )

    def _has_rank(self) -> bool:
        return self.node_rank is not None or "PET_NODE_RANK" in os.environ

    def _backend(self) -> str | None:
        """torchrun's own default, static, takes each node without a number for node 0; c10d numbers them."""
        numbers = self.nnodes > 1 and self.rdzv_endpoint and not self._has_rank()
        return self.rdzv_backend or os.environ.get("PET_RDZV_BACKEND") or ("c10d" if numbers else None)

    def torchrun_words(self) -> list[str]:
        """The flags for torchrun, which ft_launcher has too.

        A single node finds a free port by itself, so that two runs can share it.
        """
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "launcher"}
        given["rdzv_backend"] = self._backend()
        alone = self.nnodes == 1 and not (self.master_addr or self.master_port or self.rdzv_endpoint)
        words = [word for name, value in given.items() if value is not None for word in (flag(name), str(value))]
        return [*(["--standalone"] if alone else []), *words]


def start_processes(module: str, argv: Sequence[str], launch: Mapping[str, Any], program: str) -> int | None:
    """Run `python -m MODULE ARGV` in the processes that are asked for; the exit code, or None: this one goes on alone.

    `launch` has typed values of `LaunchConfig`. Raises ConfigurationError if they are wrong, or contradict the
    processes that run.
    """
    # CUDA reads it once. Compute and communication are issued in order, so that they overlap; in the ranks too, which
    # another launcher may have started.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    config = _processes_to_start(launch, os.environ)
    if config is None:
        return None
    world_size = _world_size(config)
    print(f"starting {world_size} process{'es' * (world_size > 1)}", file=sys.stderr, flush=True)
    words = [*config.torchrun_words(), "--module", module, *argv]
    if config.launcher == "ft_launcher":
        os.execv(sys.executable, [sys.executable, "-m", FT_LAUNCHER, *words])  # signals then reach it
    return _run_by_torchrun(words, program)


def tell_loading() -> None:
    """Report on rank 0 that torch is about to be imported, which takes seconds."""
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(LOADING)
        sys.stderr.flush()


def with_world_size(launch: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that is to be started, or of this one. ConfigurationError: the flags contradict."""
    config = _processes_to_start(launch, environ)
    return {**environ} if config is None else {**environ, "WORLD_SIZE": str(_world_size(config))}


def _processes_to_start(launch: Mapping[str, Any], environ: Mapping[str, str]) -> LaunchConfig | None:
    config = LaunchConfig(**launch)
    if "WORLD_SIZE" not in environ:
        return config if launch.keys() & {"nproc_per_node", "nnodes"} else None
    running = environ.get("LOCAL_WORLD_SIZE")
    require(
        not running or config.nproc_per_node in (None, "gpu", running),
        f"--nproc-per-node {config.nproc_per_node} contradicts the {running} processes that run on this node.",
    )
    size = environ["WORLD_SIZE"]
    require(
        bool(running) or config.nproc_per_node is None or size == str(_world_size(config)),
        f"--nproc-per-node {config.nproc_per_node} starts nothing where WORLD_SIZE is set ({size}), as within "
        "torchrun: unset WORLD_SIZE, or leave the flag out.",
    )
    return None


def running_processes(environ: Mapping[str, str]) -> dict[str, Any]:
    """The values of `LaunchConfig` that start as many processes as torchrun has started on one node."""
    number = environ.get("LOCAL_WORLD_SIZE", "1")
    return {"nproc_per_node": number} if number != "1" and environ.get("WORLD_SIZE") == number else {}


def _world_size(config: LaunchConfig) -> int:
    """The number of processes on all nodes. ConfigurationError: `gpu` on a node without one."""
    if config.nproc_per_node != "gpu":
        return int(config.nproc_per_node or 1) * config.nnodes
    import torch

    gpus = torch.cuda.device_count()
    require(gpus > 0, "--nproc-per-node gpu: there is no GPU here; give a number of processes.")
    return gpus * config.nnodes


def _run_by_torchrun(words: Sequence[str], program: str) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.run import parse_args, run

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun sets it too, with a warning
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # ranks on a CPU share its cores
    # After Ctrl-C or SIGTERM ranks finish their step and save, which may take longer than torchrun's 30 seconds.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SECONDS_TO_SAVE))
    for name in TORCHRUN_LOGGERS:  # a rank that fails has said why, and so has one that a signal ends
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with TemporaryDirectory(prefix="megatron_peft_") as folder:  # torchrun would leave its own behind
            run(parse_args(["--log-dir", folder, *words]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        exit_code = failure.exitcode
        if exit_code < 0:  # the rank could say nothing
            print(f"{program}: rank {rank} was ended by {signal.Signals(-exit_code).name}.", file=sys.stderr)
            return 128 - exit_code
        if exit_code not in PROGRAM_FAILED:
            print(f"{program}: rank {rank} ended with exit code {exit_code}.", file=sys.stderr)
        return exit_code
    except SignalException as error:
        return 128 + error.sigval
    except RendezvousError as error:
        cause = str(error.__cause__ or error).strip().split("\n")[0]
        print(f"{program}: the nodes have not found one another: {cause}", file=sys.stderr)
        return 1
    return 0
