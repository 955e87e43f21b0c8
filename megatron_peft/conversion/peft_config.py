"""The `adapter_config.json` of a Hugging Face PEFT folder, as far as it describes a plain LoRA or BOFT.

Everything else is refused by name: what changes the computation, and what this version does not know.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_peft.adapters import boft, low_rank
from megatron_peft.checkpoint.record import ADAPTER_CONFIG
from megatron_peft.config import ConfigurationError, PeftConfig, require
from megatron_peft.config.errors import flag_of, spelled
from megatron_peft.config.untrusted import limited_to, read_json_object
from megatron_peft.conversion.hf_files import Source, listed
from megatron_peft.conversion.trained_adapters import LowRankFactors, fuse, layer_name, modules_of
from megatron_peft.models.rules import Rule
from megatron_peft.models.shape import ModelShape, number, size, switch

PREFIX = "base_model.model."
WAY_OUT = "Merge it with HF PEFT (`merge_and_unload`, then `save_pretrained`) and give the result as the base model."


@dataclass(frozen=True)
class Adopted:
    """Adapters as a run has them.

    Args:
        target_modules: of the run.
        settings: the other fields of its `PeftConfig`.
        tensors: whole ones by key, `decoder.layers.3.mlp.linear_fc1.adapter.A`.
        notes: lines about what has changed, each with its end.
    """

    target_modules: Sequence[str]
    settings: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    notes: str

    @property
    def peft(self) -> PeftConfig:
        """The configuration of a run with these adapters."""
        return PeftConfig(target_modules=tuple(self.target_modules), **self.settings)

    @property
    def flags(self) -> str:
        """What a run is given to load them."""
        typed = {one.name: flag_of(one) for one in fields(PeftConfig)}
        given = [spelled(typed[name], value) for name, value in self.settings.items() if value]
        return " ".join([*given, spelled(typed["target_modules"], tuple(self.target_modules))])


def whole_tensor(source: Source, name: str) -> Tensor:
    """A whole tensor in float32, copied into memory."""
    return source.slice(name, (slice(None),) * len(source.headers[name].shape)).to(torch.float32, copy=True)


ALL_LINEAR = "all-linear"
MATCH_SECONDS = 0.5  # of the processor, for one name; a microsecond would do


class PeftImport:
    """An adapter of HF PEFT. `config` decides which modules have it; `source` has its weights."""

    def __init__(self, config: Mapping[str, Any], source: Source) -> None:
        self.config, self.source = config, source

    def shapes(self, module: str, size: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Names and shapes of a module's tensors; `size` is [out, in]."""
        raise NotImplementedError

    def adopt(self, rules: Iterable[Rule], shape: ModelShape) -> Adopted:
        """The adapters as a run has them. ConfigurationError: a run cannot hold them."""
        raise NotImplementedError

    def targeted(self, rule: Rule) -> list[str]:
        """The modules of a fused layer that have the adapter."""
        return [module for module in modules_of(rule) if self.is_targeted(module)]

    def is_targeted(self, module: str) -> bool:
        """Whether HF PEFT would put its LoRA on the module of this full name."""
        if _is_named(self.config.get("exclude_modules"), module):
            return False
        wanted = self.config["target_modules"]
        if isinstance(wanted, str):
            return wanted == ALL_LINEAR or _matches(wanted, module)
        return module in wanted or (_is_named(wanted, module) and self._is_in_listed_layer(module))

    def _is_in_listed_layer(self, module: str) -> bool:
        layers = self.config.get("layers_to_transform")
        layers = [layers] if isinstance(layers, int) else layers
        layer = re.search(r"\.(\d+)\.", module)
        return not layers or (layer is not None and int(layer[1]) in layers)


def _dropout(config: Mapping[str, Any], key: str) -> float:
    value = config.get(key) or 0.0
    require(type(value) in (int, float) and 0 <= value < 1, f"{key} is {str(value)[:40]}; it is a fraction below 1.")
    return value


ACCEPTED: dict[str, tuple[Any, ...]] = {"task_type": (None, "CAUSAL_LM"), "bias": (None, "none")}
KNOWN = {
    "peft_type", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "revision",
    "base_model_name_or_path", "inference_mode", "auto_mapping", "peft_version", "runtime_config",
}  # fmt: skip
OF_LORA = {
    "r", "lora_alpha", "lora_dropout", "use_rslora", "megatron_core", "qalora_group_size", "eva_config",
    "ensure_weight_tying", "enable_lora",
}  # fmt: skip
OF_BOFT = {"boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout"}
# Starts of LoRA that write to the base's weights (pissa, olora, corda, loftq, lora_ga) are refused: the base without
# its adapter is then another model.
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
# peft_type -> values that leave a plain adapter as it is, and fields that are read or without a meaning for what the
# trained adapter computes.
KINDS: dict[str, tuple[dict[str, tuple[Any, ...]], set[str]]] = {
    "LORA": (ACCEPTED | {"init_lora_weights": PLAIN_STARTS}, KNOWN | OF_LORA),
    "BOFT": (ACCEPTED | {"init_weights": (None, True, False)}, KNOWN | OF_BOFT),
}


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json. ConfigurationError: no HF PEFT folder, or not a plain LoRA or BOFT."""
    path = folder / ADAPTER_CONFIG
    require(path.is_file(), f"--input {folder} holds no {path.name}: give the folder of a HF PEFT adapter.")
    config = read_json_object(path)
    name = str(config.get("peft_type") or "")
    require(
        name in KINDS,
        f"{path} describes no HF PEFT adapter: it has no peft_type. A run's --save folder needs no import: --load "
        f"opens it."
        if not name
        else f"{path} describes an adapter of type {name}; only {' and '.join(KINDS)} can be imported. {WAY_OUT}",
    )
    accepted, known = KINDS[name]
    # Settings are off by default, so that an unknown one with nothing in it changes nothing.
    refused = ", ".join(
        f"{key}={json.dumps(value)[:80]}"
        for key, value in sorted(config.items())
        if (value not in accepted[key] if key in accepted else key not in known and value)
    )
    require(not refused, f"{path} uses unsupported settings: {refused}. {WAY_OUT}")
    require(bool(config.get("target_modules")), f"{path} names no target_modules.")
    return config


def _check_targets(config: Mapping[str, Any]) -> None:
    """Names or a regular expression; layers by number."""
    for key in ("target_modules", "exclude_modules"):
        value = config.get(key) or []
        names = value if isinstance(value, list) else [value]
        require(
            all(isinstance(name, str) for name in names), f"{key} is {str(value)[:40]}; it must be names of modules."
        )
        if isinstance(value, str):
            _matches(value, "")
    _check_layers(config.get("layers_to_transform"))


def _check_layers(layers: Any) -> None:
    listed = layers if isinstance(layers, list) else [] if layers is None else [layers]
    require(
        all(type(layer) is int for layer in listed),
        f"layers_to_transform is {str(layers)[:40]}; it must be numbers of layers.",
    )


def _matches(expression: str, module: str) -> bool:
    """Raises ConfigurationError: no regular expression, or one whose repetitions within repetitions take for ever."""
    try:
        with limited_to(MATCH_SECONDS):
            return bool(re.fullmatch(expression, module))
    except (re.error, RecursionError, OverflowError, TimeoutError) as error:
        raise ConfigurationError(
            f"{ADAPTER_CONFIG}: the regular expression {expression[:60]!r} cannot be used on the name {module!r} "
            f"({error}): list the modules by name."
        ) from error


def _is_named(names: str | Iterable[str] | None, module: str) -> bool:
    """A regular expression over full names, or a list of full names and ends of them."""
    if isinstance(names, str):
        return bool(names) and _matches(names, module)
    return any(module == name or module.endswith(f".{name}") for name in names or ())


def shortest_targets(names: Iterable[str], num_layers: int) -> list[str]:
    """`q_proj` where all layers have it, else the full names; Megatron's names alike.

    Both --peft-target-modules and HF PEFT's target_modules take either, also mixed.

    Args:
        names: of modules, as `model.layers.3.self_attn.q_proj`.
        num_layers: of the model.
    """
    by_kind: dict[str, list[str]] = defaultdict(list)
    for name in names:
        by_kind[name.rpartition(".")[2]].append(name)
    return [target for kind, found in by_kind.items() for target in ([kind] if len(found) == num_layers else found)]


class BoftImport(PeftImport):
    """HF PEFT's BOFT as adapters of a run.

    Without its CUDA extension HF PEFT trains a single factor, whatever its config says: the tensors decide.
    """

    def __init__(self, config: Mapping[str, Any], source: Source) -> None:
        super().__init__(config, source)
        self.block_size = size(config, "boft_block_size") if config.get("boft_block_size") else 0
        self.num_blocks = 0 if self.block_size else size(config, "boft_block_num")  # of each layer
        self.configured_factors = self.num_factors = size(config, "boft_n_butterfly_factor", 1)
        self.dropout = _dropout(config, "boft_dropout")
        stored = next((header.shape[0] for name, header in source.headers.items() if name.endswith("boft_R")), None)
        self.num_factors = 1 if stored == 1 else self.num_factors

    def block_size_of(self, in_features: int) -> int:
        return self.block_size or in_features // self.num_blocks

    def shapes(self, module: str, size: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        config = {"boft_block_size": self.block_size_of(size[1]), "boft_n_butterfly_factor": self.num_factors}
        return _named(module, boft.EXPORT.shapes(config, *size))

    def adopt(self, rules: Iterable[Rule], shape: ModelShape) -> Adopted:
        """The run's tensors and settings.

        Raises:
            ConfigurationError: modules that are fused differ, output features are scaled, or blocks are of several
                sizes.
        """
        layers = {layer_name(rule): self._rotation(rule) for rule in rules if self.targeted(rule)}
        settings = {
            "method": "boft",
            "boft_block_size": self._block_size(rules),
            "boft_factors": self.num_factors,
            "rotation_side": "input",
        }
        tensors = {f"{layer}.adapter.Q": Q for layer, Q in layers.items()}
        return Adopted(shortest_targets(layers, shape.num_layers), settings, tensors, self._notes())

    def _notes(self) -> str:
        factors = (
            f"The adapter holds 1 butterfly factor instead of the {self.configured_factors} of its config: HF PEFT "
            f"trains one where it lacks its CUDA extension.\n"
        )
        dropout = f"boft_dropout={self.dropout:g} is left out: rotations have no dropout here.\n"
        return factors * (self.configured_factors != self.num_factors) + dropout * bool(self.dropout)

    def _block_size(self, rules: Iterable[Rule]) -> int:
        modules = (item for rule in rules if self.targeted(rule) for item in modules_of(rule).values())
        sizes = {self.block_size_of(in_features) for _, in_features in modules}
        require(
            len(sizes) == 1,
            f"boft_block_num={self.num_blocks} of {self.source.folder} gives blocks of "
            f"{' and '.join(map(str, sorted(sizes)))} features; all layers have one --boft-block-size. {WAY_OUT}",
        )
        return next(iter(sizes))

    def _rotation(self, rule: Rule) -> Tensor:
        """Q of a fused layer."""
        modules, targeted = list(modules_of(rule)), self.targeted(rule)
        for module in targeted:
            self._require_unscaled(f"{PREFIX}{module}.boft_s")
        found = [boft.from_huggingface(whole_tensor(self.source, f"{PREFIX}{module}.boft_R")) for module in targeted]
        if targeted != modules or not all(torch.equal(Q, found[0]) for Q in found):
            raise ConfigurationError(
                f"{listed(modules)} share an input in {layer_name(rule)} and therefore need the same rotation; "
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


def _named(module: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"{PREFIX}{module}.{name}": shape for name, shape in shapes.items()}


# A run's LoRA has one A for all modules of a fused layer. Modules that were trained apart (q, k and v) each have their
# own, which the fused adapter holds side by side, so its rank is their sum. A run has one --lora-rank: layers that need
# less are padded with zeros, which stay zero under training. alpha grows with the rank, so that the scale stays.


class LoraImport(PeftImport):
    """HF PEFT's LoRA as adapters of a run."""

    def __init__(self, config: Mapping[str, Any], source: Source) -> None:
        super().__init__(config, source)
        self.rank, self.alpha = size(config, "r"), number(config, "lora_alpha")
        self.rank_stabilised, self.dropout = switch(config, "use_rslora"), _dropout(config, "lora_dropout")
        self.scale = self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)

    def shapes(self, module: str, size: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return _named(module, low_rank.EXPORT.shapes({"r": self.rank}, *size))

    def adopt(self, rules: Iterable[Rule], shape: ModelShape) -> Adopted:
        """The run's tensors and settings. ConfigurationError: the rank is above a layer's smaller side."""
        fused = {layer_name(rule): fuse(rule, found) for rule in rules if (found := self._found(rule))}
        rank = max(factors.rank for factors in fused.values())
        _check_rank(rank, fused, self.rank)
        alpha = low_rank.grown_alpha(self.alpha, rank / self.rank, self.rank_stabilised)
        own = {
            "method": "lora",
            "lora_rank": rank,
            "lora_alpha": low_rank.whole_number(alpha),
            "lora_dropout": self.dropout,
            "lora_rs": self.rank_stabilised,
        }
        grown = (
            f"Modules that share a layer each have their own A, so the rank is {rank} instead of {self.rank}; "
            f"alpha {own['lora_alpha']} keeps the scale of {self.scale:g}.\n"
        )
        tensors = {
            f"{layer}.adapter.{name}": tensor
            for layer, factors in fused.items()
            for name, tensor in vars(factors.padded(rank)).items()
        }
        targets = shortest_targets(fused, shape.num_layers)
        return Adopted(targets, own, tensors, grown * (rank != self.rank))

    def _found(self, rule: Rule) -> dict[str, LowRankFactors]:
        """A and B, in float32, of each module that has the adapter."""
        modules = (module for module in modules_of(rule) if self.is_targeted(module))
        return {
            module: LowRankFactors(
                *(whole_tensor(self.source, f"{PREFIX}{module}.lora_{side}.weight") for side in "AB")
            )
            for module in modules
        }


def _check_rank(rank: int, fused: Mapping[str, LowRankFactors], old_rank: int) -> None:
    """A rank above the smaller side of a layer would be refused at --load."""
    side, layer = min((min(factors.A.shape[1], factors.B.shape[0]), layer) for layer, factors in fused.items())
    require(
        rank <= side,
        f"modules that share a layer each have their own A, which takes --lora-rank {rank} instead of "
        f"{old_rank}; but {layer} has only {side} features on its smaller side.",
    )


IMPORTS: dict[str, type[PeftImport]] = {"LORA": LoraImport, "BOFT": BoftImport}


def open_import(config: Mapping[str, Any], source: Source) -> PeftImport:
    """The import that a checked adapter_config.json asks for. ConfigurationError: a value in it cannot be used."""
    try:
        _check_targets(config)
        return IMPORTS[config["peft_type"]](config, source)
    except ConfigurationError as error:
        raise ConfigurationError(f"{source.folder / ADAPTER_CONFIG}: {error}") from None
