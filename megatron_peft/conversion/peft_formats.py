"""LoRA and BOFT between a run and the files of Hugging Face PEFT."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_peft.adapters.butterfly import skew
from megatron_peft.config import ConfigurationError, PeftConfig, require
from megatron_peft.conversion.hf_files import Source, listed
from megatron_peft.conversion.peft_config import (
    PREFIX,
    WAY_OUT,
    Adopted,
    BoftSettings,
    LoraSettings,
    shortest_targets,
    whole_tensor,
)
from megatron_peft.conversion.trained_adapters import (
    Factors,
    TrainedAdapters,
    fuse,
    layer_of,
    low_rank_factors,
    modules_of,
    split,
)
from megatron_peft.conversion.writer import TensorSpec
from megatron_peft.models.rules import Rule
from megatron_peft.models.shape import ModelShape

# BOFT between a run that turns the input side and Hugging Face PEFT.
#
# Both compute W' = W R^T with R = B_m ... B_1 and pair the same features. A block of ours is Cayley(Q) = (I + Q)(I -
# Q)^-1 with Q given by the numbers above its diagonal; one of theirs is (I - S)(I + S)^-1 with S = (D - D^T) / 2 out
# of a whole b x b matrix D (`boft_R`). So S = -Q. Theirs lie in one row of n = in / b blocks a factor, ours by
# groups. Blocks that were trained by projection have the Q of Cayley's inverse, unless they turn a direction around:
# no Q is large enough for that.
#
# Their `boft_s` scales the output features; ours has no such thing. Modules that are fused here meet one input, so they
# share R: an export gives each a copy, an import needs them all, with the same numbers.
#
# Letters: k groups of features, m factors, c blocks of a factor in a group, b block size; n = k c.

LARGEST_NUMBER = 1e4  # of a Cayley block: beyond it float32 holds no rotation to 1e-3


def to_huggingface(Q: Tensor, block_size: int) -> Tensor:  # [k, m, c, b (b - 1) / 2] -> [m, n, b, b]
    """`boft_R` of the same rotation."""
    return -skew(Q, block_size).transpose(0, 1).flatten(1, 2)


def from_huggingface(D: Tensor) -> Tensor:  # [m, n, b, b] -> [k, m, c, b (b - 1) / 2]
    """Q of the same rotation."""
    num_factors, _, size, _ = D.shape
    row, column = torch.triu_indices(size, size, 1)
    Q = ((D.mT - D) / 2)[..., row, column]
    return Q.unflatten(1, (-1, 2 ** (num_factors - 1))).transpose(0, 1).contiguous()


def inverse_cayley(R: Tensor) -> Tensor:  # [..., b, b] -> [..., b (b - 1) / 2]
    """Q of (I + Q)(I - Q)^-1 = R: above the diagonal of (R + I)^-1 (R - I). Not finite where R has an eigenvalue -1."""
    identity = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
    Q, _ = torch.linalg.solve_ex(R + identity, R - identity)
    row, column = torch.triu_indices(Q.shape[-1], Q.shape[-1], 1)
    return ((Q - Q.mT) / 2)[..., row, column]


class BoftExport:
    """A run of BOFT as HF PEFT's BOFT.

    Raises:
        ConfigurationError: the run turned the output side.
    """

    def __init__(self, adapters: TrainedAdapters, rules: Sequence[Rule]) -> None:
        self._adapters, self._rules, self._peft = adapters, rules, adapters.record.config.peft
        require(
            self._peft.rotation_side == "input",
            f"{adapters.folder} turned the output side of its weights (--rotation-side output), HF PEFT's BOFT turns "
            f"the input: tools/convert.py merge folds the adapters into their base, which any program opens.",
        )

    @property
    def note(self) -> str:
        """HF PEFT without its extension takes every BOFT for one of a single factor."""
        return (
            f"HF PEFT opens this adapter only with its CUDA extension, which it builds itself (a GPU, nvcc, ninja): "
            f"there are {self._peft.boft_factors} butterfly factors, and without the extension HF PEFT knows 1.\n"
        ) * (self._peft.boft_factors > 1)

    def config(self) -> dict[str, Any]:
        """The fields of peft.BOFTConfig beside those of every adapter."""
        return {
            "peft_type": "BOFT",
            "boft_block_size": self._peft.boft_block_size,
            "boft_block_num": 0,
            "boft_n_butterfly_factor": self._peft.boft_factors,
            "boft_dropout": 0.0,
            "init_weights": True,
        }

    def specs(self) -> dict[str, TensorSpec]:
        """Of every tensor by name."""
        block, num_factors = self._peft.boft_block_size, self._peft.boft_factors
        modules = (module for rule in self._rules for module in modules_of(rule).items())
        shapes = (item for module in modules for item in _shapes(*module, block, num_factors))
        return {name: TensorSpec(shape, torch.float32) for name, shape in shapes}

    def tensors(self, rule: Rule) -> Iterator[tuple[str, Tensor]]:
        """Those of one fused layer's modules."""
        R = to_huggingface(self._numbers(layer_of(rule)), self._peft.boft_block_size)
        for module, (out_features, _) in modules_of(rule).items():
            yield f"{PREFIX}{module}.boft_R", R
            yield f"{PREFIX}{module}.boft_s", torch.ones(out_features, 1)

    def _numbers(self, layer: str) -> Tensor:
        """Q of a layer."""
        if self._adapters.has(layer, "Q"):
            return self._adapters.tensor(layer, "Q")
        Q = inverse_cayley(self._adapters.tensor(layer, "P").double())
        largest = Q.abs().max().item()
        require(
            largest < LARGEST_NUMBER,
            f"a block of {layer} in {self._adapters.folder} turns a direction around, which HF PEFT's BOFT cannot "
            f"(Cayley's numbers would reach {largest:.2g}). tools/convert.py merge folds the adapters into their base.",
        )
        return Q.float()


class BoftImport:
    """HF PEFT's BOFT as adapters of a run.

    Without its CUDA extension HF PEFT trains a single factor, whatever its config says: the tensors decide.
    """

    def __init__(self, settings: BoftSettings, source: Source) -> None:
        stored = next((header.shape[0] for name, header in source.headers.items() if name.endswith("boft_R")), None)
        self._configured, self.source = settings.num_factors, source
        self.settings = replace(settings, num_factors=1) if stored == 1 else settings

    def shapes(self, module: str, size: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of a module's tensors; `size` is [out, in]."""
        yield from _shapes(module, size, self.settings.block_size_of(size[1]), self.settings.num_factors)

    def adopt(self, rules: Iterable[Rule], shape: ModelShape) -> Adopted:
        """The run's tensors and settings.

        Raises:
            ConfigurationError: modules that are fused differ, output features are scaled, or blocks are of several
                sizes.
        """
        layers = {layer_of(rule): self._rotation(rule) for rule in rules if self._targeted(rule)}
        peft = PeftConfig(
            method="boft",
            target_modules=tuple(shortest_targets(layers, shape.num_layers)),
            boft_block_size=self._block_size(rules),
            boft_factors=self.settings.num_factors,
            rotation_side="input",
        )
        flags = (
            f"--peft-method boft --boft-block-size {peft.boft_block_size} --boft-factors {peft.boft_factors} "
            f"--rotation-side input"
        )
        return Adopted(peft, {f"{layer}.adapter.Q": Q for layer, Q in layers.items()}, flags, self._told())

    def _told(self) -> str:
        factors = (
            f"The adapter holds 1 butterfly factor instead of the {self._configured} of its config: HF PEFT trains one "
            f"where it lacks its CUDA extension.\n"
        )
        dropout = f"boft_dropout={self.settings.dropout:g} is left out: rotations have no dropout here.\n"
        return factors * (self._configured != self.settings.num_factors) + dropout * bool(self.settings.dropout)

    def _targeted(self, rule: Rule) -> list[str]:
        return [module for module in modules_of(rule) if self.settings.is_targeted(module)]

    def _block_size(self, rules: Iterable[Rule]) -> int:
        modules = (item for rule in rules if self._targeted(rule) for item in modules_of(rule).values())
        sizes = {self.settings.block_size_of(in_features) for _, in_features in modules}
        require(
            len(sizes) == 1,
            f"boft_block_num={self.settings.num_blocks} of {self.source.folder} gives blocks of "
            f"{' and '.join(map(str, sorted(sizes)))} features; all layers have one --boft-block-size. {WAY_OUT}",
        )
        return next(iter(sizes))

    def _rotation(self, rule: Rule) -> Tensor:
        """Q of a fused layer."""
        modules, targeted = list(modules_of(rule)), self._targeted(rule)
        for module in targeted:
            self._require_unscaled(f"{PREFIX}{module}.boft_s")
        found = [from_huggingface(whole_tensor(self.source, f"{PREFIX}{module}.boft_R")) for module in targeted]
        if targeted != modules or not all(torch.equal(Q, found[0]) for Q in found):
            raise ConfigurationError(
                f"{listed(modules)} meet one input in {layer_of(rule)}, so they have one rotation here; "
                f"{self.source.folder} has one for {listed(targeted)}, or different ones. {WAY_OUT}"
            )
        return found[0]

    def _require_unscaled(self, name: str) -> None:
        scale = whole_tensor(self.source, name)
        require(
            bool((scale == 1).all()),
            f"{name} of {self.source.folder} scales output features by {scale.min():g} to {scale.max():g}; a rotation "
            f"scales nothing. {WAY_OUT}",
        )


def _shapes(module: str, size: tuple[int, ...], block: int, num_factors: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{PREFIX}{module}.boft_R", (num_factors, size[1] // block, block, block)
    yield f"{PREFIX}{module}.boft_s", (size[0], 1)


# LoRA between a run's fused layers and Hugging Face PEFT's separate modules.
#
# LoRA over a fused layer is LoRA over each of its modules: they share A, and each has its own rows of B. The other
# way, modules that were trained apart (q, k and v) have an A each, which the fused adapter holds side by side, so its
# rank is their sum. A run has one --lora-rank: layers that need less are padded with zeros, which stay zero under
# training. The scale stays what it was, alpha growing with the rank.


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
            item
            for rule in self._rules
            for module in modules_of(rule).items()
            for item in _lora_shapes(*module, self._rank)
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
        yield from _lora_shapes(module, size, self.settings.rank)

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
        return Adopted(peft, tensors, _flags(peft), _told(peft.lora_rank, peft.lora_alpha, settings))

    def _found(self, rule: Rule) -> dict[str, Factors]:
        """In float32, of the modules that have them."""
        modules = (module for module in modules_of(rule) if self.settings.is_targeted(module))
        sides = ("A", "B")
        return {
            module: Factors(*(whole_tensor(self.source, _name(module, side)) for side in sides)) for module in modules
        }


def _lora_shapes(module: str, size: tuple[int, ...], rank: int) -> Iterator[tuple[str, tuple[int, ...]]]:
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


def _told(rank: int, alpha: float, settings: LoraSettings) -> str:
    grown = (
        f"Modules that share a layer have an A of their own, so the rank is {rank} instead of "
        f"{settings.rank}; alpha {_whole_number(alpha)} keeps the scale of {settings.scale:g}.\n"
    )
    return grown * (rank != settings.rank)
