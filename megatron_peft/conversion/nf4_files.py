"""A Hugging Face folder that bitsandbytes has quantized to NF4, read as codes and scales or as what these stand for.

A matrix that is quantized again need not get its codes back: where the scales are quantized too, a block's can be below
0, or above 0 for a block of zeros.
"""

from importlib import import_module
from math import prod
from typing import Any

import torch
from torch import Tensor

from megatron_peft.config import require, require_packages, untrusted
from megatron_peft.config.model import BLOCK
from megatron_peft.config.untrusted import parse_json
from megatron_peft.conversion.hf_files import Header, Source, raise_problems
from megatron_peft.models.rules import Index, RowRange, Rule
from megatron_peft.models.shape import is_size

STATE = ".quant_state.bitsandbytes__nf4"  # what bitsandbytes keeps beside a weight; JSON in bytes
BESIDE = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE)
NESTED_BLOCK = 256  # scales that share one of their own, where these are quantized too


class NF4Source(Source):
    """Its `headers` are those of the matrices, in float32; `read_codes` and `read_scales` are for those `in_codes`."""

    def __init__(self, source: Source) -> None:
        super().__init__(source.folder, dict(source.headers))
        self.counts, self._stored = source.counts, source.headers
        self._whole_scales: tuple[str, Tensor] = "", torch.empty(0)  # of one matrix
        self._states: dict[str, dict[str, Any]] = {}
        for name in [name.removesuffix(STATE) for name in source.headers if name.endswith(STATE)]:
            self._states[name] = self._state(name)
            self.headers[name] = Header(self._stored[name].file, tuple(self._states[name]["shape"]), "F32")
        for name in [name + part for name in self._states for part in BESIDE]:
            self.headers.pop(name, None)
        self._open = None  # it may be sent to other ranks
        self.in_codes = frozenset(self._states)

    def slice(self, name: str, index: Index) -> Tensor:
        """`tensor[index]` as `Source` gives it; of a quantized one in float32."""
        if name not in self._states:
            return super().slice(name, index)
        codes, scales = self._codes(name, index), self._scales(name, index)
        shape = torch.Size((len(codes), self.headers[name].shape[1]))
        state = _library().QuantState(scales.flatten(), shape, dtype=torch.float32, blocksize=BLOCK, quant_type="nf4")
        return _library().dequantize_4bit(codes.view(-1, 1), state)[(slice(None), *index[1:])]

    def read_codes(self, rule: Rule, rows: RowRange, target: Tensor) -> None:
        """Fill `target` [rows, in / 2] with the codes of some rows, two a byte."""
        target.copy_(self._codes(rows.name, (rows.hf,)))

    def read_scales(self, rule: Rule, rows: RowRange, target: Tensor) -> None:
        """Fill `target` [rows, in / 64] with the scales of some rows, in float32."""
        target.copy_(self._scales(rows.name, (rows.hf,)))

    def _codes(self, name: str, index: Index) -> Tensor:
        num_rows, width = self.headers[name].shape
        first, stop, _ = index[0].indices(num_rows)
        return self._elements(name, first * width // 2, stop * width // 2).view(-1, width // 2)

    def _scales(self, name: str, index: Index) -> Tensor:
        return self._scales_of(name).view(self.headers[name].shape[0], -1)[index[0]]

    def _elements(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements of a stored tensor, which may be a weight's codes."""
        return self.values(name, self._stored[name], (slice(start, stop),)).clone()

    def _scales_of(self, name: str) -> Tensor:
        """The scales of a whole matrix in float32, made once where they are quantized too."""
        if self._whole_scales[0] != name:
            scales, state = self._elements(f"{name}.absmax"), self._states[name]
            if "nested_offset" in state:
                nested = [self._elements(f"{name}.nested_{part}") for part in ("absmax", "quant_map")]
                second = _library().QuantState(*nested[:1], code=nested[1], blocksize=NESTED_BLOCK, dtype=torch.float32)
                scales = _library().dequantize_blockwise(scales, second) + state["nested_offset"]
            untrusted.require_finite(scales, f"the scales of {name}", self._stored[name].file)
            self._whole_scales = name, scales.float()
        return self._whole_scales[1]

    def _state(self, name: str) -> dict[str, Any]:
        """What bitsandbytes says of a weight, compared with the tensors beside it."""
        place = f"{name}{STATE} in {self._stored[name + STATE].file}"
        state = parse_json(bytes(self._elements(name + STATE).tolist()), place)
        shape: Any = state.get("shape") if isinstance(state, dict) else None
        is_matrix = isinstance(shape, list) and len(shape) == 2 and all(is_size(side) for side in shape)
        message = f"{place} is not of a matrix in blocks of {BLOCK} of a row."
        require(is_matrix and shape[1] % BLOCK == 0, message)
        wanted = {"quant_type": "nf4", "blocksize": BLOCK}
        if "nested_offset" in state:
            wanted |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
        odd = [f"{key} {str(state.get(key))[:40]}" for key, value in wanted.items() if state.get(key) != value]
        odd += ["nested_offset"] * (type(state.get("nested_offset", 0.0)) not in (int, float))
        packed = self._stored[name].dtype if name in self._stored else "U8"
        odd += [f"codes packed as {packed}"] * (packed not in ("U8", "uint8"))
        require(
            not odd,
            f"{place} has {', '.join(odd)}, which is not read: blocks of {BLOCK} in NF4 are, with "
            f"bnb_4bit_quant_storage uint8. Quantize the model so, or take the one that it was made from, with "
            f"--base-precision nf4.",
        )
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
