"""The `adapter_config.json` of a Hugging Face PEFT folder, as far as it describes a plain LoRA or BOFT.

Everything else is refused by name: what changes the computation, and what this version does not know.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_peft.checkpoint.record import ADAPTER_CONFIG
from megatron_peft.config import ConfigurationError, PeftConfig, require
from megatron_peft.config.untrusted import limited_to, read_json_object
from megatron_peft.conversion.hf_files import Source
from megatron_peft.models.shape import number, size, switch

# What the formats of Hugging Face PEFT have in common: names of tensors, and what an import gives.

PREFIX = "base_model.model."
WAY_OUT = "Merge it with HF PEFT (`merge_and_unload`, then `save_pretrained`) and give the result as the base model."


@dataclass(frozen=True)
class Adopted:
    """Adapters as a run has them.

    Args:
        peft: the run's method and numbers.
        tensors: whole ones by key, `decoder.layers.3.mlp.linear_fc1.adapter.A`.
        flags: what a run is given to load them, without its target modules.
        told: lines about what is not as it was, each with its end.
    """

    peft: PeftConfig
    tensors: Mapping[str, Tensor]
    flags: str
    told: str = ""


def whole_tensor(source: Source, name: str) -> Tensor:
    """In float32, in memory of its own."""
    return source.slice(name, (slice(None),) * len(source.headers[name].shape)).to(torch.float32, copy=True)


ALL_LINEAR = "all-linear"
MATCH_SECONDS = 0.5  # of the processor, for one name; a microsecond would do


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of an adapter. `targets` decides which modules have it."""

    targets: Mapping[str, Any]

    def is_targeted(self, module: str) -> bool:
        """Whether HF PEFT would put its LoRA on the module of this full name."""
        if _is_named(self.targets.get("exclude_modules"), module):
            return False
        wanted = self.targets["target_modules"]
        if isinstance(wanted, str):
            return wanted == ALL_LINEAR or _matches(wanted, module)
        return module in wanted or (_is_named(wanted, module) and self._is_in_listed_layer(module))

    def _is_in_listed_layer(self, module: str) -> bool:
        layers = self.targets.get("layers_to_transform")
        layers = [layers] if isinstance(layers, int) else layers
        layer = re.search(r"\.(\d+)\.", module)
        return not layers or (layer is not None and int(layer[1]) in layers)


@dataclass(frozen=True, kw_only=True)
class LoraSettings(Settings):
    """Of a plain LoRA."""

    rank: int
    alpha: float
    rank_stabilised: bool
    dropout: float

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)


@dataclass(frozen=True, kw_only=True)
class BoftSettings(Settings):
    """Of a plain BOFT: blocks of a size, or as many a layer that it follows; the other is 0."""

    block_size: int
    num_blocks: int
    num_factors: int
    dropout: float

    def block_size_of(self, in_features: int) -> int:
        """In a layer of this many input features."""
        return self.block_size or in_features // self.num_blocks


def _lora_settings(config: Mapping[str, Any]) -> LoraSettings:
    return LoraSettings(
        targets=config,
        rank=size(config, "r"),
        alpha=number(config, "lora_alpha"),
        rank_stabilised=switch(config, "use_rslora"),
        dropout=_dropout(config, "lora_dropout"),
    )


def _boft_settings(config: Mapping[str, Any]) -> BoftSettings:
    by_size = bool(config.get("boft_block_size"))
    return BoftSettings(
        targets=config,
        block_size=size(config, "boft_block_size") if by_size else 0,
        num_blocks=0 if by_size else size(config, "boft_block_num"),
        num_factors=size(config, "boft_n_butterfly_factor", 1),
        dropout=_dropout(config, "boft_dropout"),
    )


def _dropout(config: Mapping[str, Any], key: str) -> float:
    value = config.get(key) or 0.0
    require(type(value) in (int, float) and 0 <= value < 1, f"{key} is {str(value)[:40]}; it is a fraction below 1.")
    return value


@dataclass(frozen=True)
class Kind:
    """A type of adapter.

    Args:
        read: its settings, of a config that asks for nothing else.
        accepted: values that leave a plain adapter as it is.
        known: fields that are read, or without a meaning for what the trained adapter computes.
    """

    read: Callable[[Mapping[str, Any]], LoraSettings | BoftSettings]
    accepted: Mapping[str, tuple[Any, ...]]
    known: frozenset[str]


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
KINDS = {
    "LORA": Kind(_lora_settings, ACCEPTED | {"init_lora_weights": PLAIN_STARTS}, frozenset(KNOWN | OF_LORA)),
    "BOFT": Kind(_boft_settings, ACCEPTED | {"init_weights": (None, True, False)}, frozenset(KNOWN | OF_BOFT)),
}


def read_settings(folder: Path) -> LoraSettings | BoftSettings:
    """ConfigurationError: no HF PEFT folder, not a plain LoRA or BOFT, or numbers that are none."""
    path = folder / ADAPTER_CONFIG
    config = _read_json(path)
    name = str(config.get("peft_type") or "")
    require(
        name in KINDS,
        f"{path} describes no HF PEFT adapter: it has no peft_type. A run's --save folder needs no import: --load "
        f"opens it."
        if not name
        else f"{path} describes an adapter of type {name}; only {' and '.join(KINDS)} can be imported. {WAY_OUT}",
    )
    kind = KINDS[name]
    refused = sorted(key for key, value in config.items() if not _is_plain(kind, key, value))
    told = ", ".join(f"{key}={json.dumps(config[key])[:80]}" for key in refused)
    require(not refused, f"{path} asks for what is not supported: {told}. {WAY_OUT}")
    require(bool(config.get("target_modules")), f"{path} names no target_modules.")
    try:
        _check_targets(config)
        return kind.read(config)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from None


def _check_targets(config: Mapping[str, Any]) -> None:
    """Names or a regular expression; layers by number."""
    for key in ("target_modules", "exclude_modules"):
        value = config.get(key) or []
        names = value if isinstance(value, list) else [value]
        require(all(isinstance(name, str) for name in names), f"{key} is {str(value)[:40]}; it names modules.")
        if isinstance(value, str):
            _matches(value, "")
    layers = config.get("layers_to_transform")
    listed = layers if isinstance(layers, list) else [] if layers is None else [layers]
    require(
        all(type(layer) is int for layer in listed), f"layers_to_transform is {str(layers)[:40]}; it numbers layers."
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


def _is_plain(kind: Kind, key: str, value: Any) -> bool:
    """Settings are off by default, so that one with nothing in it says nothing."""
    return value in kind.accepted[key] if key in kind.accepted else key in kind.known or not value


def _read_json(path: Path) -> dict[str, Any]:
    require(path.is_file(), f"--input {path.parent} holds no {path.name}: give the folder of a HF PEFT adapter.")
    return read_json_object(path)


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
