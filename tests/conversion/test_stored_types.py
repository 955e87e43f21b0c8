from __future__ import annotations

import pytest
import torch

from megatron_peft.config import ConfigurationError
from megatron_peft.conversion.inventory import NUMBER_TYPES
from megatron_peft.conversion.stored_types import stored_type, type_flag


def test_every_number_type_that_a_folder_may_have_is_known() -> None:
    assert {stored_type(name) for name in NUMBER_TYPES} == {torch.float64, torch.float32, torch.float16, torch.bfloat16}


def test_types_of_the_flag() -> None:
    assert type_flag("bfloat16") is torch.bfloat16
    assert type_flag(None) is None
    with pytest.raises(ConfigurationError, match="--dtype int8 is none of float32, bfloat16, float16"):
        type_flag("int8")
