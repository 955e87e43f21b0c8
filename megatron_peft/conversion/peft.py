"""Adapters of Hugging Face PEFT as a --save folder that --load opens, and a run's as a folder for PEFT."""

import json
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import torch

from megatron_peft.checkpoint.folders import megatron_files
from megatron_peft.checkpoint.record import ADAPTER_CONFIG, RunRecord
from megatron_peft.checkpoint.tensors import ADAPTER
from megatron_peft.config import (
    ConfigurationError,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    PeftFormat,
    RunConfig,
    TrainingConfig,
    require,
)
from megatron_peft.config.hub import hub_name
from megatron_peft.config.methods import OTHER_EXPORTS
from megatron_peft.conversion.hf_files import open_source, raise_problems, tensor_problems
from megatron_peft.conversion.model_card import Exported, check_license, write_card
from megatron_peft.conversion.peft_config import (
    PREFIX,
    Adopted,
    PeftImport,
    open_import,
    read_adapter_config,
    shortest_targets,
)
from megatron_peft.conversion.pretrained import known_fingerprint, open_weights, read_model_shape
from megatron_peft.conversion.trained_adapters import (
    TrainedAdapters,
    base_of,
    is_weight,
    layer_name,
    modules_of,
    open_adapters,
    rows_of_modules,
    save_adapters,
)
from megatron_peft.conversion.writer import SafetensorsWriter, TensorSpec, check_new, new_folder
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
        ConfigurationError: before anything is written: the adapter is not plain LoRA or BOFT, does not fit the fused
            layers, belongs to another base model, is damaged or lacks tensors, or the output exists.
    """
    check_new(output)
    if pretrained_checkpoint is None:
        raise ConfigurationError(
            "import-adapter needs --pretrained-checkpoint, the folder of the adapter's base model."
        )
    folder, shape = Path(input), read_model_shape(pretrained_checkpoint)
    adapter = _open(folder)
    open_weights(pretrained_checkpoint, shape)
    rules = [rule for rule in rules_for(shape).values() if is_weight(rule) and ".linear_" in rule.name]
    _check_tensors(adapter, rules, f"--pretrained-checkpoint {pretrained_checkpoint}")
    adopted = adapter.adopt(rules, shape)
    save_adapters(output, _record(str(Path(pretrained_checkpoint).absolute()), shape, adopted), adopted.tensors)
    print(f"{adopted.notes}Load it with --finetune {adopted.flags}", flush=True)
    return Path(output)


def _open(folder: Path) -> PeftImport:
    config = read_adapter_config(folder)
    name = next((name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if name is None:
        raise ConfigurationError(f"--input {folder} holds neither {' nor '.join(WEIGHT_FILES)}.")
    return open_import(config, open_source(folder, [name]))


def _check_tensors(adapter: PeftImport, rules: list[Rule], base: str) -> None:
    """ConfigurationError names every kind of fault: missing, extra, misshapen and quantized tensors."""
    source = adapter.source
    modules = {module: size for rule in rules for module, size in modules_of(rule).items()}
    targeted = {module: size for module, size in modules.items() if adapter.is_targeted(module)}
    require(
        bool(targeted),
        f"target_modules {adapter.config['target_modules']} of {source.folder} name no linear layer of {base}: give "
        f"the base model that the adapter was made for.",
    )
    expected = {
        name: shape for module, size in targeted.items() for name, shape in adapter.shapes(module, size).items()
    }
    problems = tensor_problems(source.headers, expected, "that belong to no targeted layer of this base")
    raise_problems(f"the tensors in {source.folder} do not fit {base}.", problems)


def _record(base: str, shape: ModelShape, adopted: Adopted) -> RunRecord:
    """The record of a run before its first step, without data and length."""
    return RunRecord(
        config=RunConfig(
            parallel=ParallelConfig(),
            model=ModelConfig(pretrained_checkpoint=base),
            peft=adopted.peft,
            data=DataConfig(),
            training=TrainingConfig(),
        ),
        shape=shape,
        position={"iteration": 0, "consumed_samples": 0, "consumed_tokens": 0},
        adapted_layers=tuple(sorted({key.partition(ADAPTER)[0] for key in adopted.tensors})),
        base_fingerprint=known_fingerprint(base),
        schedule=None,
        optimizer_steps=None,
    )


STEM = "adapter_model"  # .safetensors, beside adapter_config.json


def export_adapter(
    input: str | Path,
    output: str | Path,
    *,
    pretrained_checkpoint: str | Path | None = None,
    license: str | None = None,
) -> Path:
    """Write `output`, which `peft.PeftModel.from_pretrained(base, output)` opens; print what has to be known of it.

    Args:
        input: the --save folder of a run, of any layout.
        output: must not exist.
        pretrained_checkpoint: the base, if it is not where the run says. Its weights are not read.
        license: of the model card; None takes the base's.

    Raises:
        ConfigurationError: before anything is written: no checkpoint or no adapters, a method that HF PEFT cannot
            express, another base, an output that exists, damaged files.
    """
    check_new(output)
    check_license(license)
    adapters = open_adapters(input)
    record = adapters.record
    peft = record.config.peft
    form: PeftFormat | None = getattr(import_module(peft.spec.adapter), "EXPORT", None)
    if form is None:
        raise ConfigurationError(
            f"--input {input}: HF PEFT has no equivalent of --peft-method {peft.method}. {OTHER_EXPORTS}."
        )
    rules = _adapted_weights(record)
    modules = (module for rule in rules for module in modules_of(rule))
    targets = shortest_targets(modules, record.shape.num_layers)
    own_config = form.config(peft, targets)
    base = _base(adapters, pretrained_checkpoint)
    card = Exported(adapters.folder, record, Path(output), opened_by_others(base), True, own_config.get("r"), license)
    with new_folder(output) as draft:
        write_adapter_config(draft, card.base, targets, own_config)
        _write(draft, rules, form, own_config, adapters)
        write_card(draft, card)
    print(form.note(peft), end="", flush=True)
    return Path(output)


def write_adapter_config(
    folder: Path, base: str | None, target_modules: Sequence[str], own_config: Mapping[str, Any]
) -> None:
    """The adapter_config.json of HF PEFT.

    Args:
        base: name or folder of the base that it opens; of a folder in the Hub's cache `org/name` is written.
        target_modules: names, or ends of names, of the modules.
        own_config: fields of its kind of adapter.
    """
    config = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": hub_name(base or "") or base,
        "inference_mode": True,
        "target_modules": list(target_modules),
        "modules_to_save": None,
        **own_config,
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def opened_by_others(base: str | None) -> str | None:
    """The base's name; None, which is printed, if it is in Megatron's form."""
    if base is None or megatron_files(base) is None:
        return base
    print(
        f"The base model {base} is in Megatron's form, which HF PEFT does not open, so the adapter names none: "
        f"megatron-peft convert megatron-to-hf makes a Hugging Face folder of it, to put the adapter on."
    )
    return None


def _adapted_weights(record: RunRecord) -> list[Rule]:
    adapted = set(record.adapted_layers)
    return [rule for rule in rules_for(record.shape).values() if is_weight(rule) and layer_name(rule) in adapted]


def _base(adapters: TrainedAdapters, override: str | Path | None) -> str | None:
    """Name of the base's folder, which is checked if it exists."""
    named = adapters.record.config.model.pretrained_checkpoint
    if override is None and not Path(named or "").is_dir():
        return named
    return str(base_of(adapters, override))


def _write(
    draft: Path, rules: Sequence[Rule], form: PeftFormat, config: Mapping[str, Any], adapters: TrainedAdapters
) -> None:
    """Every tensor into one file, in float32: HF PEFT has no shards."""
    peft, sizes = adapters.record.config.peft, {}
    for rule in rules:
        sizes |= modules_of(rule)
    shared = form.shared(peft, sizes)
    shapes = {name: (*tensor.shape,) for name, tensor in shared.items()}
    for module, size in sizes.items():
        shapes |= {f"{PREFIX}{module}.{name}": shape for name, shape in form.shapes(config, *size).items()}
    specs = {name: TensorSpec(shape, torch.float32) for name, shape in shapes.items()}
    with SafetensorsWriter(draft, specs, max_shard_bytes=sys.maxsize, stem=STEM) as writer:
        for name, tensor in shared.items():
            writer.write(name, tensor)
        for rule in rules:
            layer = layer_name(rule)
            tensors = form.tensors(adapters.of(layer), peft, layer, rule.local_shape(1)[0])
            rows = {name: rows_of_modules(rule, tensors[name]) for name in form.rows}
            for module, name in product(modules_of(rule), tensors):
                writer.write(f"{PREFIX}{module}.{name}", rows[name][module] if name in rows else tensors[name])
