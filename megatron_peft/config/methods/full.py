"""Full fine-tuning: every parameter of the base model is trained."""

from typing import Any

from megatron_peft.config.methods.base import Method


class Full(Method):
    name = "full"
    summary = "every parameter of the model; megatron-core's own layers"
    cost = "out in"
    ignored = ("target_modules",)

    def num_parameters(self, peft: Any, out_features: int, in_features: int) -> int:
        return out_features * in_features


FULL = Full()
