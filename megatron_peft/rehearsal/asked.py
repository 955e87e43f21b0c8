"""What a rehearsed rank is asked for: a run, a place in it, and the microbatches of its step."""

from dataclasses import dataclass, replace

from megatron_peft.config import RunConfig
from megatron_peft.models.shape import ModelShape

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
        num_waiting: microbatches that the run's step has beside these; the device holds their data too.
        calls_alone: record the calls of the whole run, from the model to a checkpoint, and nothing else.
    """

    config: RunConfig
    shape: ModelShape
    rank: int
    num_microbatches: int
    lengths: tuple[Lengths, ...]
    phases: tuple[str, ...] = ("start", "validation", "saving")
    num_waiting: int = 0
    calls_alone: bool = False

    @classmethod
    def of(cls, config: RunConfig, shape: ModelShape, rank: int, peaks: bool = True) -> "RankToRehearse":
        """A rank of a run, with as many microbatches as it needs for its peak; without `peaks` with the fewest."""
        asked = cls(config, shape, rank, config.num_microbatches, (Lengths.longest(config),))
        if not peaks:
            fewest = fewest_microbatches(config, config.num_microbatches)
            return replace(asked, num_microbatches=fewest, phases=())
        enough = enough_microbatches(config, asked.stage, config.num_microbatches)
        return replace(asked, num_microbatches=enough, num_waiting=config.num_microbatches - enough)

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


def fewest_microbatches(config: RunConfig, num_microbatches: int) -> int:
    """Of a step that has a first, a last and one between, where the run has them: all others are like that one."""
    pp = config.parallel.pipeline_model_parallel_size
    return min(num_microbatches, -(-3 // pp) * pp if config.parallel.is_interleaved else 3)
