"""Break the code one line at a time and see its test fail: `python tests/mutations/run.py [--sample 20]`.

A break of mutations.toml counts as caught if the one test that it names passes on the tree as it is and, with the line
broken, fails where it is called: by an assertion of a test's own file, by an exception that did not come, or by the
exception that the entry names. An import that fails, a fixture, or the time is no answer.

This process imports the libraries, never the package. Each break is tried in a child forked from it, in a copy of the
working tree.
"""

import argparse
import compileall
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from py_compile import PycInvalidationMode
from typing import NoReturn

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIST = Path(__file__).with_name("mutations.toml")
NUM_WORKERS = 2
LIMIT_SECONDS = 300.0 * float(os.environ.get("MEGATRON_PEFT_TEST_TIME_FACTOR", "1"))
LIBRARIES = (
    *("numpy", "scipy.stats", "torch", "torch.utils.tensorboard", "safetensors.torch", "matplotlib.pyplot", "rich"),
    *("megatron.core.models.gpt", "megatron.core.optimizer", "megatron.core.distributed.finalize_model_grads"),
    *("megatron.core.pipeline_parallel", "megatron.core.dist_checkpointing", "hypothesis", "sacrebleu"),
    *("transformers.models.llama.modeling_llama", "transformers.models.bloom.modeling_bloom", "peft"),
)
SETTINGS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}


@dataclass(frozen=True)
class Mutation:
    """A break."""

    what: str
    file: str
    old: str  # stands exactly once in `file`
    new: str
    test: str  # pytest's id of the test that must fail
    error: str = ""  # the exception that it may fail with; an assertion if empty


class Recorder:
    """A pytest plugin: by test that ran, its failures as [phase, exception, our file where it arose, message]."""

    def __init__(self) -> None:
        self.found: dict[str, list[list[str]]] = {}
        self.root = Path.cwd()  # which a test may leave

    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> None:
        failures, error = self.found.setdefault(item.nodeid, []), call.excinfo
        if error is not None:
            ours = [str(entry.path) for entry in error.traceback if Path(entry.path).is_relative_to(self.root)]
            place = os.path.relpath(ours[-1], self.root) if ours else ""
            failures.append([call.when, error.typename, place, str(error.value)[:500]])


def main() -> int:
    parser = argparse.ArgumentParser(description="Break the code one line at a time and see its test fail.")
    parser.add_argument("--sample", type=int, help="try this many, drawn at random")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 100_000, help="of the draw (default: the clock)")
    parser.add_argument("--only", default="", help="those with this text in `what`, `file` or `test`")
    parser.add_argument("--list", action="store_true", help="print them and try none")
    args = parser.parse_args()
    chosen = [m for m in read_list() if any(args.only in text for text in (m.what, m.file, m.test))]
    if args.sample is not None:
        print(f"--sample {args.sample} --seed {args.seed}")
        chosen = random.Random(args.seed).sample(chosen, min(args.sample, len(chosen)))
    if args.list:
        print(*(f"{m.what}: {m.test}" for m in chosen), sep="\n")
        return 0
    return try_all(chosen)


def read_list() -> list[Mutation]:
    return [Mutation(**entry) for entry in tomllib.loads(LIST.read_text())["mutation"]]


def try_all(mutations: Sequence[Mutation]) -> int:
    """Prints a line for each and a summary. Returns the exit status."""
    started = time.monotonic()
    problems = [problem for mutation in mutations if (problem := text_problem(mutation))]
    import_libraries()
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copies = [copy_tree(Path(folder, f"copy{index}")) for index in range(NUM_WORKERS)]
        failures = unbroken_failures({mutation.test for mutation in mutations}, copies)
        problems += [f"{m.what}: {m.test} unbroken: {failures[m.test]}" for m in mutations if m.test in failures]
        runs = [Run((m.test,), m) for m in mutations if not text_problem(m) and m.test not in failures]
        num_caught = 0
        for run in finished(runs, copies):
            problem = run.problem()
            num_caught += not problem
            word, what = "SURVIVED" if problem else "caught", run.mutation.what if run.mutation else ""
            print(f"{word:8} {run.seconds:5.1f} s  {what} {problem}", flush=True)
    print(*problems, f"{num_caught} of {len(mutations)} caught in {time.monotonic() - started:.0f} s", sep="\n")
    return 0 if num_caught == len(mutations) else 1


def text_problem(mutation: Mutation) -> str:
    count = (ROOT / mutation.file).read_text().count(mutation.old) if (ROOT / mutation.file).exists() else 0
    return "" if count == 1 else f"{mutation.what}: `old` stands {count} times in {mutation.file}"


def import_libraries() -> None:
    os.environ.update(SETTINGS)
    sys.dont_write_bytecode = True  # a broken file may have the size and the second of the whole one
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).parent]
    with warnings.catch_warnings(action="ignore"):
        for name in LIBRARIES:
            importlib.import_module(name)
    assert "megatron_peft" not in sys.modules


def copy_tree(copy: Path) -> Path:
    """What git tracks or would track of the working tree, compiled; byte code is valid only for the very source."""
    listed = subprocess.check_output(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, text=True)
    for name in listed.split("\0"):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    compileall.compile_dir(copy / "megatron_peft", quiet=1, invalidation_mode=PycInvalidationMode.CHECKED_HASH)
    return copy


def unbroken_failures(tests: set[str], copies: Sequence[Path]) -> dict[str, str]:
    """What is wrong with tests that do not pass on the tree as it is; a skipped one is among them.

    A call of pytest a copy, each of whole files, so that fixtures are made once.
    """
    files = sorted({test.split("::")[0] for test in tests})
    runs = []
    for worker in range(len(copies)):
        own = set(files[worker :: len(copies)])
        runs.append(Run(tuple(sorted(test for test in tests if test.split("::")[0] in own))))
    failures = {}
    for run in finished([run for run in runs if run.tests], copies):
        own = {test: run.found.get(test, "did not run") for test in run.tests if run.found.get(test) != []}
        passed = f"{len(run.tests) - len(own)} of {len(run.tests)}"
        print(f"{passed} tests pass unbroken ({run.seconds:.0f} s)", run.unread(), flush=True)
        failures |= {test: str(failure) for test, failure in own.items()}
    return failures


@dataclass
class Run:
    """A call of pytest in a copy, and what came of it; `found` is the Recorder's."""

    tests: tuple[str, ...]
    mutation: Mutation | None = None
    copy: Path = Path()
    pid: int = 0
    started: float = 0.0
    seconds: float = 0.0
    found: dict[str, list[list[str]]] = field(default_factory=dict)
    output: str = ""

    def start(self, copy: Path) -> None:
        self.copy, self.started = copy, time.monotonic()
        if self.mutation:
            path = copy / self.mutation.file
            path.write_text(path.read_text().replace(self.mutation.old, self.mutation.new))
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            run_pytest(copy, self.tests)

    def ended(self) -> bool:
        """Whether it is over, in time or not. The copy is then whole again, and what the tests started is gone."""
        self.seconds = time.monotonic() - self.started
        over = os.waitpid(self.pid, os.WNOHANG)[0] == self.pid
        limit = LIMIT_SECONDS if self.mutation else 10 * LIMIT_SECONDS
        if not over and self.seconds < limit:
            return False
        self.kill()
        if not over:
            os.waitpid(self.pid, 0)
        if self.mutation:
            shutil.copy2(ROOT / self.mutation.file, self.copy / self.mutation.file)
        report = self.copy.with_suffix(".json")
        self.found = json.loads(report.read_text()) if report.exists() else {}
        self.output = self.copy.with_suffix(".txt").read_text(errors="replace")
        report.unlink(missing_ok=True)
        return True

    def kill(self) -> None:
        """Its group: ranks and programs that a failed test left behind are in it."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def problem(self) -> str:
        """Why the break does not count as caught, or nothing."""
        assert self.mutation is not None
        if self.tests[0] not in self.found:
            return f"no answer in {self.seconds:.0f} s{self.unread()}"
        failures = self.found[self.tests[0]]
        for phase, error, place, message in failures:
            expected = error == self.mutation.error if self.mutation.error else is_assertion(error, place, message)
            if phase == "call" and expected:
                return ""
        return f"failed otherwise: {failures}" if failures else "the test passes"

    def unread(self) -> str:
        """pytest's last words, if it did not run all tests."""
        return "" if set(self.tests) <= self.found.keys() else "\n" + self.output[-3000:]


def is_assertion(error: str, place: str, message: str) -> bool:
    """Whether a test says that something is not as it should be: `assert`, or pytest.raises that saw no exception."""
    said = error == "AssertionError" or (error == "Failed" and message.startswith("DID NOT RAISE"))
    return said and place.startswith("tests" + os.sep)


def finished(runs: Sequence[Run], copies: Sequence[Path]) -> Iterator[Run]:
    """Each run as it ends; as many at once as there are copies."""
    waiting, free, running = list(runs), list(copies), []
    try:
        while waiting or running:
            while waiting and free:
                running.append(waiting.pop(0))
                running[-1].start(free.pop())
            time.sleep(0.02)
            for run in [run for run in running if run.ended()]:
                running.remove(run)
                free.append(run.copy)
                yield run
    finally:
        for run in running:  # interrupted
            run.kill()


def run_pytest(copy: Path, tests: Sequence[str]) -> NoReturn:
    """In the child: leave the answer beside the copy."""
    os.setsid()
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    os.environ["PYTHONPATH"] = str(copy)  # before an editable installation, for processes that tests start
    with open(copy.with_suffix(".txt"), "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    recorder = Recorder()
    try:
        pytest.main([*tests, "-p", "no:cacheprovider", "--tb=short"], plugins=[recorder])
        where = sys.modules["megatron_peft"].__file__ if "megatron_peft" in sys.modules else str(copy)
        assert Path(where or "").is_relative_to(copy), where
        copy.with_suffix(".json").write_text(json.dumps(recorder.found))
    except BaseException:
        traceback.print_exc(file=sys.stdout)
    finally:
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
