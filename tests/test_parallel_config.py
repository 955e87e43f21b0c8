"""How a run is split: what contradicts itself is told with its flag and numbers."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_peft.config_error import ConfigurationError
from megatron_peft.parallel_config import ParallelConfig

CONTRADICTIONS = [
    ({"tensor_model_parallel_size": 3, "world_size": 4}, "4 processes cannot hold .* 3"),
    ({"tensor_model_parallel_size": 0}, "--tensor-model-parallel-size is 0"),
    ({"sequence_parallel": True}, "--sequence-parallel .* above 1"),
    ({"num_layers_per_virtual_pipeline_stage": 2}, "--num-layers-per-virtual-pipeline-stage"),
    ({"decoder_first_pipeline_num_layers": 2}, "--decoder-first-pipeline-num-layers"),
    (
        {
            "pipeline_model_parallel_size": 2,
            "world_size": 2,
            "num_layers_per_virtual_pipeline_stage": 1,
            "decoder_last_pipeline_num_layers": 2,
        },
        "stages of equal size",
    ),
]


@pytest.mark.parametrize(("values", "message"), CONTRADICTIONS)
def test_a_contradiction_is_one_problem(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        ParallelConfig(**values)
    assert len(caught.value.problems) == 1
