"""The method of docs/new-method.md, added to a process as the page says; started on ranks by test_new_method.py."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

from megatron_peft.config import PEFT_METHODS
from tests.training.layout_runs import Curve, Job, run_jobs

PAGE = Path(__file__).parents[2] / "docs" / "new-method.md"
MODULE = "megatron_peft.adapters.gains"


def example() -> str:
    """The file that the page shows."""
    (source,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return source


def add_example() -> None:
    module = ModuleType(MODULE)
    sys.modules[MODULE] = module
    exec(compile(example(), str(PAGE), "exec"), module.__dict__)
    (line,) = re.findall(r'^    "(\w+)": "([\w.:]+)",$', PAGE.read_text(), re.MULTILINE)
    PEFT_METHODS.update([line])


def run(jobs: list[Job]) -> dict[str, Curve]:
    add_example()
    return run_jobs(jobs)
