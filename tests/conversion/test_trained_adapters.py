"""Adapters out of a --save folder as whole tensors, and into one; factors of a fused layer make the change of its
modules."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_peft.checkpoint.folders import newest_checkpoint
from megatron_peft.checkpoint.record import read_record
from megatron_peft.checkpoint.sharded_files import stored_shapes
from megatron_peft.config import ConfigurationError
from megatron_peft.conversion import adapter_save
from megatron_peft.conversion.adapter_checkpoint import low_rank_factors, open_adapters
from megatron_peft.conversion.adapter_factors import Factors, fuse, layer_of, modules_of, split
from megatron_peft.conversion.adapter_save import save_adapters
from megatron_peft.conversion.families import rules_for
from tests.checkpoint.records import SHAPE, make_record
from tests.one_rank import one_rank

LAYER, OTHER = "decoder.layers.0.mlp.linear_fc1", "decoder.layers.1.mlp.linear_fc1"
A, B = torch.arange(6.0).view(2, 3), -torch.ones(5, 2)
BOTH = {f"{LAYER}.adapter.A": A, f"{LAYER}.adapter.B": B}


def save(folder: Path, tensors: dict[str, torch.Tensor], **changes) -> Path:
    save_adapters(folder, make_record(**changes), tensors)
    return folder


def test_what_was_saved_is_read_by_us_and_by_megatron_core(tmp_path):
    factors = low_rank_factors(open_adapters(save(tmp_path / "run", BOTH)), LAYER)
    assert torch.equal(factors.A, A) and torch.equal(factors.B, B)
    checkpoint = newest_checkpoint(tmp_path / "run")
    assert checkpoint == tmp_path / "run" / "iter_0000000"
    assert read_record(checkpoint) == make_record()
    assert stored_shapes(checkpoint) == {name: tuple(x.shape) for name, x in BOTH.items()}
    wanted: Any = {name: ShardedTensor.from_rank_offsets(name, torch.zeros_like(x)) for name, x in BOTH.items()}
    with one_rank():
        loaded = dist_checkpointing.load(wanted, str(checkpoint), validate_access_integrity=False)
    assert all(torch.equal(loaded[name], x) for name, x in BOTH.items())


def test_copies_in_float32_are_preferred(tmp_path):
    """Under --bf16 a run goes on from them, so they are what it has trained."""
    tensors = {f"{LAYER}.adapter.A": A.bfloat16(), f"optimizer.master.{LAYER}.adapter.A": A + 1e-6}
    adapters = open_adapters(save(tmp_path / "run", tensors))
    assert torch.equal(adapters.tensor(LAYER, "A"), A + 1e-6)
    with pytest.raises(ConfigurationError, match=rf"lacks {LAYER}.adapter.B"):
        low_rank_factors(adapters, LAYER)


@pytest.mark.parametrize(
    ("tensors", "layers", "told"),
    [
        (BOTH | {f"{OTHER}.adapter.A": A}, (LAYER, OTHER), rf"it lacks {OTHER}.adapter.B, which belong"),
        ({"rng.torch": A}, (LAYER,), rf"it lacks {LAYER}.adapter.\*, which belong"),
    ],
)
def test_layer_without_its_tensors_is_named(tensors, layers, told, tmp_path):
    run = save(tmp_path / "run", tensors, adapted_layers=layers)
    with pytest.raises(ConfigurationError, match=f"iter_0000000 is damaged: {told}"):
        open_adapters(run)


def test_torn_file_is_named(tmp_path):
    (file,) = save(tmp_path / "run", BOTH).glob("iter_*/*.distcp")
    file.write_bytes(file.read_bytes()[:-100])
    told = rf"{file.name} has \d+ bytes instead .* an older iter_\* folder as --in"
    with pytest.raises(ConfigurationError, match=told):
        open_adapters(tmp_path / "run")


def test_nothing_is_left_of_a_folder_that_could_not_be_written(tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(adapter_save, "publish", mock.Mock(side_effect=full))
    with pytest.raises(ConfigurationError, match=r"--output .*run could not be written \(No space left on device\)"):
        save(tmp_path / "run", BOTH)
    assert not list(tmp_path.iterdir())


RULES = {name: rule for name, rule in rules_for(SHAPE).items() if ".layers.1." in name and name.endswith("weight")}
LINEAR = [rule for name, rule in RULES.items() if ".linear_" in name]


def draw(out: int, columns: int, rank: int, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(rank, columns, generator=generator), torch.randn(out, rank, generator=generator))


def change(factors: Factors) -> torch.Tensor:
    return factors.B.double() @ factors.A.double()


@pytest.mark.parametrize("rule", LINEAR, ids=layer_of)
def test_split_makes_the_change_that_the_weights_rule_takes_apart_and_fuse_undoes_it(rule):
    fused = draw(*rule.local_shape(1), rank=3, seed=0)
    expected, modules = rule.write([change(fused)]), split(rule, fused)
    found = {f"{module}.weight": change(factors) for module, factors in modules.items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    again = fuse(rule, modules)
    assert torch.equal(again.A, fused.A) and torch.equal(again.B, fused.B)


@pytest.mark.parametrize("rule", LINEAR, ids=layer_of)
@pytest.mark.parametrize("left_out", [0, 1])
def test_modules_with_an_A_of_their_own_keep_their_change(rule, left_out):
    modules = list(modules_of(rule).items())
    found = {module: draw(*shape, rank=2, seed=seed) for seed, (module, shape) in enumerate(modules)}
    kept = {module: found[module] for module in list(found)[: max(1, len(found) - left_out)]}
    fused = fuse(rule, kept)
    assert fused.rank == 2 * len(kept)
    for module, factors in split(rule, fused).items():
        expected = change(kept[module]) if module in kept else torch.zeros_like(change(factors))
        torch.testing.assert_close(change(factors), expected, rtol=1e-12, atol=1e-12)
