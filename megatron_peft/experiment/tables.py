"""Tables of an experiment: each method's runs, their mean and spread, a paired test against one method, and costs."""

from collections.abc import Mapping, Sequence
from itertools import pairwise, product
from typing import Any, NamedTuple

import numpy as np
import pandas

from megatron_peft.config import METHODS, PeftConfig, require
from megatron_peft.experiment.cells import command_line
from megatron_peft.experiment.contrasts import POWER, SIGNIFICANT, Answer, compare
from megatron_peft.experiment.results import Result, Results, metrics, shown_metrics
from megatron_peft.experiment.spec import span

BOLD = r"\*\*(.*?)\*\*"  # as cells of a table mark it, for Markdown
LATEX = {"±": r"$\pm$", "†": r"$^\dagger$", "–": "--", "≥": r"$\ge$", "<": "$<$"}
NONE = "–"
pd: Any = pandas  # whose own types reject much of what it takes
Frame = Any  # a DataFrame
Scores = Mapping[tuple[str, str, str], Frame]  # of model, task and metric


class Table(NamedTuple):
    """Rows of text with a title above and a note below. The first `text_columns` are words, the others numbers.

    style: a class of the page: "sortable" by a click on a heading, "prose" of long texts, or nothing.
    """

    title: str
    frame: Frame
    note: str = ""
    text_columns: int = 1
    style: str = "sortable"

    def markdown(self) -> str:
        rule = ["---" if at < self.text_columns else "---:" for at in range(len(self.frame.columns))]
        cells = self.frame.map(lambda cell: cell.replace("|", "\\|")).values.tolist()
        lines = [f"| {' | '.join(row)} |" for row in (self.frame.columns, rule, *cells)]
        return "\n".join([f"**{self.title}**", "", *lines, *(["", self.note] if self.note else [])]) + "\n"

    def csv(self) -> str:
        return self.frame.replace(BOLD, r"\1", regex=True).to_csv(index=False)

    def latex(self) -> str:
        """Return a table environment, for the package booktabs."""
        columns = "l" * self.text_columns + "r" * (len(self.frame.columns) - self.text_columns)
        caption = f"{self.title}. {self.note}".replace("%", r"\%").replace("&", r"\&")
        text = self.frame.to_latex(index=False, escape=True, column_format=columns, caption=caption)
        return pd.Series(text).replace(BOLD, r"\\textbf{\1}", regex=True)[0].translate(str.maketrans(LATEX))


def make_table(title: str, columns: Sequence[str], rows: Sequence[Any], note: str = "", **settings: Any) -> Table:
    return Table(title, pd.DataFrame(rows, columns=[*columns], dtype=object), note, **settings)


def format_number(value: float | None, signed: bool = False) -> str:
    """Return four significant digits or so: losses with three after the point, scores with one or two."""
    return NONE if value is None or pd.isna(value) else f"{value:{'+' if signed else ''}.{_digits(value)}f}"


def format_p(p: float | None) -> str:
    return NONE if p is None or pd.isna(p) else f"{p:.3f}" if p >= 0.001 else "< 0.001"


def with_spread(mean: float, deviation: float) -> str:
    """Return a mean and its standard deviation, to the same digit."""
    return format_number(mean) + ("" if np.isnan(deviation) else f" ± {deviation:.{_digits(mean)}f}")


def _digits(value: float) -> int:
    return 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1


def reference_method(results: Results, chosen: str | None) -> str:
    """Return the method that others are tested against: the chosen one, `hybrid`, the first Hybrid, or the first.

    Raises ConfigurationError: the experiment has no such method.
    """
    names = [method.name for method in results.experiment.methods]
    if chosen is not None:
        require(chosen in names, f"--against {chosen}: the experiment's methods are {', '.join(names)}.")
        return chosen
    mixing = {name for name, method in METHODS.items() if method.mixes}
    mixed = [method.name for method in results.experiment.methods if method.peft_method in mixing]
    return ([name for name in mixed if name in mixing] or mixed or names)[0]


def score_runs(results: Results, reference: str) -> Scores:
    """Return a frame for each model, task and metric, with a row of numbers for each method.

    A column for each seed; mean; sd (n - 1); difference, low, high and p of the comparison with the reference method;
    is_best: no other method is better over the seeds that both have; average: mean and sd as text, bold if it is best.
    """
    seeds, scores = list(results.experiment.all_seeds), {}
    for model, task in dict.fromkeys((result.model, result.task) for result in results.all):
        of_place = results.of(model, task)
        for metric, higher in metrics(of_place[0].group.task).items():
            runs = pd.DataFrame({one.method: pd.Series(one.values(metric), dtype=float) for one in of_place}).T
            runs = runs.reindex(columns=seeds)
            part = runs.assign(mean=runs.mean(axis=1), sd=runs.std(axis=1))
            gains = {name: (runs - run) * (1 if higher else -1) for name, run in runs.iterrows()}  # of others over it
            tests = [compare((run - runs.loc[reference]).dropna().to_numpy()) for _, run in runs.iterrows()]
            part[["difference", "low", "high", "p"]] = [test or (np.nan,) * 4 for test in tests]
            is_beaten = [(gains[name].sum(axis=1) > 0).any() for name in runs.index]
            part["is_best"] = part["mean"].notna() & ~np.array(is_beaten) & (part["mean"].count() > 1)
            part["average"] = [bold(with_spread(*row[:2]), row[2]) for row in part[["mean", "sd", "is_best"]].values]
            scores[model, task, metric] = part.rename_axis("method")
    return scores


def bold(text: str, is_bold: bool = True) -> str:
    return f"**{text}**" if is_bold else text


def by_score(results: Results, scores: Scores) -> Table:
    """Return a line per method and a column per score, or the validation loss of a task without scores."""
    experiment, columns, counts = results.experiment, {}, {}
    for model, task in product(experiment.models, experiment.tasks):
        for key in ((model.name, task.name, metric) for metric in shown_metrics(task)):
            name = ", ".join(key[0 if len(experiment.models) > 1 else 1 :])
            columns[name] = scores[key]["average"] if key in scores else pd.Series(dtype=object)
            runs = scores[key][list(experiment.all_seeds)].count(axis=1) if key in scores else pd.Series()
            if runs.any():
                counts.setdefault(span(runs[runs > 0]), []).append(name)
    usual = max(counts, key=lambda count: len(counts[count]), default="0")
    others = "; ".join(f"{', '.join(names)}: {count}" for count, names in counts.items() if count != usual)
    frame = pd.DataFrame(columns).reindex([method.name for method in experiment.methods]).fillna(NONE)
    title = f"Mean ± standard deviation of {usual} seeds{f' ({others})' if others else ''}"
    return Table(title, frame.rename_axis("method").reset_index())


def with_test(results: Results, scores: Scores, reference: str) -> Table:
    """Return a line per row of the scores, with the test."""
    numbers, seeds = pd.concat(scores, names=["model", "task", "metric"]), results.experiment.all_seeds
    signed = numbers[["difference", "low", "high"]].map(lambda value: format_number(value, signed=True))
    frame = numbers[list(seeds)].map(format_number).set_axis([f"run {at + 1}" for at in range(len(seeds))], axis=1)
    frame["mean"] = [bold(format_number(mean), is_best) for mean, is_best in numbers[["mean", "is_best"]].values]
    frame["sd"], frame[f"minus {reference}"] = numbers["sd"].map(format_number), signed["difference"]
    frame["95% interval"] = (signed["low"] + " to " + signed["high"]).where(numbers["p"].notna(), NONE)
    frame["p"] = numbers["p"].map(format_p)
    note = (
        "Bold: no method is better over the seeds that both have. The test pairs runs of the same seed; of few seeds "
        "it sees large differences only, and p is not corrected for the number of methods."
    )
    title = f"Runs, mean, standard deviation, and a paired t-test against {reference}"
    return Table(title, frame.reset_index(), note, text_columns=4)


def in_the_papers_form(results: Results, scores: Scores) -> Table:
    """Return two lines per method, its runs and their mean; a column per model."""
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for (model, task, metric), part in scores.items():
        runs = part[list(results.experiment.all_seeds)].map(format_number).agg(" / ".join, axis=1)
        for method, average in part["average"].items():
            heading = f"{task} ({metric})"
            lines.setdefault((heading, method, method), {})[model] = runs[method]
            lines.setdefault((heading, method, "Avg"), {})[model] = average
    frame = pd.DataFrame.from_dict(lines, orient="index", columns=[one.name for one in results.experiment.models])
    headings = pd.Series([heading for heading, _, _ in lines], dtype=object)
    frame.insert(0, "Benchmark", headings.mask(headings.duplicated(), "").to_numpy())
    frame.insert(1, "Method", [name for _, _, name in lines])
    note = "Average ± standard deviation of the sample; the best of each benchmark is bold."
    return Table("Ours: each run and the average", frame.fillna(NONE), note, text_columns=2, style="")


def contrast_table(answers: Sequence[Answer]) -> Table:
    """Return the numbers of the answers to contrasts."""
    lines = [
        (
            *(spec.name, answer.result.model, answer.result.task, f"{spec.of} - {spec.against}", spec.metric),
            *(str(answer.num_pairs), str(answer.num_items or NONE), f"{spec.margin:g}"),
            NONE if answer.difference is None else f"{answer.difference:+.4f}",
            NONE if answer.quantiles is None else f"{answer.quantiles[0]:+.4f} to {answer.quantiles[-1]:+.4f}",
            *map(format_p, (answer.p, None if answer.obstacle else answer.holm)),
            NONE if answer.detectable is None else f"{answer.detectable:.4f}",
        )
        for answer in answers
        for spec in (answer.contrast,)
    ]
    words = ("contrast", "model", "task", "difference", "metric")
    return make_table(
        "Differences of runs of the same seed",
        (*words, "pairs", "items", "margin", "mean", "95% interval", "p", "p (Holm)", "detectable"),
        lines,
        "Intervals: of Student's t over seeds and items. p: a paired t-test over the seeds, then corrected by Holm's "
        "method for the number of answers. Better: the 95% interval is off 0, and the corrected p below "
        f"{SIGNIFICANT}. Equivalent: the 90% interval is within the margin (not corrected). Detectable: the difference "
        f"that the test finds in {POWER:.0%} of all cases, where pairs spread like these and p is to be below "
        f"{SIGNIFICANT} over the number of answers; of a smaller one it probably says nothing.",
        text_columns=len(words),
    )


# Time and peak memory.

QUIET = 1.2  # times the shortest step of a method's runs is the longest, at most, where nothing else ran beside them
COSTS = {  # column: field of a record, unit
    "seconds a step": ("step_seconds", 1.0),
    "minutes an epoch": ("epoch_seconds", 60.0),
    "CPU minutes a run": ("cpu_seconds", 60.0),
    "peak memory (GB)": ("peak_memory_bytes", 1e9),
}


def costs(results: Results) -> Frame:
    """Return the costs of each final run, by model, task, method and seed."""
    runs = {
        (result.model, result.task, result.method, seed): [getattr(record, name) for name, _ in COSTS.values()]
        for result in results.all
        for seed, record in result.finals.items()
    }
    frame = pd.DataFrame.from_dict(runs, orient="index", columns=[*COSTS], dtype=float)
    frame.index = pd.MultiIndex.from_tuples([*runs], names=["model", "task", "method", "seed"])
    return frame / [unit for _, unit in COSTS.values()]


def spread(runs: Frame, column: str) -> float:
    """Return the largest ratio between runs of one method."""
    by_method = runs[column].groupby(["model", "task", "method"])
    return (by_method.max() / by_method.min()).max()


def is_quiet(runs: Frame) -> bool:
    """Return True if the runs of each method took about as long: else wall-clock time is that of other work too."""
    return not spread(runs, "seconds a step") > QUIET


def cost_table(results: Results) -> Table:
    """Return trained parameters, time and memory; the commits of the runs, where there are several."""
    runs, finals = costs(results), [result for result in results.all if result.finals]
    means = runs.groupby(["model", "task", "method"], sort=False).mean().map(format_number)
    note = (
        "Means over the final runs. CPU minutes are those of a run's processes, validations included. Memory "
        "is that of the process that writes the log: on a GPU what its allocator held, on a CPU the resident set with "
        "Python itself."
    )
    if is_quiet(runs):
        note += " Seconds and minutes are wall-clock time."
    else:
        means = means.drop(columns=["seconds a step", "minutes an epoch"])
        note += (
            f" Wall-clock time is left out: seconds a step differ by more than a factor of {QUIET} between runs of one "
            f"method, as they do beside other work."
        )
    if (widest := spread(runs, "peak memory (GB)")) > QUIET:
        note += f" Peaks differ by up to a factor of {widest:.2f} between runs of one method: by less they say nothing."
    trained = [next(iter(result.finals.values())).trainable_parameters for result in finals]
    means.insert(0, "trainable parameters", [NONE if number is None else f"{number:,}" for number in trained])
    commits = [{str(record.versions.get("commit", NONE)): None for record in one.finals.values()} for one in finals]
    if len(set().union(*commits)) > 1:
        note += " The runs are of several commits, not equally fast: CPU minutes compare only within one."
        means["commit"] = [", ".join(commit[:7] + commit[40:] for commit in each) for each in commits]
    return Table("Cost", means.reset_index(), note, text_columns=3)


# Steps to LoRA's loss.


def crossing(curve: Mapping[float, float], loss: float) -> tuple[float, bool] | None:
    """Return the first iteration, linear between measurements, at which the loss is reached, and if it is a bound.

    Args: curve: iteration -> validation loss, by iteration.
    """
    first = next(iter(curve.items()), None)
    if first and first[1] <= loss:
        return first[0], first[1] < loss
    for (before_at, before), (at, value) in pairwise(curve.items()):
        if value <= loss:
            return before_at + (before - loss) / (before - value) * (at - before_at), False
    return None


def steps_to(result: Result, reference: Result) -> dict[int, str]:
    """Return N -> how many times fewer steps the method needs to the reference's loss after N, over seeds of both.

    Each N is a measurement of all of the reference's runs at which the mean of their losses is the lowest so far: a
    later loss that is higher is no goal, since every run had it earlier.
    """
    seeds = result.finals.keys() & reference.finals.keys()
    curves, targets = (
        [{at: loss for at, _, loss in one.finals[seed].curves.get("validation_loss", ())} for seed in seeds]
        for one in (result, reference)
    )
    found, lowest = {}, np.inf
    for steps in sorted(set.intersection(*map(set, targets))) if seeds else ():
        if (target := np.mean([losses[steps] for losses in targets])) < lowest:
            lowest = target
            reached = [crossing(curve, losses[steps]) for curve, losses in zip(curves, targets, strict=True)]
            arrived = [each for each in reached if each]
            if not arrived:
                found[steps] = f"not reached (0/{len(seeds)})"
            elif len(arrived) < len(seeds):  # those that arrive are the faster ones
                found[steps] = f"{len(arrived)}/{len(seeds)} reach it"
            else:
                bound = "≥ " if any(is_bound for _, is_bound in arrived) else ""
                found[steps] = f"{bound}{steps / np.mean([at for at, _ in arrived]):.2f}"
    return found


def speed_table(results: Results, model: str, task: str) -> Table | None:
    """Return a line per method, a column per measurement; None without LoRA's runs, or with fewer than two columns."""
    of_place = [result for result in results.of(model, task) if result.finals]
    base = next((one for one in of_place if one.group.method.peft_method == PeftConfig.method), None)
    others = {one.method: steps for one in of_place if base and one is not base and (steps := steps_to(one, base))}
    frame = pd.DataFrame.from_dict(others, orient="index").fillna(NONE)
    if base is None or len(frame.columns) < 2:
        return None
    frame = frame.sort_index(axis=1).rename(columns=lambda steps: f"N = {steps}").rename_axis("method").reset_index()
    return Table(
        f"Times fewer steps than {base.method} to {base.method}'s validation loss after N steps ({model}, {task})",
        frame,
        "N over the mean number of steps that the method's runs need, seed by seed, linear between measurements; above "
        "1 it is faster. '≥' where the first measurement is at or below the loss already; k/n where only k of n runs "
        "reach it: those that do are the faster ones. All rates decay to 0 at the end of the run, so N before the end "
        "is not a run of N steps.",
    )


# How the runs were made.


def tuning_table(results: Results) -> Table:
    """Return every setting that was tried: the point of the grid, or the rate of a method without one."""
    lines = [
        (
            *(result.model, result.task, result.method),
            cell.point or (f"lr={cell.flags[cell.flags.index('--lr') + 1]}" if "--lr" in cell.flags[:-1] else ""),
            str(cell.seed),
            format_number(record.validation_loss) if record and record.is_trained else "failed" if record else NONE,
            "yes" if result.finals and cell.settings == result.chosen[0].settings else "",
        )
        for result in results.all
        for cell, record in result.tuning
    ]
    columns = ("model", "task", "method", "settings", "seed", "validation loss", "chosen")
    return make_table("Settings that were tried", columns, lines, text_columns=4)


def flags_table(results: Results) -> Table:
    """Return the budget of each task and model."""
    experiment = results.experiment
    lines = [
        (model.name, task.name, " ".join(command_line(experiment.budget(model, task))))
        for model in experiment.models
        for task in experiment.tasks
    ]
    return make_table("Flags that all methods share", ("model", "task", "flags"), lines, text_columns=3)
