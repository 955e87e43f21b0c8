"""Read Hugging Face weight files slice by slice, check their tensors, and copy or write the files beside them."""

import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_peft.checkpoint.safe_pickle import DAMAGE_ERRORS, plain_reason
from megatron_peft.config import ConfigurationError, DataConfig, require, untrusted
from megatron_peft.models.rules import HFTensor, Index, RowRange, Rule

logger = logging.getLogger(__name__)

# A source maps its file again after this many bytes of tensors: pages that were read stay resident until the file is
# unmapped.
MAPPED_BYTES = 64 * 2**20
MAX_READ_BYTES = 2**30  # of one read; Linux reads at most 2 GiB at once
MAX_LISTED = 8  # names in one error
# First bytes of files that only look like weights, and the error for each.
LOOKALIKES = {
    b"version https://git-lfs": "it is a Git LFS pointer, not the weights. Fetch them with `git lfs pull`.",
    b"\x80\x02\x8a\x0al\xfc\x9cF": "it has the format of torch before 1.6, which cannot be memory-mapped. "
    "Convert it to safetensors.",
}
# The first of these that exists is read, as in transformers.
WEIGHT_FILES = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


@dataclass(frozen=True)
class Header:
    """File, shape and type of a tensor, read without its data."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # the name that the file format uses
    start: int | None = None  # the first byte, if the elements lie in order; None if only the format's reader knows

    @property
    def torch_dtype(self) -> torch.dtype:
        """Its type in torch. KeyError: not one of NUMBER_TYPES."""
        return NUMBER_TYPES[self.dtype]


@dataclass
class ReadCounts:
    """What one rank has read."""

    headers: int = 0  # of files; the index of a distributed checkpoint is one
    opens: int = 0  # of files for their weights
    reads: int = 0
    bytes: int = 0  # in the stored types


class SafetensorsFile:
    """A .safetensors file. Opening it checks that its length matches its header."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = safe_open(path, framework="pt")

    def headers(self) -> dict[str, Header]:
        """Shape, type and first byte of every tensor, by name."""
        headers: dict[str, Header] = {}
        start: int | None = self.path.stat().st_size  # safetensors refuses gaps, so sizes tell places
        for name in reversed(self._file.offset_keys()):
            tensor = self._file.get_slice(name)
            shape, dtype = tuple(tensor.get_shape()), SAFETENSORS_TYPES.get(tensor.get_dtype())
            start = None if start is None or dtype is None else start - prod(shape) * dtype.itemsize
            headers[name] = Header(self.path, shape, tensor.get_dtype(), start)
        return {name: headers[name] for name in self._file.keys()}

    def view(self, name: str, index: Index) -> Tensor:
        """`tensor[index]`, lazily."""
        return self._file.get_slice(name)[index]


class TorchFile:
    """A memory-mapped pytorch_model*.bin; only tensors are unpickled."""

    def __init__(self, path: Path) -> None:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        require(
            isinstance(state, dict) and all(isinstance(name, str) for name in state),
            f"{path} is not a state_dict of tensors. Save the model's state_dict, or convert it to safetensors.",
        )
        self.path = path
        self._tensors: dict[str, Tensor] = {name: value for name, value in state.items() if torch.is_tensor(value)}
        odd = [name for name, tensor in self._tensors.items() if tensor.layout != torch.strided or tensor.is_meta]
        require(not odd, f"{path} holds tensors that are sparse or empty: {listed(odd)}. Convert it to safetensors.")

    def headers(self) -> dict[str, Header]:
        """Shape and type of every tensor, by name."""
        return {
            name: Header(self.path, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in self._tensors.items()
        }

    def view(self, name: str, index: Index) -> Tensor:
        """`tensor[index]`, a view."""
        return self._tensors[name][index]


FORMATS: dict[str, type[SafetensorsFile] | type[TorchFile]] = {".safetensors": SafetensorsFile, ".bin": TorchFile}


class Source:
    """The weights of a Hugging Face folder. It may be sent to other ranks before anything is read."""

    def __init__(self, folder: Path, headers: dict[str, Header]) -> None:
        self.folder = folder
        self.headers = headers
        self.counts = ReadCounts()
        self._open: SafetensorsFile | TorchFile | None = None
        self._mapped_bytes = 0
        self._unmapped: dict[Path, BinaryIO] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What is sent to other ranks: not the files that this one has open."""
        return self.__dict__ | {"_open": None, "_mapped_bytes": 0, "_unmapped": {}}

    def slice(self, name: str, index: Index) -> Tensor:
        """`tensor[index]`. It may be a view of the mapped file: copy it at once and keep no reference.

        Whole rows are read with one call, where it is known where they lie: on a parallel file system that is faster
        than the page faults of a mapped file.

        Raises ConfigurationError: the file cannot be read, was cut short after its header was checked, or holds a value
        that is not finite.
        """
        return self.values(name, self.headers[name], index)

    def values(self, name: str, header: Header, index: Index) -> Tensor:
        """`slice` of the tensor that a header describes."""
        if header.start is not None and is_whole_rows(index, header.shape):
            values = self._rows(header, header.start, index)
        else:
            if self._open is None or self._open.path != header.file or self._mapped_bytes > MAPPED_BYTES:
                self._open, self._mapped_bytes = _open_file(header.file), 0
                self.counts.opens += 1
            values = self._open.view(name, index)
            self.counts.reads += 1
            self.counts.bytes += values.nbytes
            self._mapped_bytes += prod(header.shape) * values.element_size()
        untrusted.require_finite(values, name, header.file)
        return values

    def _rows(self, header: Header, start: int, index: Index) -> Tensor:
        first, stop, _ = index[0].indices(header.shape[0])
        values = torch.empty((stop - first, *header.shape[1:]), dtype=header.torch_dtype)
        start += first * prod(header.shape[1:]) * values.element_size()
        memory: Any = values.flatten().view(torch.uint8).numpy()
        try:
            if header.file not in self._unmapped:
                untrusted.require_regular(header.file)
                self._unmapped[header.file] = header.file.open("rb", buffering=0)
                self.counts.opens += 1
            file = self._unmapped[header.file]
            while len(memory):
                num_bytes = os.preadv(file.fileno(), [memory[:MAX_READ_BYTES]], start)
                message = f"{file.name} cannot be read: it was cut short while it was read. Copy it again."
                require(num_bytes > 0, message)
                self.counts.reads += 1
                self.counts.bytes += num_bytes
                memory, start = memory[num_bytes:], start + num_bytes
        except OSError as error:
            raise ConfigurationError(f"{header.file} cannot be read: {error.strerror}.") from error
        return values

    def read(self, rule: Rule, local: Tensor, rank: int, size: int) -> None:
        """Fill a tensor-parallel rank's local tensor in place, in its own dtype and on its own device."""
        rule.read(local, self, rank, size)

    def read_rows(self, rule: Rule, rows: RowRange, target: Tensor) -> None:
        """Fill `target` with some rows of a parameter, in its own dtype and on its own device."""
        target.copy_(self.slice(rows.name, (rows.hf,)))

    def stored_type(self, rule: Rule) -> torch.dtype:
        """Type of a parameter; the wider one if the rule fuses tensors of several types."""
        return reduce(torch.promote_types, (self.headers[tensor.name].torch_dtype for tensor in rule.hf_tensors))

    def place(self, rule: Rule) -> tuple[str, int]:
        """File and first byte of a parameter's first tensor, to read parameters in that order."""
        header = self.headers[rule.hf_tensors[0].name]
        return str(header.file), header.start or 0

    def holds_whole_rows(self, rule: Rule, dtype: torch.dtype) -> bool:
        """Whether rows of a matrix are contiguous in the file, and columns are strided: always."""
        return True


def is_whole_rows(index: Index, shape: Sequence[int]) -> bool:
    """Whether `tensor[index]` of a tensor of this shape is some of its rows, which are contiguous in a file."""
    others = zip(index[1:], shape[1:], strict=False)
    return len(index) > 0 and all(range(length)[cut] == range(length) for cut, length in others)


def row_ranges(rule: Rule, granule: int = 1, max_elements: int | None = None) -> dict[str, list[RowRange]]:
    """The rows of each Hugging Face tensor of a parameter, by its name, in ranges that lie together on both sides.

    Ranges begin and end at multiples of `granule` in the parameter, as every run of consecutive rows does, and have at
    most `max_elements`, unless a granule has more.
    """
    columns = tuple(HFTensor(part.name, (part.shape[0], 1)) for part in rule.hf_tensors)
    rule_of_rows = replace(rule, hf_tensors=columns)
    places = rule_of_rows.write([torch.arange(rule_of_rows.local_shape(1)[0])[:, None]])
    ranges = {}
    for tensor in rule.hf_tensors:
        num_rows = max_elements // prod(tensor.shape[1:]) if max_elements else tensor.shape[0]
        step = max(num_rows // granule, 1) * granule
        rows = places[tensor.name].flatten().tolist()  # of the parameter
        ends = [row for row in range(1, len(rows)) if rows[row] != rows[row - 1] + 1]
        ranges[tensor.name] = [
            RowRange(tensor.name, slice(start, end), slice(rows[start], rows[start] + end - start))
            for first, stop in pairwise([0, *ends, len(rows)])
            for start in range(first, stop, step)
            for end in [min(start + step, stop)]
        ]
    return ranges


def open_source(folder: str | Path, weight_files: Sequence[str] = WEIGHT_FILES) -> Source:
    """Read the headers, and nothing else, of the first of `weight_files` that exists.

    Raises ConfigurationError: a file is missing, torn or unreadable, or lacks a tensor that the index lists.
    """
    folder = Path(folder)
    chosen = next((folder / name for name in weight_files if (folder / name).exists()), None)
    if chosen is None:
        raise ConfigurationError(
            f"--pretrained-checkpoint {folder} holds no weights: expected one of {', '.join(weight_files)}."
        )
    indexed = _read_index(chosen) if chosen.suffix == ".json" else {}
    headers: dict[str, Header] = {}
    paths = sorted({folder / file for file in indexed.values()}) or [chosen]
    for path in paths:
        headers |= _open_file(path).headers()
    missing = [f"{name} in {file}" for name, file in indexed.items() if name not in headers]
    require(not missing, f"{chosen} lists tensors that are missing: {listed(missing)}.")
    source = Source(folder, headers)
    source.counts.headers = len(paths)
    return source


def listed(names: Iterable[str]) -> str:
    """`a, b, c` with at most `MAX_LISTED` names and the count of the others."""
    names = list(names)
    more = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, of a sharded checkpoint."""
    try:
        weight_map = {str(name): str(file) for name, file in untrusted.read_json_object(path)["weight_map"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"{path} is not an index of weights ({error!r}): copy the file again.") from error
    files = weight_map.values()
    outside = [file for file in files if file != Path(file).name or file in ("", "..") or len(file) > 255]
    require(not outside, f"{path} is refused: it names {str(outside[:1])[:80]}, which is not the name of a file in it.")
    return weight_map


def _open_file(path: Path) -> SafetensorsFile | TorchFile:
    require(path.exists(), f"{path} is missing, but the index of the weights lists it: copy the folder again.")
    untrusted.require_regular(path)
    require(path.suffix in FORMATS, f"{path} is neither {' nor '.join(FORMATS)}.")
    try:
        return FORMATS[path.suffix](path)
    except ConfigurationError:
        raise
    except (*DAMAGE_ERRORS, OSError, SafetensorError) as error:
        reason = plain_reason(error)
        with path.open("rb") as file:
            start = file.read(max(map(len, LOOKALIKES)))
        why = next((text for magic, text in LOOKALIKES.items() if start.startswith(magic)), "")
        if isinstance(error, pickle.UnpicklingError):
            why = f"it holds more than tensors ({reason}). Convert it to safetensors."
        why = why or f"truncated or torn, {path.stat().st_size:,} bytes long ({reason}). Copy or download it again."
        raise ConfigurationError(f"{path} cannot be read: {why}") from error


SAFETENSORS_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Floating-point types by their names in safetensors and in torch; anything else is a quantized checkpoint.
NUMBER_TYPES = SAFETENSORS_TYPES | {str(dtype).removeprefix("torch."): dtype for dtype in SAFETENSORS_TYPES.values()}
INVERSE_FREQUENCIES = re.compile(r"(^|\.)rotary_emb\.inv_freq$")  # in old checkpoints
OUTPUT_WEIGHT = "lm_head.weight"  # in tied models too, if a program saved the embedding twice


def check_inventory(source: Source, expected: Mapping[str, tuple[int, ...]], tied_embeddings: bool) -> None:
    """Raise ConfigurationError that lists missing, extra, misshapen and quantized tensors."""
    headers = {
        name: header
        for name, header in source.headers.items()
        if name in expected or not (INVERSE_FREQUENCIES.search(name) or (tied_embeddings and name == OUTPUT_WEIGHT))
    }
    what = f"the tensors in {source.folder} do not fit its config.json."
    require_tensors(headers, expected, what, "not part of this model")


def require_tensors(
    headers: Mapping[str, Header], expected: Mapping[str, tuple[int, ...]], what: str, extra: str
) -> None:
    """Raise ConfigurationError, `what` and the tensors that do not fit; `extra` describes those not expected."""
    there = {name: headers[name] for name in expected if name in headers}
    problems = {
        "missing": [name for name in expected if name not in headers],
        extra: [name for name in headers if name not in expected],
        "of the wrong shape": [
            f"{name} {list(header.shape)} instead of {list(expected[name])}"
            for name, header in there.items()
            if header.shape != expected[name]
        ],
        "of an unsupported number type": [
            f"{name} {header.dtype}" for name, header in there.items() if header.dtype not in NUMBER_TYPES
        ],
    }
    raise_problems(what, problems)


def raise_problems(what: str, problems: Mapping[str, list[str]]) -> None:
    """Raise ConfigurationError with `what` and the names of each kind of problem, if there are any."""
    lines = [f"{len(names)} {kind}: {listed(names)}" for kind, names in problems.items() if names]
    require(not lines, f"{what} {'; '.join(lines)}.")


CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
# What is copied from a Hugging Face folder besides its weights; never code.
TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model"),
    "chat_template*",
)
SMALL_FILES = (CONFIG, GENERATION_CONFIG, *TOKENIZER_FILES)
TYPE_KEYS = ("dtype", "torch_dtype")  # in new and in old config.json


def copy_small_files(source: Path, target: Path, patterns: Iterable[str] = SMALL_FILES) -> None:
    """Copy config.json, generation settings and the tokenizer's files, as far as they exist, without permissions."""
    for path in _found(source, patterns):
        shutil.copyfile(path, target / path.name)


def copy_trained_tokenizer(data: DataConfig, target: Path) -> None:
    """Put a run's own tokenizer and chat template, if it had some, in the place of those of its base.

    A model in `target` then ends an answer with the end token of that tokenizer too.
    """
    folder, template = Path(data.tokenizer_model or ""), data.chat_template
    if data.tokenizer_model and not folder.is_dir():
        logger.warning("the tokenizer is the base's: the run's --tokenizer-model %s is no folder here", folder)
    elif data.tokenizer_model:
        for path in _found(target, TOKENIZER_FILES):
            path.unlink()
        copy_small_files(folder, target, TOKENIZER_FILES)
        _add_end_token(target)
    if template and "{" not in template and not Path(template).is_file():
        logger.warning("the chat template is the base's: the run's --chat-template %s is not here", template)
    elif template:
        text = template if "{" in template else untrusted.read_text(Path(template))
        (target / CHAT_TEMPLATE).write_text(text, encoding="utf-8")


def _add_end_token(folder: Path) -> None:
    def content(name: str) -> dict[str, Any]:
        return untrusted.read_json_object(folder / name) if (folder / name).is_file() else {}

    named = content("tokenizer_config.json").get("eos_token")
    text = named.get("content") if isinstance(named, dict) else named
    if text is None:
        return
    tokens = [token["id"] for token in content("tokenizer.json").get("added_tokens", ()) if token["content"] == text]
    for name in [name for name in (GENERATION_CONFIG, CONFIG) if content(name)][:1]:  # transformers reads the first
        config = content(name)
        ends = config.get("eos_token_id")
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        config["eos_token_id"] = [*ends, *(token for token in tokens if token not in ends)]
        (folder / name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _found(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]


def set_stored_type(folder: Path, dtypes: Iterable[torch.dtype]) -> None:
    """Set the dtype of config.json to that of the weights, in which transformers then loads them.

    It stays if the weights have several types. What was said of a quantization goes: written weights have none.
    """
    names = list({str(dtype).removeprefix("torch.") for dtype in dtypes})
    path = folder / CONFIG
    there = untrusted.read_json_object(path)
    config = {key: value for key, value in there.items() if key != "quantization_config"}
    keys = [key for key in TYPE_KEYS if config.get(key) is not None] or [TYPE_KEYS[0]]
    if len(names) == 1:
        config |= dict.fromkeys(keys, names[0])
    if config != there:
        write_config(folder, config)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """config.json as transformers writes it."""
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
