"""From the run's configuration to its sources of training, validation and test steps."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from megatron.core.datasets.utils import Split

from megatron_peft.config import Blend, DataConfig, RunConfig, is_indexed, kind_of_source, parse_blend, require
from megatron_peft.data.batches import BatchLayout, GlobalBatches
from megatron_peft.data.files import RecordFiles
from megatron_peft.data.formats import ColumnNames
from megatron_peft.data.indexed import build_indexed, build_mock
from megatron_peft.data.instruction import InstructionDataset
from megatron_peft.data.records import Fit
from megatron_peft.data.samples import BlendedOrder, PackedOrder, SampleOrder, SampleSource
from megatron_peft.data.tokenizers import Tokenizer
from megatron_peft.runtime.launch import checked_together, gather_over_world, place_on_node

logger = logging.getLogger(__name__)

MOCK_EVAL_ITERS = 10  # one pass over megatron-core's generated documents is some 70 million tokens, which mean nothing


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
    blend = _blend(config, Split.train)
    require(
        blend.weights is None or iterations is not None,
        "--train-data-path has weights, and --train-epochs is undefined for a weighted blend: give --train-iters or "
        "--train-samples.",
    )
    order = _sample_order(config, dataset, blend, shuffle=not shuffled)
    return GlobalBatches(dataset, order, layout, consumed_samples, prefetch=config.data.num_workers)


def _evaluation(
    config: RunConfig, split: Split, tokenizer: Tokenizer, layout: BatchLayout, num_ids: int
) -> GlobalBatches | None:
    """One pass in the order of the file, ended by --eval-iters: the same samples at each evaluation."""
    eval_iters = config.training.eval_iters
    if eval_iters is None and config.data.mock_data:
        eval_iters = MOCK_EVAL_ITERS
    requested = None if eval_iters is None else eval_iters * config.global_batch_size
    dataset = _dataset(config, split, requested, tokenizer, num_ids)
    if dataset is None:
        return None
    # A blend is taken with its weights as far as --eval-iters reaches; otherwise each sample is taken once.
    blend = _blend(config, split) if requested is not None else Blend([], None)
    order = _sample_order(config, dataset, blend, shuffle=False)
    whole = order.epoch_length(0)
    end = whole if requested is None else min(requested, whole)
    return GlobalBatches(dataset, order, layout, end=end, prefetch=config.data.num_workers)


def _sample_order(config: RunConfig, dataset: SampleSource, blend: Blend, shuffle: bool) -> SampleOrder:
    """megatron-core has blended and packed an indexed dataset already."""
    data = config.data
    if not isinstance(dataset, InstructionDataset):
        return SampleOrder(len(dataset), data.seed, shuffle)
    order = SampleOrder(len(dataset), data.seed, shuffle)
    if blend.weights:
        _require_samples(blend, dataset)
        order = BlendedOrder(dataset.lengths_of_files(), blend.weights, data.seed, shuffle)
    return PackedOrder(order, dataset.lengths, data.seq_length, data.packing) if data.pack_sequences else order


def _require_samples(blend: Blend, dataset: InstructionDataset) -> None:
    """Raises ConfigurationError for a source with a weight from which --overlong left nothing."""
    empty = [path for path, length in zip(blend.prefixes, dataset.lengths_of_files(), strict=True) if not length]
    require(
        not empty,
        f"all samples of {' and '.join(empty)} were skipped, so the blend's weights cannot be reached: raise "
        "--seq-length, or leave the path out.",
    )


def _blend(config: RunConfig, split: Split) -> Blend:
    """Paths and weights of the split; without weights for --data-path, which megatron-core blends."""
    return Blend([], None) if config.data.data_path else parse_blend(_paths(config, split), f"--{split.name}-data-path")


def _dataset(
    config: RunConfig, split: Split, num_samples: int | None, tokenizer: Tokenizer, num_ids: int
) -> SampleSource | None:
    if config.data.mock_data:
        return build_mock(config.data, split, num_samples, num_ids)
    paths = _paths(config, split)
    if not paths:
        return None
    if config.data.data_path or is_indexed(paths):
        indexed = build_indexed(config.data, split, paths, num_samples, tokenizer, num_ids)
        _require_one_digest(split, paths, indexed.digest if indexed else "")
        return indexed
    return _records(config, split, tokenizer)


def _records(config: RunConfig, split: Split, tokenizer: Tokenizer) -> InstructionDataset:
    data, flag = config.data, f"--{split.name}-data-path"
    paths = _blend(config, split).prefixes
    if any(kind_of_source(path) != "json" for path in paths):  # `datasets` makes its cache, in one process of a node
        checked_together(lambda: RecordFiles(paths, flag) if place_on_node().rank == 0 else None)
    records = checked_together(lambda: RecordFiles(paths, flag))
    _require_one_digest(split, paths, records.digest)
    fit = Fit(tokenizer, data.seq_length, data.overlong, ColumnNames.of(data))
    dataset = InstructionDataset(records, fit, _cache_root(data, paths))
    if not dist.is_initialized() or dist.get_rank() == 0:
        for sentence in dataset.warnings:
            logger.warning("%s: %s", flag, sentence)
    return dataset


def _cache_root(data: DataConfig, paths: Sequence[str]) -> Path | None:
    """--data-cache-path; tables have a cache without it, beside that of `datasets`."""
    if data.data_cache_path:
        return Path(data.data_cache_path)
    if all(kind_of_source(path) == "json" for path in paths):
        return None
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "megatron_peft"


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
