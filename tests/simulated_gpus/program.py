"""Started where GPUs can be seen: prints what a rank of `run_ranks` finds, which computes on the CPU.

With the word `rehearse` a rehearsal comes first, in a fork of the same server.
"""

import json
import sys
from typing import Any

from megatron_peft.config import make_run
from megatron_peft.models.shape import ModelShape
from megatron_peft.runtime.ranks import preload, run_ranks


def found_by_a_rank(_: None) -> list[Any]:
    import torch
    from megatron.core.extensions.transformer_engine import HAVE_TE

    from megatron_peft.runtime.launch import world

    with world():
        backend = torch.distributed.get_backend()
    is_simulated = hasattr(torch._C, "_cuda_getDeviceCount")
    return [is_simulated, torch.cuda.is_available(), HAVE_TE, backend]


def peak_of_a_rehearsal() -> int:
    from megatron_peft.rehearsal.rehearsal import rehearse
    from megatron_peft.rehearsal.requests import RankToRehearse

    shape = ModelShape("llama", 2, 24, 40, 4, 2, 8, 37, 64)
    model = {"pretrained_checkpoint": "not read", "bf16": True}
    layout = {"tensor_model_parallel_size": 2, "world_size": 2}
    run = make_run(**model, **layout, mock_data=True, seq_length=16, train_iters=1)
    [record] = rehearse([RankToRehearse.of(run, shape, 1)])
    return record.peak("step")


if __name__ == "__main__":
    if sys.argv[1:]:
        assert peak_of_a_rehearsal() > 0
    else:  # what would ask for GPUs as the server imports it
        preload(["torch", "megatron.core.extensions.transformer_engine"])
    print(json.dumps(run_ranks(1, found_by_a_rank)))
