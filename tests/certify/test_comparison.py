"""Comparisons of reports that are made by hand: what differs is named, and nothing else."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megatron_peft.certify import runs
from megatron_peft.certify.comparison import (
    compare_curves,
    compare_resharded,
    compare_resumed,
    compare_tensors,
    same_copies,
    same_samples,
    whole_tensors,
)
from megatron_peft.certify.runs import END, START, Curve, RankReport
from megatron_peft.checkpoint.run_record import BestValidation
from megatron_peft.checkpoint.state import Position
from megatron_peft.config import make_run
from megatron_peft.training.step import StepReport

CONFIG = make_run(pretrained_checkpoint="not read", train_data_path=("not read",), global_batch_size=1, train_iters=1)
STEP = StepReport(2.0, 9, 9, 9, grad_norm=1.0, learning_rate=0.1, stop=False, layer_grad_norms=(0.6, 0.8))
CURVE = Curve([STEP, STEP], {"layer": 0.4}, 1.5)
A, ROWS = "decoder.layers.0.mlp.linear_fc2.adapter.A", torch.arange(8.0).view(4, 2)
WHOLE = {A: ROWS.double()}


def report(rank: int, *slices: tuple[str, int, Tensor], **others: Any) -> RankReport:
    """Of a tensor-parallel rank that holds these slices at the start and at the end: (key, first row, rows)."""
    held = {(key, ((row, 0), tuple(rows.shape))): rows for key, row, rows in slices}
    return RankReport(CONFIG, (rank, 0, 0), CURVE, {START: held, END: held}, [], None, others)


HALVES = [report(0, (A, 0, ROWS[:2])), report(1, (A, 2, ROWS[2:]))]


def test_slices_of_ranks_make_one_tensor():
    assert torch.equal(whole_tensors(HALVES, END)[A], WHOLE[A])


def test_a_microbatch_that_a_replica_lacks_or_has_too_many_is_told():
    expected = replace(HALVES[0], samples=[[("a",), ("b",)]])
    for read in ([("a",)], [("a",), ("b",), ("c",)]):
        (problem,) = same_samples([replace(expected, samples=[read])], expected).problems
        assert "step 1, rank 0" in problem
    assert same_samples([expected], expected).passed


def test_of_a_resharded_run_changes_since_the_start_are_compared():
    """A tenth of what training has changed is seen, beside weights a thousand times as large."""
    moved, other = ((A, 0, ROWS + 1000 + change) for change in (1.0, 1.1))
    start = {(A, ((0, 0), (4, 2))): ROWS + 1000}
    layout, resharded = (replace(report(0, one), curve=CURVE) for one in (moved, other))
    layout, resharded = (replace(one, tensors={**one.tensors, START: start}) for one in (layout, resharded))
    resharded = replace(resharded, curve=replace(CURVE, steps=CURVE.steps[:0]))
    *_, line = compare_resharded([layout], resharded)
    assert line.problems and line.largest is not None and abs(line.largest - 0.1) < 0.01


def test_a_float32_copy_stands_for_its_parameter():
    rounded, copy = (A, 0, ROWS.bfloat16()), (f"optimizer.master.{A}", 0, ROWS + 2**-10)
    found = whole_tensors([report(0, rounded, copy)], END)
    assert found.keys() == {A} and torch.equal(found[A], copy[2].double())


def test_rows_that_no_rank_holds_are_a_difference():
    ranks = [report(0, (A, 0, ROWS[:1]), (A, 2, ROWS[2:]))]
    assert compare_tensors("", whole_tensors(ranks, END), WHOLE, 9.0, ranks).problems == (
        f"{A}: nan (layer 0, linear_fc2)",
    )


def test_the_rank_that_holds_what_differs_is_named():
    found = {A: torch.cat([ROWS[:2], -ROWS[2:]]).double()}
    (problem,) = compare_tensors("", found, WHOLE, 0.1, HALVES).problems
    assert problem == f"{A}: 1.9e+00 (layer 0, linear_fc2, tensor-parallel rank 1)"


def test_tensors_that_one_of_two_runs_lacks_are_named():
    line = compare_tensors("", {"b": torch.ones(2)}, {"a": torch.ones(2)}, 9.0, [])
    assert line.problems == ("a is missing", "b is of the layout alone")


def test_changes_are_compared_since_the_start():
    before = {A: WHOLE[A] - 1e-3}
    found = {A: WHOLE[A] + 1e-3}
    assert compare_tensors("", found, WHOLE, 0.01, HALVES).passed
    (problem,) = compare_tensors("", found, WHOLE, 0.01, HALVES, since=(before, before)).problems
    assert problem.startswith(f"{A}: 1.0e+00")


def test_copies_of_the_same_rows_must_be_equal():
    assert same_copies(HALVES, END).num_compared == 0 and same_copies([HALVES[0], HALVES[0]], END).passed
    other = report(1, (A, 0, ROWS[:2] + 2**-20))
    assert "rank 1 (tensor-parallel 1" in same_copies([HALVES[0], other], END).problems[0]


def test_all_tensors_are_compared_as_one():
    whole = {"a": torch.ones(3), "b": 4 * torch.ones(3)}
    near, far = ({**whole, "a": torch.zeros(3)}, {**whole, "b": torch.zeros(3)})
    assert compare_tensors("start", near, whole, 0.5, [], as_one=True).passed
    (problem,) = compare_tensors("start", far, whole, 0.5, [], as_one=True).problems
    assert problem == "all together: 9.7e-01, most of it in b"
    missing = compare_tensors("start", {"a": whole["a"]}, whole, 0.5, [], as_one=True)
    assert missing.problems == ("b is missing", "all together: nan, most of it in b")


def test_a_resumed_run_has_the_moments_and_generators_of_one_that_was_not_interrupted():
    moment = f"optimizer.exp_avg.{A}"
    whole, again = (
        [report(0, (A, 0, ROWS)), report(1, (moment, 0, ROWS + lost), generator=state)]
        for lost, state in ((0, b"12"), (1, b"13"))
    )
    assert compare_resumed(whole, whole).passed
    problems = compare_resumed(whole, again).problems
    assert problems == tuple(f"{name} differs after resuming from step 2" for name in (f"exp_avg {A}", "generator"))


def test_a_resumed_run_has_to_find_its_place_and_its_schedule(monkeypatch):
    monkeypatch.setattr(runs, "random_states", lambda: {})
    state = SimpleNamespace(
        position=Position(3, 24), best=BestValidation(1.5, 2), schedule=SimpleNamespace(num_steps=24)
    )
    others = runs.Run.others(SimpleNamespace(state=state))  # type: ignore[arg-type]
    assert (others["iteration"], others["schedule"], others["lowest validation loss: loss"]) == (3, 24, 1.5)


def test_every_number_of_a_curve_is_compared():
    others = {
        "losses": {"loss": 2.1},
        "loss tokens of a step": {"num_tokens": 8},
        "learning rates": {"learning_rate": 0.1001},
        "steps that ask to stop": {"stop": True},
        "gradient norms": {"grad_norm": float("nan")},
        "gradient norms of layers": {"layer_grad_norms": (0.6,)},
    }
    for name, fields in others.items():
        lines = compare_curves(replace(CURVE, steps=[STEP, replace(STEP, **fields)]), CURVE)
        assert [line.name for line in lines if line.problems] == [name]
        assert all(problem.startswith("step 2") for line in lines for problem in line.problems)
    lines = compare_curves(replace(CURVE, lambdas={}, validation_loss=1.6), CURVE)
    assert [line.name for line in lines if line.problems] == ["lambdas", "validation loss"]
