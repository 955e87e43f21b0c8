"""A run's adapters as a folder that Hugging Face PEFT loads.

    adapter_config.json             a LoraConfig
    adapter_model.safetensors       base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight, ...

LoRA over a fused layer is LoRA over each of its modules: they share A, and each has its own rows of B.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_peft.checkpoint.record import ADAPTER_CONFIG, RunRecord
from megatron_peft.config import require
from megatron_peft.conversion.adapter_checkpoint import TrainedAdapters, base_of, low_rank_factors, open_adapters
from megatron_peft.conversion.adapter_factors import Factors, is_weight, layer_of, modules_of, split
from megatron_peft.conversion.adapter_targets import shortest_targets
from megatron_peft.conversion.families import rules_for
from megatron_peft.conversion.output_folder import check_new, new_folder
from megatron_peft.conversion.rules import Rule
from megatron_peft.conversion.writer import SafetensorsWriter, TensorSpec

STEM = "adapter_model"
PREFIX = "base_model.model."


# The methods that LoRA can express: (adapters, layer) -> the factors of the fused layer, for the run's own scale (their
# rank may be another than the run's). A new method is one line here.
Exporter = Callable[[TrainedAdapters, str], Factors]
EXPORTERS: dict[str, Exporter] = {"lora": low_rank_factors, "lora-ga": low_rank_factors}


def export_adapter(input: str | Path, output: str | Path, *, pretrained_checkpoint: str | Path | None = None) -> Path:
    """Write `output`, which `peft.PeftModel.from_pretrained(base, output)` opens.

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
    rank = EXPORTERS[method](adapters, layer_of(rules[0])).rank
    config = _lora_config(record, _base(adapters, pretrained_checkpoint), rank, rules)
    with new_folder(output) as draft:
        (draft / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        _write(draft, rules, rank, adapters, EXPORTERS[method])
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


def _write(draft: Path, rules: Sequence[Rule], rank: int, adapters: TrainedAdapters, exporter: Exporter) -> None:
    """Every factor into one file, in float32: HF PEFT knows no shards."""
    specs = {
        f"{PREFIX}{module}.lora_{side}.weight": TensorSpec(size, torch.float32)
        for rule in rules
        for module, shape in modules_of(rule).items()
        for side, size in (("A", (rank, shape[1])), ("B", (shape[0], rank)))
    }
    writer = SafetensorsWriter(draft, specs, max_shard_bytes=sys.maxsize, stem=STEM)
    for rule in rules:
        for name, tensor in _tensors(rule, exporter(adapters, layer_of(rule))):
            writer.write(name, tensor)
    writer.finish()


def _tensors(rule: Rule, fused: Factors) -> Iterator[tuple[str, Tensor]]:
    for module, factors in split(rule, fused).items():
        yield f"{PREFIX}{module}.lora_A.weight", factors.A
        yield f"{PREFIX}{module}.lora_B.weight", factors.B


def _lora_config(record: RunRecord, base: str | None, rank: int, rules: Iterable[Rule]) -> dict[str, Any]:
    """The fields of peft.LoraConfig that say what is computed; the others have their defaults."""
    peft, modules = record.config.peft, (module for rule in rules for module in modules_of(rule))
    growth = rank / peft.lora_rank
    alpha = peft.lora_alpha * (growth**0.5 if peft.lora_rs else growth)  # the scale stays
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "use_rslora": peft.lora_rs,
        "lora_dropout": peft.lora_dropout,
        "target_modules": shortest_targets(modules, record.shape.num_layers),
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }
