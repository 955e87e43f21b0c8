"""The adapter methods by name: `PEFT_METHODS` in `config/peft.py`. A new method is one new file and one line there."""

from collections.abc import Callable
from importlib import import_module

import torch
from torch import nn

from megatron_peft.config import PEFT_METHODS, PeftConfig
from megatron_peft.parallel.layout import LinearLayout

AdapterBuilder = Callable[[LinearLayout, PeftConfig, str, int, torch.dtype], nn.Module]


def adapter_builder(method: str) -> AdapterBuilder:
    """(layout, peft, name, seed, dtype) -> the adapter of one layer, for any --peft-method but full."""
    module, _, name = PEFT_METHODS[method].partition(":")
    return getattr(import_module(module), name)
