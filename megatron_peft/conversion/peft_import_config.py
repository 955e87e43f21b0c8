"""The `adapter_config.json` of a Hugging Face PEFT folder, as far as it describes a plain LoRA.

Everything else is refused by name: what changes the computation, and what this version does not know.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_peft.checkpoint.record import ADAPTER_CONFIG
from megatron_peft.config import ConfigurationError, require
from megatron_peft.models.huggingface_values import number, size, switch

WAY_OUT = "Merge it with HF PEFT (`merge_and_unload`, then `save_pretrained`) and give the result as the base model."
ALL_LINEAR = "all-linear"

# Values that leave a plain LoRA as it is. Starts that write to the base's weights (pissa, olora, corda, loftq, lora_ga)
# are refused: the base without its adapter is then another model.
ACCEPTED: dict[str, tuple[Any, ...]] = {
    "task_type": (None, "CAUSAL_LM"),
    "bias": (None, "none"),
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva", "mica"),
}
# Read below, or without a meaning for what the trained adapter computes.
KNOWN = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping",
    "peft_version", "megatron_core", "qalora_group_size", "eva_config", "ensure_weight_tying", "runtime_config",
    "enable_lora",
}  # fmt: skip


@dataclass(frozen=True)
class LoraSettings:
    """Of a plain LoRA. `targets` decides which modules have it."""

    rank: int
    alpha: float
    rank_stabilised: bool
    dropout: float
    targets: Mapping[str, Any]

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)

    def is_targeted(self, module: str) -> bool:
        """Whether HF PEFT would put its LoRA on the module of this full name."""
        if _is_named(self.targets.get("exclude_modules"), module):
            return False
        wanted = self.targets["target_modules"]
        if isinstance(wanted, str):
            return wanted == ALL_LINEAR or bool(re.fullmatch(wanted, module))
        return module in wanted or (_is_named(wanted, module) and self._is_in_listed_layer(module))

    def _is_in_listed_layer(self, module: str) -> bool:
        layers = self.targets.get("layers_to_transform")
        layers = [layers] if isinstance(layers, int) else layers
        layer = re.search(r"\.(\d+)\.", module)
        return not layers or (layer is not None and int(layer[1]) in layers)


def read_lora_settings(folder: Path) -> LoraSettings:
    """ConfigurationError: no HF PEFT folder, not a plain LoRA, or numbers that are none."""
    path = folder / ADAPTER_CONFIG
    config = _read_json(path)
    kind = config.get("peft_type")
    require(
        kind == "LORA",
        f"{path} describes no HF PEFT adapter: it has no peft_type. A run's --save folder needs no import: --load "
        f"opens it."
        if kind is None
        else f"{path} describes an adapter of type {kind}; only LORA can be imported. {WAY_OUT}",
    )
    refused = sorted(key for key, value in config.items() if not _is_plain(key, value))
    told = ", ".join(f"{key}={json.dumps(config[key])[:80]}" for key in refused)
    require(not refused, f"{path} asks for what is not supported: {told}. {WAY_OUT}")
    return _settings(path, config)


def _is_plain(key: str, value: Any) -> bool:
    """Settings are off by default, so that one with nothing in it says nothing."""
    return value in ACCEPTED[key] if key in ACCEPTED else key in KNOWN or not value


def _settings(path: Path, config: Mapping[str, Any]) -> LoraSettings:
    wanted = config.get("target_modules")
    require(bool(wanted) and isinstance(wanted, str | list), f"{path} names no target_modules.")
    try:
        return LoraSettings(
            rank=size(config, "r"),
            alpha=number(config, "lora_alpha"),
            rank_stabilised=switch(config, "use_rslora"),
            dropout=config.get("lora_dropout") or 0.0,
            targets=config,
        )
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    require(path.is_file(), f"--input {path.parent} holds no {path.name}: give the folder of a HF PEFT adapter.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigurationError(f"{path} is not JSON ({error}): copy it again.") from error
    require(isinstance(config, dict), f"{path} holds no JSON object.")
    return config


def _is_named(names: str | Iterable[str] | None, module: str) -> bool:
    """A regular expression over full names, or a list of full names and ends of them."""
    if isinstance(names, str):
        return bool(names) and bool(re.fullmatch(names, module))
    return any(module == name or module.endswith(f".{name}") for name in names or ())
