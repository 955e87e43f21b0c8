"""LoRA between a run's fused layers and Hugging Face PEFT's separate modules.

LoRA over a fused layer is LoRA over each of its modules: they share A, and each has its own rows of B. The other way,
modules that were trained apart (q, k and v) have an A each, which the fused adapter holds side by side, so its rank is
their sum. A run has one --lora-rank: layers that need less are padded with zeros, which stay zero under training. The
scale stays what it was, alpha growing with the rank.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_peft.config import PeftConfig, require
from megatron_peft.conversion.adapter_factors import Factors, fuse, layer_of, modules_of, split
from megatron_peft.conversion.adapter_targets import shortest_targets
from megatron_peft.conversion.hf_files import Source
from megatron_peft.conversion.peft_config import LoraSettings
from megatron_peft.conversion.peft_names import PREFIX, Adopted, whole_tensor
from megatron_peft.conversion.trained_adapters import TrainedAdapters, low_rank_factors
from megatron_peft.conversion.writer import TensorSpec
from megatron_peft.models.rules import Rule
from megatron_peft.models.shape import ModelShape


class LoraExport:
    """A run of LoRA or LoRA-GA as HF PEFT's LoRA.

    A LoRA-GA that keeps its start B0 A0 frozen has twice the rank: [B, -B0] and [A; A0].
    """

    note = ""

    def __init__(self, adapters: TrainedAdapters, rules: Sequence[Rule]) -> None:
        self._adapters, self._rules = adapters, rules
        self._rank = low_rank_factors(adapters, layer_of(rules[0])).rank

    def config(self) -> dict[str, Any]:
        """The fields of peft.LoraConfig beside those of every adapter."""
        peft = self._adapters.record.config.peft
        return {
            "peft_type": "LORA",
            "r": self._rank,
            "lora_alpha": _whole_number(_grown_alpha(peft.lora_alpha, self._rank / peft.lora_rank, peft.lora_rs)),
            "use_rslora": peft.lora_rs,
            "lora_dropout": peft.lora_dropout,
            "init_lora_weights": True,
        }

    def specs(self) -> dict[str, TensorSpec]:
        """Of every tensor by name."""
        sizes = (
            item for rule in self._rules for module in modules_of(rule).items() for item in _shapes(*module, self._rank)
        )
        return {name: TensorSpec(shape, torch.float32) for name, shape in sizes}

    def tensors(self, rule: Rule) -> Iterator[tuple[str, Tensor]]:
        """Those of one fused layer's modules."""
        for module, factors in split(rule, low_rank_factors(self._adapters, layer_of(rule))).items():
            yield _name(module, "A"), factors.A
            yield _name(module, "B"), factors.B


class LoraImport:
    """HF PEFT's LoRA as adapters of a run."""

    def __init__(self, settings: LoraSettings, source: Source) -> None:
        self.settings, self.source = settings, source

    def shapes(self, module: str, size: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of a module's tensors; `size` is [out, in]."""
        yield from _shapes(module, size, self.settings.rank)

    def adopt(self, rules: Iterable[Rule], shape: ModelShape) -> Adopted:
        """The run's tensors and settings. ConfigurationError: the rank is above a layer's smaller side."""
        settings = self.settings
        fused = {layer_of(rule): fuse(rule, found) for rule in rules if (found := self._found(rule))}
        rank = max(factors.rank for factors in fused.values())
        _check_rank(rank, fused, settings)
        peft = PeftConfig(
            method="lora",
            target_modules=tuple(shortest_targets(fused, shape.num_layers)),
            lora_rank=rank,
            lora_alpha=_grown_alpha(settings.alpha, rank / settings.rank, settings.rank_stabilised),
            lora_dropout=settings.dropout,
            lora_rs=settings.rank_stabilised,
        )
        tensors = {
            f"{layer}.adapter.{name}": tensor
            for layer, factors in fused.items()
            for name, tensor in vars(factors.padded(rank)).items()
        }
        return Adopted(peft, tensors, _flags(peft), _told(peft, settings))

    def _found(self, rule: Rule) -> dict[str, Factors]:
        """In float32, of the modules that have them."""
        modules = (module for module in modules_of(rule) if self.settings.is_targeted(module))
        sides = ("A", "B")
        return {
            module: Factors(*(whole_tensor(self.source, _name(module, side)) for side in sides)) for module in modules
        }


def _shapes(module: str, size: tuple[int, ...], rank: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield _name(module, "A"), (rank, size[1])
    yield _name(module, "B"), (size[0], rank)


def _name(module: str, side: str) -> str:
    return f"{PREFIX}{module}.lora_{side}.weight"


def _grown_alpha(alpha: float, growth: float, rank_stabilised: bool) -> float:
    """That of a rank `growth` times as high, for the same scale."""
    return alpha * (growth**0.5 if rank_stabilised else growth)


def _whole_number(alpha: float) -> float:
    return int(alpha) if alpha == int(alpha) else alpha


def _check_rank(rank: int, fused: Mapping[str, Factors], settings: LoraSettings) -> None:
    """A rank above the smaller side of a layer would be refused at --load."""
    side, layer = min((min(factors.A.shape[1], factors.B.shape[0]), layer) for layer, factors in fused.items())
    require(
        rank <= side,
        f"modules that share a layer have an A of their own, which takes --lora-rank {rank} instead of "
        f"{settings.rank}; but {layer} has only {side} features on its smaller side.",
    )


def _flags(peft: PeftConfig) -> str:
    alpha = _whole_number(peft.lora_alpha)
    return f"--peft-method lora --lora-rank {peft.lora_rank} --lora-alpha {alpha}{' --lora-rs' * peft.lora_rs}"


def _told(peft: PeftConfig, settings: LoraSettings) -> str:
    grown = (
        f"Modules that share a layer have an A of their own, so the rank is {peft.lora_rank} instead of "
        f"{settings.rank}; alpha {_whole_number(peft.lora_alpha)} keeps the scale of {settings.scale:g}.\n"
    )
    return grown * (peft.lora_rank != settings.rank)
