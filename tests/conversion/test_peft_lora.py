"""LoRA over fused layers and LoRA over their modules are the same numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_peft.config import PeftConfig
from megatron_peft.conversion.adapter_checkpoint import TrainedAdapters, open_adapters
from megatron_peft.conversion.adapter_factors import is_weight, layer_of
from megatron_peft.conversion.adapter_save import save_adapters
from megatron_peft.conversion.families import rules_for
from megatron_peft.conversion.peft_import_config import LoraSettings
from megatron_peft.conversion.peft_lora import LoraExport, LoraImport
from megatron_peft.conversion.rules import Rule
from megatron_peft.conversion.source import open_source
from tests.checkpoint.records import make_record
from tests.conversion.megatron_folders import ODD

RANK = 3
RULES = [rule for rule in rules_for(ODD).values() if is_weight(rule) and ".0." in rule.name and ".linear_" in rule.name]
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def trained(folder: Path, names: str = "A B", **settings) -> TrainedAdapters:
    """Random factors on every linear layer of the first layer."""
    draw = torch.Generator().manual_seed(0)
    tensors = {
        f"{layer_of(rule)}.adapter.{name}": torch.randn(_shape(rule, name), generator=draw)
        for rule in RULES
        for name in names.split()
    }
    record = make_record(shape=ODD, adapted_layers=tuple(sorted(map(layer_of, RULES))))
    peft = PeftConfig(lora_rank=RANK, lora_alpha=6, **settings)
    save_adapters(folder, replace(record, config=replace(record.config, peft=peft)), tensors)
    return open_adapters(folder)


def _shape(rule: Rule, name: str) -> tuple[int, int]:
    out_features, in_features = rule.local_shape(1)
    return (RANK, in_features) if name.startswith("A") else (out_features, RANK)


def test_there_and_back_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    adapters = trained(tmp_path / "run")
    export = LoraExport(adapters, RULES)
    tensors = {name: x.clone() for rule in RULES for name, x in export.tensors(rule)}
    assert {name: tuple(x.shape) for name, x in tensors.items()} == {n: s.shape for n, s in export.specs().items()}
    (tmp_path / "hf").mkdir()
    save_file(tensors, tmp_path / "hf" / "adapter_model.safetensors")
    config = {"target_modules": MODULES, "layers_to_transform": [0]}
    settings = LoraSettings(targets=config, rank=RANK, alpha=6, rank_stabilised=False, dropout=0.0)
    adopted = LoraImport(settings, open_source(tmp_path / "hf", ["adapter_model.safetensors"])).adopt(RULES, ODD)
    assert (adopted.peft.lora_rank, adopted.peft.lora_alpha, adopted.told) == (RANK, 6, "")
    assert adopted.flags == "--peft-method lora --lora-rank 3 --lora-alpha 6"
    for key, tensor in adopted.tensors.items():
        layer, _, name = key.partition(".adapter.")
        assert torch.equal(tensor, adapters.tensor(layer, name))
    assert len(adopted.tensors) == 2 * len(RULES)


@pytest.mark.parametrize(("stabilised", "alpha"), [(False, 12), (True, 6 * 2**0.5)])
def test_a_subtracted_start_doubles_the_rank_and_keeps_the_scale(
    stabilised: bool, alpha: float, tmp_path: Path
) -> None:
    adapters = trained(tmp_path / "run", "A B A0 B0", lora_rs=stabilised)
    config = LoraExport(adapters, RULES).config()
    assert config["r"] == 2 * RANK and config["use_rslora"] is stabilised
    assert config["lora_alpha"] == pytest.approx(alpha, rel=1e-12)
