"""What is read for an adapter is float32 and outlives its file."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_peft.conversion.peft_names import whole_tensor
from megatron_peft.conversion.source import open_source


def test_whole_tensors_are_float32_and_outlive_their_file(tmp_path: Path) -> None:
    stored = {f"{dim}": torch.arange(24.0).reshape(*(1,) * (dim - 1), 24).bfloat16() for dim in (1, 2, 4)}
    save_file(stored, tmp_path / "adapter_model.safetensors")
    source = open_source(tmp_path, ["adapter_model.safetensors"])
    read = {name: whole_tensor(source, name) for name in stored}
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert all(torch.equal(read[name], stored[name].float()) for name in stored)
