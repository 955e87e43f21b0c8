"""A rank's loading, start, training step and validation, run by the training code itself on tensors without numbers.

Each rank runs in a process of its own, on torch's fake process group (`runtime/fake_ranks.py`). What it computes,
sends and holds is in its `RankRecord`. It reads the model's shape, no weights and no data: every microbatch is as long
as --seq-length allows.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

from megatron_peft.config import RunConfig
from megatron_peft.models.shape import ModelShape
from megatron_peft.planning.record import RankRecord

SAMPLES_IN_A_PACK = 4  # assumed: what is in the data is not known


@dataclass(frozen=True)
class Lengths:
    """Sizes of a microbatch.

    Args:
        rows: samples, or 1 if they are packed.
        positions: of each row.
        packed: lengths of the samples in the one row; empty: not packed.
    """

    rows: int
    positions: int
    packed: tuple[int, ...] = ()

    @classmethod
    def longest(cls, config: RunConfig) -> "Lengths":
        """As long as the flags allow."""
        rows, positions = config.training.micro_batch_size, config.data.seq_length
        if not config.data.pack_sequences:
            return cls(rows, positions)
        num_samples = SAMPLES_IN_A_PACK * rows
        total = rows * positions
        return cls(
            1, total, tuple(total * (i + 1) // num_samples - total * i // num_samples for i in range(num_samples))
        )


@dataclass(frozen=True)
class RankToRehearse:
    """What a process needs to run one rank.

    Args:
        config: of the run; its world need not exist.
        shape: of the base model.
        rank: global.
        num_microbatches: of the recorded step.
        lengths: of each of its microbatches, or of all.
        phases: of memory (`record.PHASES`) that are rehearsed beside "loading" and "step".
    """

    config: RunConfig
    shape: ModelShape
    rank: int
    num_microbatches: int
    lengths: tuple[Lengths, ...]
    phases: tuple[str, ...] = ("start", "validation", "saving")

    @property
    def stage(self) -> int:
        """Pipeline rank: as megatron-core orders ranks, the slowest index."""
        return self.rank // (self.config.parallel.world_size // self.config.parallel.pipeline_model_parallel_size)


def enough_microbatches(config: RunConfig, stage: int, num_microbatches: int) -> int:
    """Of a step in which the stage holds as many microbatches at once as in one of `num_microbatches`."""
    pp = config.parallel.pipeline_model_parallel_size
    if not config.parallel.is_interleaved:
        # 1F1B holds pp - stage; and the first, the last and one between them are different from one another.
        return min(num_microbatches, max(pp - stage + 1, 3))
    return min(num_microbatches, 2 * pp)  # more than the schedule warms up with


def rehearse(ranks: Sequence[RankToRehearse], num_processes: int | None = None) -> list[RankRecord]:
    """The record of each rank.

    Args:
        num_processes: at a time; default: the cores of this machine, at most four.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["megatron_peft.planning.rehearsed_rank"])
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    number = min(num_processes or min(len(os.sched_getaffinity(0)), 4), len(ranks))
    with ProcessPoolExecutor(number, mp_context=context, max_tasks_per_child=1) as pool:
        return list(pool.map(_rehearse_here, ranks))


def _rehearse_here(rank: RankToRehearse) -> RankRecord:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nothing is computed
    from megatron_peft.planning.rehearsed_rank import rehearse_rank

    return rehearse_rank(rank)
