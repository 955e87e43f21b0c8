"""A Hugging Face PEFT LoRA as a --save folder that --load opens.

A fused layer has one adapter. Modules that were trained apart (q, k and v) have an A each, which the fused adapter
holds side by side, so its rank is their sum. A run has one --lora-rank: layers that need less are padded with zeros,
which stay zero under training. The scale stays what it was, alpha growing with the rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_peft.checkpoint.record import RunRecord
from megatron_peft.config import (
    ConfigurationError,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    PeftConfig,
    RunConfig,
    TrainingConfig,
    require,
)
from megatron_peft.conversion.adapter_checkpoint import known_fingerprint
from megatron_peft.conversion.adapter_factors import Factors, fuse, is_weight, layer_of, modules_of
from megatron_peft.conversion.adapter_save import save_adapters
from megatron_peft.conversion.adapter_targets import shortest_targets
from megatron_peft.conversion.families import rules_for
from megatron_peft.conversion.inventory import NUMBER_TYPES
from megatron_peft.conversion.output_folder import check_new
from megatron_peft.conversion.peft_export import PREFIX
from megatron_peft.conversion.peft_import_config import LoraSettings, read_lora_settings
from megatron_peft.conversion.pretrained import open_weights, read_model_shape
from megatron_peft.conversion.rules import Rule
from megatron_peft.conversion.source import Source, listed, open_source
from megatron_peft.models.shape import ModelShape

WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def import_adapter(input: str | Path, output: str | Path, *, pretrained_checkpoint: str | Path | None) -> Path:
    """Write `output`, and print the flags that a run needs to load it.

    Args:
        input: the folder of a HF PEFT adapter.
        output: must not exist.
        pretrained_checkpoint: the base model. It is checked, but its weights are not read.

    Raises:
        ConfigurationError: before anything is written: not a plain LoRA, of another base, missing tensors, damaged
            files, an output that exists.
    """
    check_new(output)
    if pretrained_checkpoint is None:
        raise ConfigurationError("which base model? --pretrained-checkpoint takes the folder that the adapter is for.")
    folder, shape = Path(input), read_model_shape(pretrained_checkpoint)
    settings = read_lora_settings(folder)
    source = _open(folder)
    open_weights(pretrained_checkpoint, shape)
    rules = [rule for rule in rules_for(shape).values() if is_weight(rule) and ".linear_" in rule.name]
    _check_tensors(source, rules, settings, f"--pretrained-checkpoint {pretrained_checkpoint}")
    fused = {
        layer_of(rule): fuse(rule, found)
        for rule in rules
        if (found := {module: _factors(source, module) for module in modules_of(rule) if settings.is_targeted(module)})
    }
    rank = max(factors.rank for factors in fused.values())
    _check_rank(rank, fused, settings)
    record = _record(folder, str(pretrained_checkpoint), shape, _peft_config(settings, rank, fused, shape), fused)
    tensors = {
        f"{layer}.adapter.{name}": tensor
        for layer, factors in fused.items()
        for name, tensor in vars(factors.padded(rank)).items()
    }
    save_adapters(output, record, tensors)
    print(_what_to_give(record, settings), flush=True)
    return Path(output)


def _open(folder: Path) -> Source:
    name = next((name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if name is None:
        raise ConfigurationError(f"--input {folder} holds neither {' nor '.join(WEIGHT_FILES)}.")
    return open_source(folder, [name])


def _check_tensors(source: Source, rules: list[Rule], settings: LoraSettings, base: str) -> None:
    """ConfigurationError names every kind of fault: missing, extra, misshapen and quantised tensors."""
    modules = {module: shape for rule in rules for module, shape in modules_of(rule).items()}
    targeted = {module: shape for module, shape in modules.items() if settings.is_targeted(module)}
    require(
        bool(targeted),
        f"target_modules {settings.targets['target_modules']} of {source.folder} name no linear layer of {base}: give "
        f"the base model that the adapter was made for.",
    )
    expected = {name: shape for module, size in targeted.items() for name, shape in _shapes(module, size, settings)}
    headers = source.headers
    faults = {
        "missing": [name for name in expected if name not in headers],
        "that belong to no targeted layer of this base": [name for name in headers if name not in expected],
        "of the wrong shape": [
            f"{name} {list(headers[name].shape)} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in headers and headers[name].shape != shape
        ],
        "of an unsupported number type": [
            f"{name} {header.dtype}" for name, header in headers.items() if header.dtype not in NUMBER_TYPES
        ],
    }
    told = [f"{len(names)} {kind}: {listed(names)}" for kind, names in faults.items() if names]
    if told:
        raise ConfigurationError(f"the tensors in {source.folder} do not fit {base}. " + "; ".join(told) + ".")


def _shapes(module: str, size: tuple[int, ...], settings: LoraSettings) -> Iterator[tuple[str, tuple[int, int]]]:
    yield _name(module, "A"), (settings.rank, size[1])
    yield _name(module, "B"), (size[0], settings.rank)


def _name(module: str, side: str) -> str:
    return f"{PREFIX}{module}.lora_{side}.weight"


def _factors(source: Source, module: str) -> Factors:
    """In float32."""
    return Factors(*(_whole(source, _name(module, side)) for side in ("A", "B")))


def _whole(source: Source, name: str) -> Tensor:
    return source.slice(name, (slice(None), slice(None))).to(torch.float32, copy=True)


def _check_rank(rank: int, fused: Mapping[str, Factors], settings: LoraSettings) -> None:
    """A rank above the smaller side of a layer would be refused at --load."""
    side, layer = min((min(factors.A.shape[1], factors.B.shape[0]), layer) for layer, factors in fused.items())
    require(
        rank <= side,
        f"modules that share a layer have an A of their own, which takes --lora-rank {rank} instead of "
        f"{settings.rank}; but {layer} has only {side} features on its smaller side.",
    )


def _peft_config(settings: LoraSettings, rank: int, layers: Iterable[str], shape: ModelShape) -> PeftConfig:
    growth = rank / settings.rank
    return PeftConfig(
        method="lora",
        target_modules=tuple(shortest_targets(layers, shape.num_layers)),
        lora_rank=rank,
        lora_alpha=settings.alpha * (growth**0.5 if settings.rank_stabilised else growth),
        lora_dropout=settings.dropout,
        lora_rs=settings.rank_stabilised,
    )


def _record(folder: Path, base: str, shape: ModelShape, peft: PeftConfig, layers: Iterable[str]) -> RunRecord:
    """As of a run before its first step. A run has data and a length; these say where the adapter came from instead."""
    return RunRecord(
        config=RunConfig(
            parallel=ParallelConfig(),
            model=ModelConfig(pretrained_checkpoint=base),
            peft=peft,
            data=DataConfig(train_data_path=(f"imported from {folder}",)),
            training=TrainingConfig(train_iters=1),
        ),
        shape=shape,
        position={"iteration": 0, "consumed_samples": 0, "consumed_tokens": 0},
        adapted_layers=tuple(sorted(layers)),
        base_fingerprint=known_fingerprint(base),
        schedule=None,
        optimizer_steps=None,
    )


def _what_to_give(record: RunRecord, settings: LoraSettings) -> str:
    peft = record.config.peft
    alpha = int(peft.lora_alpha) if peft.lora_alpha == int(peft.lora_alpha) else peft.lora_alpha
    grown = (
        f"Modules that share a layer have an A of their own, so the rank is {peft.lora_rank} instead of "
        f"{settings.rank}; alpha {alpha} keeps the scale of {settings.scale:g}.\n"
    )
    return (
        f"{grown * (peft.lora_rank != settings.rank)}Load it with --finetune --peft-method lora --lora-rank "
        f"{peft.lora_rank} --lora-alpha {alpha}{' --lora-rs' * peft.lora_rs} --peft-target-modules "
        f"{' '.join(peft.target_modules)}"
    )
