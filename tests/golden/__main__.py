"""Train tiny models by every method in another commit's tree and in the working tree, and compare them bit for bit.

python -m tests.golden --base COMMIT; make golden BASE=COMMIT ARGS='--only hybrid'

Losses, gradient norms, lambdas, learning rates, validation losses, all saved tensors, merged weights and greedy answers
must be the same bits, and the working tree goes on from what the base saved. Bits differ between machines, so the base
is run anew. What b03219c wrote is loaded as well. A change of flags, files or names stands in tests/golden/cases.py.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.golden import written
from tests.golden.cases import CASES, Case, Inputs, resume, train
from tests.golden.results import first_difference, quantities
from tests.golden.tree import ENVIRONMENT, ProgramFailed, Tree

ROOT = Path(__file__).parents[2]
WRITTEN = "written by b03219c: "
RESUMED = "TP2"  # the layout at which the working tree goes on from the base's checkpoint


class NothingToCompare(Exception):
    """The base does not exist, or it is what the working tree holds."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 when something differs or fails, 2 when there is nothing to compare, 130 when it was interrupted."""
    args = _parser().parse_args(argv)
    checks = [name for name in written.CHECKS if re.search(args.only, WRITTEN + name)]
    cases = [case for case in CASES if re.search(args.only, str(case))]
    if args.list:
        print("\n".join([*map(str, cases), *(WRITTEN + name for name in checks)]))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it cleans up as for Ctrl-C
    try:
        if not cases and not checks:
            raise NothingToCompare(f"--only {args.only} chooses none; --list shows them all")
        return _compare_all(_base(args.base), cases, checks, args.keep)
    except NothingToCompare as error:
        print(f"golden: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("golden: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="golden", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--base", metavar="COMMIT", help="default: HEAD if the working tree differs from it, else HEAD~1"
    )
    parser.add_argument("--only", metavar="PATTERN", default="", help="cases whose name it is found in: 'boft.*, TP2$'")
    parser.add_argument("--keep", metavar="FOLDER", type=Path, help="leave both trees' runs there")
    parser.add_argument("--list", action="store_true", help="name the cases and run nothing")
    return parser


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    if done.returncode:
        raise NothingToCompare(f"git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.rstrip("\n")


def _base(asked: str | None) -> str:
    """The commit to compare with; prints it and the working tree's.

    Raises:
        NothingToCompare: no such commit, or the working tree holds the same files.
    """
    changes = _git("status", "--porcelain").splitlines()
    commit = _git("rev-parse", "--verify", f"{asked or ('HEAD' if changes else 'HEAD~1')}^{{commit}}")
    print(f"base:         {_git('log', '-1', '--format=%h %s', commit)}")
    with_changes = f" with changes in {len(changes)} files" if changes else ""
    print(f"working tree: {_git('log', '-1', '--format=%h %s')}{with_changes}", flush=True)
    if not _git("diff", "--name-only", commit) and not any(line.startswith("??") for line in changes):
        raise NothingToCompare("the base and the working tree hold the same files: give another BASE=COMMIT.")
    return commit


def _compare_all(commit: str, cases: Sequence[Case], checks: Sequence[str], keep: Path | None) -> int:
    start, num_equal = time.monotonic(), 0
    with _folder(keep) as folder, ThreadPoolExecutor(2) as pool:
        with Tree(_checkout(commit, folder / "base")) as base, Tree(ROOT) as work:
            comparison = Comparison(base, work, folder, pool, keep is not None)
            looks: dict[str, Callable[[], str | None]] = {
                **{str(case): partial(comparison.difference, case) for case in cases},
                **{WRITTEN + name: partial(_failure, name, work, folder / "written") for name in checks},
            }
            for name, look in looks.items():
                told = look()
                num_equal += told is None
                print(f"{'equal  ' if told is None else 'DIFFERS'} {name}{_indented(told)}", flush=True)
    print(f"{num_equal} of {len(looks)} cases equal in {time.monotonic() - start:.0f} s")
    return 0 if num_equal == len(looks) else 1


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        yield Path(folder)


def _checkout(commit: str, folder: Path) -> Path:
    """The files of a commit; nothing of it stays in the repository, however this ends."""
    folder.mkdir(parents=True)
    archive = subprocess.Popen(["git", "-C", str(ROOT), "archive", commit], stdout=subprocess.PIPE)
    subprocess.run(["tar", "-x", "-C", str(folder)], stdin=archive.stdout, check=True)
    if archive.wait():
        raise NothingToCompare(f"git archive {commit} failed")
    return folder


@dataclass
class Comparison:
    """Both trees, and the folder of their runs."""

    base: Tree
    work: Tree
    folder: Path
    pool: ThreadPoolExecutor
    keeps_runs: bool
    inputs: Inputs | None = None

    def difference(self, case: Case) -> str | None:
        """Run the case in both trees at once; where they part, or None."""
        self.inputs = inputs = self.inputs or Inputs.write(self.folder / "inputs")
        name = re.sub(r"\W+", "-", str(case))
        folders = [self.folder / "runs" / tree / name for tree in ("base", "work")]
        told = self._compare(folders, lambda tree, folder: train(tree, case, inputs, folder))
        if told is None and case.layout == RESUMED:
            saved, resumed = folders[0] / "run", [folder / "resumed" for folder in folders]
            told = self._compare(resumed, lambda tree, folder: resume(tree, case, inputs, saved, folder))
            told = told and f"resumed from the base's checkpoint, {told}"
        if not self.keeps_runs:
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
        return told

    def _compare(self, folders: Sequence[Path], run: Callable[[Tree, Path], None]) -> str | None:
        futures = [self.pool.submit(run, *at) for at in zip((self.base, self.work), folders, strict=True)]
        failures = []
        for future in futures:
            try:
                future.result()
                failures.append(None)
            except ProgramFailed as error:
                failures.append(str(error))
        if not any(failures):
            return first_difference(*map(quantities, folders))
        if failures[0] == failures[1]:
            return f"in both trees, {failures[0]}"
        where = ("in the base", "in the working tree")
        return "\n".join(f"{tree}, {failure}" for tree, failure in zip(where, failures, strict=True) if failure)


def _failure(name: str, tree: Tree, folder: Path) -> str | None:
    """Of reading what b03219c wrote."""
    try:
        written.check(name, tree, folder / name.replace(" ", "-"))
    except (ProgramFailed, AssertionError) as error:
        return str(error)
    return None


def _indented(text: str | None) -> str:
    return "" if text is None else "".join(f"\n    {line}" for line in text.splitlines())


if __name__ == "__main__":
    os.environ |= ENVIRONMENT
    sys.exit(main())
