"""Read a base model in Megatron's format: a distributed checkpoint or the older files of ranks."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_peft.checkpoint.folders import INDEX, RANK_FILES, RANK_FOLDER
from megatron_peft.checkpoint.safe_pickle import load_inertly
from megatron_peft.config import LINEAR_MODULES, ConfigurationError, require
from megatron_peft.config.untrusted import require_finite
from megatron_peft.conversion.hf_files import ReadCounts, listed, raise_problems
from megatron_peft.conversion.megatron_files import (
    StoredSlice,
    StoredTensor,
    layer_of,
    open_distributed,
    without_duplicates,
)
from megatron_peft.models.rules import RowRange, Rule
from megatron_peft.models.shape import ModelShape, is_size

# Old Megatron-LM checkpoints: a pickle for each tensor- and pipeline-parallel rank.
#
#     iter_0000010/mp_rank_01/model_optim_rng.pt          tensor-parallel rank 1, no pipeline
#     iter_0000010/mp_rank_01_002/model_optim_rng.pt      pipeline stage 2
#
# A file holds `model` (with interleaving `model0`, `model1`, ...), `args` and more. Layers are numbered within a stage.
# The names must be megatron-core's; older ones (`language_model.*`) are refused.

LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
CHUNK = re.compile(r"model(\d*)")


@dataclass(frozen=True)
class LegacyCheckpoint:
    """`tensors` has the local tensors of the tensor-parallel ranks, in order, by name with global layer number."""

    folder: Path
    tensors: Mapping[str, list[Tensor]]
    arguments: Any

    def stored(self, name: str, rule: Rule) -> StoredTensor | None:
        """A parameter as one global tensor; None if the checkpoint does not have it."""
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
        slices = without_duplicates(
            StoredSlice(part.offset, tuple(part.view.shape), partial(self._load, name, rank, part.view))
            for rank, shard in enumerate(shards)
            for part in rule.global_slices(shard, rank, size)
        )
        ends = zip(*([a + b for a, b in zip(part.offset, part.shape, strict=True)] for part in slices), strict=True)
        return StoredTensor(tuple(map(max, ends)), shards[0].dtype, slices)

    def _load(self, name: str, rank: int, view: Tensor, index: Any) -> Tensor:
        require_finite(view[index], name, self.folder / f"mp_rank_{rank:02d}*")
        return view[index]


def open_legacy(folder: Path) -> LegacyCheckpoint:
    """Map every rank's file; no weight is read yet.

    Raises:
        ConfigurationError: a rank's file is missing, torn or refused, or has the names of an older Megatron.
    """
    files = _rank_files(folder)
    num_tensor, num_stages = (max(place[axis] for place in files) + 1 for axis in (0, 1))
    missing = [f"mp_rank_{t:02d}_{p:03d}" for t in range(num_tensor) for p in range(num_stages) if (t, p) not in files]
    require(not missing, f"{folder} lacks the folders {listed(missing)} of its ranks: copy the checkpoint again.")
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
        require(match is not None, f"{path} has expert parallelism, which is not supported.")
        assert match is not None
        file = next((path / name for name in RANK_FILES if (path / name).is_file()), None)
        require(file is not None, f"{path} holds none of {', '.join(RANK_FILES)}: copy the checkpoint again.")
        assert file is not None
        files[int(match[1]), int(match[2] or 0)] = file
    return files


def _whole_model(stages: list[dict[str, Any]], folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of one tensor-parallel rank, with layers numbered over all stages and chunks."""
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
    """The tensors of a checkpoint by megatron-core's names. `find` and `arguments` are functions without a closure, so
    that the tensors of a distributed checkpoint may be sent to other ranks before anything is read."""

    def __init__(self, folder: Path, names: Sequence[str], find: Find, arguments: Callable[[], Any]) -> None:
        self.folder = folder
        self.names = names
        self.arguments = arguments
        self.counts = ReadCounts()
        self._find = find

    def stored(self, rule: Rule, dtype: torch.dtype | None = None) -> StoredTensor | None:
        """A parameter as it is stored; for float32 the float32 copy of bf16 training, if the checkpoint has one."""
        prefixes = (MASTER, "") if dtype == torch.float32 else ("",)
        found = (self._find(prefix + name, rule) for prefix in prefixes for name in spellings(rule.name))
        return next((tensor for tensor in found if tensor is not None), None)

    def stored_type(self, rule: Rule) -> torch.dtype:
        """Type of a rule's weight in the files."""
        stored = self.stored(rule)
        assert stored is not None, rule.name  # `check` found it
        return stored.dtype

    @torch.no_grad()
    def read(self, rule: Rule, local: Tensor, rank: int, size: int) -> None:
        """Fill `rank`'s local tensor in place, in its own dtype and on its own device."""
        stored = self.stored(rule, local.dtype)
        assert stored is not None, rule.name  # `check` found it
        for part in rule.global_slices(local, rank, size):
            self._count(stored.fill(part.view, part.offset))
        rule.clear_padding(local, rank)

    @torch.no_grad()
    def read_rows(self, rule: Rule, rows: RowRange, target: Tensor) -> None:
        """Fill `target` with some rows of a parameter, in its own dtype and on its own device."""
        stored = self.stored(rule, target.dtype)
        assert stored is not None, rule.name  # `check` found it
        self._count(stored.fill(target, (rows.megatron.start, *(0,) * (target.dim() - 1))))

    def _count(self, num_bytes: int) -> None:
        self.counts.reads += 1
        self.counts.bytes += num_bytes

    def place(self, rule: Rule) -> tuple[str, int]:
        """File and first byte of a parameter's first slice, to read parameters in that order."""
        stored = self.stored(rule)
        assert stored is not None, rule.name  # `check` found it
        return stored.slices[0].place

    def holds_whole_rows(self, rule: Rule, dtype: torch.dtype) -> bool:
        """Whether rows of a matrix are contiguous in the files, and columns strided: not if the files are of ranks
        that held columns."""
        stored = self.stored(rule, dtype)
        assert stored is not None, rule.name  # `check` found it
        return all(one.shape[-1] == stored.shape[-1] for one in stored.slices)

    def check(self, rules: Mapping[str, Rule]) -> None:
        """Raise ConfigurationError that lists missing, extra and misshapen tensors."""
        adapters = [name for name in self.names if ADAPTER in name and not NO_WEIGHT.search(name)]
        require(
            not adapters,
            f"{self.folder} holds adapters ({listed(adapters[:1])}, ...) and no base model: "
            f"megatron-peft convert merge merges them into their base.",
        )
        found = {name: self.stored(rule) for name, rule in rules.items()}
        known = {OUTPUT, *(spelling for name in rules for spelling in spellings(name))}  # a tied output is a copy
        problems = {
            "missing": [name for name, tensor in found.items() if tensor is None],
            "not part of this model": [n for n in self.names if n not in known and not NO_WEIGHT.search(n)],
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
        legacy = open_legacy(files)
        return MegatronWeights(files, list(legacy.tensors), legacy.stored, lambda: legacy.arguments)
    tensors = dict(_unstacked(open_distributed(files)))
    weights = MegatronWeights(files, list(tensors), partial(_named, tensors), partial(_arguments, files / "common.pt"))
    weights.counts.headers = 1
    return weights


def _named(tensors: Mapping[str, StoredTensor], name: str, rule: Rule) -> StoredTensor | None:
    return tensors.get(name)


def _arguments(common: Path) -> Any:
    return load_inertly(common).get("args") if common.is_file() else None


def spellings(name: str) -> Iterator[str]:
    """megatron-core's names of a parameter: they depend on the layers that it builds the model with."""
    yield name
    for norm, fused in FUSED_NORMS.items():
        if f".{norm}" in name:
            yield name.replace(norm, fused)


def _unstacked(tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[str, StoredTensor]]:
    """Tensors with those that stack all layers, megatron-core's default for uniform layers, split by layer."""
    for key, tensor in tensors.items():
        match = STACK.match(key)
        if match is None:
            yield key, tensor
        else:
            layers = range(tensor.shape[0])
            yield from ((f"{match[1]}{layer}.{match[2]}", layer_of(tensor, layer)) for layer in layers)


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
    heads = sizes["num_attention_heads"]
    grouped = given.get("group_query_attention")
    return ModelShape(
        architecture=_family(given, where),
        **sizes,
        num_query_groups=given.get("num_query_groups") or heads if grouped else heads,
        kv_channels=given.get("kv_channels") or sizes["hidden_size"] // heads,
        vocab_size=vocab_size,
        max_position_embeddings=given.get("max_position_embeddings") or 2048,
        norm_epsilon=given.get("norm_epsilon", given.get("layernorm_epsilon", 1e-5)),
        linear_biases=_biases(given),
        qk_layernorm=bool(given.get("qk_layernorm")),
        tied_embeddings=not given.get("untie_embeddings_and_output_weights"),
        rotary_base=float(given.get("rotary_base") or 10000),
    )


def _family(given: dict[str, Any], where: str) -> str:
    """The family whose config.json can say what differs from a Llama."""
    biases, has_head_norms = _biases(given), bool(given.get("qk_layernorm"))
    require(
        not (biases and has_head_norms),
        f"{where} was trained with qk_layernorm and with biases, which is not read from arguments: {WAY_OUT}",
    )
    return "qwen3" if has_head_norms else "qwen2" if biases == {"linear_qkv"} else "llama"


def _biases(given: dict[str, Any]) -> frozenset[str]:
    if given.get("add_bias_linear"):
        return frozenset(LINEAR_MODULES)
    return frozenset({"linear_qkv"} if given.get("add_qkv_bias") else ())
