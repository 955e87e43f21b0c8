"""A Hugging Face folder that bitsandbytes has quantized to NF4, read as the matrices that its codes stand for.

Quantizing such a matrix again gives the codes and scales of the folder, bit for bit: in each block the largest number
has the code of 1 or of -1, so that its size is the scale. Blocks in which it has another are refused.
"""

from importlib import import_module
from math import prod
from typing import Any

import torch
from torch import Tensor

from megatron_peft.config import require, require_packages
from megatron_peft.config.model import BLOCK
from megatron_peft.config.untrusted import parse_json
from megatron_peft.conversion.hf_files import Header, Source, raise_problems
from megatron_peft.models.rules import Index
from megatron_peft.models.shape import is_size

STATE = ".quant_state.bitsandbytes__nf4"  # what bitsandbytes keeps beside a weight; JSON in bytes
BESIDE = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE)
ENDS = (0, 15)  # codes of -1 and 1
NESTED_BLOCK = 256  # scales that share one of their own, where these are quantized too


class NF4Source(Source):
    """Its `headers` are those of the matrices, in float32."""

    def __init__(self, source: Source) -> None:
        super().__init__(source.folder, dict(source.headers))
        self.counts, self._stored = source.counts, source.headers
        self._scales: tuple[str, Tensor] = "", torch.empty(0)  # of one matrix
        self._states: dict[str, dict[str, Any]] = {}
        for name in [name.removesuffix(STATE) for name in source.headers if name.endswith(STATE)]:
            self._states[name] = self._state(name)
            self.headers[name] = Header(self._stored[name].file, tuple(self._states[name]["shape"]), "F32")
        for name in [name + part for name in self._states for part in BESIDE]:
            self.headers.pop(name, None)
        self._open = None  # it may be sent to other ranks

    def slice(self, name: str, index: Index) -> Tensor:
        """`tensor[index]` as `Source` gives it; of a quantized one in float32."""
        if name not in self._states:
            return super().slice(name, index)
        num_rows, width = self.headers[name].shape
        first, stop, _ = index[0].indices(num_rows)
        codes = self._elements(name, first * width // 2, stop * width // 2)
        scales = self._scales_of(name)[first * width // BLOCK : stop * width // BLOCK]
        largest = sum((codes >> shift & 15 == end) for shift in (0, 4) for end in ENDS).view(-1, BLOCK // 2).any(1)
        require(
            bool((largest | (scales == 0)).all()) and bool((scales >= 0).all()),
            f"{self._stored[name].file} holds blocks of {name} that bitsandbytes does not make: a run would round them "
            f"to others. Quantize the model again.",
        )
        state = _library().QuantState(
            scales, (stop - first, width), dtype=torch.float32, blocksize=BLOCK, quant_type="nf4"
        )
        return _library().dequantize_4bit(codes, state)[(slice(None), *index[1:])]

    def _elements(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements of a stored tensor, which may be a weight's codes."""
        return self.values(name, self._stored[name], (slice(start, stop),)).clone()

    def _scales_of(self, name: str) -> Tensor:
        """The scales of a whole matrix in float32, made once where they are quantized too."""
        if self._scales[0] != name:
            scales, state = self._elements(f"{name}.absmax"), self._states[name]
            if "nested_offset" in state:
                nested = [self._elements(f"{name}.nested_{part}") for part in ("absmax", "quant_map")]
                second = _library().QuantState(*nested[:1], code=nested[1], blocksize=NESTED_BLOCK, dtype=torch.float32)
                scales = _library().dequantize_blockwise(scales, second) + state["nested_offset"]
            self._scales = name, scales.float()
        return self._scales[1]

    def _state(self, name: str) -> dict[str, Any]:
        """What bitsandbytes says of a weight, compared with the tensors beside it."""
        place = f"{name}{STATE} in {self._stored[name + STATE].file}"
        state = parse_json(bytes(self._elements(name + STATE).tolist()), place)
        shape: Any = state.get("shape") if isinstance(state, dict) else None
        is_matrix = isinstance(shape, list) and len(shape) == 2 and all(is_size(side) for side in shape)
        told = f"{place} is not of a matrix in blocks of {BLOCK} of a row."
        require(is_matrix and shape[1] % BLOCK == 0, told)
        wanted = {"quant_type": "nf4", "blocksize": BLOCK}
        if "nested_offset" in state:
            wanted |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
        odd = [f"{key} {str(state.get(key))[:40]}" for key, value in wanted.items() if state.get(key) != value]
        odd += ["nested_offset"] * (type(state.get("nested_offset", 0.0)) not in (int, float))
        require(not odd, f"{place} has {', '.join(odd)}, which is not read: blocks of {BLOCK} in NF4 are.")
        num = prod(shape)
        sizes = {name: (num // 2, 1), f"{name}.absmax": (num // BLOCK,)}
        if "nested_offset" in state:
            sizes |= {f"{name}.nested_absmax": (-(-num // BLOCK // NESTED_BLOCK),), f"{name}.nested_quant_map": (256,)}
        wrong = [part for part, size in sizes.items() if part not in self._stored or self._stored[part].shape != size]
        raise_problems(f"{self.folder} is damaged: copy it again.", {"tensors missing or of the wrong size": wrong})
        return state


def _library() -> Any:
    """bitsandbytes, which is imported where a folder needs it."""
    return import_module("bitsandbytes.functional")


def unpacked(source: Source) -> Source:
    """The source itself, or an `NF4Source` of a folder that bitsandbytes has quantized."""
    if not any(name.endswith(STATE) for name in source.headers):
        return source
    require_packages("nf4", "bitsandbytes")
    return NF4Source(source)
