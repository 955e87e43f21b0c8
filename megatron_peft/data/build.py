"""From the run's configuration to its sources of training, validation and test steps."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core.datasets.utils import Split

from megatron_peft.config import JSON_SUFFIXES, RunConfig, require
from megatron_peft.data.batches import BatchLayout, GlobalBatches, PackedOrder, SampleOrder, SampleSource
from megatron_peft.data.indexed import build_indexed, build_mock
from megatron_peft.data.instruction import Fit, InstructionDataset
from megatron_peft.data.jsonl import JsonRecords
from megatron_peft.data.tokenizers import Tokenizer
from megatron_peft.runtime.launch import gather_over_world

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """The sources of a run. `valid` and `test` are None where there is no such data, or it is not evaluated."""

    train: GlobalBatches
    valid: GlobalBatches | None
    test: GlobalBatches | None
    train_iters: int  # from --train-iters, --train-samples or --train-epochs

    @property
    def digest(self) -> str:
        """Digest of the files of the training data."""
        return self.train.dataset.digest  # pyright: ignore[reportAttributeAccessIssue] - both kinds have it


def build_data(
    config: RunConfig,
    tokenizer: Tokenizer,
    *,
    data_parallel_rank: int,
    data_parallel_size: int,
    consumed_samples: int = 0,
    num_ids: int | None = None,
) -> Data:
    """Open, check and index all data. A collective over all ranks.

    num_ids: rows of the model's embedding, above all token ids (default: as many as the tokenizer needs).
    Raises ConfigurationError, on every rank, for whatever is wrong with it.
    """
    num_ids = num_ids or tokenizer.largest_id + 1
    layout = BatchLayout(
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.training.micro_batch_size,
        data_parallel_rank=data_parallel_rank,
        data_parallel_size=data_parallel_size,
        pad_multiple=config.parallel.tensor_model_parallel_size if config.parallel.sequence_parallel else 1,
        pad_id=min(tokenizer.eos_id, num_ids - 1),  # with --mock-data the tokenizer may be another model's
    )
    train = _train(config, tokenizer, layout, consumed_samples, num_ids)
    epochs = config.training.train_epochs
    iterations = (_requested_iterations(config) or 0) if epochs is None else train.iterations_for_epochs(epochs)
    evaluates = config.training.eval_interval is not None and config.training.eval_iters != 0
    valid = _evaluation(config, Split.valid, tokenizer, layout, num_ids) if evaluates else None
    test = _evaluation(config, Split.test, tokenizer, layout, num_ids) if config.training.eval_iters != 0 else None
    return Data(train, valid, test, iterations)


def _requested_iterations(config: RunConfig) -> int | None:
    """From --train-iters, or --train-samples rounded down to whole batches as in Megatron; None with --train-epochs."""
    training = config.training
    if training.train_samples is None:
        return training.train_iters
    require(
        training.train_samples >= config.global_batch_size,
        f"--train-samples {training.train_samples} is less than one --global-batch-size {config.global_batch_size}.",
    )
    return training.train_samples // config.global_batch_size


def _train(
    config: RunConfig, tokenizer: Tokenizer, layout: BatchLayout, consumed_samples: int, num_ids: int
) -> GlobalBatches:
    iterations = _requested_iterations(config)
    num_samples = None if iterations is None else iterations * config.global_batch_size
    dataset = _dataset(config, Split.train, num_samples, tokenizer, num_ids)
    require(dataset is not None, "no training data: give --train-data-path or --data-path.")
    assert dataset is not None
    # megatron-core has already shuffled an indexed dataset of that many samples.
    shuffled = not isinstance(dataset, InstructionDataset) and len(dataset) >= (num_samples or len(dataset) + 1)
    order = _sample_order(config, dataset, shuffle=not shuffled)
    return GlobalBatches(dataset, order, layout, consumed_samples, prefetch=config.data.num_workers)


def _evaluation(
    config: RunConfig, split: Split, tokenizer: Tokenizer, layout: BatchLayout, num_ids: int
) -> GlobalBatches | None:
    """One pass in the order of the file, ended by --eval-iters: the same samples at each evaluation."""
    eval_iters = config.training.eval_iters
    requested = None if eval_iters is None else eval_iters * config.global_batch_size
    dataset = _dataset(config, split, requested, tokenizer, num_ids)
    if dataset is None:
        return None
    order = _sample_order(config, dataset, shuffle=False)
    whole = order.epoch_length(0)
    end = whole if requested is None else min(requested, whole)
    return GlobalBatches(dataset, order, layout, end=end, prefetch=config.data.num_workers)


def _sample_order(config: RunConfig, dataset: SampleSource, shuffle: bool) -> SampleOrder:
    data = config.data
    if data.pack_sequences and isinstance(dataset, InstructionDataset):
        return PackedOrder(dataset.lengths, data.seq_length, data.seed, shuffle)
    return SampleOrder(len(dataset), data.seed, shuffle)


def _dataset(
    config: RunConfig, split: Split, num_samples: int | None, tokenizer: Tokenizer, num_ids: int
) -> SampleSource | None:
    if config.data.mock_data:
        return build_mock(config.data, split, num_samples, num_ids)
    paths = _paths(config, split)
    if not paths:
        return None
    if not paths[0].endswith(JSON_SUFFIXES):
        indexed = build_indexed(config.data, split, paths, num_samples, tokenizer, num_ids)
        _require_one_digest(split, paths, indexed.digest if indexed else "")
        return indexed
    records = JsonRecords(paths, f"--{split.name}-data-path")
    _require_one_digest(split, paths, records.digest)
    dataset = InstructionDataset(records, Fit(tokenizer, config.data.seq_length, config.data.overlong))
    if not dist.is_initialized() or dist.get_rank() == 0:
        for sentence in dataset.warnings:
            logger.warning("--%s-data-path: %s", split.name, sentence)
    return dataset


def _require_one_digest(split: Split, paths: Sequence[str], digest: str) -> None:
    """Raises ConfigurationError, on every rank, if a rank has read other files: nodes may have copies of their own."""
    by_rank = gather_over_world(digest)
    others = [rank for rank, other in enumerate(by_rank) if other != by_rank[0]]
    require(
        not others,
        f"the {split.name} data {' '.join(paths)} of rank {others[0] if others else 0} has other contents than that of "
        "rank 0: copy the files again to where that rank reads them.",
    )


def _paths(config: RunConfig, split: Split) -> Sequence[str]:
    own = {
        Split.train: config.data.train_data_path,
        Split.valid: config.data.valid_data_path,
        Split.test: config.data.test_data_path,
    }
    return config.data.data_path or own[split]
