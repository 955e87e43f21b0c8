"""Two bases are told apart by their config, by a weight file's size, header and values."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from megatron_peft.checkpoint.fingerprint import fingerprint, weight_files


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
