from __future__ import annotations

import inspect

import pytest

from megatron_peft.adapters.low_rank import LowRank
from megatron_peft.adapters.registry import ADAPTERS
from megatron_peft.config import PEFT_METHODS


def test_every_method_but_full_has_an_adapter():
    assert ADAPTERS.keys() == set(PEFT_METHODS) - {"full"}


@pytest.mark.parametrize("adapter", ADAPTERS.values())
def test_all_adapters_are_made_from_the_same_arguments(adapter):
    assert inspect.signature(adapter) == inspect.signature(LowRank)
