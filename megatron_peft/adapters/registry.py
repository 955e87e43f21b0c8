"""The adapter methods by name. A new method is one new file and one line here."""

from __future__ import annotations

from megatron_peft.adapters.boft import boft
from megatron_peft.adapters.hybrid import Hybrid
from megatron_peft.adapters.low_rank import LowRank
from megatron_peft.adapters.urnn import urnn

ADAPTERS = {"lora": LowRank, "lora-ga": LowRank, "boft": boft, "urnn": urnn, "hybrid": Hybrid}
