"""The adapters in a run's --save folder, whatever layout wrote them, as whole tensors and without a model."""

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from torch import Tensor

from megatron_peft.adapters.change import StoredTensors
from megatron_peft.checkpoint.folders import RECORD, damage, iteration_folder, new_folder, publish, start_draft
from megatron_peft.checkpoint.run_record import ADAPTER_CONFIG, RunRecord, differing_base, find_checkpoint, read_record
from megatron_peft.checkpoint.save import record_of
from megatron_peft.checkpoint.state import TrainingState, whole_parameters
from megatron_peft.checkpoint.tensors import (
    ADAPTER,
    NOT_PARAMETERS,
    adapted_layers,
    data_of,
    global_slices,
    master_key,
    sharded_parameters,
    write_common_files,
)
from megatron_peft.config import ConfigurationError, require, untrusted
from megatron_peft.conversion.hf_files import listed, row_ranges
from megatron_peft.conversion.megatron_files import StoredSlice, StoredTensor, open_distributed
from megatron_peft.conversion.pretrained import known_fingerprint, read_model_shape
from megatron_peft.models.rules import WEIGHT, Rule
from megatron_peft.runtime.launch import gather_over_world

# The two factors of a low-rank adapter, between Megatron's fused layers and Hugging Face's separate ones.
#
# A weight's rule says which rows of a fused layer are which module's. They are the rows of B as well; A meets the
# input, which all modules of a layer share. Letters: out and in are a layer's features, r the rank.


@dataclass(frozen=True)
class LowRankFactors:
    """A [r, in] and B [out, r]; the change of the weight is B A times a scale that a whole adapter has in common."""

    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def padded(self, rank: int) -> "LowRankFactors":
        """The same change at a higher rank. What is added is zero on both sides, so training leaves it at zero."""
        more = rank - self.rank
        A = torch.cat([self.A, self.A.new_zeros(more, self.A.shape[1])])
        return LowRankFactors(A, torch.cat([self.B, self.B.new_zeros(self.B.shape[0], more)], dim=1))


def rows_of_modules(rule: Rule, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor over a fused layer's output features, [out, ...], as one for each of its modules."""
    return {
        name.removesuffix(WEIGHT): torch.cat([tensor[rows.megatron] for rows in ranges])
        for name, ranges in row_ranges(rule).items()
    }


def fuse(rule: Rule, by_module: Mapping[str, LowRankFactors]) -> LowRankFactors:
    """The adapters of a layer's modules as one of the fused layer. Modules without an adapter have zero rows.

    With one A in common the rank stays. Otherwise A is [A_q; A_k; A_v] and B has each module's B in its own rows and
    columns and zeros elsewhere, so that the rank is the sum.
    """
    blocks, ranges, start = list(by_module.values()), row_ranges(rule), 0
    shared = all(torch.equal(block.A, blocks[0].A) for block in blocks)
    A = blocks[0].A if shared else torch.cat([block.A for block in blocks])
    B = A.new_zeros(rule.local_shape(1)[0], A.shape[0])
    for module, block in by_module.items():
        for rows in ranges[module + WEIGHT]:
            B[rows.megatron, start : start + block.rank] = block.B[rows.hf]
        start += 0 if shared else block.rank
    return LowRankFactors(A, B)


PREFIX = "base_model.model."  # of all tensors in the files of HF PEFT


def shortest_targets(names: Iterable[str], num_layers: int) -> list[str]:
    """`q_proj` where all layers have it, else the full names; Megatron's names alike.

    Both --peft-target-modules and HF PEFT's target_modules take either, also mixed.
    """
    by_kind: dict[str, list[str]] = defaultdict(list)
    for name in names:
        by_kind[name.rpartition(".")[2]].append(name)
    return [target for kind, layers in by_kind.items() for target in ([kind] if len(layers) == num_layers else layers)]


@dataclass(frozen=True)
class TrainedAdapters:
    """An open checkpoint of a run. `stored` has its tensors by key, `decoder.layers.3.mlp.linear_fc1.adapter.A`."""

    folder: Path
    record: RunRecord
    stored: dict[str, StoredTensor]

    def of(self, layer: str) -> "LayerTensors":
        """A layer's tensors by name; each is read when it is asked for."""
        return LayerTensors(self, layer)

    def tensor(self, key: str, rows: slice | None = None) -> Tensor:
        """A tensor, or some of its rows; of the float32 copy if training kept one."""
        stored = self.stored.get(master_key(key), self.stored.get(key))
        if stored is None:
            raise ConfigurationError(_lacks(self.folder, [key]))
        return stored.read(rows)


@dataclass(frozen=True)
class LayerTensors(StoredTensors):
    """The tensors of a layer's adapter by name, such as `A` or `low_rank.A`. ConfigurationError: one is missing."""

    adapters: TrainedAdapters
    layer: str

    def __getitem__(self, name: str) -> Tensor:
        return self.adapters.tensor(f"{self.layer}{ADAPTER}{name}")

    def rows(self, name: str, rows: slice) -> Tensor:
        return self.adapters.tensor(f"{self.layer}{ADAPTER}{name}", rows)

    def __contains__(self, name: object) -> bool:
        return f"{self.layer}{ADAPTER}{name}" in self.adapters.stored

    def __iter__(self) -> Iterator[str]:
        prefix = f"{self.layer}{ADAPTER}"
        return (key.removeprefix(prefix) for key in self.adapters.stored if key.startswith(prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


Run = str | Path | TrainedAdapters  # the folder of --save, or what is open already


def open_run(folder: Run) -> TrainedAdapters:
    """The newest checkpoint in a --save folder. Every file is compared with the manifest; no tensor is kept yet.

    Raises ConfigurationError: there is no checkpoint, or it is damaged (unlike --load, an export never falls back to an
    older one).
    """
    if isinstance(folder, TrainedAdapters):
        return folder
    checkpoint = find_checkpoint(folder)
    require_undamaged(checkpoint)
    run = TrainedAdapters(checkpoint, read_record(checkpoint), open_distributed(checkpoint))
    if run.record.config.peft.trains_adapters:
        keys = [key for key in run.stored if ADAPTER in key and not key.startswith(NOT_PARAMETERS)]
        names = sorted({key.partition(ADAPTER)[2] for key in keys})  # every layer has the same
        expected = [f"{layer}{ADAPTER}{name}" for layer in run.record.adapted_layers for name in names or ["*"]]
        missing = [key for key in expected if key not in run.stored]
        require(not missing, _lacks(run.folder, missing))
    return run


def require_undamaged(files: Path, without: str = "") -> None:
    """Compare a checkpoint with its manifest, `without` as in `damage`. ConfigurationError names the damage."""
    problems = damage(files, without=without)
    require(not problems, f"{files} is damaged: {'; '.join(problems)}. Copy it again, or give an older iter_* folder.")


def open_adapters(folder: Run) -> TrainedAdapters:
    """`open_run` of a run with adapters. ConfigurationError: as there, or it is of full fine-tuning."""
    run = open_run(folder)
    require(
        run.record.config.peft.trains_adapters,
        f"--input {run.folder} is a run of full fine-tuning and holds no adapters: megatron-peft convert "
        f"megatron-to-hf turns it into a Hugging Face folder, and export-adapter --as-lora into an adapter close to "
        f"it.",
    )
    return run


def gathered_adapters(state: TrainingState) -> TrainedAdapters | None:
    """A run's adapters as they are now, without a file: on the first rank, in its memory; None on the others.

    A collective. What --bf16 trains is in bfloat16, as the model computes with it.
    """
    chunks = [chunk.module for chunk in state.model_chunks]
    entries = sharded_parameters(chunks, only_adapters=True)
    record = record_of(state, adapted_layers(chunks), entries)
    with whole_parameters(state.model_chunks):
        slices = [tensor for entry in entries for tensor in global_slices(entry)]
        gathered = _gather_on_first_rank([tensor for tensor in slices if is_main_replica(tensor.replica_id)])
    stored: dict[str, StoredTensor] = {}
    for place, data in sorted(gathered, key=lambda pair: pair[0].key):
        others = stored[place.key].slices if place.key in stored else ()
        part = StoredSlice(place.offset, place.shape, partial(_finite, data, place.key))
        stored[place.key] = StoredTensor(place.global_shape, data.dtype, (*others, part))
    folder = iteration_folder(Path(state.config.checkpoint.save or ""), state.position.iteration)
    return TrainedAdapters(folder, record, stored) if dist.get_rank() == 0 else None


class _Place(NamedTuple):
    """A slice of a global tensor without its data."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype


def _gather_on_first_rank(own: Sequence[ShardedTensor]) -> list[tuple[_Place, Tensor]]:
    """Gather the slices of all ranks in the first rank's CPU memory; an empty list on the others. A collective.

    One tensor after another is sent to the first rank: it has at most one more on its GPU, the others have none. As
    pickled objects the whole adapters would be on every GPU.
    """
    parts = [(tensor, data_of(tensor).detach()) for tensor in own]
    places = [
        _Place(tensor.key, tuple(tensor.global_shape), tuple(tensor.global_offset), tuple(data.shape), data.dtype)
        for tensor, data in parts
    ]
    sources = [rank for rank, has_slices in enumerate(gather_over_world(bool(own))) if has_slices and rank > 0]
    if dist.get_rank() in sources:
        dist.send_object_list([places], dst=0)
        for _, data in parts:
            dist.send(data.contiguous().view(-1).view(torch.uint8), dst=0)
    if dist.get_rank() > 0:
        return []
    gathered = [(place, data.cpu()) for place, (_, data) in zip(places, parts, strict=True)]
    for source in sources:
        received: list[Any] = [None]
        dist.recv_object_list(received, src=source)
        for place in received[0]:
            data = torch.empty(place.shape, dtype=place.dtype, device=torch.cuda.current_device())
            dist.recv(data.view(-1).view(torch.uint8), src=source)
            gathered.append((place, data.cpu()))
    return gathered


def _finite(data: Tensor, key: str, index: Any) -> Tensor:
    require(untrusted.is_finite(data[index]), f"{key} holds NaN or infinities: training has diverged.")
    return data[index]


def base_of(adapters: TrainedAdapters, override: str | Path | None) -> Path:
    """The base model's folder: --pretrained-checkpoint if given, else the one that the run names.

    Raises ConfigurationError: it is not there, or it is another model than the one that was trained on.
    """
    named = adapters.record.config.model.pretrained_checkpoint
    folder = Path(override or named or "")
    require(
        folder.is_dir(),
        f"the base model {folder} of the run in {adapters.folder} is not there: give its folder with "
        f"--pretrained-checkpoint.",
    )
    differing = differing_base(adapters.record, read_model_shape(folder), known_fingerprint(folder))
    require(
        not differing,
        f"the adapters in {adapters.folder} were trained on the base model {named}, but {folder} is another one "
        f"({', '.join(differing)}): give the base that they were trained on with --pretrained-checkpoint.",
    )
    return folder


def _lacks(checkpoint: Path, keys: list[str]) -> str:
    return (
        f"{checkpoint} is damaged: it lacks {listed(keys)}, which belong to the layers of its {RECORD}. Copy it again."
    )


def save_adapters(output: str | Path, record: RunRecord, tensors: Mapping[str, Tensor]) -> None:
    """Write iter_0000000, the tracker and adapter_config.json; all appear at once.

    `record` is of a run that has not begun; `tensors` are whole, by key, `decoder.layers.3.mlp.linear_fc1.adapter.A`.
    """
    with new_folder(output) as folder:
        draft = start_draft(iteration_folder(folder, 0))
        writer = torch_checkpoint.FileSystemWriter(draft, thread_count=1, sync_files=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is no process group: it is not needed
            torch_checkpoint.save(dict(tensors), storage_writer=writer, no_dist=True)
        write_common_files(draft)
        (draft / RECORD).write_text(record.to_json())
        for place in (draft, folder):
            (place / ADAPTER_CONFIG).write_text(record.adapter_config())
        publish(draft, folder, 0)
