"""Only a plain LoRA passes; what is asked for beyond it is named."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import save_file

from megatron_peft.config import ConfigurationError
from megatron_peft.conversion.peft_import import PeftImport, open_import

WEIGHTS = "adapter_model.safetensors"
PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
MODULES = [f"model.layers.{layer}.{name}" for layer in (1, 11) for name in ("self_attn.q_proj", "mlp.up_proj")]


def read(folder: Path, **settings: Any) -> PeftImport:
    (folder / "adapter_config.json").write_text(json.dumps({**PLAIN, **settings}))
    return opened(folder)


def opened(folder: Path) -> Any:
    """With weights of no module."""
    save_file({"none": torch.zeros(1)}, folder / WEIGHTS)
    return open_import(folder)


def test_what_peft_itself_writes_is_plain(tmp_path):
    theirs = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], use_rslora=True, lora_dropout=0.25)
    theirs.save_pretrained(tmp_path)
    settings = opened(tmp_path)
    assert (settings.rank, settings.alpha, settings.dropout, settings.rank_stabilised) == (8, 16, 0.25, True)
    assert settings.scale == 16 / 8**0.5


UNSUPPORTED = {
    "use_dora": True, "bias": "lora_only", "modules_to_save": ["lm_head"], "rank_pattern": {"q_proj": 4},
    "alpha_pattern": {"q_proj": 4}, "fan_in_fan_out": True, "lora_bias": True, "init_lora_weights": "pissa",
    "task_type": "SEQ_CLS", "of_a_later_version": 3,
}  # fmt: skip
WAY_OUT = r"\. Merge it with HF PEFT"
OTHER_TYPES = ("ADALORA", "IA3", "OFT", "VERA", "PREFIX_TUNING")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(
            ({key: value}, f"uses unsupported settings: {re.escape(f'{key}={json.dumps(value)}')}{WAY_OUT}")
            for key, value in UNSUPPORTED.items()
        ),
        *(({"peft_type": one}, f"type {one}; only LORA and BOFT can be imported. Merge it") for one in OTHER_TYPES),
        ({"peft_type": None}, "has no peft_type. A run's --save folder needs no import: --load opens it"),
        ({"r": 0}, "r is 0; it must be a whole number above 0"),
        ({"r": 2.5}, "r is 2.5; it must be a whole number"),
        ({"lora_alpha": None}, "lora_alpha is missing"),
        ({"target_modules": None}, "names no target_modules"),
    ],
)
def test_what_is_not_a_plain_lora_is_named_with_the_way_out(settings, message, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        read(tmp_path, **settings)


def test_a_folder_without_a_config_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match="holds no adapter_config.json: give the folder of a HF PEFT adapter"):
        opened(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [11], "layers_pattern": "layers"},
        {"target_modules": ["model.layers.1.mlp.up_proj", "11.self_attn.q_proj"]},
        {"target_modules": ["proj"]},
        {"target_modules": r".*\.1\..*"},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["1.mlp.up_proj"]},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.11\..*"},
    ],
)
def test_targets_are_those_of_peft(settings, tmp_path):
    ours = read(tmp_path, **settings)
    for module in MODULES:
        assert ours.is_targeted(module) == bool(check_target_module_exists(LoraConfig(**settings), module))
    assert all(map(read(tmp_path, target_modules="all-linear").is_targeted, MODULES))


def test_whole_tensors_are_float32_and_outlive_their_file(tmp_path):
    read(tmp_path)
    stored = {f"{dim}": torch.arange(24.0).reshape(*(1,) * (dim - 1), 24).bfloat16() for dim in (1, 2, 4)}
    save_file({f"base_model.model.q.{name}": tensor for name, tensor in stored.items()}, tmp_path / WEIGHTS)
    adapter = open_import(tmp_path)
    found = {name: adapter.tensor("q", name) for name in stored}
    (tmp_path / WEIGHTS).write_bytes(b"")
    assert all(torch.equal(found[name], stored[name].float()) for name in stored)
