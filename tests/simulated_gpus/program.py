"""Started where GPUs can be seen: prints what a rehearsal and a rank of `run_ranks` find, which compute on the CPU."""

import json
from typing import Any

from megatron_peft.config import make_run
from megatron_peft.models.shape import ModelShape
from megatron_peft.rehearsal.rehearsal import rehearse
from megatron_peft.rehearsal.requests import RankToRehearse
from megatron_peft.runtime.ranks import run_ranks


def found_by_a_rank(_: None) -> list[Any]:
    import torch
    from megatron.core.extensions.transformer_engine import HAVE_TE

    from megatron_peft.runtime.launch import world

    with world():
        backend = torch.distributed.get_backend()
    is_simulated = hasattr(torch._C, "_cuda_getDeviceCount")
    return [is_simulated, torch.cuda.is_available(), HAVE_TE, backend]


def main() -> None:
    shape = ModelShape("llama", 2, 24, 40, 4, 2, 8, 37, 64)
    model = {"pretrained_checkpoint": "not read", "bf16": True}
    layout = {"tensor_model_parallel_size": 2, "world_size": 2}
    run = make_run(**model, **layout, mock_data=True, seq_length=16, train_iters=1)
    [record] = rehearse([RankToRehearse.of(run, shape, 1)])
    print(json.dumps([record.peak("step") > 0, *run_ranks(1, found_by_a_rank)]))


if __name__ == "__main__":
    main()
