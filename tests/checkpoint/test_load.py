"""A resumed run is the uninterrupted one, bit for bit; what does not fit is refused before anything changes."""

from __future__ import annotations

import pytest

from tests.checkpoint import rank_checks
from tests.checkpoint.rank_checks import CHANGED, RESUMED_ON_FOUR, RESUMED_ON_TWO
from tests.ranks import run_ranks


@pytest.mark.parametrize("name", RESUMED_ON_TWO)
def test_resumed_equals_uninterrupted(two_ranks, name):
    assert [facts["resumed"][name] for facts in two_ranks] == [[], []]


def test_resumed_equals_uninterrupted_on_four_ranks(files):
    by_rank = run_ranks(4, rank_checks.on_four_ranks, files, limit=900)
    assert by_rank == [{name: [] for name in RESUMED_ON_FOUR}] * 4


@pytest.mark.parametrize(
    "change, words",
    {
        "method": ["--peft-method lora", "--peft-method full"],
        "rank": ["--lora-rank 4", "--lora-rank 8"],
        "alpha": ["--lora-alpha 32", "--lora-alpha 8"],
        "targets": ["(16 layers)", "(8 layers"],
        "optimizer": ["--optimizer adam", "--optimizer sgd"],
        "schedule": ["--lr: 0.005 there, 0.001 here"],
    }.items(),
)
def test_another_run_is_refused_before_anything_changes(two_ranks, change, words):
    assert change in CHANGED
    for facts in two_ranks:
        message, changed = facts["refused"][change]
        assert all(word in message for word in words), message
        assert changed == []


def test_another_base_of_the_same_shape_is_refused(two_ranks):
    for facts in two_ranks:
        message, changed = facts["refused base"]
        assert "bases/base" in message and "bases/other" in message and "model.safetensors" in message
        assert changed == []


@pytest.mark.parametrize(
    "flag, differing, iteration",
    [
        ("finetune", {"exp_avg", "exp_avg_sq", "steps", "rate", "torch", "python", "numpy"}, 0),
        ("no_load_optim", {"exp_avg", "exp_avg_sq", "steps", "rate"}, 2),
        ("no_load_rng", {"torch", "python", "numpy"}, 2),
    ],
)
def test_flags_leave_their_part_out(facts, flag, differing, iteration):
    assert facts["loaded partly"][flag] == (differing, iteration)


def test_override_takes_this_runs_rates_and_use_checkpoint_the_stored_ones(facts):
    """After two of three steps of a cosine a quarter of the rate is left; B's is four times A's."""
    assert facts["schedule"]["override_opt_param_scheduler"] == pytest.approx([1e-3 / 4, 4e-3 / 4])
    assert facts["schedule"]["use_checkpoint_opt_param_scheduler"] == pytest.approx([5e-3 / 4, 20e-3 / 4])


def test_a_folder_without_a_checkpoint_starts_from_the_beginning(facts):
    assert facts["empty"] is False


def test_trained_parameters_for_inference(facts):
    inference = facts["inference"]
    assert not inference["parameters differ"]
    assert (inference["rank"], inference["iteration"]) == (4, 2)
    assert "holds 24 parameters that this run does not have" in inference["fewer adapters"]
