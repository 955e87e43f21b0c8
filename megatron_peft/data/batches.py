"""Steps of microbatches for one data-parallel rank, out of global batches that do not depend on the layout."""

import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count

from megatron_peft.data.order import SampleOrder
from megatron_peft.data.packing import PackedOrder
from megatron_peft.data.sample import SampleSource
from megatron_peft.data.samples import Microbatch, pack, pad

Step = list[Microbatch]


@dataclass(frozen=True)
class BatchLayout:
    """How a global batch falls on data-parallel ranks, in units of positions (samples, or packs).

    pad_multiple: the sequence is rounded up to a multiple of it; pad_id: the token of padding.
    """

    global_batch_size: int
    micro_batch_size: int
    data_parallel_rank: int = 0
    data_parallel_size: int = 1
    pad_multiple: int = 1
    pad_id: int = 0

    def microbatches(self, first: int) -> list[range]:
        """Positions of each microbatch of this rank in the global batch that begins at `first`: consecutive chunks of
        micro_batch_size x data_parallel_size, each cut into one piece a rank, as Megatron does it."""
        chunk = self.micro_batch_size * self.data_parallel_size
        mine = first + self.data_parallel_rank * self.micro_batch_size
        starts = range(mine, mine + self.global_batch_size, chunk)
        return [range(start, start + self.micro_batch_size) for start in starts]


class GlobalBatches:
    """An endless (training) or single (evaluation) pass over a dataset, a step at a time.

    Iterating a training source goes on from `consumed_samples`, which is all of its state, and moves it on as steps
    are handed out. With `end`, a source for evaluation: each iteration begins anew at 0 and stops after that many
    positions; what lacks in the last step is filled with padding, so that every rank has as many microbatches.

    `prefetch` steps are built ahead on as many threads. A step is a function of its first position alone, so they
    change nothing but the time.
    """

    def __init__(
        self,
        dataset: SampleSource,
        order: SampleOrder,
        layout: BatchLayout,
        consumed_samples: int = 0,
        end: int | None = None,
        prefetch: int = 0,
    ) -> None:
        self.dataset = dataset
        self.order = order
        self.layout = layout
        self.consumed_samples = consumed_samples
        self.end = end
        self.prefetch = prefetch
        self._collate = pack if isinstance(order, PackedOrder) else pad

    @property
    def samples_per_epoch(self) -> int:
        """Positions (samples, or packs of the first epoch) in one pass."""
        return self.order.epoch_length(0)

    @property
    def num_steps(self) -> int | None:
        """Steps of an evaluation; None for training, which has no end."""
        return None if self.end is None else math.ceil(self.end / self.layout.global_batch_size)

    def iterations_for_epochs(self, epochs: float) -> int:
        """Training iterations that cover `epochs` epochs."""
        return math.ceil(self.order.positions_in(epochs) / self.layout.global_batch_size)

    def epochs_at(self, consumed_samples: int) -> float:
        """Epochs (a fraction) done after so many samples."""
        return self.order.epochs_at(consumed_samples)

    def step_at(self, first: int) -> Step:
        """This rank's microbatches of the global batch that begins at position `first`."""
        layout = self.layout
        return [
            self._collate([self._samples(p) for p in positions], layout.pad_multiple, layout.pad_id)
            for positions in layout.microbatches(first)
        ]

    def __iter__(self) -> Iterator[Step]:
        size = self.layout.global_batch_size
        if self.end is not None:
            yield from self._build(iter(range(0, self.end, size)))
            return
        for step in self._build(count(self.consumed_samples, size)):
            self.consumed_samples += size
            yield step

    def _samples(self, position: int) -> list:
        if self.end is not None and position >= self.end:
            return []
        return [self.dataset[int(i)] for i in self.order.samples_at(position)]

    def _build(self, firsts: Iterator[int]) -> Iterator[Step]:
        if not self.prefetch:
            yield from map(self.step_at, firsts)
            return
        pool = ThreadPoolExecutor(self.prefetch, thread_name_prefix="prefetch")
        waiting: deque[Future[Step]] = deque()
        try:
            while True:
                while len(waiting) < self.prefetch and (first := next(firsts, None)) is not None:
                    waiting.append(pool.submit(self.step_at, first))
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
