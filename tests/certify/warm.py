"""Certificates in forks of one process that has imported everything, at a third of the cost of the command's own."""

import multiprocessing
import pickle
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from megatron_peft.config import RunConfig
from megatron_peft.models.shape import ModelShape
from megatron_peft.runtime import ranks
from tests.certify.faults import Break

IMPORTED = (*("megatron_peft.certify.certify", "transformers.models.llama.modeling_llama", "peft", "torch._dynamo"),)


@dataclass(frozen=True)
class Case:
    """A run to be certified.

    Args:
        broken: a line of the program, in all of the certificate's processes.
        until: the name of a comparison after which no others are made.
    """

    config: RunConfig
    shape: ModelShape
    broken: Break | None = None
    until: str | None = None


def certified(cases: Sequence[Case]) -> list[Any]:
    """Certificates of the cases; of one that ends early, the comparisons so far. Called without a world."""
    for name in IMPORTED:
        import_module(name)
    ranks._server = multiprocessing.get_context("fork")  # type: ignore[assignment]
    return [_in_a_fork(case) for case in cases]


def _in_a_fork(case: Case) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "found")
        process = multiprocessing.get_context("fork").Process(target=_certify, args=(case, path))
        process.start()
        process.join()
        return pickle.loads(path.read_bytes()) if process.exitcode == 0 else []


def _certify(case: Case, path: Path) -> None:
    from megatron_peft.certify import certify

    if case.broken is not None:
        case.broken.plant()
    if case.until is None:
        found: Any = certify.certify(case.config, case.shape)
    else:
        found = []
        run = case.config, case.shape
        for line in certify.compare_all(
            certify.small_run(*run, path.parent), certify.wide_run(*run, path.parent / "wide")
        ):
            found.append(line)
            if line.name == case.until:
                break
    path.write_bytes(pickle.dumps(found))
