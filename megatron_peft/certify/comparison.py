"""Comparisons of a layout's run with that of one process, number by number and tensor by tensor; differences are named.

Certificates and the tests of layouts make the same, with the same tolerances.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product, zip_longest

import numpy as np
import torch
from torch import Tensor

from megatron_peft.certify.runs import END, GRADIENTS, SAVED_AT, START, Curve, Place, RankReport, slice_of
from megatron_peft.checkpoint.tensors import NOT_PARAMETERS, master_key
from megatron_peft.config import RunConfig

Tensors = Mapping[str, Tensor]  # whole, by the keys of parameters

SECOND_MOMENT = "optimizer.exp_avg_sq."
NEGLIGIBLE = 1e-5  # a tensor below this share of all tensors' norm is compared with that share

# Largest differences that pass, in float32 and in bfloat16; each comparison says relative to what.
#
# float32: losses as promised; the others are ten times what was seen over methods and layouts, or more. bfloat16: at
# least 1.5 times what was seen. It keeps eight bits: a sum over ranks that is missing or doubled still changes a tensor
# by half or more. The gradients of step 2 follow Adam's first update.
TOLERANCES = {
    "trained tensors at the start": (1e-3, 5e-1),  # where they follow from gradients; others are equal
    "losses": (1e-5, 5e-3),
    "loss tokens of a step": (0.0, 0.0),
    "learning rates": (1e-7, 1e-7),
    "steps that ask to stop": (0.0, 0.0),
    "gradient norms": (1e-4, 1e-1),
    "gradient norms of layers": (1e-4, 1e-1),
    "gradients of step 1": (1e-3, 1e-1),
    "gradients of step 2": (2e-2, 5e-1),
    "lambdas": (1e-4, 2e-2),
    "trained tensors": (1e-2, 6e-1),
    "validation loss": (1e-5, 5e-3),
    "logits": (1e-3, 3e-1),
}


@dataclass(frozen=True)
class CertificateLine:
    """One line of a certificate."""

    name: str  # what was compared
    num_compared: int  # numbers, tensors or folders
    largest: float | None  # difference; None where things are equal or not
    tolerance: float  # the largest difference that passes
    problems: tuple[str, ...] = ()  # what does not pass, the worst first
    note: str = ""  # how the difference is measured, or why nothing was compared
    error: str = ""  # what kept it from being compared: a failure of the tool, or of the ranks that it started

    @property
    def passed(self) -> bool:
        return not (self.problems or self.error)


def compare_runs(ranks: Sequence[RankReport], reference: RankReport) -> Iterator[CertificateLine]:
    """A layout's run with that of one process, in the order in which a fault shows first."""
    config, bf16 = ranks[0].config, ranks[0].config.model.bf16
    curves = {line.name: line for line in compare_curves(ranks[0].curve, reference.curve, bf16)}

    def wholes(when: str) -> tuple[Tensors, Tensors]:
        return whole_tensors(ranks, when), whole_tensors([reference], when)

    yield same_copies(ranks, START)
    name, starts, is_exchanged = "trained tensors at the start", wholes(START), begins_alike(config)
    tolerance = TOLERANCES[name][bf16] if config.peft.spec.starts_from_gradients else 0.0
    yield compare_tensors(name, *starts, tolerance, ranks, as_one=is_exchanged)
    yield same_samples(ranks, reference)
    if reference.logits is not None:
        yield compare_logits("logits before training", reported_logits(ranks)[0], reference.logits, 0, bf16)
    for name in ("losses", "loss tokens of a step", "gradient norms", "gradient norms of layers"):
        yield curves[name]
    for name in GRADIENTS.values():
        yield compare_tensors(name, *wholes(name), TOLERANCES[name][bf16], ranks)
    if reference.curve.lambdas:
        yield curves["lambdas"]
    yield same_copies(ranks, END)
    # Adam divides a gradient by its usual size. Where that is rounding alone, as for the bias of keys, so is the
    # change: weighted by the size, a change counts as much as its gradient. Other optimizers have no sizes.
    sizes = {key: moment.sqrt() for key, moment in whole_tensors([reference], END, SECOND_MOMENT).items()}
    name, since = "trained tensors", (starts[0], starts[0]) if is_exchanged else starts
    yield compare_tensors(name, *wholes(END), TOLERANCES[name][bf16], ranks, since, sizes)
    yield curves["validation loss"]
    if reference.logits is not None:
        yield compare_logits("logits after training", reported_logits(ranks)[1], reference.logits, 1, bf16)


def begins_alike(config: RunConfig) -> bool:
    """Whether one process trains from the start that the layout's run has found, once the two were compared as one.

    LoRA-GA's directions whose singular values are close are exchanged by bfloat16's rounding alone, and with other
    directions all that follows is another run.
    """
    return config.model.bf16 and config.peft.spec.starts_from_gradients


def compare_resumed(ranks: Sequence[RankReport], resumed: Sequence[RankReport]) -> CertificateLine:
    """A run that was resumed from its middle with the one that was not interrupted."""
    names: set[str] = set()
    for rank, again in zip(ranks, resumed, strict=True):
        names |= {name for name, value in rank.others.items() if again.others.get(name) != value}
        tensors, others = rank.tensors[END], again.tensors[END]
        for slot in tensors.keys() | others.keys():
            if slot not in tensors or slot not in others or not torch.equal(tensors[slot], others[slot]):
                key = slot[0].removeprefix("optimizer.")
                names.add(key if key == slot[0] else key.replace(".", " ", 1))
    problems = [f"{name} differs after resuming from step {SAVED_AT}" for name in sorted(names)]
    return CertificateLine("resumed run", len(ranks), None, 0.0, tuple(problems), "bit for bit, on every rank")


def compare_resharded(ranks: Sequence[RankReport], resharded: RankReport) -> Iterator[CertificateLine]:
    """The layout with one process that was resumed from its checkpoint."""
    bf16, start = ranks[0].config.model.bf16, whole_tensors(ranks, START)
    losses = _by_step(ranks[0].curve.losses[SAVED_AT:]), _by_step(resharded.curve.losses)
    yield compare_numbers("losses after resharding to one process", *losses, TOLERANCES["losses"][bf16])
    ends = whole_tensors(ranks, END), whole_tensors([resharded], END)
    tolerance = TOLERANCES["trained tensors"][bf16]
    yield compare_tensors("trained tensors after resharding", *ends, tolerance, ranks, (start, start))


# Numbers.


def compare_curves(curve: Curve, reference: Curve, bf16: bool = False) -> list[CertificateLine]:
    """Relative differences of all numbers of a run. A certificate's rates are constant, and nobody asks it to stop."""
    numbers, expected = _numbers(curve), _numbers(reference)
    return [compare_numbers(name, numbers[name], expected[name], TOLERANCES[name][bf16]) for name in expected]


def _numbers(curve: Curve) -> dict[str, Mapping[str, float]]:
    of_layers = {
        f"step {number}, layer {layer}": norm
        for number, step in enumerate(curve.steps, 1)
        for layer, norm in enumerate(step.layer_grad_norms)
    }
    return {
        "losses": _by_step(curve.losses),
        "loss tokens of a step": _by_step(step.num_tokens for step in curve.steps),
        "learning rates": _by_step(step.learning_rate for step in curve.steps),
        "steps that ask to stop": _by_step(step.stop for step in curve.steps),
        "gradient norms": _by_step(step.grad_norm for step in curve.steps),
        "gradient norms of layers": of_layers,
        "lambdas": curve.lambdas,
        "validation loss": _by_step([curve.validation_loss]),
    }


def _by_step(values: Iterable[float]) -> dict[str, float]:
    return {f"step {number}": value for number, value in enumerate(values, 1)}


def compare_numbers(
    name: str, numbers: Mapping[str, float], reference: Mapping[str, float], tolerance: float
) -> CertificateLine:
    """Relative differences; what one of the two lacks is NaN there, and so is the largest."""
    pairs = {key: (numbers.get(key, math.nan), reference.get(key, math.nan)) for key in {**reference, **numbers}}
    errors = {key: abs(value - wanted) / (abs(wanted) or 1.0) for key, (value, wanted) in pairs.items()}
    wrong = [key for key, error in errors.items() if not error <= tolerance]
    problems = ("{}: {:.8g}, in one process {:.8g}".format(key, *pairs[key]) for key in wrong)
    largest = float(np.max([0.0, *errors.values()]))
    return CertificateLine(name, len(errors), largest, tolerance, tuple(problems), "relative")


# Samples.


def same_samples(ranks: Sequence[RankReport], reference: RankReport) -> CertificateLine:
    """Each step's microbatches: in their order the replicas' are those of one process, on every rank of a replica."""
    problems = []
    num_replicas = ranks[0].config.parallel.data_parallel_size
    for (step, expected), (rank, run) in product(enumerate(reference.samples), enumerate(ranks)):
        own = expected[run.place[2] :: num_replicas]  # a replica takes every so many-th microbatch
        for number, (read, wanted) in enumerate(zip_longest(run.samples[step], own), 1):
            if read != wanted:
                elsewhere = "no microbatch of that step" if read not in expected else "another of that step's"
                what = f"microbatch {number} is {elsewhere} in one process"
                problems.append(f"step {step + 1}, {_rank(rank, run)}: {what}")
    return CertificateLine("samples of each step", len(reference.samples), None, 0.0, tuple(problems), "by digest")


def _rank(number: int, run: RankReport) -> str:
    tensor_parallel, stage, replica = run.place
    return f"rank {number} (tensor-parallel {tensor_parallel}, stage {stage}, replica {replica})"


# Tensors.


def whole_tensors(ranks: Sequence[RankReport], when: str, prefix: str = "") -> Tensors:
    """Joins the slices that the ranks hold, in float64; what none of them holds is NaN.

    In the place of a bfloat16 parameter stands its float32 copy, if there is one: a few steps change a norm's weight by
    less than bfloat16 can say. A `prefix` of keys in a checkpoint is left out; parameters have none.
    """
    slices: dict[str, dict[Place, Tensor]] = {}
    for run in ranks:
        for (key, place), held in run.tensors[when].items():
            slices.setdefault(key, {})[place] = held
    tensors = {}
    for key in slices:
        if not key.startswith(prefix) or (not prefix and key.startswith(NOT_PARAMETERS)):
            continue
        parts = slices.get(master_key(key), slices[key])
        ends = ((start + side for start, side in zip(*place, strict=True)) for place in parts)
        whole = torch.full([max(sides) for sides in zip(*ends, strict=True)], math.nan, dtype=torch.float64)
        for place, held in parts.items():
            whole[slice_of(*place)] = held.double()
        tensors[key.removeprefix(prefix)] = whole
    return tensors


def compare_tensors(
    name: str,
    tensors: Tensors,
    reference: Tensors,
    tolerance: float,
    ranks: Sequence[RankReport],
    since: tuple[Tensors, Tensors] | None = None,
    weights: Tensors | None = None,
    as_one: bool = False,
) -> CertificateLine:
    """The norm of the difference over the norm of the reference, tensor by tensor, or of all `as_one`.

    `ranks` say which slices they hold. `since` is what both were before: their changes since are compared instead.
    `weights` are of each tensor's elements.
    """
    differences, wholes = {}, {}
    for key, whole in reference.items():
        other = tensors.get(key)
        if other is None or other.shape != whole.shape:
            other = torch.full_like(whole, math.nan)
        if since is not None:
            before, whole_before = (start.get(key, torch.zeros_like(whole)) for start in since)
            other, whole = other - before, whole - whole_before
        weight = (weights or {}).get(key, torch.ones(()))
        differences[key], wholes[key] = weight * (other - whole), weight * whole
    size = math.hypot(*(float(whole.norm()) for whole in wholes.values()))
    least = size if as_one else NEGLIGIBLE * size

    def error(key: str, index: tuple[slice, ...] = ()) -> float:
        return float(differences[key][index].norm()) / (max(float(wholes[key][index].norm()), least) or 1.0)

    errors = {key: error(key) for key in reference}
    worst = sorted(errors, key=lambda key: -math.inf if math.isnan(errors[key]) else -errors[key])
    problems = [f"{key} is missing" for key in sorted(reference.keys() - tensors.keys())]
    problems += [f"{key} is of the layout alone" for key in sorted(tensors.keys() - reference.keys())]
    if as_one:
        largest, of = math.hypot(*errors.values()), "all tensors"
        if not largest <= tolerance:
            problems.append(f"all together: {largest:.1e}, most of it in {worst[0]}")
    else:
        largest, of = float(np.max([0.0, *errors.values()])), "the tensor" if since is None else "the change"
        for key in (key for key in worst if key in tensors and not errors[key] <= tolerance):
            holders = {(place, run.place[0]) for run in ranks for held, place in run.tensors[START] if held == key}
            wrong = {rank for place, rank in holders if not error(key, slice_of(*place)) <= tolerance}
            some = sorted(wrong) if wrong < {rank for _, rank in holders} else []
            problems.append(f"{key}: {errors[key]:.1e}{_where(key, some)}")
    note = "bit for bit" if tolerance == 0 else f"norm of the difference over that of {of}"
    return CertificateLine(name, len(reference), largest, tolerance, tuple(problems), note)


def _where(key: str, tensor_ranks: Sequence[int]) -> str:
    """The layer and its kind, and the tensor-parallel ranks, if any."""
    words, places = key.split("."), []
    if words[:2] == ["decoder", "layers"]:
        places = [f"layer {words[2]}, {words[4] if len(words) > 4 else words[3]}"]
    if tensor_ranks:
        places.append(f"tensor-parallel rank {' and '.join(map(str, tensor_ranks))}")
    return f" ({', '.join(places)})" if places else ""


def same_copies(ranks: Sequence[RankReport], when: str) -> CertificateLine:
    """What several ranks hold of trained tensors must be the same on all."""
    first: dict[tuple[str, Place], tuple[int, Tensor]] = {}
    problems: dict[str, str] = {}
    copies = 0
    for rank, run in enumerate(ranks):
        for slot, held in run.tensors[when].items():
            if slot[0].startswith(NOT_PARAMETERS):
                continue
            holder, theirs = first.setdefault(slot, (rank, held))
            copies += holder != rank
            if not torch.equal(held, theirs):
                problem = f"{slot[0]}: {_rank(rank, run)} has other values than {_rank(holder, ranks[holder])}"
                problems.setdefault(slot[0], problem)
    name = f"copies on several ranks, at the {when}"
    return CertificateLine(name, copies, None, 0.0, tuple(problems.values()), "bit for bit")


# Logits.


def reported_logits(ranks: Sequence[RankReport]) -> tuple[Tensor, Tensor]:
    """The logits before and after training, from the rank that has them."""
    return next(run.logits for run in ranks if run.logits is not None)


def compare_logits(name: str, found: Tensor, trained: tuple[Tensor, Tensor], index: int, bf16: bool) -> CertificateLine:
    """Compares with `trained[index]`, relative to what training has changed; `trained`: before and after it."""
    scale = float((trained[1] - trained[0]).abs().max())
    largest = float((found - trained[index]).abs().max()) / scale if scale else math.inf
    tolerance = TOLERANCES["logits"][bf16]
    problems = () if largest <= tolerance else (f"the largest difference is {largest:.1e} of the largest change",)
    note = "largest difference over the largest change by training"
    return CertificateLine(name, found.numel(), largest, tolerance, problems, note)
