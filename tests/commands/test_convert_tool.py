"""megatron-peft convert as a user calls it."""

from pathlib import Path

import pytest

from megatron_peft.commands.convert import main
from megatron_peft.conversion import verify
from tests.conversion.megatron_folders import equal, save_random, tensors_of


def convert(command: str, source: Path, output: Path, *flags: str) -> int:
    return main([command, "--input", str(source), "--output", str(output), *flags])


def test_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = save_random(tmp_path / "hf")
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    assert convert("hf-to-megatron", original, megatron, "--make-vocab-size-divisible-by", "64") == 0
    assert convert("megatron-to-hf", megatron, back, "--max-shard-size", "2KB") == 0
    assert equal(tensors_of(back), tensors_of(original))
    assert (back / "model.safetensors.index.json").is_file()
    assert tuple(capsys.readouterr()) == (f"wrote {megatron}\nwrote {back}\n", "")


def test_verify_says_how_far_apart(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = verify.LogitComparison(verify.Difference(0.5, 100.0), [verify.Difference(0.25, 10.0)], 3, 4)
    monkeypatch.setattr(verify, "verify", lambda *_, **__: found)
    flags = ["verify", "--input", "a", "--output", "b", "--per-layer"]
    assert main(flags) == 1
    assert capsys.readouterr().out == (
        "layer   0: largest difference 0.25, relative 0.025\n"
        "logits: largest difference 0.5, relative 0.005 (above --tolerance 0.0001); largest logit 100; "
        "same best token at 3 of 4 positions\n"
    )
    assert main([*flags, "--tolerance", "0.01"]) == 0
