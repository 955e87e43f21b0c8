"""Old Megatron-LM checkpoints: a pickle for each tensor- and pipeline-parallel rank.

    iter_0000010/mp_rank_01/model_optim_rng.pt          tensor-parallel rank 1, no pipeline
    iter_0000010/mp_rank_01_002/model_optim_rng.pt      pipeline stage 2

A file holds `model` (with interleaving `model0`, `model1`, ...), `args` and much else. Layers are numbered within a
stage. Only the names of megatron-core are read; those of older models (`language_model.*`) are refused.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_peft.checkpoint.folders import RANK_FILES, RANK_FOLDER
from megatron_peft.checkpoint.safe_pickle import load_inertly
from megatron_peft.config import ConfigurationError, require
from megatron_peft.conversion.hf_files import listed
from megatron_peft.conversion.stored_boxes import StoredBox, StoredTensor, union
from megatron_peft.models.rules import Rule

LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
CHUNK = re.compile(r"model(\d*)")


@dataclass(frozen=True)
class LegacyCheckpoint:
    """`tensors` has, by name with global layer numbers, the local tensors of the tensor-parallel ranks in order."""

    folder: Path
    tensors: Mapping[str, list[Tensor]]
    arguments: Any

    def stored(self, name: str, rule: Rule) -> StoredTensor | None:
        """A parameter as one global tensor."""
        shards = self.tensors.get(name)
        if shards is None:
            return None
        size = len(shards)
        for rank, shard in enumerate(shards):
            require(
                rule.accepts(shard.shape, size),
                f"{name} is {list(shard.shape)} on rank {rank} of {size} in {self.folder}, but the model has "
                f"{list(rule.local_shape(size))} there.",
            )
        boxes = union(box for rank, shard in enumerate(shards) for box in _boxes(rule, shard, rank, size))
        ends = zip(*([a + b for a, b in zip(box.offset, box.shape, strict=True)] for box in boxes), strict=True)
        return StoredTensor(tuple(map(max, ends)), shards[0].dtype, boxes)


def open_legacy(folder: Path) -> LegacyCheckpoint:
    """Map every rank's file; no weight is read yet.

    Raises:
        ConfigurationError: a rank's file is missing, torn or refused, or the names are of an older Megatron.
    """
    files = _rank_files(folder)
    num_tensor, num_stages = (max(place[axis] for place in files) + 1 for axis in (0, 1))
    lost = [f"mp_rank_{t:02d}_{p:03d}" for t in range(num_tensor) for p in range(num_stages) if (t, p) not in files]
    require(not lost, f"{folder} lacks the folders {listed(lost)} of its ranks: copy the checkpoint again.")
    contents = {place: load_inertly(path) for place, path in files.items()}
    tensors: dict[str, list[Tensor]] = defaultdict(list)
    for rank in range(num_tensor):
        for name, tensor in _whole_model([contents[rank, stage] for stage in range(num_stages)], folder):
            tensors[name].append(tensor)
    return LegacyCheckpoint(folder, dict(tensors), contents[0, 0].get("args"))


def _rank_files(folder: Path) -> dict[tuple[int, int], Path]:
    """By (tensor-parallel rank, pipeline stage)."""
    files = {}
    for path in sorted(folder.glob("mp_rank_*")):
        match = RANK_FOLDER.fullmatch(path.name)
        require(match is not None, f"{path} is of a layout with experts, which is not supported.")
        assert match is not None
        file = next((path / name for name in RANK_FILES if (path / name).is_file()), None)
        require(file is not None, f"{path} holds none of {', '.join(RANK_FILES)}: copy the checkpoint again.")
        assert file is not None
        files[int(match[1]), int(match[2] or 0)] = file
    return files


def _whole_model(stages: list[dict[str, Any]], folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of one tensor-parallel rank, layers numbered over all stages and chunks of them."""
    first_layer = 0
    num_chunks = max(1, sum(bool(CHUNK.fullmatch(str(key))) for key in stages[0]))
    for chunk in range(num_chunks):
        for stage in stages:
            parameters = dict(_parameters(stage, chunk, folder))
            for name, tensor in parameters.items():
                yield LAYER.sub(lambda m: f"decoder.layers.{first_layer + int(m[1])}.", name), tensor  # noqa: B023
            first_layer += len({match[1] for name in parameters if (match := LAYER.match(name))})


def _parameters(stage: dict[str, Any], chunk: int, folder: Path) -> Iterator[tuple[str, Tensor]]:
    held = stage.get(f"model{chunk}", stage.get("model") if chunk == 0 else None)
    if not isinstance(held, dict):
        raise ConfigurationError(f"{folder}: a rank's file holds no 'model': is it a checkpoint of Megatron-LM?")
    old = next((name for name in held if str(name).startswith(("language_model", "model.language_model"))), None)
    require(
        old is None,
        f"{folder} holds {old}, a name of Megatron-LM before megatron-core: convert it with Megatron-LM's "
        f"tools/checkpoint/convert.py (--loader legacy --saver core) first.",
    )
    return ((str(name), tensor) for name, tensor in held.items() if isinstance(tensor, Tensor))


def _boxes(rule: Rule, shard: Tensor, rank: int, size: int) -> Iterator[StoredBox]:
    for region in rule.regions(shard, rank, size):
        yield StoredBox(region.offset, tuple(region.view.shape), lambda view=region.view: view)
