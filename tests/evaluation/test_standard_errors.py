"""Every score has a standard error: the formula of lm-evaluation-harness, or its bootstrap with few draws."""

import random
from statistics import stdev
from typing import Any

import pytest
from lm_eval.api.metrics import acc_all, bleu, bypass_agg, f1_score, mean, weighted_perplexity

from megatron_peft.evaluation.harness_run import NUM_DRAWS, evaluator_utils

DRAW = random.Random(0)
LABELS = [(DRAW.randrange(2), DRAW.randrange(2)) for _ in range(300)]
TEXTS = [" ".join(DRAW.choices("abcdefgh", k=9)) for _ in range(60)]
ITEMS = {
    f1_score: LABELS,
    bleu: [(text, text if DRAW.random() < 0.5 else text[::-1]) for text in TEXTS],
    weighted_perplexity: [(DRAW.gauss(-20, 2), 9) for _ in range(300)],
}


def leave_one_out(statistic: Any, items: list[Any]) -> float:
    """The jackknife's error: of the statistic without each of the items in turn."""
    values = [statistic([*items[:place], *items[place + 1 :]]) for place in range(len(items))]
    middle = sum(values) / len(values)
    return ((len(items) - 1) / len(items) * sum((value - middle) ** 2 for value in values)) ** 0.5


@pytest.mark.parametrize("statistic", ITEMS)
def test_a_score_without_a_formula_is_drawn_again_in_silence(statistic, capsys):
    error = evaluator_utils.stderr_for_metric(statistic, NUM_DRAWS)
    assert error is not None, "perplexities too, for which the harness has none"
    assert error(ITEMS[statistic]) == pytest.approx(leave_one_out(statistic, ITEMS[statistic]), rel=0.3)
    assert capsys.readouterr().out == ""


def test_a_formula_is_used_where_there_is_one():
    items = [DRAW.gauss(0, 1) for _ in range(30)]
    formula, other, none = (evaluator_utils.stderr_for_metric(metric, 1) for metric in (mean, acc_all, bypass_agg))
    assert formula(items) == pytest.approx(stdev(items) / 30**0.5)
    assert other.__module__ == "lm_eval.api.metrics" and none is None
