"""Standard errors are those of leaving one item out, from a few computations; the harness bootstraps nothing."""

import math
import random
from statistics import stdev
from types import SimpleNamespace
from typing import Any

import pytest
from lm_eval.api.metrics import acc_all, bleu, f1_score, matthews_corrcoef, mean, median, stderr_for_metric

from megatron_peft.evaluation.harness_run import _add_errors, _with_errors
from megatron_peft.evaluation.standard_errors import NUM_GROUPS, WithError, jackknife_error

DRAW = random.Random(0)
LABELS = [(DRAW.randrange(2), DRAW.randrange(2)) for _ in range(30)]
WORDS = [f"w{number}" for number in range(50)]


def leave_one_out(statistic: Any, items: list[Any]) -> float:
    """The definition: the statistic without each of the items in turn."""
    values = [statistic([*items[:place], *items[place + 1 :]]) for place in range(len(items))]
    middle = sum(values) / len(values)
    return math.sqrt((len(items) - 1) / len(items) * sum((value - middle) ** 2 for value in values))


@pytest.mark.parametrize("statistic", [f1_score, matthews_corrcoef])
def test_the_error_of_a_score_of_labels_is_exact(statistic):
    assert jackknife_error(statistic, LABELS) == pytest.approx(leave_one_out(statistic, LABELS), rel=1e-9)


def test_forty_thousand_labels_take_a_computation_for_each_kind():
    calls: list[int] = []

    def accuracy(items: Any) -> float:
        calls.append(len(items))
        return sum(truth == answer for truth, answer in items) / len(items)

    items = LABELS * 1334
    right = sum(truth == answer for truth, answer in items) / len(items)
    assert jackknife_error(accuracy, items) == pytest.approx(math.sqrt(right * (1 - right) / (len(items) - 1)))
    assert len(calls) == 4


@pytest.mark.parametrize("num_items", [7, NUM_GROUPS])
def test_the_error_of_a_mean_is_that_of_its_formula(num_items):
    items = [DRAW.gauss(0, 1) for _ in range(num_items)]
    assert jackknife_error(mean, items) == pytest.approx(stdev(items) / math.sqrt(num_items))


def test_items_that_all_differ_are_left_out_in_groups():
    calls: list[int] = []
    items = [DRAW.gauss(3, 1) for _ in range(1009)]
    error = jackknife_error(lambda some: calls.append(len(some)) or mean(some), items)
    assert error == pytest.approx(stdev(items) / math.sqrt(len(items)), rel=0.5)
    assert sorted(set(calls)) == [958, 959] and len(calls) == NUM_GROUPS


def test_bleu_has_an_error():
    right = [" ".join(DRAW.choices(WORDS, k=9)) for _ in range(40)]
    items = [(text, text if DRAW.random() < 0.5 else " ".join(DRAW.choices(WORDS, k=9))) for text in right]
    error = jackknife_error(bleu, items)
    assert error is not None and 2 < error < 20


@pytest.mark.parametrize("items", [[1.0, 3.0], [*range(NUM_GROUPS)] * 3], ids=["two items", "as many kinds as groups"])
def test_few_items_and_just_few_enough_kinds_have_the_exact_error(items):
    assert jackknife_error(mean, items) == pytest.approx(leave_one_out(mean, items))


@pytest.mark.parametrize(
    ("statistic", "items"), [(f1_score, LABELS[:1]), (median, [1.0, 2.0, 9.0]), (lambda items: math.nan, [1, 2, 3])]
)
def test_no_error_where_there_is_none(statistic, items):
    measured = WithError(statistic)
    measured(items)
    assert measured.errors == [None]


def test_items_that_cannot_be_hashed_are_no_kinds():
    items = [[0.2, 0.8], [0.5, 0.5], [0.2, 0.8]]
    firsts = jackknife_error(lambda some: mean([first for first, _ in some]), items)
    assert firsts == pytest.approx(stdev(first for first, _ in items) / math.sqrt(3))


def test_the_harness_bootstraps_nothing_and_errors_stand_beside_their_scores():
    statistics = {"acc": mean, "all": acc_all, "f1": f1_score}
    task = SimpleNamespace(aggregation=lambda: statistics)
    measured = _with_errors(task)
    assert stderr_for_metric(statistics["f1"], 1) is None and statistics["acc"] is mean and statistics["all"] is acc_all
    first, second = LABELS[:14], LABELS[14:]
    scores = {"f1,strict": statistics["f1"](first), "f1_stderr,strict": "N/A", "f1,any": statistics["f1"](second)}
    _add_errors(scores, measured)
    assert scores["f1,strict"] == f1_score(first)
    assert scores["f1_stderr,strict"] == pytest.approx(leave_one_out(f1_score, first))
    assert scores["f1_stderr,any"] == pytest.approx(leave_one_out(f1_score, second))
