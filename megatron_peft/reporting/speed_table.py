"""In how many times fewer steps than LoRA each method reaches LoRA's validation loss after N steps."""

from collections.abc import Sequence

from megatron_peft.experiment.results import Results, peft_method
from megatron_peft.reporting.steps_to_loss import StepsTo, steps_to
from megatron_peft.reporting.table import Table


def table(results: Results, model: str, task: str) -> Table | None:
    """A line a method, a column for each measurement; None without a run of LoRA."""
    found = results.of(model, task)
    lora = next((result for result in found if peft_method(result.group.method) == "lora" and result.finals), None)
    if lora is None:
        return None
    measured = {result.method: steps_to(result.finals, lora.finals) for result in found if result is not lora}
    lines = {method: steps for method, steps in measured.items() if steps}
    steps = sorted({one.steps for line in lines.values() for one in line})
    return Table(
        f"Times fewer steps than {lora.method} to {lora.method}'s validation loss after N steps ({model}, {task})",
        ("method", *(f"N = {one}" for one in steps)),
        tuple((method, *_cells(line, steps)) for method, line in lines.items()),
        "N over the mean number of steps that the method's runs need, seed by seed, linear between measurements; above "
        "1 it is faster. '≥' where the first measurement is at or below the loss already; (k/n) where only k of n runs "
        "reach it. All rates decay to 0 at the end of the run, so N before the end is not a run of N steps.",
    )


def _cells(line: Sequence[StepsTo], steps: Sequence[int]) -> list[str]:
    found = {one.steps: one for one in line}
    return [_cell(found[one]) if one in found else "–" for one in steps]


def _cell(one: StepsTo) -> str:
    if one.times_fewer is None:
        return f"not reached (0/{one.num_runs})"
    share = "" if one.num_reached == one.num_runs else f" ({one.num_reached}/{one.num_runs})"
    return f"{'≥ ' if one.is_bound else ''}{one.times_fewer:.2f}{share}"
