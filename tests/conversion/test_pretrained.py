"""--pretrained-checkpoint opens every form of a base model, at any layout, and each rank reads its own part."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from megatron_peft.checkpoint.manifest import write_manifest
from megatron_peft.config import ConfigurationError
from megatron_peft.conversion import to_megatron
from megatron_peft.conversion.loader import LoadReport, base_parameters, load_pretrained
from megatron_peft.conversion.pretrained import read_model_shape
from megatron_peft.conversion.to_megatron import hf_to_megatron
from megatron_peft.models.shape import ModelShape
from tests.conversion.megatron_folders import ODD, global_tensors, save_random, save_ranks
from tests.conversion.test_loader import num_bytes, stage
from tests.conversion.test_to_huggingface import save_run
from tests.one_rank import one_rank

TIED = dataclasses.replace(ODD, tied_embeddings=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """One model in each form."""
    work = tmp_path_factory.mktemp("forms")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_megatron, "MIN_SHARE_BYTES", 1)
        found = {}
        for name, shape in (("odd", ODD), ("tied", TIED)):
            original = save_random(work / name, shape)
            found |= {
                name: original,
                f"{name} distributed": hf_to_megatron(original, work / f"{name}-megatron", progress=False),
                f"{name} ranks": save_ranks(original, work / f"{name}-ranks", tp=2, pp=2),
                f"{name} run": save_run(original, work / f"{name}-run", global_tensors(original)),
            }
    return found


def load(chunk: torch.nn.Module, folder: Path, shape: ModelShape, rank: int, size: int) -> LoadReport:
    return load_pretrained([chunk], folder, shape, tensor_parallel_rank=rank, tensor_parallel_size=size, progress=False)


@pytest.mark.parametrize("form", ["distributed", "ranks", "run"])
@pytest.mark.parametrize("name", ["odd", "tied"])
@pytest.mark.parametrize(("size", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_every_form_fills_every_rank_alike(
    form: str, name: str, size: int, rank: int, folders: dict[str, Path]
) -> None:
    """Two stages; the last one of the tied model has an output layer of its own."""
    shape = ODD if name == "odd" else TIED
    for layers, end in (([0, 1], "first"), ([2, 3], "last")):
        expected, found = (stage(shape, size, layers, [end]) for _ in range(2))
        load(expected, folders[name], shape, rank, size)
        load(found, folders[f"{name} {form}"], shape, rank, size)
        for (key, parameter), (_, other) in zip(base_parameters(found), base_parameters(expected), strict=True):
            assert torch.equal(parameter, other), key


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_reads_its_own_shares_only(rank: int, folders: dict[str, Path]) -> None:
    chunk = stage(ODD, 2, range(4))
    for name in ("embedding.word_embeddings", "output_layer"):
        chunk.get_submodule(name).weight = torch.nn.Parameter(torch.full((64, 10), torch.nan))  # 128 padded rows
    report = load(chunk, folders["odd distributed"], ODD, rank, 2)
    assert report.bytes_read == num_bytes([chunk])


@pytest.mark.parametrize("form", ["distributed", "ranks"])
def test_shape_is_read_from_every_form(form: str, folders: dict[str, Path]) -> None:
    for name, shape in (("odd", ODD), ("tied", TIED)):
        assert read_model_shape(folders[name]) == shape
        assert read_model_shape(folders[f"{name} {form}"]) == shape


def test_shape_of_a_run_is_in_its_record(folders: dict[str, Path]) -> None:
    assert read_model_shape(folders["odd run"]) == ODD


def test_a_config_beside_old_ranks_is_believed(folders: dict[str, Path], tmp_path: Path) -> None:
    ranks = save_ranks(folders["odd"], tmp_path / "iter_0000010", tp=1, pp=1, vocab_size=None)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    with pytest.raises(ConfigurationError, match="vocabulary padded to 128 rows .*config.json"):
        read_model_shape(tmp_path)
    (ranks.parent / "config.json").write_bytes((folders["odd"] / "config.json").read_bytes())
    assert read_model_shape(tmp_path) == ODD


def test_a_folder_of_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="holds no config.json"):
        read_model_shape(tmp_path)


def test_a_run_of_adapters_is_no_base(folders: dict[str, Path], tmp_path: Path) -> None:
    key = "decoder.layers.0.mlp.linear_fc1.adapter.A"
    run = save_run(folders["odd"], tmp_path / "run", {key: torch.zeros(2)}, "lora")
    with pytest.raises(ConfigurationError, match=f"holds adapters \\({key}, ...\\) and no base model: .*merge"):
        load(stage(ODD, 1, range(4)), run, ODD, 0, 1)


def test_a_flipped_byte_of_a_run_that_is_a_base_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(folders["odd run"], tmp_path / "run"))
    checkpoint = base / "iter_0000002"
    write_manifest(checkpoint, {})
    with one_rank():
        load(stage(ODD, 1, [0, 1], ["first"]), base, ODD, 0, 1)
    numbers = bytearray((checkpoint / "__0_0.distcp").read_bytes())
    numbers[len(numbers) // 2] ^= 1
    (checkpoint / "__0_0.distcp").write_bytes(numbers)
    with one_rank(), pytest.raises(ConfigurationError, match="iter_0000002 is damaged: __0_0.distcp has other bytes"):
        load(stage(ODD, 1, [0, 1], ["first"]), base, ODD, 0, 1)
