"""Keys of a checkpoint."""

from __future__ import annotations

from megatron_peft.checkpoint.keys import NOT_PARAMETERS, master_key


def test_the_float32_copy_is_no_parameter() -> None:
    assert master_key("decoder.layers.0.mlp.linear_fc1.adapter.A").startswith(NOT_PARAMETERS)
