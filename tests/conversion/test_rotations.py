"""The blocks of a trained rotation are those that training applied, in every form that it has."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from megatron_peft.adapters.boft import Boft, ProjectedBoft
from megatron_peft.adapters.urnn import RiemannianUrnn, StructuredUrnn
from megatron_peft.config import PeftConfig
from megatron_peft.conversion.rotations import rotation_blocks
from megatron_peft.parallel.layout import LinearLayout
from megatron_peft.runtime import cpu
from tests.one_rank import places

PEFT = PeftConfig("boft", boft_block_size=4, boft_factors=2, urnn_block_size=8)


def in_a_checkpoint(adapter: nn.Module, part: str) -> Any:
    """An open checkpoint of one layer."""
    tensors = {f"{part}{name}": tensor for name, tensor in adapter.state_dict().items()}
    return SimpleNamespace(
        record=SimpleNamespace(config=SimpleNamespace(peft=PEFT)),
        has=lambda layer, name: name in tensors,
        tensor=lambda layer, name: tensors[name],
    )


@pytest.mark.parametrize("part", ["", "rotation."])
@pytest.mark.parametrize("kind", [Boft, ProjectedBoft, StructuredUrnn, RiemannianUrnn])
def test_blocks_are_those_of_training(kind: Callable[..., Any], part: str) -> None:
    cpu.install()
    layout = LinearLayout("column", 24, 16, places(1)[0])  # pyright: ignore[reportArgumentType]
    adapter = kind(layout, PEFT, "layer.adapter", 0, torch.float32)
    (parameter,) = adapter.parameters()
    with torch.no_grad():
        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    expected = adapter.changes() + torch.eye(8)
    blocks = rotation_blocks(in_a_checkpoint(adapter, part), "layer", part)
    assert blocks.dtype == torch.float64
    torch.testing.assert_close(blocks, expected.double(), atol=1e-5, rtol=1e-5)
    assert (blocks - torch.eye(8)).abs().max() > 0.1
