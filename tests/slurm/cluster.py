"""A SLURM of two nodes on this machine: its configuration, ports and keys are its own, and nothing is in /etc/slurm.

    with Cluster(folder) as cluster:
        job = cluster.sbatch("job.sh", SAVE="runs/a")

Debian's slurm-wlm has all that it takes; it wants root. Nodes are two slurmd that answer to different names on
different ports; their steps are processes of this machine, told apart by SLURMD_NODENAME.
"""

import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from megatron_peft.runtime.ranks import free_port
from tests.time_limits import seconds, wait_until

SET_PARENT_DEATH_SIGNAL = 1  # of prctl
SECONDS_BETWEEN_STARTS = 2.5
NODES = ("n1", "n2")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}
SlurmUser=root
SlurmdUser=root
AuthType=auth/slurm
CredType=cred/slurm
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdSpoolDir={folder}/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PreemptParameters=send_user_signal
ReturnToService=2
SlurmdTimeout=10
KillWait=20
MinJobAge=3600
InactiveLimit=0
SchedulerParameters=batch_sched_delay=1,sched_interval=5,bf_interval=5,requeue_delay=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} RealMemory=1000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} RealMemory=1000
PartitionName=low Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60 OverSubscribe=NO
PartitionName=high Nodes=n1,n2 Default=NO MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF OverSubscribe=NO
"""


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name) is None]


def _end_with_parent() -> None:
    """In the child: have the kernel kill it when the tests are killed."""
    ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, int(signal.SIGKILL))


class Cluster:
    """One controller and two nodes, which end with it; a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pending_since: dict[str, float] = {}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        host, cpus = socket.gethostname().split(".")[0], os.cpu_count() or 1
        for name in ("state", "run"):
            (folder / name).mkdir(parents=True)
        configuration, ports = folder / "slurm.conf", [free_port() for _ in range(3)]
        configuration.write_text(CONFIGURATION.format(folder=folder, host=host, cpus=cpus, ports=ports))
        (folder / "slurm.key").write_bytes(secrets.token_bytes(1024))
        (folder / "slurm.key").chmod(0o600)
        (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        self.environment = {**os.environ, "SLURM_CONF": str(configuration)}

    def __enter__(self) -> "Cluster":
        try:
            self._start("slurmctld", "slurmctld", "-D", "-c")
            wait_until(lambda: any((self.folder / "run").iterdir()), "the controller's socket")
            for node in NODES:
                self.start_node(node)
            wait_until(lambda: all(self.node_state(node) == "IDLE" for node in NODES), "idle nodes", 60)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End every daemon and every process of a job."""
        for node in NODES:
            self.kill_node(node)
        for process in self.daemons.values():
            process.kill()
            process.wait()

    def _start(self, name: str, *command: str) -> None:
        # SLURM's sockets in /run have fixed names, which a cluster of this machine's own, or another test's, may have.
        of_its_own = ["unshare", "--mount", "sh", "-c", f'mount --bind {self.folder}/run /run && exec "$@"', "sh"]
        if name != "slurmctld":
            of_its_own = self._inside()
        with (self.folder / f"{name}.out").open("ab") as output:
            to_file = {"env": self.environment, "stdout": output, "stderr": output, "start_new_session": True}
            self.daemons[name] = subprocess.Popen([*of_its_own, *command], preexec_fn=_end_with_parent, **to_file)

    def _inside(self) -> list[str]:
        """What starts a command where /run is the cluster's own."""
        return ["nsenter", f"--mount=/proc/{self.daemons['slurmctld'].pid}/ns/mnt"]

    def start_node(self, node: str) -> None:
        self._start(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """Everything that runs on the node is gone at once, as when its power fails."""
        daemon = self.daemons.get(node)
        if daemon is not None:
            daemon.kill()
            daemon.wait()
        for number in self._processes(node):
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)

    def _processes(self, node: str) -> list[int]:
        """What steps have started there, which its environment tells, and the shepherds of these steps."""
        ours = {f"SLURM_CONF={self.environment['SLURM_CONF']}".encode(), f"SLURMD_NODENAME={node}".encode()}
        found: set[int] = set()
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended meanwhile
                environment = {*(folder / "environ").read_bytes().split(b"\0")}
                parent = Path("/proc", (folder / "stat").read_text().rpartition(")")[2].split()[1])
                if ours <= environment:
                    found.add(int(folder.name))
                    if (parent / "cmdline").read_bytes().startswith(b"slurmstepd"):
                        found.add(int(parent.name))
        return sorted(found)

    def run(self, *command: str, check: bool = True, **environment: str) -> str:
        """What one of SLURM's programs printed."""
        words, variables = [*self._inside(), *command], {**self.environment, **environment}
        done = subprocess.run(words, env=variables, capture_output=True, text=True, timeout=seconds(60))
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def sbatch(self, *words: str | Path, **environment: str) -> int:
        """Submit; the job's number."""
        return int(self.run("sbatch", "--parsable", *map(str, words), **environment).split(";")[0])

    def node_state(self, node: str) -> str:
        """IDLE, ALLOCATED, DOWN, ... with SLURM's own suffixes."""
        return self.run("sinfo", "--noheader", "--nodes", node, "--format", "%T", check=False).upper().split("\n")[0]

    def job(self, job: int | str) -> dict[str, str]:
        """What `scontrol show job` says, by SLURM's names."""
        text = self.run("scontrol", "--oneliner", "show", "job", str(job), check=False)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def state(self, job: int | str) -> str:
        return self.job(job).get("JobState", "UNKNOWN")

    def restarts(self, job: int | str) -> int:
        """How often it was queued again."""
        return int(self.job(job).get("Restarts", 0))

    def start_now(self, job: int | str) -> None:
        """A job that is queued again waits two minutes by itself.

        Its nodes refuse it in the second in which its last start has ended, and SLURM then gives it up.
        """
        if self.state(job) != "PENDING":
            self._pending_since.pop(str(job), None)
        elif time.monotonic() - self._pending_since.setdefault(str(job), time.monotonic()) > SECONDS_BETWEEN_STARTS:
            self.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)

    def wait_for_state(self, job: int | str, states: Sequence[str], limit: float = 120) -> str:
        """Wait until the job is in one of the states, without the two minutes after a requeue."""
        end = time.monotonic() + seconds(limit)
        while (state := self.state(job)) not in states:
            self.start_now(job)
            assert time.monotonic() < end, f"job {job} is {state}, not {' or '.join(states)}: {self.job(job)}"
            time.sleep(0.3)
        return state

    def output(self, job: int | str) -> str:
        """What the job's batch script has printed, in all its starts."""
        path = Path(self.job(job).get("StdOut", "/dev/null"))
        return path.read_text(errors="replace") if path.exists() else ""
