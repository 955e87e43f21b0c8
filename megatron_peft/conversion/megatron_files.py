"""Read a model in Megatron's files slice by slice: a distributed checkpoint, or the older files of ranks.

A distributed checkpoint (`torch_dist`) is read without a process group. megatron-core's own reader needs one and
unpickles the index without a check. It and torch's `FileSystemReader` copy a stored slice whole: every layer of stacked
keys would cost the time and memory of all of them. Of 30 layers of 4 MiB, stacked and read one by one, torch's reader
takes 2.4 s of CPU time and 128 MiB, this one 0.2 s and 26 MiB.
"""

import io
import mmap
import pickle
import re
import struct
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megatron_peft.checkpoint.folders import INDEX, RANK_FILES, RANK_FOLDER
from megatron_peft.checkpoint.safe_pickle import DAMAGE_ERRORS, load_inertly, read_metadata
from megatron_peft.checkpoint.tensors import ADAPTER, master_key
from megatron_peft.config import ConfigurationError, require, untrusted
from megatron_peft.conversion.hf_files import ReadCounts, listed, raise_problems
from megatron_peft.models.rules import RowRange, Rule


@dataclass(frozen=True)
class StoredSlice:
    """A slice of a global tensor, by first index and shape; `load(index)`, a part of it, may be a lazy view.

    `place` is its file and first byte there, where that is known: slices are read in this order.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    load: Callable[[Any], Tensor]
    place: tuple[str, int] = ("", 0)


@dataclass(frozen=True)
class StoredTensor:
    """A global tensor of a checkpoint. Its slices fill it and never overlap."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    slices: tuple[StoredSlice, ...]

    @torch.no_grad()
    def fill(self, target: Tensor, offset: Sequence[int]) -> int:
        """Copy the slice at `offset` with the shape of `target`. Elements beyond the stored tensor keep their values.

        Returns the bytes read, in the stored type.
        """
        num_bytes = 0
        for stored in self.slices:
            dims = list(zip(offset, target.shape, stored.offset, stored.shape, strict=True))
            overlaps = [(max(a, c), min(a + b, c + d)) for a, b, c, d in dims]
            if all(start < stop for start, stop in overlaps):
                place = zip(overlaps, offset, stored.offset, strict=True)
                cuts = [(slice(start - a, stop - a), slice(start - c, stop - c)) for (start, stop), a, c in place]
                values = stored.load(tuple(cut for _, cut in cuts))
                target[tuple(cut for cut, _ in cuts)].copy_(values)
                num_bytes += values.nbytes
        return num_bytes

    def read(self, rows: slice | None = None) -> Tensor:
        """The tensor, or some of its rows, copied into memory."""
        start, shape = (0, self.shape) if rows is None else (rows.start, (rows.stop - rows.start, *self.shape[1:]))
        tensor = torch.empty(shape, dtype=self.dtype)
        self.fill(tensor, (start, *(0,) * (len(shape) - 1))[: len(shape)])
        return tensor


def layer_of(stack: StoredTensor, layer: int) -> StoredTensor:
    """One layer of a tensor that stacks all layers along its first dimension."""
    slices = []
    for stored in stack.slices:
        number = layer - stored.offset[0]
        if 0 <= number < stored.shape[0]:
            file, start = stored.place
            load = partial(_load_layer, stored, number)
            slices.append(StoredSlice(stored.offset[1:], stored.shape[1:], load, (file, start + number)))
    return StoredTensor(stack.shape[1:], stack.dtype, tuple(slices))


def _load_layer(stack: StoredSlice, number: int, index: tuple[Any, ...]) -> Tensor:
    return stack.load((number, *index))


_LOCAL_HEADER_BYTES, _NAME_AND_EXTRA = 30, 26  # of a zip record: size of its fixed part, offset of two lengths


@dataclass(frozen=True)
class MappedTensor:
    """A tensor in a mapped file. An index gives a view; or a copy of that part, where the file did not align it."""

    bits: np.ndarray  # as integers of the tensor's shape, which numpy reads at any address
    dtype: torch.dtype

    def __getitem__(self, index: Any) -> Tensor:
        return torch.from_numpy(np.require(self.bits[index], requirements=["ALIGNED"])).view(self.dtype)


def map_tensor(path: Path, start: int, length: int) -> MappedTensor:
    """A tensor that torch.save wrote at these bytes of a file, mapped until it and its views are freed.

    The format is an uncompressed zip archive in which `data.pkl` describes the tensor and names the record of its
    data. `torch.load` would copy the data, and takes long for tensors below a MiB. Raises one of
    DAMAGE_ERRORS: torn, or not a single tensor.
    """
    before = start % mmap.ALLOCATIONGRANULARITY
    with open(path, "rb") as file:
        # Copy on write, because torch.from_numpy needs a writable buffer.
        mapped = mmap.mmap(file.fileno(), before + length, access=mmap.ACCESS_COPY, offset=start - before)
    records: dict[str, tuple[int, int]] = {}  # first byte and size, by name within the archive's folder
    with zipfile.ZipFile(cast(IO[bytes], mapped)) as directory:
        for record in directory.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{record.filename} is compressed")
            lengths = struct.unpack_from("<HH", mapped, record.header_offset + _NAME_AND_EXTRA)
            first = record.header_offset + _LOCAL_HEADER_BYTES + sum(lengths)
            records[record.filename.partition("/")[2]] = first, record.file_size
    first, size = records["data.pkl"]
    storage, offset, shape, strides = _Description(io.BytesIO(mapped[first : first + size])).load()[:4]
    _, dtype, key, *_ = storage
    first, size = records[f"data/{key}"]
    size_of_one, data = dtype.itemsize, memoryview(mapped)[first : first + size]
    strides = [stride * size_of_one for stride in strides]
    return MappedTensor(np.ndarray(shape, f"i{size_of_one}", data, offset * size_of_one, strides), dtype)


class _Description(pickle.Unpickler):
    """Loads (storage, offset, shape, strides, ...) of a tensor; storage is (kind, dtype, key, device, length)."""

    def persistent_load(self, pid: Any) -> Any:
        return pid

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *described: described
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        # The public `dtype` of these classes warns that they are deprecated.
        dtype = getattr(getattr(torch, name, None), "_dtype", None) if module == "torch" else None
        if not name.endswith("Storage") or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no plain tensor needs")
        return dtype


def open_distributed(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor by key. Only the index is read.

    Raises ConfigurationError: the index is truncated or refused, a file is missing or short, or a tensor is incomplete.
    """
    index = read_metadata(folder)
    ends: dict[str, int] = {}
    for place in index.storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    missing = sorted(name for name in ends if not (folder / name).is_file())
    require(not missing, f"{folder} lacks {listed(missing)}, which its index lists: copy the checkpoint again.")
    short = sorted(name for name, end in ends.items() if (folder / name).stat().st_size < end)
    require(not short, f"{folder} is truncated: {listed(short)} are shorter than written. Copy the checkpoint again.")
    tensors = {}
    for key, entry in index.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            slices = []
            for chunk in entry.chunks:
                place = index.storage_data[MetadataIndex(key, chunk.offsets)]
                file, shape = folder / place.relative_path, tuple(chunk.sizes)
                load = partial(_load, file, place.offset, place.length, key, shape)
                slices.append(StoredSlice(tuple(chunk.offsets), shape, load, (str(file), place.offset)))
            tensors[key] = StoredTensor(tuple(entry.size), entry.properties.dtype, tuple(slices))
    return tensors


def _load(path: Path, start: int, length: int, key: str, shape: tuple[int, ...], index: Any) -> Tensor:
    try:
        tensor = map_tensor(path, start, length)
        values = tensor[index] if tensor.bits.shape == shape else None
    except DAMAGE_ERRORS as error:
        raise ConfigurationError(f"{path} is damaged where it holds {key}: {error}".partition("\n")[0]) from error
    if values is None:
        raise ConfigurationError(f"{path} is damaged: it does not hold {key} {list(shape)} where its index says so.")
    untrusted.require_finite(values, key, path)
    return values


# Old Megatron-LM checkpoints: a pickle for each tensor- and pipeline-parallel rank.
#
#     iter_0000010/mp_rank_01/model_optim_rng.pt          tensor-parallel rank 1, no pipeline
#     iter_0000010/mp_rank_01_002/model_optim_rng.pt      pipeline stage 2
#
# A file holds `model` (with interleaving `model0`, `model1`, ...), `args` and more. Layers are numbered within a stage.
# The names must be megatron-core's; older ones (`language_model.*`) are refused.

LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
CHUNK = re.compile(r"model(\d*)")


def joined(shards: list[Tensor], name: str, rule: Rule, folder: Path) -> StoredTensor:
    """The local tensors of a parameter as one global tensor."""
    size = len(shards)
    slices: dict[tuple[int, ...], StoredSlice] = {}  # by offset, since several ranks may hold copies
    for rank, shard in enumerate(shards):
        require(
            rule.accepts(shard.shape, size),
            f"{name} is {list(shard.shape)} on rank {rank} of {size} in {folder}, but the model has "
            f"{list(rule.local_shape(size))} there.",
        )
        for part in rule.global_slices(shard, rank, size):
            load = partial(_load_shard, folder / f"mp_rank_{rank:02d}*", name, part.view)
            slices.setdefault(part.offset, StoredSlice(part.offset, tuple(part.view.shape), load))
    ends = ([a + b for a, b in zip(part.offset, part.shape, strict=True)] for part in slices.values())
    shape = tuple(map(max, zip(*ends, strict=True)))
    return StoredTensor(shape, shards[0].dtype, tuple(slices.values()))


def _load_shard(files: Path, name: str, view: Tensor, index: Any) -> Tensor:
    untrusted.require_finite(view[index], name, files)
    return view[index]


def open_legacy(folder: Path) -> tuple[dict[str, list[Tensor]], Any]:
    """The mapped local tensors of the tensor-parallel ranks, in order, by name with global layer number; and the
    arguments of the program that trained.

    Raises ConfigurationError: a rank's file is missing, torn or refused, or has the names of an older Megatron.
    """
    files: dict[tuple[int, int], Path] = {}  # by tensor-parallel rank and pipeline stage
    for path in sorted(folder.glob("mp_rank_*")):
        match = RANK_FOLDER.fullmatch(path.name)
        if match is None:
            raise ConfigurationError(f"{path} has expert parallelism, which is not supported.")
        file = next((path / name for name in RANK_FILES if (path / name).is_file()), None)
        if file is None:
            raise ConfigurationError(f"{path} holds none of {', '.join(RANK_FILES)}: copy the checkpoint again.")
        files[int(match[1]), int(match[2] or 0)] = file
    num_tensor, num_stages = (max(place[axis] for place in files) + 1 for axis in (0, 1))
    missing = [f"mp_rank_{t:02d}_{p:03d}" for t in range(num_tensor) for p in range(num_stages) if (t, p) not in files]
    require(not missing, f"{folder} lacks the folders {listed(missing)} of its ranks: copy the checkpoint again.")
    contents = {place: load_inertly(path) for place, path in files.items()}
    tensors: dict[str, list[Tensor]] = defaultdict(list)
    for rank in range(num_tensor):
        for name, tensor in _whole_model([contents[rank, stage] for stage in range(num_stages)], folder):
            tensors[name].append(tensor)
    return tensors, contents[0, 0].get("args")


def _whole_model(stages: list[dict[str, Any]], folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of one tensor-parallel rank, with layers numbered over all stages and chunks."""
    first_layer = 0
    num_chunks = max(1, sum(bool(CHUNK.fullmatch(str(key))) for key in stages[0]))
    for chunk, stage in product(range(num_chunks), stages):
        held = stage.get(f"model{chunk}", stage.get("model") if chunk == 0 else None)
        if not isinstance(held, dict):
            raise ConfigurationError(f"{folder}: a rank's file holds no 'model': is it a checkpoint of Megatron-LM?")
        old = next((name for name in held if str(name).startswith(("language_model", "model.language_model"))), None)
        require(
            old is None,
            f"{folder} holds {old}, a name of Megatron-LM before megatron-core: convert it with Megatron-LM's "
            f"tools/checkpoint/convert.py (--loader legacy --saver core) first.",
        )
        parameters = {str(name): tensor for name, tensor in held.items() if isinstance(tensor, Tensor)}
        for name, tensor in parameters.items():
            yield LAYER.sub(lambda m: f"decoder.layers.{first_layer + int(m[1])}.", name), tensor  # noqa: B023
        first_layer += len({match[1] for name in parameters if (match := LAYER.match(name))})


# A base model by megatron-core's names.

STACK = re.compile(r"^(decoder\.layers\.)(?!\d)(.+)$")
# Transformer Engine's fused layers hold the norm before them.
FUSED_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
NO_WEIGHT = re.compile(r"^(chained_\d+\.)?(optimizer|rng|rerun)|_extra_state|inv_freq$")


@dataclass
class MegatronWeights:
    """The tensors of a checkpoint by megatron-core's names: global ones, which may be sent to other ranks before
    anything is read, or those of each tensor-parallel rank."""

    folder: Path
    tensors: Mapping[str, StoredTensor | list[Tensor]]
    arguments_of_ranks: Any = None
    counts: ReadCounts = field(default_factory=ReadCounts)

    @property
    def arguments(self) -> Any:
        """Megatron-LM's, or None."""
        common = self.folder / "common.pt"
        return load_inertly(common).get("args") if common.is_file() else self.arguments_of_ranks

    def find(self, rule: Rule, dtype: torch.dtype | None = None) -> StoredTensor | None:
        """A parameter as it is stored; for float32 the float32 copy of bf16 training, if the checkpoint has one."""
        names = [*spellings(rule.name)]
        names = [*map(master_key, names), *names] if dtype == torch.float32 else names
        name = next((name for name in names if name in self.tensors), "")
        tensor = self.tensors.get(name)
        return joined(tensor, name, rule, self.folder) if isinstance(tensor, list) else tensor

    def stored(self, rule: Rule, dtype: torch.dtype | None = None) -> StoredTensor:
        """What `find` returns of a parameter that `check` has seen."""
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
        """Whether rows of a matrix are contiguous in the files: not if they are of ranks that held columns."""
        stored = self.stored(rule, dtype)
        return all(part.shape[-1] == stored.shape[-1] for part in stored.slices)

    def check(self, rules: Mapping[str, Rule]) -> None:
        """Raise ConfigurationError that lists missing, extra and misshapen tensors."""
        names = self.tensors
        adapters = [name for name in names if ADAPTER in name and not NO_WEIGHT.search(name)]
        require(
            not adapters,
            f"{self.folder} holds adapters ({listed(adapters[:1])}, ...) and no base model: "
            f"megatron-peft convert merge merges them into their base.",
        )
        stored = {name: self.find(rule) for name, rule in rules.items()}
        known = {OUTPUT, *(spelling for name in rules for spelling in spellings(name))}  # a tied output is a copy
        problems = {
            "missing": [name for name, tensor in stored.items() if tensor is None],
            "not part of this model": [n for n in names if n not in known and not NO_WEIGHT.search(n)],
            "of the wrong shape": [
                f"{name} {list(tensor.shape)} instead of {list(rules[name].local_shape(1))}"
                for name, tensor in stored.items()
                if tensor is not None and not rules[name].accepts(tensor.shape, 1)
            ],
        }
        raise_problems(f"the tensors in {self.folder} do not fit its model.", problems)


def open_megatron(files: Path) -> MegatronWeights:
    """Open a folder that `megatron_files` returned. ConfigurationError: torn, incomplete or refused."""
    if not (files / INDEX).is_file():
        return MegatronWeights(files, *open_legacy(files))
    tensors: dict[str, StoredTensor] = {}
    for key, tensor in open_distributed(files).items():
        # megatron-core's default for uniform layers is a tensor that stacks all of them.
        if stack := STACK.match(key):
            tensors |= {f"{stack[1]}{n}.{stack[2]}": layer_of(tensor, n) for n in range(tensor.shape[0])}
        else:
            tensors[key] = tensor
    return MegatronWeights(files, tensors, counts=ReadCounts(headers=1))


def spellings(name: str) -> Iterator[str]:
    """megatron-core's names of a parameter: they depend on the layers that it builds the model with."""
    yield name
    for norm, fused in FUSED_NORMS.items():
        if f".{norm}" in name:
            yield name.replace(norm, fused)
