"""What a process finds in which VeRA is an installed method: nothing of the project may be imported before."""

import sys
from pathlib import Path
from typing import Any

POINT = "[megatron_peft.methods]\nvera = tests.adapters.vera.declaration:VERA\n"


def install(folder: Path) -> None:
    """The metadata of a package, as pip leaves it."""
    info = folder / "vera-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vera\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINT)
    sys.path.insert(0, str(folder))


def layers_of_many_ranks(folder: Path) -> dict[str, float]:
    """Differences of adapted layers at TP2+SP from one rank."""
    install(folder)
    from megatron_peft.config import LinearSizes, PeftConfig
    from megatron_peft.planning.many_ranks import Layers, compare_many_ranks

    sizes = {"linear_fc1": LinearSizes("column", 64, 16, 2, 2), "linear_fc2": LinearSizes("row", 16, 32, 2)}
    return compare_many_ranks(Layers(sizes, PeftConfig("vera", vera_rank=4), 4, 8, sequence_parallel=True))


def certificates(folder: Path) -> list[Any]:
    """Of VeRA in one layout of each kind."""
    install(folder)
    from tests.planning.test_certify import LLAMA, OVERLAPPED, PP2, TP2, run_of
    from tests.planning.warm import Case, certified

    layouts: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({**TP2, "sequence_parallel": True}, {}),
        ({**PP2, "num_layers_per_virtual_pipeline_stage": 1}, {}),
        ({}, OVERLAPPED),
    ]
    peft = {"method": "vera", "vera_rank": 4}
    return certified([Case(run_of(peft, parallel, 2, **others), LLAMA) for parallel, others in layouts])
