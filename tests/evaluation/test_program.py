"""Settings and flags are looked at before a world is made; what runs in it gets both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_peft.config import ConfigurationError, RunConfig
from megatron_peft.evaluation.program import run_on_a_model
from tests.tiny_llama import save_llama


def _never(config: RunConfig, settings: int) -> None:
    raise AssertionError("the program was run")


def _refused() -> int:
    raise ConfigurationError("--top-p is 2.")


@pytest.mark.parametrize(
    ("settings", "flags", "told"),
    [
        (_refused, [], "p.py: error: --top-p is 2.\n"),
        (lambda: 1, ["--load", "nowhere"], "p.py: error: nowhere holds no checkpoint"),
        (lambda: 1, ["--pretrained-checkpoint", "nowhere", "--wibble"], "p.py: error: several things are wrong:"),
    ],
)
def test_what_is_wrong_is_told_under_the_programs_name(capsys, settings, flags, told):
    with pytest.raises(SystemExit, match="2"):
        run_on_a_model(_never, settings, flags, "p.py")
    assert capsys.readouterr().err.startswith(told)
    assert not dist.is_initialized()


def test_the_program_runs_in_a_world_with_settings_and_model(tmp_path: Path):
    base, seen = str(save_llama(tmp_path / "base", num_hidden_layers=1)), []

    def main(config: RunConfig, settings: str) -> None:
        seen.append((config.model.pretrained_checkpoint, settings, dist.get_world_size()))

    run_on_a_model(main, lambda: "settings", ["--pretrained-checkpoint", base], "p.py")
    assert seen == [(base, "settings", 1)]
    assert not dist.is_initialized()
