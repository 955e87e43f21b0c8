from __future__ import annotations

import inspect

import pytest

from megatron_peft.adapters.low_rank import LowRank
from megatron_peft.adapters.registry import adapter_builder
from megatron_peft.config import PEFT_METHODS


@pytest.mark.parametrize("method", [method for method in PEFT_METHODS if method != "full"])
def test_all_adapters_are_made_from_the_same_arguments(method):
    assert inspect.signature(adapter_builder(method)).parameters == inspect.signature(LowRank).parameters
