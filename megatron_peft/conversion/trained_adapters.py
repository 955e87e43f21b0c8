"""The adapters in a run's --save folder, whatever layout wrote them, as whole tensors and without a model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_peft.checkpoint.folders import RECORD, damage
from megatron_peft.checkpoint.record import RunRecord, differing_base, find_checkpoint, fingerprint, read_record
from megatron_peft.checkpoint.tensors import ADAPTER, NOT_PARAMETERS, master_key
from megatron_peft.config import ConfigurationError, require
from megatron_peft.conversion.adapter_factors import Factors
from megatron_peft.conversion.hf_files import listed
from megatron_peft.conversion.megatron_files import open_distributed
from megatron_peft.conversion.pretrained import read_model_shape
from megatron_peft.conversion.stored_boxes import StoredTensor


@dataclass(frozen=True)
class TrainedAdapters:
    """An open checkpoint of adapters. `stored` has its tensors by key, `decoder.layers.3.mlp.linear_fc1.adapter.A`."""

    folder: Path
    record: RunRecord
    stored: dict[str, StoredTensor]

    def has(self, layer: str, name: str) -> bool:
        """Whether a layer's adapter has a tensor of this name."""
        return f"{layer}{ADAPTER}{name}" in self.stored

    def tensor(self, layer: str, name: str) -> Tensor:
        """A whole tensor of a layer's adapter; where training kept a float32 copy, that one."""
        key = f"{layer}{ADAPTER}{name}"
        stored = self.stored.get(master_key(key), self.stored.get(key))
        if stored is None:
            raise ConfigurationError(_lacks(self.folder, [key]))
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
        stored.fill(tensor, (0,) * len(stored.shape))
        return tensor


def open_adapters(folder: str | Path) -> TrainedAdapters:
    """The newest checkpoint in a --save folder. Every file is compared with the manifest; no tensor is kept yet.

    Raises:
        ConfigurationError: there is no checkpoint, it is of full fine-tuning, or it is damaged (--load would go back to
            an older one: what moves on to other programs is chosen by hand).
    """
    checkpoint = find_checkpoint(folder)
    problems = damage(checkpoint)
    require(
        not problems,
        f"{checkpoint} is damaged: {'; '.join(problems)}. Copy it again, or give an older iter_* folder as --input.",
    )
    record = read_record(checkpoint)
    require(
        record.config.peft.trains_adapters,
        f"--input {folder} is a run of full fine-tuning and holds no adapters: tools/convert.py megatron-to-hf turns "
        f"it into a Hugging Face folder.",
    )
    stored = open_distributed(checkpoint)
    keys = [key for key in stored if ADAPTER in key and not key.startswith(NOT_PARAMETERS)]
    names = sorted({key.partition(ADAPTER)[2] for key in keys})  # every layer has the same
    expected = [f"{layer}{ADAPTER}{name}" for layer in record.adapted_layers for name in names or ["*"]]
    missing = [key for key in expected if key not in stored]
    require(not missing, _lacks(checkpoint, missing))
    return TrainedAdapters(checkpoint, record, stored)


def low_rank_factors(adapters: TrainedAdapters, layer: str, part: str = "") -> Factors:
    """A and B of a layer's whole low-rank change, without its scale.

    Some starts of LoRA-GA subtract a frozen B0 A0: the change is then of rank 2r, [B, -B0] [A; A0].

    Args:
        part: what comes before the names, where an adapter has several parts: `low_rank.`.
    """
    change = Factors(adapters.tensor(layer, f"{part}A"), adapters.tensor(layer, f"{part}B"))
    if not adapters.has(layer, f"{part}A0"):
        return change
    A0, B0 = (adapters.tensor(layer, f"{part}{name}").to(change.A.dtype) for name in ("A0", "B0"))
    return Factors(torch.cat([change.A, A0]), torch.cat([change.B, -B0], dim=1))


def base_of(adapters: TrainedAdapters, override: str | Path | None) -> Path:
    """The base model's folder: --pretrained-checkpoint if given, else the one that the run names.

    Raises:
        ConfigurationError: it is not there, or it is another model than the one that was trained on.
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


def known_fingerprint(base: str | Path) -> Mapping[str, str] | None:
    """Of a base model's folder; None where there is nothing that it is made of (checkpoints of ranks)."""
    try:
        return fingerprint(str(base))
    except OSError:
        return None


def _lacks(checkpoint: Path, keys: list[str]) -> str:
    return (
        f"{checkpoint} is damaged: it lacks {listed(keys)}, which belong to the layers of its {RECORD}. Copy it again."
    )
