"""The weight of a frozen linear layer in four or eight bits, made dense for the moment of a product.

A block is 64 input features of one row, with one scale in float32. A slice of the matrix that cuts no block has the
codes of the whole one, so the layout changes no number.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from megatron_peft.config import require_packages
from megatron_peft.config.model import BLOCK
from megatron_peft.runtime.cpu_kernels import onednn_takes

ROWS_AT_ONCE = 256
LARGEST_FP8 = torch.finfo(torch.float8_e4m3fn).max


class QuantizedWeight(nn.Module):
    """This rank's slice of a matrix [out, in].

    nf4: the codes of bitsandbytes, two a byte, without its second quantization, whose offset is a mean over a whole
        tensor and would depend on the slice.
    fp8: float8_e4m3fn, the largest of a block at its largest number.

    Raises ConfigurationError: bitsandbytes is not installed.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, precision: str, shape: tuple[int, ...], dtype: torch.dtype, device: Any = None) -> None:
        super().__init__()
        self.precision, self.shape, self.dtype = precision, torch.Size(shape), dtype
        self.rounded_to = dtype  # of what the codes stand for; a model in float32 can have the numbers of a run in bf16
        (num_rows, width), device = shape, torch.cuda.current_device() if device is None else device
        is_nf4 = precision == "nf4"
        per_byte, kind = (2, torch.uint8) if is_nf4 else (1, torch.float8_e4m3fn)
        for name, part, its_type in (("codes", width // per_byte, kind), ("scales", width // BLOCK, torch.float32)):
            self.register_buffer(name, torch.empty((num_rows, part), dtype=its_type, device=device), persistent=False)
        self.library: Any = None
        if is_nf4:
            require_packages("nf4", "bitsandbytes")
            self.library = import_module("bitsandbytes.functional")

    @torch.no_grad()
    def fill_rows(self, rows: slice, values: Tensor) -> None:  # [rows, in], float32
        """Quantize some rows."""
        values = values.to(self.codes.device).contiguous()
        if self.library is None:
            blocks = values.view(len(values), -1, BLOCK)
            largest = blocks.abs().amax(-1)
            # By a tensor, since CUDA multiplies by the reciprocal of a Python scalar, which rounds differently.
            scales = largest / largest.new_full((), LARGEST_FP8)
            codes = blocks / scales.clamp(min=torch.finfo(scales.dtype).tiny).unsqueeze(-1)
        else:
            codes, state = self.library.quantize_4bit(values, blocksize=BLOCK, quant_type="nf4")
            scales = state.absmax
        self.codes[rows] = codes.reshape(len(values), -1).to(self.codes.dtype)
        self.scales[rows] = scales.view(len(values), -1)

    @torch.no_grad()
    def dense(self, rows: slice = slice(None)) -> Tensor:  # [out, in]
        """A new matrix in `dtype`, or some of its rows. Don't keep it: ask again in backward."""
        codes, scales = self.codes[rows], self.scales[rows]
        shape = torch.Size((len(codes), self.shape[1]))
        if self.library is None:
            blocks = codes.to(self.rounded_to).view(len(codes), -1, BLOCK)
            return blocks.mul_(scales.unsqueeze(-1)).view(shape).to(self.dtype)
        # Not with a buffer of all layers of a shape: bitsandbytes fills one on GPUs only, and each shape would hold its
        # own for the whole run, where the allocator lends all of them the same memory.
        state = self.library.QuantState(
            scales.flatten(), shape, dtype=self.rounded_to, blocksize=BLOCK, quant_type="nf4"
        )
        return self.library.dequantize_4bit(codes.view(-1, 1), state).to(self.dtype)


def dense(weight: Tensor) -> Tensor:
    """The matrix of a linear layer's `weight`: itself, or made of its quantized form."""
    quantized = getattr(weight, "quantized", None)
    return weight if quantized is None else quantized.dense()


def dense_rows(weight: Tensor, most_bytes: int) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a linear layer's `weight`, as many at a time as have the bytes, with their place.

    Those of a weight that is not quantized come all at once, unless oneDNN multiplies them.
    """
    quantized = getattr(weight, "quantized", None)
    is_whole = quantized is None and not onednn_takes(weight)
    num_rows = len(weight) if is_whole else max(1, most_bytes // (weight.itemsize * weight.shape[1]))
    for start in range(0, len(weight), num_rows):
        rows = slice(start, start + num_rows)
        yield rows, weight[rows] if quantized is None else quantized.dense(rows)


def stored_tensors(parameter: Any) -> list[Tensor]:
    """The tensors with a parameter's values: its own, or those of its quantized form."""
    quantized: QuantizedWeight | None = getattr(parameter, "quantized", None)
    return [parameter] if quantized is None else [quantized.codes, quantized.scales]


def trained_values(values: Tensor, precision: str, dtype: torch.dtype) -> Tensor:  # [out, in] -> [out, in]
    """What a run in `dtype` on a base of this precision computes with, in the type and on the device of `values`."""
    if precision == "run":
        return values
    quantized = QuantizedWeight(precision, values.shape, dtype, values.device)
    for start in range(0, len(values), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        quantized.fill_rows(rows, values[rows].float())
    return quantized.dense().to(values.dtype)


def weights_as(precision: str) -> AbstractContextManager[Any]:
    """The context that a weight is made in: without memory where it will be quantized."""
    return nullcontext() if precision == "run" else _MatricesWithoutMemory()


def quantize(layer: Any, precision: str) -> None:
    """Give the weight of a layer that was made in `weights_as(precision)` its quantized form."""
    if precision != "run":
        weight = layer.weight.requires_grad_(False)
        layer.quantized = QuantizedWeight(precision, weight.shape, weight.dtype)
        weight.quantized, layer.is_frozen = layer.quantized, True


class _MatricesWithoutMemory(TorchFunctionMode):
    """A context in which torch.empty makes matrices on the meta device, whatever it is told; vectors as ever."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "empty" and len(args) == 2:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)
