"""Adapters out of a --save folder as whole tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_peft.config import ConfigurationError
from megatron_peft.conversion.adapter_checkpoint import known_fingerprint, low_rank_factors, open_adapters
from megatron_peft.conversion.adapter_save import save_adapters
from tests.checkpoint.records import make_record

LAYER = "decoder.layers.0.mlp.linear_fc1"
A, B = torch.arange(6.0).view(2, 3), -torch.ones(5, 2)


def save(folder: Path, tensors: dict[str, torch.Tensor], **changes) -> Path:
    save_adapters(folder, make_record(**changes), tensors)
    return folder


def test_what_was_saved_is_read(tmp_path: Path) -> None:
    adapters = open_adapters(save(tmp_path / "run", {f"{LAYER}.adapter.A": A, f"{LAYER}.adapter.B": B}))
    factors = low_rank_factors(adapters, LAYER)
    assert torch.equal(factors.A, A) and torch.equal(factors.B, B)


def test_a_start_that_is_subtracted_is_part_of_the_change(tmp_path: Path) -> None:
    A0, B0 = torch.full((2, 3), 2.0), torch.full((5, 2), 3.0)
    tensors = {f"{LAYER}.adapter.low_rank.{name}": x for name, x in {"A": A, "B": B, "A0": A0, "B0": B0}.items()}
    adapters = open_adapters(save(tmp_path / "run", tensors))
    change = low_rank_factors(adapters, LAYER, "low_rank.")
    assert change.rank == 4
    assert torch.equal(change.B @ change.A, B @ A - B0 @ A0)


def test_copies_in_float32_are_preferred(tmp_path: Path) -> None:
    """Under --bf16 a run goes on from them, so they are what it has trained."""
    tensors = {f"{LAYER}.adapter.A": A.bfloat16(), f"optimizer.master.{LAYER}.adapter.A": A + 1e-6}
    adapters = open_adapters(save(tmp_path / "run", tensors))
    assert torch.equal(adapters.tensor(LAYER, "A"), A + 1e-6)


def test_layer_without_its_tensors_is_named(tmp_path: Path) -> None:
    other = "decoder.layers.1.mlp.linear_fc1"
    tensors = {f"{LAYER}.adapter.A": A, f"{LAYER}.adapter.B": B, f"{other}.adapter.A": A}
    run = save(tmp_path / "run", tensors, adapted_layers=(LAYER, other))
    with pytest.raises(ConfigurationError, match=rf"iter_0000000 is damaged: it lacks {other}.adapter.B, which belong"):
        open_adapters(run)


def test_checkpoint_without_any_adapter_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=rf"is damaged: it lacks {LAYER}.adapter.\*, which belong"):
        open_adapters(save(tmp_path / "run", {"rng.torch": A}))


def test_tensor_that_no_layer_has_is_named(tmp_path: Path) -> None:
    adapters = open_adapters(save(tmp_path / "run", {f"{LAYER}.adapter.A": A}))
    with pytest.raises(ConfigurationError, match=rf"lacks {LAYER}.adapter.B"):
        low_rank_factors(adapters, LAYER)


def test_torn_file_is_named(tmp_path: Path) -> None:
    run = save(tmp_path / "run", {f"{LAYER}.adapter.A": A, f"{LAYER}.adapter.B": B})
    (file,) = run.glob("iter_*/*.distcp")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(
        ConfigurationError, match=rf"{file.name} has \d+ bytes instead .* an older iter_\* folder as --in"
    ):
        open_adapters(run)


def test_folder_of_no_model_has_no_fingerprint(tmp_path: Path) -> None:
    assert known_fingerprint(tmp_path) is None
    (tmp_path / "config.json").write_text("{}")
    assert known_fingerprint(tmp_path / ".") is not None
