"""Adapters of Hugging Face PEFT, as far as they are a plain LoRA or BOFT, as a --save folder that --load opens.

Everything else in adapter_config.json is refused by name: what changes the computation, and what this version does not
know.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_peft.adapters import boft, low_rank
from megatron_peft.checkpoint.folders import check_new
from megatron_peft.checkpoint.run_record import ADAPTER_CONFIG, RunRecord
from megatron_peft.checkpoint.tensors import ADAPTER
from megatron_peft.config import ConfigurationError, PeftConfig, config_from_dict, errors, require, untrusted
from megatron_peft.conversion.hf_files import Source, listed, open_source, require_tensors
from megatron_peft.conversion.peft_targets import is_targeted
from megatron_peft.conversion.pretrained import known_fingerprint, open_weights, read_model_shape
from megatron_peft.conversion.trained_adapters import PREFIX, LowRankFactors, fuse, save_adapters, shortest_targets
from megatron_peft.models.families import rules_for
from megatron_peft.models.rules import Rule
from megatron_peft.models.shape import number, size, switch

WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
WAY_OUT = "Merge it with HF PEFT (`merge_and_unload`, then `save_pretrained`) and give the result as the base model."


def import_adapter(input: str | Path, output: str | Path, *, pretrained_checkpoint: str | Path | None) -> Path:
    """Write `output`, and print the flags that a run needs to load it. The weights of the base model are not read.

    Raises ConfigurationError: before anything is written: the adapter is not plain LoRA or BOFT, does not fit the fused
    layers, belongs to another base model, is damaged or lacks tensors, or the output exists.
    """
    check_new(output)
    if pretrained_checkpoint is None:
        raise ConfigurationError(
            "import-adapter needs --pretrained-checkpoint, the folder of the adapter's base model."
        )
    folder, shape = Path(input), read_model_shape(pretrained_checkpoint)
    adapter = open_import(folder)
    open_weights(pretrained_checkpoint, shape)
    rules = [rule for rule in rules_for(shape).values() if rule.is_linear]
    sizes = {module: size for rule in rules for module, size in rule.modules.items() if adapter.is_targeted(module)}
    base = f"--pretrained-checkpoint {pretrained_checkpoint}"
    require(
        bool(sizes),
        f"target_modules {adapter.config['target_modules']} of {folder} name no linear layer of {base}: give "
        f"the base model that the adapter was made for.",
    )
    expected = {
        f"{PREFIX}{module}.{name}": tensor_shape
        for module, size in sizes.items()
        for name, tensor_shape in adapter.shapes(*size).items()
    }
    what, extra = f"the tensors in {folder} do not fit {base}.", "that belong to no targeted layer of this base"
    require_tensors(adapter.source.headers, expected, what, extra)
    settings, layers, notes = adapter.adopt([rule for rule in rules if adapter.targeted(rule)])
    targets = tuple(shortest_targets(layers, shape.num_layers))
    folder_of_base = str(Path(pretrained_checkpoint).absolute())
    settings = {**settings, "target_modules": targets}
    record = RunRecord(  # of a run before its first step, without data and length
        config=config_from_dict({"model": {"pretrained_checkpoint": folder_of_base}, "peft": settings}),
        shape=shape,
        position={"iteration": 0, "consumed_samples": 0, "consumed_tokens": 0},
        adapted_layers=tuple(sorted(layers)),
        base_fingerprint=known_fingerprint(folder_of_base),
        schedule=None,
        optimizer_steps=None,
    )
    tensors = {f"{layer}{ADAPTER}{name}": tensor for layer, own in layers.items() for name, tensor in own.items()}
    save_adapters(output, record, tensors)
    flags = {field.name: errors.flag_of(field) for field in fields(PeftConfig)}
    typed = [errors.spelled(flags[name], value) for name, value in settings.items() if value]
    print(f"{notes}Load it with --finetune {' '.join(typed)}", flush=True)
    return Path(output)


class Adopted(NamedTuple):
    """Adapters as a run has them."""

    settings: Mapping[str, Any]  # of its `PeftConfig`, apart from the target modules
    tensors: Mapping[str, Mapping[str, Tensor]]  # whole, by layer and name, `A`
    notes: str  # lines about what has changed, each with its end


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


def open_import(folder: Path) -> "LoraImport | BoftImport":
    """Open the folder of an adapter. ConfigurationError: no HF PEFT folder, not a plain LoRA or BOFT, or damaged."""
    path = folder / ADAPTER_CONFIG
    require(path.is_file(), f"--input {folder} holds no {path.name}: give the folder of a HF PEFT adapter.")
    config = untrusted.read_json_object(path)
    name = str(config.get("peft_type") or "")
    no_type = "it has no peft_type. A run's --save folder needs no import: --load opens it."
    require(bool(name), f"{path} describes no HF PEFT adapter: {no_type}")
    only = f"only {' and '.join(KINDS)} can be imported. {WAY_OUT}"
    require(name in KINDS, f"{path} describes an adapter of type {name}; {only}")
    accepted, known = KINDS[name]
    # Settings are off by default, so that an unknown one with nothing in it changes nothing.
    refused = ", ".join(
        f"{key}={json.dumps(value)[:80]}"
        for key, value in sorted(config.items())
        if (value not in accepted[key] if key in accepted else key not in known and value)
    )
    require(not refused, f"{path} uses unsupported settings: {refused}. {WAY_OUT}")
    require(bool(config.get("target_modules")), f"{path} names no target_modules.")
    weights = next((file for file in WEIGHT_FILES if (folder / file).is_file()), None)
    if weights is None:
        raise ConfigurationError(f"--input {folder} holds neither {' nor '.join(WEIGHT_FILES)}.")
    source = open_source(folder, [weights])
    try:
        return LoraImport(config, source) if name == "LORA" else BoftImport(config, source)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from None


class PeftImport:
    """An adapter of HF PEFT. `config`, which is checked, decides which modules have it; `source` has its weights.

    Each kind has `shapes`, the names (without the module) and shapes of a module's tensors, and `adopt`, which returns
    the adapters of the layers with a targeted module. ConfigurationError: a run cannot hold them.
    """

    def __init__(self, config: Mapping[str, Any], source: Source) -> None:
        self.config, self.source = config, source
        for key in ("target_modules", "exclude_modules", "layers_pattern"):
            value = config.get(key) or []
            names = value if isinstance(value, list) else [value]
            are_names = all(isinstance(name, str) for name in names)
            require(are_names, f"{key} is {str(value)[:40]}; it must be names.")
        layers = config.get("layers_to_transform")
        numbers = layers if isinstance(layers, list) else [] if layers is None else [layers]
        require(
            all(type(layer) is int for layer in numbers),
            f"layers_to_transform is {str(layers)[:40]}; it must be numbers of layers.",
        )

    def tensor(self, module: str, name: str) -> Tensor:
        """A tensor of a module in float32, copied into memory."""
        name = f"{PREFIX}{module}.{name}"
        every = (slice(None),) * len(self.source.headers[name].shape)
        return self.source.slice(name, every).to(torch.float32, copy=True)

    def targeted(self, rule: Rule) -> list[str]:
        """The modules of a fused layer that have the adapter."""
        return [module for module in rule.modules if self.is_targeted(module)]

    def is_targeted(self, module: str) -> bool:
        """Return True if HF PEFT would put its adapter on the module of this full name."""
        return is_targeted(self.config, module)


def _dropout(config: Mapping[str, Any], key: str) -> float:
    value = config.get(key) or 0.0
    require(type(value) in (int, float) and 0 <= value < 1, f"{key} is {str(value)[:40]}; it is a fraction below 1.")
    return value


class LoraImport(PeftImport):
    """HF PEFT's LoRA as adapters of a run.

    A run's LoRA has one A for all modules of a fused layer. Modules that were trained apart (q, k and v) each have
    their own, which the fused adapter holds side by side, so its rank is their sum. A run has one --lora-rank: layers
    that need less are padded with zeros, which stay zero under training. alpha grows with the rank, so that the scale
    stays.
    """

    def __init__(self, config: Mapping[str, Any], source: Source) -> None:
        super().__init__(config, source)
        self.rank, self.alpha = size(config, "r"), number(config, "lora_alpha")
        self.rank_stabilised, self.dropout = switch(config, "use_rslora"), _dropout(config, "lora_dropout")
        self.scale = self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)

    def shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        return low_rank.EXPORT.shapes({"r": self.rank}, out_features, in_features)

    def adopt(self, rules: Sequence[Rule]) -> Adopted:
        fused = {}
        for rule in rules:
            factors = {
                module: LowRankFactors(*(self.tensor(module, f"lora_{side}.weight") for side in "AB"))
                for module in self.targeted(rule)
            }
            fused[rule.layer] = fuse(rule, factors)
        rank = max(factors.rank for factors in fused.values())
        # A rank above the smaller side of a layer would be refused at --load.
        side, layer = min((min(factors.A.shape[1], factors.B.shape[0]), layer) for layer, factors in fused.items())
        require(
            rank <= side,
            f"modules that share a layer each have their own A, which takes --lora-rank {rank} instead of "
            f"{self.rank}; but {layer} has only {side} features on its smaller side.",
        )
        alpha = low_rank.whole_number(low_rank.grown_alpha(self.alpha, rank / self.rank, self.rank_stabilised))
        settings = {"method": "lora", "lora_rank": rank, "lora_alpha": alpha}
        settings |= {"lora_dropout": self.dropout, "lora_rs": self.rank_stabilised}
        notes = (
            f"Modules that share a layer each have their own A, so the rank is {rank} instead of {self.rank}; "
            f"alpha {alpha} keeps the scale of {self.scale:g}.\n"
        )
        tensors = {layer: vars(factors.padded(rank)) for layer, factors in fused.items()}
        return Adopted(settings, tensors, notes if rank != self.rank else "")


class BoftImport(PeftImport):
    """HF PEFT's BOFT as adapters of a run.

    Without its CUDA extension HF PEFT trains a single factor, whatever its config says: the tensors decide.
    """

    def __init__(self, config: Mapping[str, Any], source: Source) -> None:
        super().__init__(config, source)
        self.block_size = size(config, "boft_block_size") if config.get("boft_block_size") else 0
        self.num_blocks = 0 if self.block_size else size(config, "boft_block_num")  # of each layer
        self.configured_factors = size(config, "boft_n_butterfly_factor", 1)
        self.dropout = _dropout(config, "boft_dropout")
        stored = next((header.shape[0] for name, header in source.headers.items() if name.endswith("boft_R")), None)
        self.num_factors = 1 if stored == 1 else self.configured_factors

    def block_size_of(self, in_features: int) -> int:
        return self.block_size or in_features // self.num_blocks

    def shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        config = {"boft_block_size": self.block_size_of(in_features), "boft_n_butterfly_factor": self.num_factors}
        return boft.EXPORT.shapes(config, out_features, in_features)

    def adopt(self, rules: Sequence[Rule]) -> Adopted:
        tensors = {rule.layer: {"Q": self._rotation(rule)} for rule in rules}
        sizes = {self.block_size_of(in_features) for rule in rules for _, in_features in rule.modules.values()}
        require(
            len(sizes) == 1,
            f"boft_block_num={self.num_blocks} of {self.source.folder} gives blocks of "
            f"{' and '.join(map(str, sorted(sizes)))} features; all layers have one --boft-block-size. {WAY_OUT}",
        )
        settings = {"method": "boft", "boft_block_size": sizes.pop(), "boft_factors": self.num_factors}
        settings |= {"rotation_side": "input"}
        notes = ""
        if self.configured_factors != self.num_factors:
            notes += (
                f"The adapter holds 1 butterfly factor instead of the {self.configured_factors} of its config: HF PEFT "
                f"trains one where it lacks its CUDA extension.\n"
            )
        if self.dropout:
            notes += f"boft_dropout={self.dropout:g} is left out: rotations have no dropout here.\n"
        return Adopted(settings, tensors, notes)

    def _rotation(self, rule: Rule) -> Tensor:
        modules, targeted = list(rule.modules), self.targeted(rule)
        for module in targeted:
            scale = self.tensor(module, "boft_s")
            require(
                bool((scale == 1).all()),
                f"{PREFIX}{module}.boft_s of {self.source.folder} scales output features by {scale.min():g} to "
                f"{scale.max():g}; a rotation scales nothing. {WAY_OUT}",
            )
        rotations = [boft.from_huggingface(self.tensor(module, "boft_R")) for module in targeted]
        if targeted != modules or not all(torch.equal(Q, rotations[0]) for Q in rotations):
            raise ConfigurationError(
                f"{listed(modules)} share an input in {rule.layer} and therefore need the same rotation; "
                f"{self.source.folder} has one for {listed(targeted)}, or different ones. {WAY_OUT}"
            )
        return rotations[0]
