"""In how many steps one run reaches the validation loss that another has after N."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from megatron_peft.experiment.record import CellRecord

Curve = Sequence[tuple[float, float]]  # (iteration, validation loss), by iteration


@dataclass(frozen=True)
class StepsTo:
    """How a method reaches a reference's loss after `steps` steps.

    Attributes:
        times_fewer: `steps` over the mean number of steps that the method needs; None if no run reaches the loss.
        is_bound: a run was there at its first measurement already, so that `times_fewer` is the least it can be.
        num_reached: of `num_runs`; the mean is over these.
    """

    steps: int
    times_fewer: float | None
    is_bound: bool
    num_reached: int
    num_runs: int


def crossing(curve: Curve, loss: float) -> tuple[float, bool] | None:
    """(first iteration, linear between measurements, at which the loss is reached; whether it is only a bound)."""
    before: tuple[float, float] | None = None
    for at, value in curve:
        if value <= loss:
            if before is None:
                return at, value < loss
            share = (before[1] - loss) / (before[1] - value)
            return before[0] + share * (at - before[0]), False
        before = at, value
    return None


def steps_to(runs: Mapping[int, CellRecord], reference: Mapping[int, CellRecord]) -> list[StepsTo]:
    """One for each measurement of the reference; runs are paired by seed.

    Only measurements that all of the reference's runs have count.
    """
    seeds = sorted(runs.keys() & reference.keys())
    if not seeds:
        return []
    targets = {seed: dict(validation_curve(reference[seed])) for seed in seeds}
    shared = sorted(set.intersection(*(set(target) for target in targets.values())))
    curves = {seed: validation_curve(runs[seed]) for seed in seeds}
    return [_at(steps, [crossing(curves[seed], targets[seed][steps]) for seed in seeds]) for steps in shared]


def validation_curve(record: CellRecord) -> list[tuple[float, float]]:
    return [(iteration, loss) for iteration, _, loss in record.curves.get("validation_loss", ())]


def _at(steps: float, crossings: Sequence[tuple[float, bool] | None]) -> StepsTo:
    reached = [found for found in crossings if found is not None]
    times = steps / mean(at for at, _ in reached) if reached else None
    return StepsTo(int(steps), times, any(is_bound for _, is_bound in reached), len(reached), len(crossings))
