"""Two bases are told apart by their config, by a weight file's size, header and values."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from megatron_peft.checkpoint.fingerprint import fingerprint, weight_files
from megatron_peft.checkpoint.manifest import write_manifest
from tests.conversion.megatron_folders import save_distributed

RANK_FILE = "mp_rank_{:02d}/model_optim_rng.pt"


def save_base(folder, weights, config="{}"):
    folder.mkdir()
    (folder / "config.json").write_text(config)
    save_file(weights, folder / "model.safetensors")
    return str(folder)


def weights(scale=1.0, name="w"):
    return {name: torch.arange(400_000, dtype=torch.float32) * scale}


def test_copies_are_the_same_and_other_bases_are_not(tmp_path):
    base = fingerprint(save_base(tmp_path / "base", weights()))
    assert fingerprint(save_base(tmp_path / "copy", weights())) == base
    others = {
        "config": save_base(tmp_path / "config", weights(), config='{"rope_theta": 1}'),
        "values": save_base(tmp_path / "values", weights(scale=1.5)),
        "names": save_base(tmp_path / "names", weights(name="v")),
    }
    for name, folder in others.items():
        assert fingerprint(folder) != base, name


def test_a_change_in_the_middle_of_a_long_stretch_is_seen(tmp_path):
    """Values of one shape that differ everywhere but at the start and the end, as two fine-tunes do."""
    base, tuned = weights(), weights()
    tuned["w"][100_000:300_000] += 1
    assert fingerprint(save_base(tmp_path / "a", base)) != fingerprint(save_base(tmp_path / "b", tuned))


def test_safetensors_go_before_bin(tmp_path):
    save_base(tmp_path / "base", weights())
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"x")
    assert [path.name for path in weight_files(tmp_path / "base")] == ["model.safetensors"]


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(OSError, match="neither config.json nor weights"):
        fingerprint(str(tmp_path))


def test_a_run_that_is_a_base_is_told_from_another_and_from_a_later_itself(tmp_path):
    """Of full fine-tuning: the weights lie below the iteration that the tracker names."""

    def run(name, values, iteration=2):
        folder = tmp_path / name / f"iter_{iteration:07d}"
        save_distributed(folder, {"w": values})
        (folder / "run_record.json").write_text("{}")
        write_manifest(folder, {})
        (tmp_path / name / "latest_checkpointed_iteration.txt").write_text(f"{iteration}\n")
        fingerprint.cache_clear()
        return fingerprint(str(tmp_path / name))

    first = run("first", torch.zeros(300_000))
    assert set(first) == {"iter_0000002/__0_0.distcp", "iter_0000002/manifest.json"}
    other = torch.zeros(300_000)
    other[123_457] = 1.0  # between the stretches that are read: the manifest has its checksum
    assert run("second", other) != first
    assert run("first", torch.zeros(300_000), iteration=3) != first


def test_old_files_of_ranks_are_told_apart(tmp_path):
    def ranks(name, value):
        for rank in range(2):
            (tmp_path / name / f"mp_rank_{rank:02d}").mkdir(parents=True)
            torch.save({"model": {"w": torch.full((4,), value * rank)}}, tmp_path / name / RANK_FILE.format(rank))
        (tmp_path / name / "config.json").write_text("{}")
        return fingerprint(str(tmp_path / name))

    first = ranks("first", 1.0)
    assert set(first) == {"config.json", RANK_FILE.format(0), RANK_FILE.format(1)}
    other = ranks("other", 2.0)
    assert [name for name in first if first[name] != other[name]] == [RANK_FILE.format(1)]
