"""Any run as an ordinary LoRA: the change of every linear layer, to a tolerance, as a product of two factors.

For each Hugging Face module the smallest rank whose relative Frobenius error of dW is at most the tolerance. Where the
method itself has a product of few enough columns (LoRA, LoRA-GA, a Hybrid whose rotation is the identity), the product
is taken as it is. Of any other dW there is a sketch, from rows that are read from the files and computed as they are
needed: a block of rows is the largest part of it that ever exists.

What is no linear layer's weight cannot be in a LoRA. It is left out, and told by name and size: full fine-tuning trains
norms, biases and the embedding too.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from math import prod, sqrt
from pathlib import Path

import torch
from torch import Tensor

from megatron_peft.adapters.change import DifferenceChange, WeightChange
from megatron_peft.config import ConfigurationError, require, untrusted
from megatron_peft.conversion.hf_files import row_ranges
from megatron_peft.conversion.megatron_files import MegatronWeights, open_megatron
from megatron_peft.conversion.pretrained import Weights, open_weights, owned_rules
from megatron_peft.conversion.trained_adapters import LowRankFactors, TrainedAdapters
from megatron_peft.models.families import rules_for
from megatron_peft.models.rules import RowRange, Rule
from megatron_peft.runtime.progress import progress_bar

BLOCK_ELEMENTS = 2**20  # of a block of rows, 8 MiB
SEED = 0

# A sketch with subspace iteration. With X [in, w] orthonormal, one pass over the rows of M = dW gives
#
#     T = M X  [out, w]        Z = M^T T  [in, w]        |M|_F^2
#
# and the next X is an orthonormal basis of Z. The singular values s_i of T approach those of M from below. With T =
# U S V^T and its k leading triplets, U_k S_k (X V_k)^T is a projection of M, so what it leaves out is exactly
#
#     |M - U_k S_k (X V_k)^T|_F^2 = |M|_F^2 - (s_1^2 + ... + s_k^2)
#
# however far the iteration has come. The width w grows until the smallest k within the tolerance lies well inside it.
# Everything is in float64, since the difference of two squared norms may be small.

FIRST_RANK = 32  # that the sketch is wide enough for at first
EXTRA = 16  # columns beyond the rank: the last directions of a sketch are the worst
FEWEST_PASSES = 3  # over the rows, at each width: a random start and two steps of the iteration
MOST_PASSES = 10
PASSES_TO_WIDEN = 2  # after which a sketch may be too narrow
GROWTH = 4  # of the width
SETTLED = 0.005  # relative change of the squared residual from one pass to the next
ROUNDING = 1e-14  # relative to the squared norm


class NoEqualLora(ConfigurationError):
    """No LoRA of a rank that is allowed equals the run."""


@dataclass(frozen=True)
class ModuleChange:
    """dW [out, in] of a module, as rows that are read and computed when they are asked for, again and again."""

    rule: Rule
    change: WeightChange
    ranges: list[RowRange]
    base: Weights

    @property
    def shape(self) -> tuple[int, int]:
        return self.ranges[-1].hf.stop, self.rule.hf_tensors[0].shape[1]

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Every row once: which rows, and their values [n, in] in float64."""
        for rows in self.ranges:
            change = self.change.rows(_read_rows(self.base, self.rule, rows), rows.megatron)
            require(
                untrusted.is_finite(change),
                f"the change of {self.rule.name} holds NaN or infinities: training has diverged. Give an older iter_* "
                f"folder as --input.",
            )
            yield rows.hf, change


@dataclass(frozen=True)
class Truncation(LowRankFactors):
    """M ~ B A, with |M|_F^2 and |M - B A|_F^2."""

    squared_norm: float
    squared_residual: float

    @property
    def residual(self) -> float:
        """|M - B A|_F / |M|_F; 0 for M = 0."""
        return sqrt(self.squared_residual / self.squared_norm) if self.squared_norm else 0.0


def truncated_svd(matrix: ModuleChange, tolerance: float, max_rank: int, generator: torch.Generator) -> Truncation:
    """The smallest rank with |M - B A|_F <= tolerance |M|_F, or `max_rank`; A and B in float64.

    M is read several times; `generator` draws the start, on the CPU.
    """
    widest = min(*matrix.shape, max_rank + EXTRA)
    width, number, before = min(widest, FIRST_RANK + EXTRA), 0, (0, 0.0)
    start = torch.empty(matrix.shape[1], 0, dtype=torch.float64)
    while True:
        more = torch.randn(len(start), width - start.shape[1], dtype=torch.float64, generator=generator)
        X = torch.linalg.qr(torch.cat([start, more], dim=1)).Q
        T, Z, squared_norm = X.new_zeros(matrix.shape[0], width), torch.zeros_like(X), 0.0
        for rows, block in matrix.blocks():
            T[rows] = block @ X
            Z.addmm_(block.T, T[rows])
            squared_norm += block.square().sum().item()
        number, start = number + 1, Z
        kept = torch.linalg.eigvalsh(T.T @ T).flip(0).cumsum(0)  # cheaper than the SVD of T
        residuals = (squared_norm - torch.cat([kept.new_zeros(1), kept])).clamp_min(0)  # of ranks 0, 1, ...
        enough = residuals <= max(tolerance**2, ROUNDING) * squared_norm
        rank = min(int(enough.int().argmax()) if bool(enough.any()) else width, max_rank)
        residual = float(residuals[rank])
        settled = rank == before[0] and abs(residual - before[1]) <= max(SETTLED * residual, ROUNDING * squared_norm)
        is_enough = number == MOST_PASSES or (settled and number >= FEWEST_PASSES)
        if width < widest and rank > width - EXTRA and (is_enough or number >= PASSES_TO_WIDEN):
            width, number, before = min(widest, GROWTH * width), 0, (0, 0.0)
        elif is_enough:
            _, S, Vh = torch.linalg.svd(T, full_matrices=False)
            leading, root = Vh[:rank].T, S[:rank].sqrt()
            return Truncation((X @ (leading * root)).T, T @ (leading / root), squared_norm, residual)
        else:
            before = rank, residual


@dataclass(frozen=True)
class ModuleLora:
    """A module's dW ~ B A: Hugging Face's name, its rows, and the factors in float32 on a CPU."""

    module: str
    ranges: list[RowRange]
    factors: Truncation
    is_exact: bool  # the method's own product


@dataclass(frozen=True)
class LeftOut:
    """What full fine-tuning changed and a LoRA cannot hold: a parameter's Hugging Face name, |dW|_F^2 and |W|_F^2."""

    name: str
    squared_change: float
    squared_norm: float

    @property
    def relative(self) -> float:
        return sqrt(self.squared_change / self.squared_norm) if self.squared_norm else 0.0


@dataclass(frozen=True)
class RunAsLora:
    """The modules of every adapted layer, by Megatron's name of the layer, and what is not in them."""

    layers: Mapping[str, list[ModuleLora]]
    left_out: list[LeftOut]

    @property
    def modules(self) -> list[ModuleLora]:
        return [module for modules in self.layers.values() for module in modules]

    @property
    def rank(self) -> int:
        """The largest: every module is padded to it."""
        return max(1, *(module.factors.rank for module in self.modules))

    @property
    def residual(self) -> float:
        """|dW - B A|_F / |dW|_F over all modules."""
        squared = sum(module.factors.squared_norm for module in self.modules)
        return sqrt(sum(module.factors.squared_residual for module in self.modules) / squared) if squared else 0.0

    @property
    def share_left_out(self) -> float:
        """|change that is left out|_F / |change of all parameters|_F."""
        out = sum(parameter.squared_change for parameter in self.left_out)
        total = out + sum(module.factors.squared_norm for module in self.modules)
        return sqrt(out / total) if total else 0.0


def approximate(
    run: TrainedAdapters,
    base: Path,
    tolerance: float,
    max_rank: int,
    progress: bool,
    refused_above: float | None = None,
) -> RunAsLora:
    """The change of a run, of any method and layout, against its base. Arguments as for `peft_export.export_as_lora`.

    Raises ConfigurationError: the base or the run's weights do not fit or are not finite, the method cannot be merged.
    Raises NoEqualLora: an error is refused.
    """
    shape = run.record.shape
    rules, weights = open_weights(base, shape)
    trained = None  # the run's own weights, if the weights themselves were trained
    if not run.record.config.peft.trains_adapters:
        open_weights(run.folder, shape)  # is complete and fits
        trained = open_megatron(run.folder)
    linear = {rule.layer: rule for rule in rules.values() if rule.is_linear}
    names = rules_for(shape)  # the base's files may leave out the prefix of its modules
    adapted = run.record.adapted_layers or tuple(linear)
    num_bytes = {layer: 4 * prod(linear[layer].local_shape(1)) for layer in adapted}
    layers: dict[str, list[ModuleLora]] = {}
    with progress_bar("Approximating", sum(num_bytes.values()), in_bytes=True, enabled=progress) as advance:
        for layer in adapted:
            rule = linear[layer]
            change = _change(rule, run, weights, trained)
            ranges = row_ranges(rule, change.granule, BLOCK_ELEMENTS)
            layers[layer] = [
                _module_lora(name, ModuleChange(rule, change, ranges[tensor.name], weights), tolerance, max_rank)
                for name, tensor in zip(names[rule.name].modules, rule.hf_tensors, strict=True)
            ]
            advance(num_bytes[layer])
    largest = max(module.factors.residual for modules in layers.values() for module in modules)
    if refused_above is not None and not largest <= refused_above:
        text = f"no LoRA of rank {max_rank} equals {run.folder.parent}: of a module it leaves an error of {largest:.3g}"
        raise NoEqualLora(f"{text}. Merge it.")
    left_out: list[LeftOut] = []
    if trained is not None:
        others = [rule for rule in owned_rules(rules, shape).values() if rule.layer not in linear]
        left_out = [_left_out(rule, name, weights, trained) for rule in others for name in row_ranges(rule)]
    return RunAsLora(layers, [parameter for parameter in left_out if parameter.squared_change])


def _change(rule: Rule, run: TrainedAdapters, base: Weights, trained: MegatronWeights | None) -> WeightChange:
    """What was added to a layer's weight."""
    if trained is not None:
        return DifferenceChange(trained.stored(rule, torch.float32).read)
    peft = run.record.config.peft
    module, tensors = import_module(peft.spec.adapter), run.of(rule.layer)
    if hasattr(module, "change"):
        return module.change(tensors, peft)
    require(hasattr(module, "merge"), f"adapters of --peft-method {peft.method} cannot be merged.")
    whole = torch.empty(rule.local_shape(1), dtype=torch.float64)
    base.read(rule, whole, 0, 1)
    merged = module.merge(whole, tensors, peft)
    return DifferenceChange(lambda rows: merged[rows])


def _module_lora(name: str, matrix: ModuleChange, tolerance: float, max_rank: int) -> ModuleLora:
    product = matrix.change.factors()
    is_exact = product is not None and product[0].shape[0] <= max_rank
    if product is not None and is_exact:
        A, B = product[0], torch.cat([product[1][rows.megatron] for rows in matrix.ranges])
        factors = Truncation(A, B, ((A @ A.T) * (B.T @ B)).sum().item(), 0.0)
    else:
        factors = truncated_svd(matrix, tolerance, max_rank, torch.Generator().manual_seed(SEED))
    return ModuleLora(name, matrix.ranges, replace(factors, A=factors.A.float(), B=factors.B.float()), is_exact)


def _left_out(rule: Rule, name: str, base: Weights, trained: Weights) -> LeftOut:
    """How much a parameter has changed that is no linear layer's weight."""
    squared = torch.zeros(2, dtype=torch.float64)
    for rows in row_ranges(rule, max_elements=BLOCK_ELEMENTS)[name]:
        before, after = (_read_rows(weights, rule, rows) for weights in (base, trained))
        squared += torch.stack([(after - before).square().sum(), before.square().sum()])
    return LeftOut(name, *squared.tolist())


def _read_rows(weights: Weights, rule: Rule, rows: RowRange) -> Tensor:  # -> [n, ...]
    """Read rows in float64; of the float32 copies of bf16 training if there are any."""
    shape = next(tensor.shape for tensor in rule.hf_tensors if tensor.name == rows.name)
    target = torch.empty(rows.hf.stop - rows.hf.start, *shape[1:])
    weights.read_rows(rule, rows, target)
    return target.double()
