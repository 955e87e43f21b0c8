"""The sources of a run's training, validation and test steps, made from its configuration."""

import logging
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, get_bin_path, get_idx_path
from megatron.core.datasets.utils import Split

from megatron_peft.checkpoint.run_record import sampled_digest
from megatron_peft.config import ConfigurationError, DataConfig, RunConfig, require
from megatron_peft.config.sources import RECORD_NAMES, Blend, is_indexed, parse_blend
from megatron_peft.config.untrusted import require_regular
from megatron_peft.data.batches import BatchLayout, GlobalBatches
from megatron_peft.data.files import RecordFiles, digests_of
from megatron_peft.data.instruction import InstructionDataset, made_once
from megatron_peft.data.node_files import NodeFiles
from megatron_peft.data.records import Fit
from megatron_peft.data.samples import BlendedOrder, PackedOrder, Sample, SampleOrder, SampleSource
from megatron_peft.data.tokenizers import NullTokenizer, Tokenizer
from megatron_peft.runtime.launch import (
    checked_together,
    from_first_of,
    gather_over_world,
    place_in_world,
    place_on_node,
)

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

    @property
    def longest_sample(self) -> int:
        """Input positions of the longest training sample."""
        return self.train.dataset.longest_sample  # pyright: ignore[reportAttributeAccessIssue] - both kinds have it


def build_data(
    config: RunConfig, tokenizer: Tokenizer, *, data_parallel_rank: int, data_parallel_size: int, num_ids: int
) -> Data:
    """Open, check and index all data. A collective over all ranks.

    num_ids: rows of the model's embedding, above all token ids.
    Raises ConfigurationError, on every rank, for whatever is wrong with it.
    """
    layout = BatchLayout(
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.training.micro_batch_size,
        data_parallel_rank=data_parallel_rank,
        data_parallel_size=data_parallel_size,
        pad_multiple=config.parallel.tensor_model_parallel_size if config.parallel.sequence_parallel else 1,
        pad_to=config.data.seq_length if config.data.pad_to_seq_length else 0,
        pad_id=min(tokenizer.eos_id, num_ids - 1),  # with --mock-data the tokenizer may be another model's
    )
    splits, training = _Splits(config, tokenizer, num_ids, layout, NodeFiles()), config.training
    iterations = training.train_iters
    if training.train_samples is not None:
        iterations = training.train_samples // config.global_batch_size  # as in Megatron, a last part is left out
        require(
            iterations > 0,
            f"--train-samples {training.train_samples} is less than one --global-batch-size "
            f"{config.global_batch_size}.",
        )
    train = splits.train(None if iterations is None else iterations * config.global_batch_size)
    if training.train_epochs is not None:
        iterations = math.ceil(train.order.positions_in(training.train_epochs) / config.global_batch_size)
    valid = splits.evaluated(Split.valid) if training.eval_interval is not None else None
    return Data(train, valid, splits.evaluated(Split.test), iterations or 0)


def _paths(data: DataConfig, split: Split) -> tuple[Sequence[str], str]:
    """The paths of a split, weights among them, and the flag that named them."""
    if data.data_path:
        return data.data_path, "--data-path"
    own = data.train_data_path, data.valid_data_path, data.test_data_path
    return own[split.value], f"--{split.name}-data-path"


@dataclass(frozen=True)
class _Splits:
    """The data of each split, by their paths in the configuration."""

    config: RunConfig
    tokenizer: Tokenizer
    num_ids: int
    layout: BatchLayout
    node: NodeFiles

    def train(self, num_samples: int | None) -> GlobalBatches:
        """num_samples: which the run takes; None with --train-epochs."""
        paths, flag = _paths(self.config.data, Split.train)
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
        order = self._sample_order(Split.train, dataset, blend, shuffle)
        return GlobalBatches(dataset, order, self.layout, prefetch=self.config.data.num_workers)

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
        blend = parse_blend(*_paths(self.config.data, split)) if requested is not None else Blend([], None)
        order = self._sample_order(split, dataset, blend, shuffle=False)
        whole = order.epoch_length(0)
        end = whole if requested is None else min(requested, whole)
        return GlobalBatches(dataset, order, self.layout, end=end, prefetch=self.config.data.num_workers)

    def _sample_order(self, split: Split, dataset: SampleSource, blend: Blend, shuffle: bool) -> SampleOrder:
        data, keep = self.config.data, partial(self.node.kept, split.name)
        order = SampleOrder(len(dataset), data.seed, shuffle, keep)
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
            order = BlendedOrder(lengths, blend.weights, data.seed, shuffle, keep)
        return PackedOrder(order, dataset.lengths, data.seq_length, data.packing) if data.pack_sequences else order

    def _dataset(self, split: Split, num_samples: int | None) -> SampleSource | None:
        data, (paths, flag) = self.config.data, _paths(self.config.data, split)
        if data.mock_data:
            return build_mock(data, split, num_samples, self.num_ids)
        if not paths:
            return None
        if data.data_path or is_indexed(paths):
            indexed = build_indexed(data, split, num_samples, self.tokenizer, self.num_ids)
            _require_one_digest(split, paths, indexed.digest if indexed else "")
            return indexed
        paths = parse_blend(paths, flag).prefixes
        cache_dir = Path(data.data_cache_path) if data.data_cache_path else None
        digests = from_first_of(place_on_node().node, lambda: digests_of(paths, flag))
        _require_one_digest(split, paths, " ".join(digests))
        records = made_once(lambda: RecordFiles(paths, flag, cache_dir, digests))
        dataset = InstructionDataset(records, Fit.of(data, self.tokenizer), cache_dir, self.node, split.name)
        if place_in_world()[0] == 0:
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


# Megatron's indexed datasets (`.bin` and `.idx`), read by megatron-core's own GPTDataset and blended builder. As in
# Megatron, the order of documents depends on the number of samples: resume a run with the same length.

DEFAULT_SPLIT = "969, 30, 1"  # Megatron's
READ_BEFORE = 1024  # the most samples that a rank reads before training, to check their ids
_HEADER = struct.Struct("<9sQBQQ")  # of an index: magic, version, type of a token, sequences, document bounds
_CODES = {kind.value for kind in DType if "int" in kind.name}  # the others are of fractions
_NPY = b"\x93NUMPY"


def checked_blend(paths: Sequence[str], flag: str) -> Blend:
    """`parse_blend`. Raises ConfigurationError unless both files of each prefix exist, the index is valid and the data
    has all of its tokens."""
    blend = parse_blend(paths, flag)
    for prefix in blend.prefixes:
        index, data = Path(get_idx_path(prefix)), Path(get_bin_path(prefix))
        missing = [str(path) for path in (index, data) if not path.exists()]
        require(
            not missing,
            f"{flag} {prefix}: {' and '.join(missing)} not found. A prefix is a path without .bin and .idx, as "
            f"megatron-peft data preprocess writes it; {RECORD_NAMES}.",
        )
        for path in (index, data):
            require_regular(path, flag)
        expected, actual = _expected_bytes(index, f"{flag} {prefix}: {index}"), data.stat().st_size
        require(
            actual == expected,
            f"{flag} {prefix}: {data} has {actual} bytes where its index expects {expected}; it is truncated.",
        )
    return blend


def _expected_bytes(index: Path, named: str) -> int:
    """Size of the data file that an index describes. Raises ConfigurationError for an index that is truncated, or whose
    sequences or documents do not follow one another."""
    # megatron-core's reader does not check the sizes and follows any pointer.
    with index.open("rb") as file:
        num_bytes, header = index.stat().st_size, file.read(_HEADER.size)
        fields = _HEADER.unpack(header) if len(header) == _HEADER.size else (b"", 0, 0, 0, 0)
        magic, version, dtype_code, num_sequences, num_bounds = fields
        known = magic == b"MMIDIDX\0\0" and version == 1 and dtype_code in _CODES
        require(
            known and num_bytes == _HEADER.size + num_sequences * (4 + 8) + num_bounds * 8,
            f"{named} is not an index of Megatron's, or it is truncated ({num_bytes} bytes).",
        )
        lengths = np.fromfile(file, np.int32, num_sequences)
        pointers = np.fromfile(file, np.int64, num_sequences)
        bounds = np.fromfile(file, np.int64, num_bounds)
    ends = np.cumsum(lengths, dtype=np.int64) * DType.size(dtype_code)
    astray = (lengths < 0) | (pointers != np.append(0, ends)[:-1])
    require(
        not astray.any(),
        f"{named} is damaged: sequence {astray.argmax() if len(astray) else 0} does not begin where the one before it "
        "ends, or its length is below 0. Copy it again, or make it again with megatron-peft data preprocess.",
    )
    in_order = num_bounds > 0 and bounds[0] == 0 and bounds[-1] == num_sequences and (np.diff(bounds) >= 0).all()
    require(
        bool(in_order),
        f"{named} is damaged: its documents are not its {num_sequences} sequences in their order. Copy it again, or "
        "make it again with megatron-peft data preprocess.",
    )
    return int(ends[-1]) if num_sequences else 0


class IndexedSamples:
    """A dataset of megatron-core as a source of samples.

    num_ids: above all token ids; flag: which named the prefixes; digest: of the files, sampled.
    """

    def __init__(self, dataset: Any, num_ids: int, flag: str, digest: str) -> None:
        self._dataset, self._num_ids, self._flag, self.digest = dataset, num_ids, flag, digest
        self.longest_sample = int(dataset.config.sequence_length)  # megatron-core fills each

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Sample:
        """Raises ConfigurationError for a token id that the model has no row for."""
        row = self._dataset[index]
        tokens, labels = row["tokens"].numpy(), row["labels"].numpy()
        for ids in (tokens, labels):
            if ids.min() < 0 or ids.max() >= self._num_ids:
                raise ConfigurationError(self._wrong_id(index))
        return Sample(tokens, labels, row["loss_mask"].float().numpy())

    def _wrong_id(self, index: int) -> str:
        """The message for a sample: one of the texts that it is cut from has an id without a row in the embedding."""
        dataset = self._dataset
        if isinstance(dataset, BlendedDataset):
            dataset, index = dataset.datasets[dataset.dataset_index[index]], dataset.dataset_sample_index[index]
        bounds = dataset.sample_index[dataset.shuffle_index[index] :][:2, 0]
        texts = dataset.document_index[bounds[0] : bounds[1] + 1].tolist()
        arrays = ((text, np.asarray(dataset.dataset.get(text))) for text in texts)
        text, wrong = next(
            (text, ids[bad]) for text, ids in arrays if (bad := (ids < 0) | (ids >= self._num_ids)).any()
        )
        document = int(np.searchsorted(dataset.dataset.document_indices, text, side="right"))
        return (
            f"{self._flag} {get_bin_path(dataset.dataset.path_prefix)}, document {document} has the token id "
            f"{wrong[0]}, but the embedding of --pretrained-checkpoint has {self._num_ids} rows: the data was made "
            "with the tokenizer of another model; make it again with megatron-peft data preprocess."
        )


def build_indexed(
    config: DataConfig, split: Split, num_samples: int | None, tokenizer: Tokenizer, num_ids: int
) -> IndexedSamples | None:
    """The samples of one split; None if --split leaves it nothing (an error for training). A collective over all ranks.

    num_samples: at least so many, documents repeated as needed; None: each document once, without weights.
    """
    paths, flag = _paths(config, split)
    blend = checked_blend(paths, flag)
    blend = blend if num_samples is not None else Blend(blend.prefixes, None)
    core_config = _core_config(config, split, blend, tokenizer)
    edges = (0.0, 1.0) if core_config.split_matrix is None else core_config.split_matrix[split.value] or (0.0, 0.0)
    repeats = num_samples is not None and (blend.weights is not None or len(blend.prefixes) == 1)
    needed = 2 if repeats or split == Split.valid else config.seq_length + 1
    for prefix in blend.prefixes:  # megatron-core never ends on a split without tokens
        dataset = IndexedDataset(prefix)  # owns the map that the lengths are read from
        begin, end = (round(edge * len(dataset.sequence_lengths)) for edge in edges)
        num_tokens = int(np.sum(dataset.sequence_lengths[begin:end]))
        if num_tokens < needed:
            lack = f"{flag}: the {split.name} split has {num_tokens} tokens of {prefix} and needs {needed}"
            require(split != Split.train, f"{lack}; give --split another cut, a larger dataset, or --train-iters.")
            if place_in_world()[0] == 0:
                logger.warning("%s, so there is no %s data.", lack, split.name)
            return None
    files = [Path(path(prefix)) for prefix in blend.prefixes for path in (get_idx_path, get_bin_path)]
    digest = " ".join(sampled_digest(file)[:16] for file in files)
    samples = IndexedSamples(_build(core_config, split, num_samples, blend), num_ids, flag, digest)
    # Ids of another model's tokenizer end a run before it begins: each rank reads samples, spread over its share.
    rank, num_ranks = place_in_world()
    share = range(rank, len(samples), num_ranks)
    checked_together(lambda: [len(samples[i]) for i in share[:: len(share) // READ_BEFORE + 1]], first_alone=True)
    return samples


def build_mock(config: DataConfig, split: Split, num_samples: int | None, num_ids: int) -> IndexedSamples:
    """megatron-core's generated samples for --mock-data, a third of them for each split. A collective over all ranks.

    num_samples: at least so many; None: one pass over the documents of the split. They count through the model's ids.
    """
    core_config = _core_config(config, split, None, NullTokenizer(num_ids - 1))
    return IndexedSamples(_build(core_config, split, num_samples, None), num_ids, "--mock-data", "mock")


def index_folder(config: DataConfig, blend: Blend | None = None) -> Path | None:
    """Return the folder of the indices that megatron-core makes of indexed data; None without such data.

    blend: that of a split; by default that of the training data. megatron-core's own default is a folder named after
    each prefix, which looks like data.
    """
    if blend is None:
        paths, flag = _paths(config, Split.train)
        if not (config.data_path or is_indexed(paths)):
            return None
        blend = parse_blend(paths, flag)
    return Path(config.data_cache_path or Path(blend.prefixes[0]).parent / "cache" / "GPTDataset_indices")


def _core_config(config: DataConfig, split: Split, blend: Blend | None, tokenizer: Tokenizer) -> GPTDatasetConfig:
    """blend: None asks for generated samples, which are split in one way whatever --split says."""
    source: dict[str, Any] = {"blend_per_split": [blend if each == split else None for each in Split]}
    if config.data_path or blend is None:
        source = {"blend": blend, "split": config.split or DEFAULT_SPLIT}
    core_config = GPTDatasetConfig(
        random_seed=config.seed,
        sequence_length=config.seq_length,
        path_to_cache=config.data_cache_path if blend is None else str(index_folder(config, blend)),
        tokenizer=tokenizer,  # type: ignore[arg-type]  # ours has what GPTDataset asks of one
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        drop_last_partial_validation_sequence=False,
        mmap_bin_files=config.mmap_bin_files,
        **source,
    )
    if core_config.split_matrix is not None:  # build this split alone: the others have their own sizes
        cut: list[Any] = [core_config.split_matrix[split.value] if each == split else None for each in Split]
        core_config.split_matrix = cut
    return core_config


def _build(config: GPTDatasetConfig, split: Split, num_samples: int | None, blend: Blend | None) -> Any:
    # megatron-core's np.load unpickles what is no array, and so runs its code.
    for path in Path(config.path_to_cache).rglob("*.npy") if blend and config.path_to_cache else ():
        require_regular(path)
        with path.open("rb") as file:
            require(file.read(len(_NPY)) == _NPY, f"{path} is not an array of numpy's: remove it.")
    sizes = [num_samples if each == split else 0 for each in Split]
    kind = GPTDataset if blend else MockGPTDataset
    try:
        built = BlendedMegatronDatasetBuilder(kind, sizes, lambda: True, config).build()  # type: ignore[arg-type]
    except Exception as error:
        if not isinstance(error.__cause__ or error, OSError):
            raise
        raise ConfigurationError(
            f"the indices of the {split.name} data cannot be written ({error.__cause__ or error}): give "
            "--data-cache-path a folder that can."
        ) from error
    return built[split.value]
