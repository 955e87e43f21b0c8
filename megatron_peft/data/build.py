"""The sources of a run's training, validation and test steps, made from its configuration."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from megatron.core.datasets.utils import Split

from megatron_peft.config import Blend, RunConfig, is_indexed, kind_of_source, parse_blend, require
from megatron_peft.data.batches import BatchLayout, GlobalBatches
from megatron_peft.data.files import RecordFiles
from megatron_peft.data.indexed import build_indexed, build_mock
from megatron_peft.data.instruction import InstructionDataset
from megatron_peft.data.records import Fit
from megatron_peft.data.samples import BlendedOrder, PackedOrder, SampleOrder, SampleSource
from megatron_peft.data.tokenizers import Tokenizer
from megatron_peft.runtime.launch import checked_together, gather_over_world, place_on_node

logger = logging.getLogger(__name__)

MOCK_EVAL_ITERS = 10  # megatron-core's generated documents are some 70 million tokens, which mean nothing


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
        pad_to=config.data.seq_length if config.data.pad_to_seq_length else 0,
        pad_id=min(tokenizer.eos_id, num_ids - 1),  # with --mock-data the tokenizer may be another model's
    )
    splits, training = _Splits(config, tokenizer, num_ids, layout), config.training
    iterations = training.train_iters
    if training.train_samples is not None:
        iterations = training.train_samples // config.global_batch_size  # as in Megatron, a last part is left out
        require(
            iterations > 0,
            f"--train-samples {training.train_samples} is less than one --global-batch-size "
            f"{config.global_batch_size}.",
        )
    train = splits.train(None if iterations is None else iterations * config.global_batch_size, consumed_samples)
    if training.train_epochs is not None:
        iterations = math.ceil(train.order.positions_in(training.train_epochs) / config.global_batch_size)
    valid = splits.evaluated(Split.valid) if training.eval_interval is not None else None
    return Data(train, valid, splits.evaluated(Split.test), iterations or 0)


@dataclass(frozen=True)
class _Splits:
    """The data of each split, by their paths in the configuration."""

    config: RunConfig
    tokenizer: Tokenizer
    num_ids: int
    layout: BatchLayout

    def train(self, num_samples: int | None, consumed_samples: int) -> GlobalBatches:
        """num_samples: which the run takes; None with --train-epochs."""
        paths, flag = self._paths(Split.train)
        blend = parse_blend(paths, flag)
        require(
            blend.weights is None or num_samples is not None,
            f"{flag} has weights, and --train-epochs is undefined for a weighted blend: give --train-iters or "
            "--train-samples.",
        )
        dataset = self._dataset(Split.train, num_samples)
        assert dataset is not None
        # megatron-core has already shuffled an indexed dataset of that many samples.
        shuffle = isinstance(dataset, InstructionDataset) or len(dataset) < (num_samples or len(dataset) + 1)
        order = self._sample_order(dataset, blend, shuffle)
        return GlobalBatches(dataset, order, self.layout, consumed_samples, prefetch=self.config.data.num_workers)

    def evaluated(self, split: Split) -> GlobalBatches | None:
        """One pass in the order of the file, ended by --eval-iters: the same samples at each evaluation."""
        eval_iters = self.config.training.eval_iters
        if eval_iters is None and self.config.data.mock_data:
            eval_iters = MOCK_EVAL_ITERS
        requested = None if eval_iters is None else eval_iters * self.config.global_batch_size
        dataset = self._dataset(split, requested) if requested != 0 else None
        if dataset is None:
            return None
        # A blend is taken with its weights as far as --eval-iters reaches; otherwise each sample is taken once.
        blend = parse_blend(*self._paths(split)) if requested is not None else Blend([], None)
        order = self._sample_order(dataset, blend, shuffle=False)
        whole = order.epoch_length(0)
        end = whole if requested is None else min(requested, whole)
        return GlobalBatches(dataset, order, self.layout, end=end, prefetch=self.config.data.num_workers)

    def _sample_order(self, dataset: SampleSource, blend: Blend, shuffle: bool) -> SampleOrder:
        data, order = self.config.data, SampleOrder(len(dataset), self.config.data.seed, shuffle)
        if not isinstance(dataset, InstructionDataset):
            return order  # megatron-core has blended and packed it already
        if blend.weights:
            lengths = dataset.lengths_of_files()
            empty = [path for path, length in zip(blend.prefixes, lengths, strict=True) if not length]
            require(
                not empty,
                f"all samples of {' and '.join(empty)} were skipped, so the blend's weights cannot be reached: raise "
                "--seq-length, or leave the path out.",
            )
            order = BlendedOrder(lengths, blend.weights, data.seed, shuffle)
        return PackedOrder(order, dataset.lengths, data.seq_length, data.packing) if data.pack_sequences else order

    def _paths(self, split: Split) -> tuple[Sequence[str], str]:
        """The paths of a split, weights among them, and the flag that named them."""
        data = self.config.data
        if data.data_path:
            return data.data_path, "--data-path"
        own = data.train_data_path, data.valid_data_path, data.test_data_path
        return own[split.value], f"--{split.name}-data-path"

    def _dataset(self, split: Split, num_samples: int | None) -> SampleSource | None:
        data, (paths, flag) = self.config.data, self._paths(split)
        if data.mock_data:
            return build_mock(data, split, num_samples, self.num_ids)
        if not paths:
            return None
        if data.data_path or is_indexed(paths):
            indexed = build_indexed(data, split, paths, num_samples, self.tokenizer, self.num_ids)
            _require_one_digest(split, paths, indexed.digest if indexed else "")
            return indexed
        paths = parse_blend(paths, flag).prefixes
        cache_root = Path(data.data_cache_path) if data.data_cache_path else None
        if any(kind_of_source(path) != "json" for path in paths):
            from datasets import config

            # `datasets` makes its cache, in one process of a node; beside it, tables have a cache of tokens.
            cache_root = cache_root or Path(config.HF_DATASETS_CACHE) / "megatron_peft"
            checked_together(lambda: RecordFiles(paths, flag) if place_on_node().rank == 0 else None)
        records = checked_together(lambda: RecordFiles(paths, flag))
        _require_one_digest(split, paths, records.digest)
        dataset = InstructionDataset(records, Fit.of(data, self.tokenizer), cache_root)
        if not dist.is_initialized() or dist.get_rank() == 0:
            for sentence in dataset.warnings:
                logger.warning("%s: %s", flag, sentence)
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
