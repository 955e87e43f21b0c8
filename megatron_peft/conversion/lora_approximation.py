"""Any run as an ordinary LoRA: the change of every linear layer, to a tolerance, as a product of two factors.

For each Hugging Face module the smallest rank whose relative Frobenius error of dW is at most the tolerance. Where the
method itself has a product of few enough columns (LoRA, LoRA-GA, a Hybrid whose rotation is the identity), the product
is taken as it is. All others are decomposed (`truncated_svd.py`), from rows that are read from the files as they are
needed: a block of rows is the largest part of any dW that ever exists, and of what is larger there is a sketch.

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
from megatron_peft.config import ConfigurationError, require
from megatron_peft.config.untrusted import is_finite
from megatron_peft.conversion.megatron_weights import MegatronWeights, open_megatron
from megatron_peft.conversion.pretrained import Weights, open_weights, owned_rules
from megatron_peft.conversion.trained_adapters import (
    TrainedAdapters,
    is_weight,
    layer_name,
    modules_of,
    read_stored,
    row_ranges,
)
from megatron_peft.conversion.truncated_svd import Truncation, svd_of_whole, truncated_svd
from megatron_peft.conversion.writer import byte_bar
from megatron_peft.models.families import rules_for
from megatron_peft.models.rules import RowRange, Rule

BLOCK_ELEMENTS = 2**20  # of a block of rows: 8 MiB
SEED = 0
LINEAR = ".linear_"


@dataclass(frozen=True)
class ModuleLora:
    """A module's dW ~ B A.

    Args:
        module: Hugging Face's name.
        ranges: its rows.
        found: A and B, in float32 on a CPU.
        is_exact: the method's own product.
    """

    module: str
    ranges: list[RowRange]
    found: Truncation
    is_exact: bool


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
        return max(1, *(module.found.rank for module in self.modules))

    @property
    def residual(self) -> float:
        """|dW - B A|_F / |dW|_F over all modules."""
        squared = sum(module.found.squared_norm for module in self.modules)
        return sqrt(sum(module.found.squared_residual for module in self.modules) / squared) if squared else 0.0

    @property
    def share_left_out(self) -> float:
        """|change that is left out|_F / |change of all parameters|_F."""
        out = sum(one.squared_change for one in self.left_out)
        total = out + sum(module.found.squared_norm for module in self.modules)
        return sqrt(out / total) if total else 0.0


def approximate(run: TrainedAdapters, base: Path, tolerance: float, max_rank: int, progress: bool) -> RunAsLora:
    """The change of a run against its base, as factors.

    Args:
        run: of any method and layout.
        base: the folder of its base model.
        tolerance: relative Frobenius error of each module's dW.
        max_rank: of a module.
        progress: show a bar at a terminal.

    Raises:
        ConfigurationError: the base or the run's weights do not fit or are not finite, or the method cannot be merged.
    """
    rules, weights = open_weights(base, run.record.shape)
    source = _ChangeSource.of(run, weights)
    linear = {layer_name(rule): rule for rule in rules.values() if is_weight(rule) and LINEAR in rule.name}
    adapted = run.record.adapted_layers or tuple(linear)
    layers: dict[str, list[ModuleLora]] = {}
    num_bytes = {layer: 4 * prod(linear[layer].local_shape(1)) for layer in adapted}
    with byte_bar("Approximating", sum(num_bytes.values()), progress) as advance:
        for layer in adapted:
            layers[layer] = source.modules(linear[layer], tolerance, max_rank)
            advance(num_bytes[layer])
    others = [rule for rule in owned_rules(rules, run.record.shape).values() if layer_name(rule) not in linear]
    return RunAsLora(layers, source.left_out(others))


@dataclass(frozen=True)
class _ChangeSource:
    """A run, its base's weights, and its own if the weights themselves were trained."""

    run: TrainedAdapters
    base: Weights
    trained: MegatronWeights | None

    @classmethod
    def of(cls, run: TrainedAdapters, base: Weights) -> "_ChangeSource":
        if run.record.config.peft.trains_adapters:
            return cls(run, base, None)
        open_weights(run.folder, run.record.shape)  # is complete and fits
        return cls(run, base, open_megatron(run.folder))

    def modules(self, rule: Rule, tolerance: float, max_rank: int) -> list[ModuleLora]:
        """The factors of the modules that a layer holds."""
        change = self._change(rule)
        ranges = row_ranges(rule, change.granule, BLOCK_ELEMENTS)
        names = modules_of(rules_for(self.run.record.shape)[rule.name])  # the base's files may leave out their prefix
        return [
            _module_lora(name, _ModuleChange(rule, change, ranges[tensor.name], self.base), tolerance, max_rank)
            for name, tensor in zip(names, rule.hf_tensors, strict=True)
        ]

    def _change(self, rule: Rule) -> WeightChange:
        """What was added to a layer's weight."""
        if self.trained is not None:
            stored = self.trained.stored(rule, torch.float32)
            assert stored is not None, rule.name  # `open_weights` found it
            return DifferenceChange(lambda rows: read_stored(stored, rows))
        peft = self.run.record.config.peft
        module, tensors = import_module(peft.spec.adapter), self.run.of(layer_name(rule))
        if hasattr(module, "change"):
            return module.change(tensors, peft)
        require(hasattr(module, "merge"), f"adapters of --peft-method {peft.method} cannot be merged.")
        whole = torch.empty(rule.local_shape(1), dtype=torch.float64)
        self.base.read(rule, whole, 0, 1)
        merged = module.merge(whole, tensors, peft)
        return DifferenceChange(lambda rows: merged[rows])

    def left_out(self, rules: list[Rule]) -> list[LeftOut]:
        """What has changed in these parameters; nothing if adapters were trained."""
        if self.trained is None:
            return []
        found = [self._left_out(rule, name) for rule in rules for name in row_ranges(rule)]
        return [one for one in found if one.squared_change]

    def _left_out(self, rule: Rule, name: str) -> LeftOut:
        squared = torch.zeros(2, dtype=torch.float64)
        for rows in row_ranges(rule, max_elements=BLOCK_ELEMENTS)[name]:
            before, after = (_read_rows(weights, rule, rows) for weights in (self.base, self.trained) if weights)
            squared += torch.stack([(after - before).square().sum(), before.square().sum()])
        return LeftOut(name, *squared.tolist())


@dataclass(frozen=True)
class _ModuleChange:
    """dW of a module, as rows that are computed when they are asked for."""

    rule: Rule
    change: WeightChange
    ranges: list[RowRange]
    base: Weights

    @property
    def shape(self) -> tuple[int, int]:
        return self.ranges[-1].hf.stop, self.rule.hf_tensors[0].shape[1]

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for rows in self.ranges:
            change = self.change.rows(_read_rows(self.base, self.rule, rows), rows.megatron)
            require(
                is_finite(change),
                f"the change of {self.rule.name} holds NaN or infinities: training has diverged. Give an older iter_* "
                f"folder as --input.",
            )
            yield rows.hf, change


def _read_rows(weights: Weights, rule: Rule, rows: RowRange) -> Tensor:  # -> [n, ...]
    """In float64; the float32 copies of bf16 training if there are any."""
    shape = next(tensor.shape for tensor in rule.hf_tensors if tensor.name == rows.name)
    target = torch.empty(rows.hf.stop - rows.hf.start, *shape[1:])
    weights.read_rows(rule, rows, target)
    return target.double()


def _module_lora(name: str, matrix: _ModuleChange, tolerance: float, max_rank: int) -> ModuleLora:
    found = _own_product(matrix, max_rank)
    is_exact = found is not None
    if found is None and prod(matrix.shape) <= BLOCK_ELEMENTS:
        found = svd_of_whole(matrix, tolerance, max_rank)
    elif found is None:
        found = truncated_svd(matrix, tolerance, max_rank, torch.Generator().manual_seed(SEED))
    return ModuleLora(name, matrix.ranges, replace(found, A=found.A.float(), B=found.B.float()), is_exact)


def _own_product(matrix: _ModuleChange, max_rank: int) -> Truncation | None:
    """The method's own factors; None if it has none, or of too high a rank."""
    factors = matrix.change.factors()
    if factors is None or factors[0].shape[0] > max_rank:
        return None
    A, B = factors[0], torch.cat([factors[1][rows.megatron] for rows in matrix.ranges])
    return Truncation(A, B, ((A @ A.T) * (B.T @ B)).sum().item(), 0.0)


def check_limits(tolerance: float, max_rank: int) -> None:
    """ConfigurationError: --tolerance or --max-rank cannot be used."""
    problems = []
    if not 0 <= tolerance < 1:
        problems.append(f"--tolerance is {tolerance:g}; it is a relative error, at least 0 and below 1.")
    if max_rank < 1:
        problems.append(f"--max-rank is {max_rank}; it must be above 0.")
    if problems:
        raise ConfigurationError(*problems)
