"""Comparisons of two small runs, number by number and tensor by tensor; what differs is named."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from megatron_peft.certify.certified_ranks import (
    END,
    GRADIENTS,
    SAVED_AT,
    START,
    STEPS_WITH_GRADIENTS,
    Job,
    Place,
    RankReport,
    begins_alike,
)
from megatron_peft.checkpoint.folders import iteration_folder
from megatron_peft.checkpoint.tensors import master_key
from megatron_peft.conversion.megatron_files import StoredTensor, open_distributed

MOST_NAMED = 6  # problems of one comparison that are told
NEGLIGIBLE = 1e-5  # a tensor below this share of all tensors' norm is compared with that share


@dataclass(frozen=True)
class CertificateLine:
    """One line of a certificate.

    Args:
        name: what was compared.
        num_compared: numbers, tensors or folders.
        largest: difference; None where things are equal or not.
        tolerance: the largest difference that passes.
        problems: what does not pass, the worst first.
        note: how the difference is measured, or why nothing was compared.
        error: what kept it from being compared: a failure of the tool, or of the ranks that it started.
    """

    name: str
    num_compared: int
    largest: float | None
    tolerance: float
    problems: tuple[str, ...] = ()
    note: str = ""
    error: str = ""

    @property
    def passed(self) -> bool:
        """Whether nothing differs by more than the tolerance, as far as it was compared."""
        return not (self.problems or self.error)


@dataclass(frozen=True)
class Tolerances:
    """Largest differences that pass, relative to what is compared.

    Args:
        losses, grad_norms, lambdas: of every step.
        start: norm of the difference of a trained tensor before the first step, where it follows from gradients (in
            bfloat16 of all as one, see `begins_alike`); other starts are the same bit for bit.
        gradients: of the first step: norm of the difference over the norm, tensor by tensor.
        later_gradients: of the second, which Adam's first update precedes.
        changes: the same of what training changed.
        logits: largest difference over the largest change of a logit by training.
    """

    losses: float
    grad_norms: float
    lambdas: float
    start: float
    gradients: float
    later_gradients: float
    changes: float
    logits: float


# float32: losses as promised; the others are ten times what was seen over methods and layouts, or more. bfloat16: at
# least 1.5 times what was seen.
# bfloat16 keeps eight bits: a sum over ranks that is missing or doubled still changes a tensor by half or more.
TOLERANCES = {
    False: Tolerances(1e-5, 1e-4, 1e-4, 1e-3, 1e-3, 2e-2, 1e-2, 1e-3),
    True: Tolerances(5e-3, 1e-1, 2e-2, 5e-1, 1e-1, 5e-1, 6e-1, 3e-1),
}


def compare_runs(split: tuple[Job, Sequence[RankReport]], alone: tuple[Job, RankReport]) -> Iterator[CertificateLine]:
    """A layout's run with that of one process, in the order in which a fault shows first.

    Args:
        split: the run, and what each rank has found.
        alone: the same in one process.
    """
    (job, ranks), (reference_job, reference) = split, alone
    config, tolerances = job.config, TOLERANCES[job.config.model.bf16]
    yield same_copies(ranks, START)
    starts = Tensors(job.folder / START), Tensors(reference_job.folder / START)
    start_tolerance = tolerances.start if config.peft.spec.starts_from_gradients else 0.0
    if begins_alike(config):
        yield compare_as_one("trained tensors at the start", *starts, start_tolerance)
        starts = (starts[0], starts[0])
    else:
        yield compare_tensors("trained tensors at the start", *starts, start_tolerance, ranks)
    yield _same_samples(ranks, reference)
    yield compare_logits("logits before training", ranks, reference, 0, tolerances.logits)
    first = ranks[0]
    yield numbers("losses", first.losses, reference.losses, tolerances.losses)
    yield numbers("loss tokens of a step", first.num_tokens, reference.num_tokens, 0.0)
    yield numbers("gradient norms", first.grad_norms, reference.grad_norms, tolerances.grad_norms)
    yield _layer_norms(first, reference, tolerances.grad_norms)
    for number in STEPS_WITH_GRADIENTS:
        folder = GRADIENTS.format(number)
        gradients = Tensors(job.folder / folder), Tensors(reference_job.folder / folder)
        limit = tolerances.gradients if number == 1 else tolerances.later_gradients
        yield compare_tensors(f"gradients of step {number}", *gradients, limit, ranks)
    if reference.lambdas:
        yield _by_name("lambdas", first.lambdas, reference.lambdas, tolerances.lambdas)
    yield same_copies(ranks, END)
    ends = Tensors(job.folder / END), Tensors(reference_job.folder / END)
    yield compare_tensors(
        "trained tensors", *ends, tolerances.changes, ranks, since=starts, weights=_sizes_of_gradients(reference_job)
    )
    yield numbers("validation loss", [first.validation_loss], [reference.validation_loss], tolerances.losses)
    yield compare_logits("logits after training", ranks, reference, 1, tolerances.logits)


def compare_resumed(ranks: Sequence[RankReport]) -> CertificateLine:
    """A run that was resumed from its middle with the one that was not interrupted."""
    found = ranks[0].not_resumed or []
    problems = tuple(f"{name} differs after resuming from step {SAVED_AT}" for name in found)
    return CertificateLine("resumed run", len(ranks), None, 0.0, shortened(problems), "bit for bit, on every rank")


# Numbers.


def numbers(name: str, found: Sequence[float], reference: Sequence[float], tolerance: float) -> CertificateLine:
    """Relative differences of the numbers of all steps."""
    return _by_name(name, _by_step(found), _by_step(reference), tolerance)


def _by_step(values: Sequence[float]) -> dict[str, float]:
    return {f"step {number}": value for number, value in enumerate(values, 1)}


def _by_name(
    name: str, found: Mapping[str, float], reference: Mapping[str, float], tolerance: float
) -> CertificateLine:
    errors = {one: _relative(found.get(one, math.nan), value) for one, value in reference.items()}
    problems = [
        f"{one}: {found.get(one, math.nan):.8g}, in one process {reference[one]:.8g}"
        for one, error in errors.items()
        if not error <= tolerance
    ]
    return CertificateLine(name, len(errors), _largest(errors.values()), tolerance, shortened(problems), "relative")


def _relative(value: float, reference: float) -> float:
    return abs(value - reference) / abs(reference) if reference else abs(value)


def _largest(errors: object) -> float:
    values = list(errors)  # type: ignore[call-overload]
    return math.nan if any(math.isnan(one) for one in values) else max(values, default=0.0)


def _layer_norms(found: RankReport, reference: RankReport, tolerance: float) -> CertificateLine:
    def flat(run: RankReport) -> dict[str, float]:
        steps = enumerate(run.layer_grad_norms, 1)
        return {f"step {step}, layer {layer}": value for step, norms in steps for layer, value in enumerate(norms)}

    return _by_name("gradient norms of layers", flat(found), flat(reference), tolerance)


# Samples.


def _same_samples(ranks: Sequence[RankReport], reference: RankReport) -> CertificateLine:
    """Each step's microbatches: in their order the replicas' are those of one process, on every rank of a replica."""
    problems = []
    num_replicas = 1 + max(run.place[2] for run in ranks)
    for step, expected in enumerate(reference.samples):
        for rank, run in enumerate(ranks):
            own = expected[run.place[2] :: num_replicas]  # a replica takes every so many-th microbatch
            for number, (read, wanted) in enumerate(zip_longest(run.samples[step], own), 1):
                if read != wanted:
                    elsewhere = "no microbatch of that step" if read not in expected else "another of that step's"
                    what = f"microbatch {number} is {elsewhere} in one process"
                    problems.append(f"step {step + 1}, {_rank(rank, run)}: {what}")
    return CertificateLine("samples of each step", len(reference.samples), None, 0.0, shortened(problems), "by digest")


def _rank(number: int, run: RankReport) -> str:
    tensor_parallel, stage, replica = run.place
    return f"rank {number} (tensor-parallel {tensor_parallel}, stage {stage}, replica {replica})"


# Tensors.


class Tensors(Mapping[str, Tensor]):
    """Whole tensors of a folder, in float64, each read when it is asked for.

    In the place of a bfloat16 parameter stands its float32 copy, if there is one: a few steps change a norm's weight by
    less than bfloat16 can say.
    """

    def __init__(self, folder: Path) -> None:
        stored = open_distributed(folder)
        names = [key for key in stored if not key.startswith(master_key(""))]
        self._stored: dict[str, StoredTensor] = {key: stored.get(master_key(key), stored[key]) for key in names}

    def __getitem__(self, key: str) -> Tensor:
        stored = self._stored[key]
        whole = torch.zeros(stored.shape, dtype=stored.dtype)
        stored.fill(whole, (0,) * whole.dim())
        return torch.atleast_1d(whole.double())

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def _sizes_of_gradients(job: Job) -> dict[str, Tensor]:
    """The root of Adam's second moment, by parameter; nothing with another optimizer.

    Adam divides a gradient by its usual size. Where that is rounding alone, as for the bias of keys, so is the change:
    weighted by the size, a change counts as much as its gradient.
    """
    prefix = "optimizer.exp_avg_sq."
    stored = Tensors(iteration_folder(Path(str(job.config.checkpoint.save)), job.config.training.train_iters or 0))
    return {key.removeprefix(prefix): stored[key].sqrt() for key in stored if key.startswith(prefix)}


def compare_tensors(
    name: str,
    found: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    tolerance: float,
    ranks: Sequence[RankReport],
    since: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> CertificateLine:
    """The norm of the difference over the norm of the reference, tensor by tensor.

    Args:
        found, reference: whole tensors by key.
        ranks: say which slices they hold.
        since: what both were before: their changes since are compared instead.
        weights: of each tensor's elements.
    """
    parts = {key: _Difference.of(key, found, reference, since, weights or {}) for key in reference}
    total = math.sqrt(sum(part.norm**2 for part in parts.values()))
    errors = {key: part.error(NEGLIGIBLE * total) for key, part in parts.items()}
    problems = [f"{key} is missing" for key in sorted(reference.keys() - found.keys())]
    problems += [f"{key} is of the layout alone" for key in sorted(found.keys() - reference.keys())]
    wrong = [key for key, error in errors.items() if not error <= tolerance and key in found]
    for key in sorted(wrong, key=lambda key: -errors[key] if errors[key] == errors[key] else -math.inf):
        where = _where(key, parts[key], ranks, tolerance, NEGLIGIBLE * total)
        problems.append(f"{key}: {errors[key]:.1e}{where}")
    what = "change" if since is not None else "tensor"
    note = "bit for bit" if tolerance == 0 else f"norm of the difference over that of the {what}"
    return CertificateLine(name, len(reference), _largest(errors.values()), tolerance, shortened(problems), note)


def compare_as_one(
    name: str, found: Mapping[str, Tensor], reference: Mapping[str, Tensor], tolerance: float
) -> CertificateLine:
    """The norm of the difference over the norm of the reference, of all tensors as one."""
    parts = {key: _Difference.of(key, found, reference, None, {}) for key in reference}
    size = math.sqrt(sum(part.norm**2 for part in parts.values()))
    squares = {key: float(part.difference.square().sum()) for key, part in parts.items()}
    error = _largest([math.sqrt(sum(squares.values())) / (size or 1.0)])
    problems = [f"{key} is of the layout alone" for key in sorted(found.keys() - reference.keys())]
    if not error <= tolerance:
        worst = sorted(squares, key=lambda key: squares[key] if squares[key] == squares[key] else math.inf)[-1]
        problems.append(f"all together: {error:.1e}, most of it in {worst}")
    return CertificateLine(
        name, len(reference), error, tolerance, shortened(problems), "norm of the difference over that of all tensors"
    )


@dataclass(frozen=True)
class _Difference:
    """Weighted difference and reference of one tensor."""

    difference: Tensor
    reference: Tensor

    @classmethod
    def of(
        cls,
        key: str,
        found: Mapping[str, Tensor],
        reference: Mapping[str, Tensor],
        since: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None,
        weights: Mapping[str, Tensor],
    ) -> "_Difference":
        whole = reference[key]
        other = found[key] if key in found and found[key].shape == whole.shape else torch.full_like(whole, math.nan)
        weight = weights.get(key, torch.ones(()).double())
        if since is not None:
            before, whole_before = (start.get(key, torch.zeros_like(whole)) for start in since)
            other, whole = other - before, whole - whole_before
        return cls(weight * (other - whole), weight * whole)

    @property
    def norm(self) -> float:
        return float(self.reference.norm())

    def error(self, least: float, index: tuple[slice, ...] = ()) -> float:
        """Relative to the reference, or to `least` if that is more."""
        size = max(float(self.reference[index].norm()), least)
        difference = float(self.difference[index].norm())
        return difference / size if size else difference


def _where(key: str, part: _Difference, ranks: Sequence[RankReport], tolerance: float, least: float) -> str:
    """The layer and its kind, and the tensor-parallel ranks that hold what differs, if not all do."""
    words = key.split(".")
    told = f"layer {words[2]}, {words[4] if len(words) > 4 else words[3]}" if words[:2] == ["decoder", "layers"] else ""
    holders: dict[Place, set[int]] = {}
    for run in ranks:
        for held, place in run.slices[START]:
            if held == key:
                holders.setdefault(place, set()).add(run.place[0])
    wrong = {place for place in holders if not part.error(least, _index(place)) <= tolerance}
    if wrong and wrong != holders.keys():
        own = sorted({rank for place in wrong for rank in holders[place]})
        if len(own) < len({rank for held in holders.values() for rank in held}):
            told += f"{', ' if told else ''}tensor-parallel rank {' and '.join(map(str, own))}"
    return f" ({told})" if told else ""


def _index(place: Place) -> tuple[slice, ...]:
    offset, sides = place
    return tuple(slice(start, start + side) for start, side in zip(offset, sides, strict=True))


def same_copies(ranks: Sequence[RankReport], when: str) -> CertificateLine:
    """What several ranks hold of trained tensors must be the same on all."""
    first: dict[tuple[str, Place], tuple[int, str]] = {}
    problems: dict[str, str] = {}
    copies = 0
    for rank, run in enumerate(ranks):
        for slot, digest in run.slices[when].items():
            holder, theirs = first.setdefault(slot, (rank, digest))
            copies += holder != rank
            if digest != theirs:
                told = f"{slot[0]}: {_rank(rank, run)} has other values than {_rank(holder, ranks[holder])}"
                problems.setdefault(slot[0], told)
    name = f"copies on several ranks, at the {when}"
    return CertificateLine(name, copies, None, 0.0, shortened(problems.values()), "bit for bit")


# Logits.


def compare_logits(
    name: str, ranks: Sequence[RankReport], reference: RankReport, index: int, tolerance: float
) -> CertificateLine:
    """Those of the layout's first replica."""
    found = next(run.logits for run in ranks if run.logits is not None)
    assert reference.logits is not None
    return difference_of_logits(name, found[index], reference.logits[index], reference.logits, tolerance)


def difference_of_logits(
    name: str, found: Tensor, reference: Tensor, trained: tuple[Tensor, Tensor], tolerance: float, note: str = ""
) -> CertificateLine:
    """Relative to what training has changed. `trained`: logits before and after it, in one process."""
    scale = float((trained[1] - trained[0]).abs().max())
    largest = float((found - reference).abs().max()) / scale if scale else math.inf
    problems = [] if largest <= tolerance else [f"the largest difference is {largest:.1e} of the largest change"]
    note = note or "largest difference over the largest change by training"
    return CertificateLine(name, reference.numel(), largest, tolerance, shortened(problems), note)


def shortened(problems: object) -> tuple[str, ...]:
    """The first few of them, and how many more there are."""
    found = list(problems)  # type: ignore[call-overload]
    more = len(found) - MOST_NAMED
    return tuple(found[:MOST_NAMED] + ([f"and {more} more"] if more > 0 else []))
