from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_peft.experiment import records
from megatron_peft.experiment.results import Results
from tests.experiment.small_results import results


@pytest.fixture(scope="module", autouse=True)
def commit() -> Iterator[str]:
    """What every record names: git, which is asked for each cell otherwise, takes longer than the stand-ins."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "source_version", lambda: {"commit": "c" * 40})
        yield "c" * 40


@pytest.fixture
def found(tmp_path: Path) -> Results:
    return results(tmp_path)
