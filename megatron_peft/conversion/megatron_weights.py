"""A base model's weights in Megatron's own form, whichever it is: a distributed checkpoint or old files of ranks."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_peft.checkpoint.folders import INDEX
from megatron_peft.checkpoint.safe_pickle import load_inertly
from megatron_peft.config import ConfigurationError, require
from megatron_peft.conversion.hf_files import listed
from megatron_peft.conversion.legacy import open_legacy
from megatron_peft.conversion.megatron_files import open_distributed
from megatron_peft.conversion.stored_boxes import StoredTensor, layer_of
from megatron_peft.models.rules import Rule

STACK = re.compile(r"^(decoder\.layers\.)(?!\d)(.+)$")
# Transformer Engine's fused layers hold the norm before them.
FUSED_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
OUTPUT = "output_layer.weight"
NO_WEIGHT = re.compile(r"^(chained_\d+\.)?(optimizer|rng|rerun)|_extra_state|inv_freq$")
ADAPTER = ".adapter."
MASTER = "optimizer.master."
Find = Callable[[str, Rule], StoredTensor | None]


class MegatronWeights:
    """The tensors of a checkpoint by the names of megatron-core. `bytes_read` counts what was read, as stored."""

    def __init__(self, folder: Path, names: Sequence[str], find: Find, arguments: Callable[[], Any]) -> None:
        self.folder = folder
        self.names = names
        self.arguments = arguments
        self.bytes_read = 0
        self._find = find

    def stored(self, rule: Rule, dtype: torch.dtype | None = None) -> StoredTensor | None:
        """A parameter as it is stored; for float32 the copy that bf16 training keeps in float32, if it is there."""
        prefixes = (MASTER, "") if dtype == torch.float32 else ("",)
        found = (self._find(prefix + name, rule) for prefix in prefixes for name in spellings(rule.name))
        return next((tensor for tensor in found if tensor is not None), None)

    def stored_type(self, rule: Rule) -> torch.dtype:
        stored = self.stored(rule)
        assert stored is not None, rule.name  # `check` has seen it
        return stored.dtype

    @torch.no_grad()
    def read(self, rule: Rule, local: Tensor, rank: int, size: int) -> None:
        """Fill `rank`'s local tensor in place, in its own dtype and on its own device."""
        stored = self.stored(rule, local.dtype)
        assert stored is not None, rule.name  # `check` has seen it
        for region in rule.regions(local, rank, size):
            self.bytes_read += stored.fill(region.view, region.offset)
        rule.clear_padding(local, rank)

    def check(self, rules: Mapping[str, Rule]) -> None:
        """Raise ConfigurationError naming every kind of fault: missing, extra and misshapen tensors."""
        adapters = [name for name in self.names if ADAPTER in name and not NO_WEIGHT.search(name)]
        require(
            not adapters,
            f"{self.folder} holds adapters ({listed(adapters[:1])}, ...) and no base model: "
            f"tools/convert.py merge folds them into their base.",
        )
        found = {name: self.stored(rule) for name, rule in rules.items()}
        known = {OUTPUT, *(spelling for name in rules for spelling in spellings(name))}  # a tied output repeats
        faults = {
            "missing": [name for name, tensor in found.items() if tensor is None],
            "not part of this model": [n for n in self.names if n not in known and not NO_WEIGHT.search(n)],
            "of the wrong shape": [
                f"{name} {list(tensor.shape)} instead of {list(rules[name].local_shape(1))}"
                for name, tensor in found.items()
                if tensor is not None and not rules[name].accepts(tensor.shape, 1)
            ],
        }
        told = [f"{len(names)} {kind}: {listed(names)}" for kind, names in faults.items() if names]
        if told:
            raise ConfigurationError(f"the tensors in {self.folder} do not fit its model. " + "; ".join(told) + ".")


def open_megatron(files: Path) -> MegatronWeights:
    """What `megatron_files` has found. ConfigurationError: torn, incomplete or refused."""
    if not (files / INDEX).is_file():
        legacy = open_legacy(files)
        return MegatronWeights(files, list(legacy.tensors), legacy.stored, lambda: legacy.arguments)
    tensors = dict(_unstacked(open_distributed(files)))
    common = files / "common.pt"
    return MegatronWeights(
        files,
        list(tensors),
        lambda name, rule: tensors.get(name),
        lambda: load_inertly(common).get("args") if common.is_file() else None,
    )


def spellings(name: str) -> Iterator[str]:
    """The names that megatron-core gives to a parameter, depending on the layers that a model is built of."""
    yield name
    for norm, fused in FUSED_NORMS.items():
        if f".{norm}" in name:
            yield name.replace(norm, fused)


def _unstacked(tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[str, StoredTensor]]:
    """Tensors that hold all layers, as megatron-core stores uniform ones by default, taken apart."""
    for key, tensor in tensors.items():
        match = STACK.match(key)
        if match is None:
            yield key, tensor
        else:
            layers = range(tensor.shape[0])
            yield from ((f"{match[1]}{layer}.{match[2]}", layer_of(tensor, layer)) for layer in layers)
