from pathlib import Path

import pytest

from megatron_peft.experiment.results import Results
from tests.experiment.small_results import results


@pytest.fixture
def found(tmp_path: Path) -> Results:
    return results(tmp_path)
