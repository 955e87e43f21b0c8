"""A run's adapters merged into their base, as an ordinary Hugging Face folder.

One parameter at a time: the base's is read in Megatron's form (fused, whole), changed in float32, cast, and written as
the tensors that it is made of.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_peft.checkpoint.folders import megatron_files
from megatron_peft.config import require
from megatron_peft.conversion.pretrained import Weights, open_weights, owned_rules
from megatron_peft.conversion.to_huggingface import Contents, origins, require_undamaged, write_huggingface
from megatron_peft.conversion.trained_adapters import (
    TrainedAdapters,
    base_of,
    layer_of,
    open_adapters,
)
from megatron_peft.conversion.writer import DEFAULT_SHARD_BYTES, check_new
from megatron_peft.models.rules import Rule

Merger = Callable[[Tensor, Mapping[str, Tensor], Any], Tensor]  # `merge` of an adapter's module


def merge(
    input: str | Path,
    output: str | Path,
    *,
    pretrained_checkpoint: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: bool = True,
) -> Path:
    """Write `output`: config.json, the tokenizer's files and sharded safetensors of the changed model.

    Args:
        input: the --save folder of a run, of any layout.
        output: must not exist.
        pretrained_checkpoint: the base, if it is not where the run says.
        dtype: of the weights; None keeps the base's.
        max_shard_bytes: of one file.
        progress: show a bar at a terminal.

    Raises:
        ConfigurationError: before anything is written: no checkpoint or no adapters, another base, an output that
            exists, damaged files.
    """
    check_new(output)
    adapters = open_adapters(input)
    peft, shape = adapters.record.config.peft, adapters.record.shape
    module = import_module(peft.spec.adapter)
    require(hasattr(module, "merge"), f"--input {input}: adapters of --peft-method {peft.method} cannot be merged.")
    base = base_of(adapters, pretrained_checkpoint)
    files = megatron_files(base)
    if files is not None:
        require_undamaged(files)
    rules, weights = open_weights(base, shape)
    owned = owned_rules(rules, shape)
    contents = Contents(
        shape=shape,
        rules=owned,
        types={name: dtype or weights.stored_type(rule) for name, rule in owned.items()},
        tensors=lambda rule: _merged(rule, weights, adapters, module.merge),
        origins=[base] if files is None else origins(base, files),
    )
    write_huggingface(Path(output), contents, max_shard_bytes, "Merging", progress)
    return Path(output)


def _merged(rule: Rule, weights: Weights, adapters: TrainedAdapters, merger: Merger) -> Mapping[str, Tensor]:
    """The Hugging Face tensors of one parameter; in float32 (or float64) where an adapter has changed it."""
    layer, dtype = layer_of(rule), weights.stored_type(rule)
    if layer not in adapters.record.adapted_layers:
        whole = torch.empty(rule.local_shape(1), dtype=dtype)
        weights.read(rule, whole, 0, 1)
        return rule.write([whole])
    whole = torch.empty(rule.local_shape(1), dtype=torch.promote_types(dtype, torch.float32))
    weights.read(rule, whole, 0, 1)
    return rule.write([merger(whole, adapters.of(layer), adapters.record.config.peft)])
