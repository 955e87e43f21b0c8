"""--sync-server: every so many steps a run gives its adapters, as they are, to a server that goes on answering."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_peft.checkpoint.state import TrainingState
from megatron_peft.config import CheckpointConfig, ConfigurationError, RunConfig
from megatron_peft.config.evaluation import SyncSettings
from megatron_peft.conversion.lora_approximation import NoEqualLora
from megatron_peft.conversion.trained_adapters import TrainedAdapters, gathered_adapters
from megatron_peft.data.batches import GlobalBatches
from megatron_peft.data.build import Data
from megatron_peft.data.samples import PackedOrder, SampleOrder, sample_from_ids
from megatron_peft.models.shape import ModelShape
from megatron_peft.parallel.collectives import awaited_from_first_rank
from megatron_peft.serving.sync import Asked, asked_tokens, started_sync
from megatron_peft.training.step import validation_loss

SECONDS = 60.0  # for one answer, since a run that is asked to stop waits for it


class LiveSync:
    """The server of a run, and what is compared of each version. Its methods are collectives."""

    def __init__(self, config: RunConfig, shape: ModelShape, data: Data) -> None:
        """data: whose batches' layout what is compared has too.

        ConfigurationError, on every rank, as of `started_sync`.
        """
        checkpoint, seq_length = config.checkpoint, config.data.seq_length
        run = Path(checkpoint.save or checkpoint.sync_folder or "").resolve()
        self._settings = _settings(checkpoint)
        base = config.model.pretrained_checkpoint
        self._sync = started_sync(self._settings, config.peft, shape, base, run, flags="--sync-", seconds=SECONDS)
        self._interval, self._problem = checkpoint.sync_interval, ""
        self._asked = asked_tokens(shape.vocab_size, seq_length)
        self._batches = _batches(self._asked, data.train, config)

    def after_step(self, state: TrainingState, is_last: bool) -> str:
        """What was given after this step, for a terminal; empty if none was due.

        A version that is refused is a warning, and the run goes on.
        """
        iteration = state.position.iteration
        if not self._interval or (iteration % self._interval and not is_last):
            return ""
        own = None
        if "numbers" not in self._settings.skip:  # log p of one token of each sample, by the forward of a validation
            own = -validation_loss(state.model_chunks, self._batches)
        adapters = gathered_adapters(state)
        try:
            given, ends = awaited_from_first_rank(lambda: self._given(adapters, own))
        except ConfigurationError as error:
            problem, before = str(error), self._problem
            self._problem = problem
            why = "for the same reason" if problem == before else problem.removesuffix(".")
            return f"WARNING: iteration {iteration} was not given to the server: {why}. Training continues."
        self._problem = ""
        if ends:
            self._interval = 0
        return given

    def _given(self, adapters: TrainedAdapters | None, own: float | None) -> tuple[str, bool]:
        """What the first rank has given, and whether nothing more can be."""
        assert adapters is not None
        try:
            return self._sync.give(adapters, own, self._asked), False
        except NoEqualLora as error:
            return f"WARNING: nothing is given to the server any more: {error}", True


def _settings(settings: CheckpointConfig) -> SyncSettings:
    return SyncSettings(
        str(settings.sync_server),
        name=settings.sync_name,
        folder=settings.sync_folder,
        skip=settings.sync_skip,
        tolerance=settings.sync_tolerance,
        engine_python=Path(settings.sync_engine_python),
    )


def _batches(prompts: Asked, train: GlobalBatches, config: RunConfig) -> GlobalBatches:
    """What is asked as a validation of one token a sample, in the training's layout and as few microbatches as it has.

    A whole global batch would be nearly all padding.
    """
    parallel, seq_length = config.parallel, config.data.seq_length
    microbatches = parallel.pipeline_model_parallel_size if parallel.is_interleaved else 1
    size = microbatches * train.layout.micro_batch_size * train.layout.data_parallel_size
    samples = [sample_from_ids([*ids, last], [False] * len(ids) + [True], seq_length) for ids, last in prompts]
    order = SampleOrder(len(samples), seed=0, shuffle=False)
    if isinstance(train.order, PackedOrder):
        order = PackedOrder(order, np.array([*map(len, samples)]), seq_length, train.order.packing)
    layout, end = replace(train.layout, global_batch_size=size), order.epoch_length(0)
    return replace(train, dataset=samples, order=order, layout=layout, consumed_samples=0, end=end, prefetch=0)
