"""The optimizer and its schedule: what contradicts itself is told with its flag."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_peft.config_error import ConfigurationError
from megatron_peft.optimizer_config import OptimizerSettings

CONTRADICTIONS = [
    ({"lr": 1e-4, "min_lr": 1e-3}, "--min-lr 0.001 is above --lr 0.0001"),
    ({"lr_warmup_init": 1.0}, "--lr-warmup-init 1.0 is above"),
    ({"lr_warmup_fraction": 0.1, "lr_warmup_iters": 1}, "--lr-warmup-fraction excludes"),
    ({"lr_warmup_fraction": 1.0}, "--lr-warmup-fraction is 1.0"),
    ({"lr_decay_style": "WSD"}, "--lr-wsd-decay-iters"),
    ({"lr_wsd_decay_iters": 3}, "--lr-wsd-decay-iters belong to --lr-decay-style WSD"),
    ({"end_weight_decay": 0.1}, "--weight-decay-incr-style"),
    ({"weight_decay_incr_style": "linear", "end_weight_decay": 0.1}, "given: None and 0.1"),
    ({"overlap_param_gather": True}, "--overlap-param-gather needs --use-distributed-optimizer"),
    ({"optimizer": "sgd", "use_distributed_optimizer": True}, "shards Adam only"),
    ({"override_opt_param_scheduler": True, "use_checkpoint_opt_param_scheduler": True}, "exclude one another"),
]


@pytest.mark.parametrize(("values", "message"), CONTRADICTIONS)
def test_a_contradiction_is_one_problem(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        OptimizerSettings(**values)
    assert len(caught.value.problems) == 1


def test_all_contradictions_of_a_group_are_told_at_once() -> None:
    with pytest.raises(ConfigurationError) as caught:
        OptimizerSettings(lr=-1.0, min_lr=-2.0, lr_warmup_init=-3.0, clip_grad=-1)
    flags = {problem.split(" ")[0] for problem in caught.value.problems}
    assert flags == {"--lr", "--min-lr", "--lr-warmup-init", "--clip-grad"}
    assert str(caught.value).count("\n") == len(caught.value.problems) - 1
