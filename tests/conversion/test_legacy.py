"""Old checkpoints of ranks: joined, or refused by name. What is read from whole ones: test_to_huggingface.py."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_peft.checkpoint.megatron_folder import holds_ranks
from megatron_peft.checkpoint.safe_pickle import load_inertly
from megatron_peft.config import ConfigurationError
from megatron_peft.conversion.families import rules_for
from megatron_peft.conversion.legacy import open_legacy
from tests.conversion.megatron_folders import ODD, save_random, save_ranks


@pytest.fixture
def ranks(tmp_path: Path) -> Path:
    return save_ranks(save_random(tmp_path / "hf"), tmp_path / "ranks", tp=2, pp=2)


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the model of a rank; what lies beside it goes."""
    content = {
        "model": {
            name: torch.clone(tensor) for name, tensor in load_inertly(path)["model"].items() if tensor is not None
        }
    }
    change(content)
    torch.save(content, path)


def test_layers_are_numbered_over_all_stages(ranks: Path) -> None:
    found = open_legacy(ranks)
    layers = {int(name.split(".")[2]) for name in found.tensors if name.startswith("decoder.layers")}
    assert layers == {0, 1, 2, 3}
    assert {len(shards) for shards in found.tensors.values()} == {2}
    assert found.arguments.num_layers == 4


def test_a_split_weight_is_one_global_tensor(ranks: Path) -> None:
    name = "decoder.layers.2.mlp.linear_fc1.weight"
    stored = open_legacy(ranks).stored(name, rules_for(ODD)[name])
    assert stored is not None and stored.shape == (24, 10) and len(stored.boxes) == 4 and stored.is_whole


def test_a_copied_weight_is_read_from_one_rank(ranks: Path) -> None:
    name = "decoder.layers.2.input_layernorm.weight"
    stored = open_legacy(ranks).stored(name, rules_for(ODD)[name])
    assert stored is not None and len(stored.boxes) == 1 and stored.is_whole


def test_an_unknown_name_is_not_there(ranks: Path) -> None:
    assert open_legacy(ranks).stored("ghost", rules_for(ODD)["output_layer.weight"]) is None


def test_a_lost_rank_is_named(ranks: Path) -> None:
    shutil.rmtree(ranks / "mp_rank_01_000")
    with pytest.raises(ConfigurationError, match="lacks the folders mp_rank_01_000"):
        open_legacy(ranks)


def test_a_lost_file_is_named(ranks: Path) -> None:
    (ranks / "mp_rank_01_001" / "model_optim_rng.pt").unlink()
    with pytest.raises(ConfigurationError, match="mp_rank_01_001 holds none of model_optim_rng.pt"):
        open_legacy(ranks)


def test_experts_are_refused(ranks: Path) -> None:
    (ranks / "mp_rank_00_000_000").mkdir()
    with pytest.raises(ConfigurationError, match="mp_rank_00_000_000 is of a layout with experts"):
        open_legacy(ranks)


def test_names_before_megatron_core_are_refused_with_the_way_out(ranks: Path) -> None:
    def age(content) -> None:
        content["model"] = {"language_model.encoder.layers.0.input_norm.weight": torch.zeros(1)}

    rewrite(ranks / "mp_rank_00_000" / "model_optim_rng.pt", age)
    with pytest.raises(ConfigurationError, match="language_model.encoder.* --saver core"):
        open_legacy(ranks)


def test_a_file_without_a_model_is_named(ranks: Path) -> None:
    rewrite(ranks / "mp_rank_00_000" / "model_optim_rng.pt", lambda content: content.pop("model"))
    with pytest.raises(ConfigurationError, match="holds no 'model'"):
        open_legacy(ranks)


def test_a_shard_of_another_shape_is_named(ranks: Path) -> None:
    name = "decoder.layers.1.mlp.linear_fc2.weight"

    def spoil(content) -> None:
        content["model"][name] = torch.zeros(10, 5)

    rewrite(ranks / "mp_rank_01_000" / "model_optim_rng.pt", spoil)
    with pytest.raises(ConfigurationError, match=r"linear_fc2.weight is \[10, 5\] on rank 1 of 2 .* \[10, 6\]"):
        open_legacy(ranks).stored(name, rules_for(ODD)[name])


def test_only_folders_of_ranks_count(ranks: Path, tmp_path: Path) -> None:
    assert holds_ranks(ranks)
    assert not holds_ranks(tmp_path)
