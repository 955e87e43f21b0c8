"""The sandbox keeps what it confines away from the host, and no program stops the evaluation."""

import math
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.evaluation import sandbox as sandbox_module
from megatron_peft.evaluation.sandbox import (
    DRIVER,
    MACHINES,
    UNSAFE_VARIABLE,
    Limits,
    Outcome,
    Program,
    Sandbox,
    open_sandbox,
)
from megatron_peft.evaluation.task_metrics import run_completions
from tests.evaluation.attacks import ATTACKS, CHEATS, DOUBLE, attack, cheat
from tests.evaluation.confined import THREADS, needs_bubblewrap, read
from tests.time_limits import seconds, wait_until
from tools.evaluate import main

SHORT = Limits(
    wall_seconds=seconds(8), cpu_seconds=math.ceil(seconds(1))
)  # an honest program must end in it on a busy machine too
MARKER = f"outlives-{os.getpid()}"


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
        clone = MACHINES[os.uname().machine].clone
        yield {"secret": secret, "port": server.getsockname()[1], "name": name, "marker": MARKER, "clone": clone}
    del os.environ["SANDBOX_TEST_SECRET"]


@pytest.fixture(scope="module")
def outcomes(sandbox: Sandbox, host: dict[str, object]) -> dict[str, Outcome]:
    """All attacks, and an honest program after each, in parallel."""
    everything = sandbox.run_all(
        [program for name in ATTACKS for program in (attack(name, host), Program("print(6 * 7)"))]
    )
    assert [outcome for outcome in everything[1::2] if outcome != Outcome("passed", "42\n")] == []
    return dict(zip(ATTACKS, everything[::2], strict=True))


@needs_bubblewrap
@pytest.mark.parametrize("name", ATTACKS)
def test_attack_does_not_get_what_it_wants(outcomes: dict[str, Outcome], name: str) -> None:
    assert not outcomes[name].passed


@needs_bubblewrap
def test_attacks_fail_for_the_reason_they_should(outcomes: dict[str, Outcome]) -> None:
    """An attack that fails at an import of its own would prove nothing."""
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


@pytest.fixture(scope="module")
def cheats(sandbox: Sandbox) -> dict[str, Outcome]:
    bodies = {**{name: cheat(name) for name in CHEATS}, "honest": "    return x + x\n"}
    (found,) = run_completions([DOUBLE], [list(bodies.values())], sandbox)
    return dict(zip(bodies, found, strict=True))


@needs_bubblewrap
@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_does_not_pass_its_check(cheats: dict[str, Outcome], name: str) -> None:
    assert cheats["honest"].passed
    assert cheats[name].verdict.startswith(("failed: AssertionError", "failed: TypeError: unsupported operand"))


@needs_bubblewrap
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
    monkeypatch.setattr(sandbox_module, "FIRST_USER", first)
    monkeypatch.setattr(sandbox_module, "NUM_PAIRS", 2)
    programs = [Program("import os, time; time.sleep(2); print(os.getuid())")] * 3
    assert {outcome.output for outcome in sandbox.run_all(programs[:2], 2)} == {f"{first}\n", f"{first + 2}\n"}
    with pytest.raises(ConfigurationError, match=rf"2 programs run.*from {first} to {first + 3}\): start fewer"):
        sandbox.run_all(programs, workers=3)


@needs_bubblewrap
def test_what_prints_on_does_not_touch_the_verdict(sandbox: Sandbox) -> None:
    prints_on = """
import os, threading, time
def chatter():
    while True: print("x", flush=True); time.sleep(0.001)
threading.Thread(target=chatter, daemon=True).start()
if os.fork() == 0: chatter()
time.sleep(0.1)
"""
    assert [outcome.verdict for outcome in sandbox.run_all([Program(prints_on)] * 16)] == ["passed"] * 16


@needs_bubblewrap
def test_programs_may_do_what_solutions_do(sandbox: Sandbox) -> None:
    honest = [
        "import numpy as np\nassert np.arange(4).sum() == 6",
        "import collections, hashlib, heapq, itertools, math, random, re, string, typing",
        "import tempfile\nwith tempfile.TemporaryFile() as file: file.write(bytes(1 << 20))",
        "import asyncio\nasync def one(): return 1\nassert asyncio.run(one()) == 1",
        "import sys\nsys.setrecursionlimit(5000)\ndef down(n): return n and down(n - 1)\ndown(4000)",
        "import threading\nthread = threading.Thread(target=print)\nthread.start()\nthread.join()",
        "held = bytearray(200 << 20)",
    ]
    assert [outcome.verdict for outcome in sandbox.run_all([*map(Program, honest)])] == ["passed"] * len(honest)


@needs_bubblewrap
def test_failures_say_why(sandbox: Sandbox) -> None:
    programs = ["assert 1 == 2, 'one is not two'", "def f(:", "print('before')\nraise ValueError(3)"]
    first, second, third = sandbox.run_all([*map(Program, programs)])
    assert first.verdict == "failed: AssertionError: one is not two"
    assert second.verdict.startswith("failed: SyntaxError")
    assert third == Outcome("failed: ValueError: 3", "before\n")


@needs_bubblewrap
def test_sets_have_the_same_order_every_time(sandbox: Sandbox) -> None:
    assert len({outcome.output for outcome in sandbox.run_all([Program("print({'a', 'b', 'c', 'd', 'e'})")] * 4)}) == 1


@needs_bubblewrap
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_sandbox_works_for_an_ordinary_user(host: dict[str, object], tmp_path: Path) -> None:
    """In a user namespace. The interpreter of the tests may lie in root's home, so it is the system's that runs."""
    python = "/usr/bin/python3"
    if not Path(python).exists() or _as_nobody(["bwrap", "--unshare-user", "--ro-bind", "/", "/", "true"]):
        pytest.skip("no interpreter, no bwrap or no namespaces for an ordinary user")
    copied = tmp_path / "tree"
    shutil.copytree(Path(sandbox_module.__file__).parents[1], copied / "megatron_peft")
    for folder in (copied, *copied.parents[:3]):
        folder.chmod(0o755)
    attacks = [attack(name, host).code for name in ("writes anywhere", "fork bomb", "namespace of a child")]
    script = USE.format(tree=str(copied), programs=[THREADS, *attacks])
    printed = subprocess.run([python, "-c", script], user=65534, group=65534, extra_groups=[], capture_output=True)
    assert printed.stdout.decode().split() == ["True", "False", "False", "False"], printed.stderr


USE = """
import sys
sys.path.insert(0, {tree!r})
from megatron_peft.evaluation.sandbox import Program, open_sandbox
print(*(outcome.passed for outcome in open_sandbox().run_all([*map(Program, {programs!r})])))
"""


def _as_nobody(command: list[str]) -> int:
    try:
        return subprocess.run(command, user=65534, group=65534, extra_groups=[], capture_output=True).returncode
    except OSError:
        return 1


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "echo 'No permissions to create new namespace' >&2\nexit 1",
            "No permissions to create new nam.*CAP_SYS_ADMIN",
        ),
        (f"exec {sys.executable} {DRIVER}", "cannot confine programs here"),
    ],
    ids=["that cannot confine", "that merely runs the driver"],
)
def test_refuses_a_bubblewrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str) -> None:
    fake = tmp_path / "bwrap"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sandbox_module, "find_bubblewrap", lambda: str(fake))
    with pytest.raises(ConfigurationError, match=message):
        open_sandbox()


def test_without_bubblewrap_unsafe_execution_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_module, "find_bubblewrap", lambda: None)
    monkeypatch.setenv(UNSAFE_VARIABLE, "1")
    programs = ["import numpy", "assert False", "import os; os._exit(0)"]
    outcomes = open_sandbox(SHORT).run_all([*map(Program, programs)])
    assert [outcome.passed for outcome in outcomes] == [True, False, False]
    monkeypatch.setenv(UNSAFE_VARIABLE, "0")
    with pytest.raises(ConfigurationError, match="no bwrap here.*apt install bubblewrap.*--unsafe-execution"):
        open_sandbox()


def test_flag_of_the_evaluation_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(UNSAFE_VARIABLE, "0")
    with pytest.raises(SystemExit):
        main(["--tasks", "humaneval_greedy", "--output", "scores.json", "--unsafe-execution", "--no-such-flag"])
    assert os.environ[UNSAFE_VARIABLE] == "1"
