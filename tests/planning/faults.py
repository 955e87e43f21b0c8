"""Six faults of the kind that other programs shipped, each put into the product on the ranks of a layout."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import torch.distributed as dist


def sum_left_out() -> None:
    """Partial gradients of replicated factors stay partial."""
    from megatron_peft.training import step

    step.sum_partial_gradients_over_tensor_parallel = lambda model, group: None


def sum_doubled() -> None:
    """They are summed twice."""
    from megatron_peft.training import step

    once = step.sum_partial_gradients_over_tensor_parallel

    def twice(model: Any, group: Any) -> None:
        once(model, group)
        once(model, group)

    step.sum_partial_gradients_over_tensor_parallel = twice


def gate_and_up_mixed() -> None:
    """A rank's rows of fc1's B count as one piece of [gate; up]."""
    from megatron_peft.adapters import linear

    linear.apply_swiglu_sharded_factory = lambda tensor, offsets: tensor


def wrong_seed() -> None:
    """Each rank draws factors of its own."""
    from megatron_peft.adapters import low_rank

    of_name = low_rank.generator_for
    low_rank.generator_for = lambda seed, name: of_name(seed + dist.get_rank(), name)


def tied_head_forgotten() -> None:
    """The first and the last stage keep their own gradients of the one matrix that is embedding and output layer."""
    module: Any = import_module("megatron.core.distributed.finalize_model_grads")  # the name is its function's, too
    module._allreduce_word_embedding_grads = lambda *args, **kwargs: None


def one_ranks_data() -> None:
    """Every replica reads the first one's samples."""
    from megatron_peft.data import build

    whole = build.BatchLayout
    build.BatchLayout = lambda **sizes: replace(whole(**sizes), data_parallel_rank=0)
