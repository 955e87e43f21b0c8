"""The one launcher of ranks: forks of a server that has torch, megatron-core and transformers imported already."""

from collections.abc import Callable
from typing import Any

from megatron_peft.runtime import ranks
from megatron_peft.runtime.ranks import Ranks as Ranks
from megatron_peft.runtime.ranks import RanksFailed as RanksFailed
from tests.time_limits import seconds

# Nothing of this project's: what a test patches or breaks is imported by the rank itself.
ranks.preload(
    [
        "pytest",  # which multiprocessing imports in every child, since it is the main program
        "hypothesis",
        "rich.progress",
        "tabulate",
        "torch",
        "torch.distributed.checkpoint",
        "megatron.core.datasets.gpt_dataset",
        "megatron.core.dist_checkpointing",
        "megatron.core.distributed",
        "megatron.core.models.gpt",
        "megatron.core.optimizer",
        "megatron.core.pipeline_parallel",
        "transformers.models.llama.modeling_llama",
        "transformers.models.bloom.modeling_bloom",
    ]
)


def run_ranks(num_ranks: int, function: Callable[[Any], Any], argument: Any = None, limit: float = 300) -> list[Any]:
    """What `function(argument)` returned, by rank; `limit` in seconds, see `tests.time_limits`."""
    return ranks.run_ranks(num_ranks, function, argument, timeout=seconds(limit))
