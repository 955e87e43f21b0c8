"""A run's adapters as a folder that Hugging Face PEFT loads.

adapter_config.json             a LoraConfig or BOFTConfig
adapter_model.safetensors       base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight, ...
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_peft.checkpoint.folders import megatron_files
from megatron_peft.checkpoint.record import ADAPTER_CONFIG, RunRecord
from megatron_peft.config import require
from megatron_peft.conversion.adapter_factors import is_weight, layer_of, modules_of
from megatron_peft.conversion.adapter_targets import shortest_targets
from megatron_peft.conversion.output_folder import check_new, new_folder
from megatron_peft.conversion.peft_formats import BoftExport
from megatron_peft.conversion.peft_lora import LoraExport
from megatron_peft.conversion.trained_adapters import TrainedAdapters, base_of, open_adapters
from megatron_peft.conversion.writer import SafetensorsWriter
from megatron_peft.models.families import rules_for
from megatron_peft.models.rules import Rule

STEM = "adapter_model"


# What a method is in HF PEFT: (adapters, rules of the adapted weights) -> a config and tensors. A new method is one
# line here.
EXPORTERS: dict[str, type[LoraExport] | type[BoftExport]] = {
    "lora": LoraExport,
    "lora-ga": LoraExport,
    "boft": BoftExport,
}


def export_adapter(input: str | Path, output: str | Path, *, pretrained_checkpoint: str | Path | None = None) -> Path:
    """Write `output`, which `peft.PeftModel.from_pretrained(base, output)` opens; print what has to be known of it.

    Args:
        input: the --save folder of a run, of any layout.
        output: must not exist.
        pretrained_checkpoint: the base, if it is not where the run says. Its weights are not read.

    Raises:
        ConfigurationError: before anything is written: no checkpoint or no adapters, a method that HF PEFT cannot
            express, another base, an output that exists, damaged files.
    """
    check_new(output)
    adapters = open_adapters(input)
    record = adapters.record
    method = record.config.peft.method
    require(
        method in EXPORTERS,
        f"--input {input}: HF PEFT has nothing that computes what --peft-method {method} does. tools/convert.py merge "
        f"folds the adapters into their base, which any program opens.",
    )
    rules = _adapted_weights(record)
    export = EXPORTERS[method](adapters, rules)
    base = _base(adapters, pretrained_checkpoint)
    is_megatrons = base is not None and megatron_files(base) is not None
    config = {**_common_config(record, None if is_megatrons else base, rules), **export.config()}
    with new_folder(output) as draft:
        (draft / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        _write(draft, rules, export)
    if is_megatrons:
        print(
            f"The base model {base} is in Megatron's form, which HF PEFT does not open, so the adapter names none: "
            f"tools/convert.py megatron-to-hf makes a Hugging Face folder of it, to put the adapter on."
        )
    print(export.note, end="", flush=True)
    return Path(output)


def _adapted_weights(record: RunRecord) -> list[Rule]:
    adapted = set(record.adapted_layers)
    return [rule for rule in rules_for(record.shape).values() if is_weight(rule) and layer_of(rule) in adapted]


def _base(adapters: TrainedAdapters, override: str | Path | None) -> str | None:
    """Its folder's name; checked if it is there."""
    named = adapters.record.config.model.pretrained_checkpoint
    if override is None and not Path(named or "").is_dir():
        return named
    return str(base_of(adapters, override))


def _common_config(record: RunRecord, base: str | None, rules: Iterable[Rule]) -> dict[str, Any]:
    """The fields of any PeftConfig that say what is computed; the others have their defaults."""
    modules = (module for rule in rules for module in modules_of(rule))
    return {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "target_modules": shortest_targets(modules, record.shape.num_layers),
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }


def _write(draft: Path, rules: Iterable[Rule], export: LoraExport | BoftExport) -> None:
    """Every tensor into one file, in float32: HF PEFT knows no shards."""
    with SafetensorsWriter(draft, export.specs(), max_shard_bytes=sys.maxsize, stem=STEM) as writer:
        for rule in rules:
            for name, tensor in export.tensors(rule):
                writer.write(name, tensor)
