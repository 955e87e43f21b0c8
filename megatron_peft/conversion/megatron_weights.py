"""A base model in Megatron's files: its tensors by megatron-core's names, and the shape in Megatron-LM's arguments."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_peft.checkpoint.folders import INDEX
from megatron_peft.checkpoint.safe_pickle import load_inertly
from megatron_peft.config import LINEAR_MODULES, require
from megatron_peft.conversion.hf_files import ReadCounts, listed, raise_problems
from megatron_peft.conversion.megatron_files import (
    LegacyCheckpoint,
    StoredTensor,
    layer_of,
    open_distributed,
    open_legacy,
)
from megatron_peft.models.rules import RowRange, Rule
from megatron_peft.models.shape import ModelShape, is_size

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


@dataclass(frozen=True)
class DistributedCheckpoint:
    """`tensors` has the global tensors by name."""

    folder: Path
    tensors: Mapping[str, StoredTensor]

    @property
    def arguments(self) -> Any:
        """Megatron-LM's, or None."""
        common = self.folder / "common.pt"
        return load_inertly(common).get("args") if common.is_file() else None

    def stored(self, name: str, rule: Rule) -> StoredTensor | None:
        """A parameter; None if the checkpoint does not have it."""
        return self.tensors.get(name)


@dataclass
class MegatronWeights:
    """The tensors of a checkpoint by megatron-core's names. Those of a distributed checkpoint may be sent to other
    ranks before anything is read."""

    folder: Path
    checkpoint: DistributedCheckpoint | LegacyCheckpoint
    counts: ReadCounts = field(default_factory=ReadCounts)

    def find(self, rule: Rule, dtype: torch.dtype | None = None) -> StoredTensor | None:
        """A parameter as it is stored; for float32 the float32 copy of bf16 training, if the checkpoint has one."""
        prefixes = (MASTER, "") if dtype == torch.float32 else ("",)
        names = (prefix + name for prefix in prefixes for name in spellings(rule.name))
        return next((tensor for name in names if (tensor := self.checkpoint.stored(name, rule)) is not None), None)

    def stored(self, rule: Rule, dtype: torch.dtype | None = None) -> StoredTensor:
        """As `find`, of a parameter that is there because `check` found it."""
        stored = self.find(rule, dtype)
        assert stored is not None, rule.name
        return stored

    def stored_type(self, rule: Rule) -> torch.dtype:
        """Type of a rule's weight in the files."""
        return self.stored(rule).dtype

    @torch.no_grad()
    def read(self, rule: Rule, local: Tensor, rank: int, size: int) -> None:
        """Fill `rank`'s local tensor in place, in its own dtype and on its own device."""
        stored = self.stored(rule, local.dtype)
        for part in rule.global_slices(local, rank, size):
            self._fill(part.view, stored, part.offset)
        rule.clear_padding(local, rank)

    @torch.no_grad()
    def read_rows(self, rule: Rule, rows: RowRange, target: Tensor) -> None:
        """Fill `target` with some rows of a parameter, in its own dtype and on its own device."""
        self._fill(target, self.stored(rule, target.dtype), (rows.megatron.start, *(0,) * (target.dim() - 1)))

    def _fill(self, target: Tensor, stored: StoredTensor, offset: Sequence[int]) -> None:
        self.counts.bytes += stored.fill(target, offset)
        self.counts.reads += 1

    def place(self, rule: Rule) -> tuple[str, int]:
        """File and first byte of a parameter's first slice, to read parameters in that order."""
        return self.stored(rule).slices[0].place

    def holds_whole_rows(self, rule: Rule, dtype: torch.dtype) -> bool:
        """Whether rows of a matrix are contiguous in the files, and columns strided: not if the files are of ranks
        that held columns."""
        stored = self.stored(rule, dtype)
        return all(part.shape[-1] == stored.shape[-1] for part in stored.slices)

    def check(self, rules: Mapping[str, Rule]) -> None:
        """Raise ConfigurationError that lists missing, extra and misshapen tensors."""
        names = self.checkpoint.tensors
        adapters = [name for name in names if ADAPTER in name and not NO_WEIGHT.search(name)]
        require(
            not adapters,
            f"{self.folder} holds adapters ({listed(adapters[:1])}, ...) and no base model: "
            f"megatron-peft convert merge merges them into their base.",
        )
        found = {name: self.find(rule) for name, rule in rules.items()}
        known = {OUTPUT, *(spelling for name in rules for spelling in spellings(name))}  # a tied output is a copy
        problems = {
            "missing": [name for name, tensor in found.items() if tensor is None],
            "not part of this model": [n for n in names if n not in known and not NO_WEIGHT.search(n)],
            "of the wrong shape": [
                f"{name} {list(tensor.shape)} instead of {list(rules[name].local_shape(1))}"
                for name, tensor in found.items()
                if tensor is not None and not rules[name].accepts(tensor.shape, 1)
            ],
        }
        raise_problems(f"the tensors in {self.folder} do not fit its model.", problems)


def open_megatron(files: Path) -> MegatronWeights:
    """Open a folder that `megatron_files` returned. ConfigurationError: torn, incomplete or refused."""
    if not (files / INDEX).is_file():
        return MegatronWeights(files, open_legacy(files))
    tensors: dict[str, StoredTensor] = {}
    for key, tensor in open_distributed(files).items():
        # megatron-core's default for uniform layers is a tensor that stacks all of them.
        if stack := STACK.match(key):
            tensors |= {f"{stack[1]}{n}.{stack[2]}": layer_of(tensor, n) for n in range(tensor.shape[0])}
        else:
            tensors[key] = tensor
    return MegatronWeights(files, DistributedCheckpoint(files, tensors), ReadCounts(headers=1))


def spellings(name: str) -> Iterator[str]:
    """megatron-core's names of a parameter: they depend on the layers that it builds the model with."""
    yield name
    for norm, fused in FUSED_NORMS.items():
        if f".{norm}" in name:
            yield name.replace(norm, fused)


WAY_OUT = "provide the model's config.json: put it into the folder, or give its folder with --pretrained-checkpoint."
# Arguments of a Llama, or of a Qwen, in Megatron-LM; other values compute something else.
LLAMA_LIKE = {
    "swiglu": True,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "use_rope_scaling": False,
    "qk_l2_norm": False,
    "window_size": None,
    "num_experts": None,
    "multi_latent_attention": False,
    "rotary_interleaved": False,
    "layernorm_zero_centered_gamma": False,
    "apply_layernorm_1p": False,
}


def shape_of_arguments(arguments: Any, where: str) -> ModelShape:
    """Shape of a Llama, Qwen2 or Qwen3 from Megatron-LM's arguments; `where` names the checkpoint in errors.

    Raises:
        ConfigurationError: there are no arguments, they describe another kind of model, or they lack the size of the
            vocabulary before padding.
    """
    require(arguments is not None, f"{where} does not say what model it is: {WAY_OUT}")
    given = vars(arguments)
    other = [
        f"{name} {given[name]!r}" for name, value in LLAMA_LIKE.items() if given.get(name, value) not in (value, None)
    ]
    require(not other, f"{where} was trained with {', '.join(other)}, which is not read from arguments: {WAY_OUT}")
    sizes = {name: given.get(name) for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")}
    missing = [name for name, value in sizes.items() if value is None]
    require(not missing, f"the arguments in {where} lack {', '.join(missing)}: {WAY_OUT}")
    odd = [f"{name} {str(value)[:40]}" for name, value in sizes.items() if not is_size(value)]
    require(not odd, f"the arguments in {where} have {', '.join(odd)}, which is not a size: {WAY_OUT}")
    vocab_size = given.get("vocab_size")
    require(
        vocab_size is not None,
        f"{where} holds a vocabulary padded to {given.get('padded_vocab_size')} rows and does not say from how many: "
        f"{WAY_OUT}",
    )
    biases = LINEAR_MODULES if given.get("add_bias_linear") else ["linear_qkv"] if given.get("add_qkv_bias") else []
    has_head_norms = bool(given.get("qk_layernorm"))
    require(
        not (biases and has_head_norms),
        f"{where} was trained with qk_layernorm and with biases, which is not read from arguments: {WAY_OUT}",
    )
    # The family whose config.json can say what differs from a Llama.
    family = "qwen3" if has_head_norms else "qwen2" if list(biases) == ["linear_qkv"] else "llama"
    heads = sizes["num_attention_heads"]
    grouped = given.get("group_query_attention")
    return ModelShape(
        architecture=family,
        **sizes,
        num_query_groups=given.get("num_query_groups") or heads if grouped else heads,
        kv_channels=given.get("kv_channels") or sizes["hidden_size"] // heads,
        vocab_size=vocab_size,
        max_position_embeddings=given.get("max_position_embeddings") or 2048,
        norm_epsilon=given.get("norm_epsilon", given.get("layernorm_epsilon", 1e-5)),
        linear_biases=frozenset(biases),
        qk_layernorm=has_head_norms,
        tied_embeddings=not given.get("untie_embeddings_and_output_weights"),
        rotary_base=float(given.get("rotary_base") or 10000),
    )
