"""Golden's own parts: a changed bit is told, and so are other names; a tree gets the flags that it knows."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.golden import cases
from tests.golden.__main__ import main
from tests.golden.results import first_difference, first_far, quantities

SAVED = torch.tensor([[0.0, 1, 2], [3, 4, float("nan")]])
BASE = {"step 1: loss": 5.5, "step 1: grad_norm": 2.0, "saved a": SAVED, "answer 0: answers": ["1 2"]}
ONE_BIT = SAVED.view(torch.int32) + torch.tensor([[0, 0, 0], [0, 1, 0]], dtype=torch.int32)


def told(**changes: Any) -> str:
    return first_difference(BASE, {**BASE, **changes}) or "equal"


def test_first_changed_bit_is_told() -> None:
    assert first_difference(BASE, {**BASE, "saved a": SAVED.clone()}) is None
    assert "saved a [1, 1]: base 0x1.0000000000000p+2, working tree 0x1.0000020000000p+2 (1 of 6 differ)" in told(
        **{"saved a": ONE_BIT.view(torch.float32)}
    )
    assert "saved a [0, 0]: base 0x0.0p+0, working tree -0x0.0p+0" in told(**{"saved a": SAVED * -1})
    text = told(**{"step 1: grad_norm": 2.0000000000000004, "saved a": SAVED + 1})
    assert text.startswith("step 1: grad_norm: base 0x1.0000000000000p+1, working tree 0x1.0000000000001p+1\n")
    assert "1 of step, 1 of saved; 4 quantities" in text


def test_a_loss_in_chunks_that_is_not_near_is_told() -> None:
    whole = {"step 1: loss": 2.0, "step 1: grad_norm": 1.0, "step 2: loss": 1.0, "step 2: validation_loss": 1.0}
    assert first_far({**whole, "step 1: loss": 2.000001, "step 1: grad_norm": 3.0}, whole) is None
    told = first_far({**whole, "step 2: validation_loss": 1.00001}, whole)
    assert told == "step 2: validation_loss: in chunks 1.00001, of whole logits 1.0"
    assert first_far({**whole, "step 2: loss": float("nan")}, whole) is not None


def test_other_names_kinds_and_answers_are_told() -> None:
    without = {name: value for name, value in BASE.items() if name != "saved a"}
    assert "saved a: only in the base" in (first_difference(BASE, without) or "")
    assert "saved b: only in the working tree" in told(**{"saved b": SAVED})
    assert "saved a: base float32 [2, 3], working tree float64 [2, 3]" in told(**{"saved a": SAVED.double()})
    assert "answer 0: answers: base ['1 2'], working tree ['1 3']" in told(**{"answer 0: answers": ["1 3"]})


def test_a_changed_word_number_or_exit_code_of_a_command_is_told(tmp_path: Path) -> None:
    def told(name: str, err: str = "wrong, see {}/a in {}\nagain", code: str = "2", hours: float = 0.3) -> str:
        folder, tree = tmp_path / name, tmp_path / "base"
        folder.mkdir()
        said = {"line": "plan", "cwd": str(folder), "tree": str(tree), "exit_code": code, "out": ""}
        (folder / "said.jsonl").write_text(json.dumps({**said, "err": err.format(folder, tree)}) + "\n")
        (folder / "plan.json").write_text(json.dumps({"layouts": [{"hours": hours}]}))
        return first_difference(quantities(tmp_path / "first"), quantities(folder)) or "equal"

    assert told("first") == told("same") == "equal"
    text = told("word", "wrong, see {}/b in {}\nagain")
    assert "err 1 of plan: base 'wrong, see FOLDER/a in TREE', working tree 'wrong, see FOLDER/b in TREE'" in text
    assert "err 2 of plan: only in the base" in told("shorter", "wrong, see {}/a in {}")
    assert "exit_code of plan: base '2', working tree '1'" in told("code", code="1")
    assert "plan.json: layouts/0/hours: base 0x1.3333333333333p-2" in told("number", hours=0.30000000000000004)


def test_tree_gets_the_flags_that_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"--interval": "--every", "--update manifold": "--update riemannian", "--lr": "--rate"}
    words = "--interval 3 --lr-decay cosine --update manifold".split()
    old = "--every N --lr-decay {cosine} --rate X --update {structured,riemannian}"
    assert cases.spelled(words, old, changes) == "--every 3 --lr-decay cosine --update riemannian".split()
    assert cases.spelled(words, "--interval N --lr X --update {manifold}", changes) == words
    monkeypatch.setattr(cases, "NAMES", {r"\.adapter\.lora_(.)$": r".adapter.\1"})
    assert cases.newest_name("layer.adapter.lora_a") == cases.newest_name("layer.adapter.a") == "layer.adapter.a"


def test_every_method_stands_at_every_layout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(cases.SAID) + 16 * 5 + 2 + 1
    before = signal.getsignal(signal.SIGTERM)
    assert main(["--only", "no such case"]) == 2
    assert signal.getsignal(signal.SIGTERM) == before
