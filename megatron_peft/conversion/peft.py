"""A Hugging Face PEFT adapter, LoRA or BOFT, as a --save folder that --load opens."""

from pathlib import Path

from megatron_peft.checkpoint.record import RunRecord
from megatron_peft.checkpoint.tensors import ADAPTER
from megatron_peft.config import (
    ConfigurationError,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
    require,
)
from megatron_peft.conversion.adapter_factors import is_weight, modules_of
from megatron_peft.conversion.adapter_save import save_adapters
from megatron_peft.conversion.hf_files import listed, open_source
from megatron_peft.conversion.inventory import NUMBER_TYPES
from megatron_peft.conversion.output_folder import check_new
from megatron_peft.conversion.peft_config import BoftSettings, read_settings
from megatron_peft.conversion.peft_formats import BoftImport
from megatron_peft.conversion.peft_lora import LoraImport
from megatron_peft.conversion.peft_names import Adopted
from megatron_peft.conversion.pretrained import open_weights, read_model_shape
from megatron_peft.conversion.trained_adapters import known_fingerprint
from megatron_peft.models.families import rules_for
from megatron_peft.models.rules import Rule
from megatron_peft.models.shape import ModelShape

WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def import_adapter(input: str | Path, output: str | Path, *, pretrained_checkpoint: str | Path | None) -> Path:
    """Write `output`, and print the flags that a run needs to load it.

    Args:
        input: the folder of a HF PEFT adapter.
        output: must not exist.
        pretrained_checkpoint: the base model. It is checked, but its weights are not read.

    Raises:
        ConfigurationError: before anything is written: no plain LoRA or BOFT, one that the fused layers cannot hold, of
            another base, missing tensors, damaged files, an output that exists.
    """
    check_new(output)
    if pretrained_checkpoint is None:
        raise ConfigurationError("which base model? --pretrained-checkpoint takes the folder that the adapter is for.")
    folder, shape = Path(input), read_model_shape(pretrained_checkpoint)
    adapter = _open(folder)
    open_weights(pretrained_checkpoint, shape)
    rules = [rule for rule in rules_for(shape).values() if is_weight(rule) and ".linear_" in rule.name]
    _check_tensors(adapter, rules, f"--pretrained-checkpoint {pretrained_checkpoint}")
    adopted = adapter.adopt(rules, shape)
    save_adapters(output, _record(folder, str(pretrained_checkpoint), shape, adopted), adopted.tensors)
    targets = " ".join(adopted.peft.target_modules)
    print(f"{adopted.told}Load it with --finetune {adopted.flags} --peft-target-modules {targets}", flush=True)
    return Path(output)


def _open(folder: Path) -> LoraImport | BoftImport:
    settings = read_settings(folder)
    name = next((name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if name is None:
        raise ConfigurationError(f"--input {folder} holds neither {' nor '.join(WEIGHT_FILES)}.")
    source = open_source(folder, [name])
    return BoftImport(settings, source) if isinstance(settings, BoftSettings) else LoraImport(settings, source)


def _check_tensors(adapter: LoraImport | BoftImport, rules: list[Rule], base: str) -> None:
    """ConfigurationError names every kind of fault: missing, extra, misshapen and quantised tensors."""
    settings, source = adapter.settings, adapter.source
    modules = {module: size for rule in rules for module, size in modules_of(rule).items()}
    targeted = {module: size for module, size in modules.items() if settings.is_targeted(module)}
    require(
        bool(targeted),
        f"target_modules {settings.targets['target_modules']} of {source.folder} name no linear layer of {base}: give "
        f"the base model that the adapter was made for.",
    )
    expected = {name: shape for module, size in targeted.items() for name, shape in adapter.shapes(module, size)}
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


def _record(folder: Path, base: str, shape: ModelShape, adopted: Adopted) -> RunRecord:
    """As of a run before its first step. A run has data and a length; these say where the adapter came from instead."""
    return RunRecord(
        config=RunConfig(
            parallel=ParallelConfig(),
            model=ModelConfig(pretrained_checkpoint=base),
            peft=adopted.peft,
            data=DataConfig(train_data_path=(f"imported from {folder}",)),
            training=TrainingConfig(train_iters=1),
        ),
        shape=shape,
        position={"iteration": 0, "consumed_samples": 0, "consumed_tokens": 0},
        adapted_layers=tuple(sorted({key.partition(ADAPTER)[0] for key in adopted.tensors})),
        base_fingerprint=known_fingerprint(base),
        schedule=None,
        optimizer_steps=None,
    )
