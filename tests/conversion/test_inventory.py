"""Every tensor that does not fit is named, all kinds of faults in one message."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.conversion.inventory import check_inventory
from megatron_peft.conversion.source import Header, Source

EXPECTED = {"model.embed_tokens.weight": (11, 4), "model.norm.weight": (4,), "lm_head.weight": (11, 4)}


def check(
    changes: dict[str, Header | None], expected: dict[str, tuple[int, ...]] = EXPECTED, tied: bool = False
) -> None:
    """Check a folder that holds what is expected but for `changes`."""
    headers: dict[str, Header | None] = {name: header(*shape) for name, shape in expected.items()}
    found = {name: h for name, h in (headers | changes).items() if h is not None}
    check_inventory(Source(Path("folder"), found), expected, tied)


def header(*shape: int, dtype: str = "F32") -> Header:
    return Header(Path("folder/model.safetensors"), shape, dtype)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "float32", "bfloat16"])
def test_complete_folder_passes(dtype: str) -> None:
    check({"model.norm.weight": header(4, dtype=dtype)})


def test_all_faults_are_told_at_once() -> None:
    changes = {
        "lm_head.weight": None,
        "model.norm.weight": header(5),
        "model.layers.0.mlp.ghost.weight": header(2, 2),
        "model.embed_tokens.weight": header(11, 4, dtype="I8"),
    }
    with pytest.raises(ConfigurationError) as raised:
        check(changes)
    told = str(raised.value)
    assert "1 missing: lm_head.weight" in told
    assert "1 not part of this model: model.layers.0.mlp.ghost.weight" in told
    assert "1 of the wrong shape: model.norm.weight [5] instead of [4]" in told
    assert "1 of an unsupported number type: model.embed_tokens.weight I8" in told


def test_rotary_buffers_of_old_checkpoints_are_harmless() -> None:
    check({"model.layers.0.self_attn.rotary_emb.inv_freq": header(10)})


def test_output_layer_is_harmless_only_when_tied() -> None:
    expected = {name: shape for name, shape in EXPECTED.items() if name != "lm_head.weight"}
    check({"lm_head.weight": header(11, 4)}, expected, tied=True)
    with pytest.raises(ConfigurationError, match="not part of this model: lm_head.weight"):
        check({"lm_head.weight": header(11, 4)}, expected, tied=False)
