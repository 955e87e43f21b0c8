"""Train tiny models by every method in another commit's tree and in the working tree, and compare them bit for bit.

python -m tests.golden --base COMMIT; make golden BASE=COMMIT ARGS='--only hybrid'

Losses, gradient norms, lambdas, learning rates, validation losses, all saved tensors, merged weights and greedy answers
must be the same bits, and the working tree goes on from what the base saved. Losses in chunks are those of whole
logits to 1e-6. Plans, certificates, exports, previews,
help and errors must be the same texts and numbers. Bits differ between machines, so the base is run anew. A run, a
prepared task and an experiment's record that b03219c wrote are loaded as well (test_written_by_b03219c.py). A change
of programs, flags or names stands in tests/golden/cases.py.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from tests.golden.cases import CASES, CHUNKED, Case, Commands, Inputs, resume, say, train
from tests.golden.results import first_difference, first_far, quantities
from tests.golden.tree import ENVIRONMENT, ProgramFailed, Tree

ROOT = Path(__file__).parents[2]
WRITTEN = "written by b03219c, loaded"
RESUMED = "TP2"  # the layout at which the working tree goes on from the base's checkpoint


class NothingToCompare(Exception):
    """The base does not exist, it is what the working tree holds, or no case was chosen."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 when something differs or fails, 2 when there is nothing to compare, 130 when it was interrupted."""
    args = _parser().parse_args(argv)
    cases = [case for case in CASES if re.search(args.only, str(case))]
    loads = re.search(args.only, WRITTEN) is not None
    if args.list:
        print(*cases, *([WRITTEN] * loads), sep="\n")
        return 0
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # it cleans up as for Ctrl-C
    try:
        if not cases and not loads:
            raise NothingToCompare(f"--only {args.only} chooses none; --list shows them all.")
        return _compare_all(_base(args.base), cases, loads, args.keep)
    except NothingToCompare as error:
        print(f"golden: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("golden: interrupted", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="golden", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--base", metavar="COMMIT", help="default: HEAD if the working tree differs from it, or HEAD~1")
    parser.add_argument("--only", metavar="PATTERN", default="", help="cases whose name it is found in: 'boft.*, TP2$'")
    parser.add_argument("--keep", metavar="FOLDER", type=Path, help="a new folder; both trees' runs stay there")
    parser.add_argument("--list", action="store_true", help="name the cases and run nothing")
    return parser


def _base(asked: str | None) -> str:
    """The commit to compare with; prints it and the working tree's. Raises NothingToCompare."""
    changes = _git("status", "--porcelain", "--untracked-files=all").splitlines()
    commit = _git("rev-parse", "--verify", f"{asked or ('HEAD' if changes else 'HEAD~1')}^{{commit}}")
    print(f"base:         {_git('log', '-1', '--format=%h %s', commit)}")
    with_changes = f" with changes in {len(changes)} files" if changes else ""
    print(f"working tree: {_git('log', '-1', '--format=%h %s')}{with_changes}", flush=True)
    if not _git("diff", "--name-only", commit) and not any(line.startswith("??") for line in changes):
        raise NothingToCompare("the base and the working tree hold the same files: give another BASE=COMMIT.")
    return commit


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    if done.returncode:
        raise NothingToCompare(f"git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.rstrip("\n")


def _compare_all(commit: str, cases: Sequence[Case | Commands], loads: bool, keep: Path | None) -> int:
    start, num_equal = time.monotonic(), 0
    with ExitStack() as stack:
        folder = (keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="golden-")))).resolve()
        pool = stack.enter_context(ThreadPoolExecutor(2))
        trees = [stack.enter_context(Tree(root)) for root in (_checkout(commit, folder / "base"), ROOT)]
        inputs = Inputs.write(folder / "inputs")
        looks = {str(case): partial(_difference, case, trees, inputs, folder, pool, keep is None) for case in cases}
        if loads:
            looks[WRITTEN] = _failed_loads
        for name, look in looks.items():
            told = look()
            num_equal += told is None
            print("equal  " if told is None else "DIFFERS", name, flush=True)
            if told is not None:
                print(textwrap.indent(told, "    "), flush=True)
    print(f"{num_equal} of {len(looks)} cases equal in {time.monotonic() - start:.0f} s")
    return 0 if num_equal == len(looks) else 1


def _failed_loads() -> str | None:
    """What the working tree cannot read of what b03219c wrote."""
    tests = Path(__file__).with_name("test_written_by_b03219c.py")
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", str(tests)], cwd=ROOT, capture_output=True, text=True)
    return None if done.returncode == 0 else done.stdout[-2000:]


def _checkout(commit: str, folder: Path) -> Path:
    """The files of a commit; nothing of it stays in the repository, however this ends."""
    folder.mkdir(parents=True)
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", commit], stdout=subprocess.PIPE, check=True)
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


def _difference(
    case: Case | Commands,
    trees: Sequence[Tree],
    inputs: Inputs,
    folder: Path,
    pool: ThreadPoolExecutor,
    removes_runs: bool,
) -> str | None:
    """Run the case in both trees at once; where they part, or None."""
    folders = [folder / "runs" / name / re.sub(r"\W+", "-", str(case)) for name in ("base", "work")]
    pairs = list(zip(trees, folders, strict=True))
    if isinstance(case, Commands):
        runs = [pool.submit(say, tree, case, inputs, at) for tree, at in pairs]
    else:
        runs = [pool.submit(train, tree, case, inputs, at) for tree, at in pairs]
    told = _parted(runs, folders)
    if told is None and isinstance(case, Case) and case.layout == RESUMED:
        resumed, saved = [at / "resumed" for at in folders], folders[0] / "run"
        runs = [pool.submit(resume, tree, case, inputs, saved, at) for tree, at in zip(trees, resumed, strict=True)]
        told = _parted(runs, resumed)
        told = told and f"resumed from the base's checkpoint, {told}"
    if told is None and isinstance(case, Case) and case.layout == CHUNKED:
        whole, beside = replace(case, layout="TP2"), folders[1].with_name(f"{folders[1].name} whole")
        folders = [*folders, beside]
        train(trees[1], whole, inputs, beside)
        told = first_far(*map(quantities, folders[1:]))
    for at in folders if removes_runs else []:
        shutil.rmtree(at)
    return told


def _parted(runs: Sequence[Future[None]], folders: Sequence[Path]) -> str | None:
    """What failed, or else the first difference between what two runs left in their folders."""
    errors = [run.exception() for run in runs]
    for error in errors:
        if error is not None and not isinstance(error, ProgramFailed):
            raise error
    if not any(errors):
        return first_difference(*map(quantities, folders))
    if str(errors[0]) == str(errors[1]):
        return f"in both trees, {errors[0]}"
    where = zip(("the base", "the working tree"), errors, strict=True)
    return "\n".join(f"in {tree}, {error}" for tree, error in where if error)


if __name__ == "__main__":
    os.environ |= ENVIRONMENT
    sys.exit(main())
