"""The one launcher of ranks: forks of a server that has imported already what most of them need.

A rank does not see what a test has patched in its own process, imported or not.
"""

import pickle
import sys
from collections.abc import Callable
from typing import Any

from megatron_peft.runtime import ranks
from megatron_peft.runtime.ranks import Ranks as Ranks
from megatron_peft.runtime.ranks import RanksFailed as RanksFailed
from tests.time_limits import seconds

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
        "torch.profiler",
        *(f"megatron_peft.adapters.{method}" for method in ("boft", "hybrid", "urnn")),
        "megatron_peft.certify.runs",
        "megatron_peft.evaluation.model",
        "megatron_peft.models.bloom",
        "megatron_peft.models.llama",
        "megatron_peft.rehearsal.rehearsed_rank",
    ]
)


def run_ranks(
    num_ranks: int, function: Callable[[Any], Any], argument: Any = None, limit: float = 300, afresh: bool = False
) -> list[Any]:
    """What `function(argument)` returned, by rank; `limit` in seconds, see `tests.time_limits`.

    afresh: the ranks import this project anew, with the plug-ins that they find.
    """
    if afresh:
        function, argument = _afresh, pickle.dumps((function, argument))
    return ranks.run_ranks(num_ranks, function, argument, timeout=seconds(limit))


def _afresh(call: bytes) -> Any:
    for name in [*sys.modules]:
        if name.partition(".")[0] in ("megatron_peft", "tests"):
            del sys.modules[name]
    function, argument = pickle.loads(call)
    return function(argument)
