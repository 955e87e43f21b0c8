"""Only a plain LoRA passes; what is asked for beyond it is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from megatron_peft.config import ConfigurationError
from megatron_peft.conversion.peft_import_config import LoraSettings, read_settings

PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
MODULES = [f"model.layers.{layer}.{name}" for layer in (1, 11) for name in ("self_attn.q_proj", "mlp.up_proj")]


def read(folder: Path, **settings: Any) -> LoraSettings:
    (folder / "adapter_config.json").write_text(json.dumps({**PLAIN, **settings}))
    return read_settings(folder)


def test_what_peft_itself_writes_is_plain(tmp_path: Path) -> None:
    LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], use_rslora=True, lora_dropout=0.25).save_pretrained(
        tmp_path
    )
    settings = read_settings(tmp_path)
    assert (settings.rank, settings.alpha, settings.dropout, settings.rank_stabilised) == (8, 16, 0.25, True)
    assert settings.scale == 16 / 8**0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora=true"),
        ({"bias": "lora_only"}, 'bias="lora_only"'),
        ({"modules_to_save": ["lm_head"]}, r'modules_to_save=\["lm_head"\]'),
        ({"rank_pattern": {"q_proj": 4}}, r'rank_pattern=\{"q_proj": 4\}'),
        ({"alpha_pattern": {"q_proj": 4}}, r'alpha_pattern=\{"q_proj": 4\}'),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=true"),
        ({"lora_bias": True}, "lora_bias=true"),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights="pissa"'),
        ({"task_type": "SEQ_CLS"}, 'task_type="SEQ_CLS"'),
        ({"of_a_later_version": 3}, "of_a_later_version=3"),
    ],
)
def test_what_is_not_plain_is_named_with_the_way_out(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=rf"asks for what is not supported: {message}\. Merge it with HF PEFT"):
        read(tmp_path, **settings)


@pytest.mark.parametrize("kind", ["ADALORA", "IA3", "OFT", "VERA", "PREFIX_TUNING"])
def test_other_types_are_named(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"of type {kind}; only LORA and BOFT can be imported. Merge it"):
        read(tmp_path, peft_type=kind)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": None}, "has no peft_type. A run's --save folder needs no import: --load opens it"),
        ({"r": 0}, "r is 0; it must be a whole number above 0"),
        ({"r": 2.5}, "r is 2.5; it must be a whole number"),
        ({"lora_alpha": None}, "lora_alpha is missing"),
        ({"target_modules": None}, "names no target_modules"),
    ],
)
def test_numbers_and_targets_are_checked(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=message):
        read(tmp_path, **settings)


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "holds no JSON object")])
def test_torn_config_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ConfigurationError, match=f"adapter_config.json {message}"):
        read_settings(tmp_path)


def test_folder_without_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="holds no adapter_config.json: give the folder of a HF PEFT adapter"):
        read_settings(tmp_path)


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
def test_targets_are_those_of_peft(settings: dict[str, Any], tmp_path: Path) -> None:
    ours = read(tmp_path, **settings)
    theirs = LoraConfig(**settings)
    for module in MODULES:
        assert ours.is_targeted(module) == bool(check_target_module_exists(theirs, module))


def test_all_linear_is_every_one(tmp_path: Path) -> None:
    assert all(map(read(tmp_path, target_modules="all-linear").is_targeted, MODULES))
