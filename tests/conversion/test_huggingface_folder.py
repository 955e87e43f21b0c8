"""A model's folder appears whole or not at all, described by the first folder that can."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_peft.config import ConfigurationError
from megatron_peft.conversion.families import rules_for
from megatron_peft.conversion.huggingface_folder import Contents, write_huggingface
from megatron_peft.conversion.rules import Rule
from tests.conversion.megatron_folders import ODD


def counted(rule: Rule) -> dict[str, Tensor]:
    """Each tensor filled with the length of its name."""
    return {part.name: torch.full(part.shape, float(len(part.name))) for part in rule.parts}


def contents(tensors=counted, origins: tuple[Path, ...] = ()) -> Contents:
    rules = rules_for(ODD)
    return Contents(ODD, rules, dict.fromkeys(rules, torch.bfloat16), tensors, origins)


def test_every_tensor_is_written_in_its_type(tmp_path: Path) -> None:
    write_huggingface(tmp_path / "new", contents(), 5 * 10**9, "Writing", progress=False)
    written = load_file(tmp_path / "new" / "model.safetensors")
    expected = {name: tensor for rule in rules_for(ODD).values() for name, tensor in counted(rule).items()}
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name].bfloat16()) for name in expected)


def test_the_first_folder_with_a_config_describes_it(tmp_path: Path) -> None:
    for name in ("empty", "first", "second"):
        (tmp_path / name).mkdir()
    (tmp_path / "empty" / "tokenizer.json").write_text("of no model")
    for name in ("first", "second"):
        (tmp_path / name / "config.json").write_text(json.dumps({"name": name, "torch_dtype": "float32"}))
        (tmp_path / name / "tokenizer.json").write_text(name)
    origins = tuple(tmp_path / name for name in ("empty", "first", "second"))
    write_huggingface(tmp_path / "new", contents(origins=origins), 5 * 10**9, "Writing", progress=False)
    assert (tmp_path / "new" / "tokenizer.json").read_text() == "first"
    assert json.loads((tmp_path / "new" / "config.json").read_text()) == {"name": "first", "torch_dtype": "bfloat16"}


def test_damage_found_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    def torn(rule: Rule) -> dict[str, Tensor]:
        if "layers.1" in rule.name:
            raise ConfigurationError("torn")
        return counted(rule)

    with pytest.raises(ConfigurationError, match="torn"):
        write_huggingface(tmp_path / "new", contents(torn), 5 * 10**9, "Writing", progress=False)
    assert not list(tmp_path.iterdir())
