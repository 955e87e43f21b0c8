"""HF PEFT's BOFT with several factors, without its CUDA extension."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor


class PureBlockDiagonal:
    """In place of the extension: [factors, blocks, b, b] -> [factors, n, n]."""

    @staticmethod
    def apply(blocks: Tensor) -> Tensor:
        return torch.stack([torch.block_diag(*factor) for factor in blocks])


def use_pure_torch(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns HF PEFT's module of BOFT layers."""
    layer = pytest.importorskip("peft.tuners.boft.layer")
    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(layer, "FastBlockDiag", PureBlockDiagonal)
    return layer


def use_no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it cannot be built, without trying to."""
    layer = pytest.importorskip("peft.tuners.boft.layer")
    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: None)
