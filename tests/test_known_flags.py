"""Whatever is a flag of Megatron is known: served, or refused with a reason."""

from __future__ import annotations

import pytest

from megatron_peft.config import flag
from megatron_peft.known_flags import known_flags, why_not_served
from megatron_peft.megatron_fields import SOURCES, MegatronField, megatron_fields


@pytest.mark.parametrize("class_name", SOURCES)
def test_every_field_of_megatron_core_is_served_or_refused(class_name: str) -> None:
    known = known_flags()
    fields = megatron_fields(class_name).values()
    names = [name for one in fields for name in (flag(one.name), *one.flags)]
    assert [name for name in names if name not in known or known[name] == ""] == []


def test_a_field_of_a_newer_megatron_core_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    field = MegatronField("quantum_speedup", "bool", "", ())
    monkeypatch.setattr("megatron_peft.known_flags.megatron_fields", lambda name: {"quantum_speedup": field})
    assert "--quantum-speedup is a Megatron flag" in why_not_served("--quantum-speedup")
    assert "--no-quantum-speedup is a Megatron flag" in why_not_served("--no-quantum-speedup")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("--trian-iters", "--trian-iters is not a known flag; did you mean --train-iters?"),
        ("--num-expert", "did you mean --num-experts, which is Megatron's and not served here?"),
        ("--moe-of-tomorrow", "does not serve (mixture of experts)"),
        ("--wibble", "--wibble is not a known flag; --help lists them."),
    ],
)
def test_an_unknown_flag_is_told_from_a_refused_one(name: str, told: str) -> None:
    assert told in why_not_served(name)
