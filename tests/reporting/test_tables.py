"""Tables as Markdown, CSV and LaTeX; Table I of our runs with its test, the paper's own, and steps to LoRA's loss."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.reporting import speed_table
from megatron_peft.reporting.paper import entry
from megatron_peft.reporting.results import Results
from megatron_peft.reporting.table import Table, latex_text, number
from megatron_peft.reporting.table1 import check_paper_names, reference_method, rows
from tests.experiment.small_experiment import content
from tests.reporting import small_results
from tests.reporting.small_results import METHODS, as_the_paper, results

TABLE = Table("A & B", ("what", "one", "two"), (("x|y", "*1.5", "2_0"), ("", "±", "–")), note="100% sure")


def test_markdown_has_a_rule_and_escapes_bars() -> None:
    lines = TABLE.markdown().splitlines()
    assert lines[0] == "**A & B**" and lines[-1] == "100% sure"
    assert lines[2:5] == ["| what | one | two |", "| --- | ---: | ---: |", "| x\\|y | **1.5** | 2_0 |"]


def test_csv_is_read_back_without_marks() -> None:
    read = list(csv.reader(io.StringIO(TABLE.csv())))
    assert read == [["what", "one", "two"], ["x|y", "1.5", "2_0"], ["", "±", "–"]]


def test_latex_is_escaped_and_every_row_has_all_columns() -> None:
    text = TABLE.latex()
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert [row.replace(r"\&", "").count("&") for row in rows] == [2, 2, 2]
    assert rows[1] == r"x|y & \textbf{1.5} & 2\_0 \\" and rows[2] == r" & $\pm$ & -- \\"
    assert r"\caption{A \& B. 100\% sure}" in text and r"\begin{tabular}{lrr}" in text


@pytest.mark.parametrize(
    ("text", "escaped"), [("a\\b", r"a\textbackslash{}b"), ("{x}", r"\{x\}"), ("1 ≥ 0", r"1 $\ge$ 0")]
)
def test_latex_text_is_escaped_once(text: str, escaped: str) -> None:
    assert latex_text(text) == escaped


def test_groups_are_parted_by_rules() -> None:
    lines = Table("t", ("a", "b"), (("x", "1"), ("", "2"), ("y", "3"))).latex().splitlines()[4:-2]
    assert " ".join(lines) == r"\hline a & b \\ \hline x & 1 \\  & 2 \\ \hline y & 3 \\ \hline"


def test_numbers_have_four_digits_or_so() -> None:
    texts = {1.70449: "1.704", 20.13: "20.13", 192.55: "192.6", None: "–", -0.5: "-0.500"}
    assert {value: number(value) for value in texts} == texts
    assert number(0.25, signed=True) == "+0.250"


def test_mean_spread_and_test_are_of_the_three_runs(found: Results) -> None:
    lora, lora_ga, hybrid = rows(found, "hybrid")[:3]
    assert lora.runs == pytest.approx((2.02, 2.04, 2.12)) and lora.mean == pytest.approx(2.06)
    assert lora.deviation == pytest.approx(0.05292, rel=1e-3)  # n - 1
    assert lora.against is not None and lora.against.difference == pytest.approx(0.43)
    assert lora_ga.against is None, "its runs differ from the Hybrid's by the same each: no spread, no test"
    assert hybrid.against is None


def test_reference_is_the_hybrid_or_the_one_asked_for(found: Results) -> None:
    assert reference_method(found, None) == "hybrid" and reference_method(found, "lora") == "lora"


def test_paper_names_are_held_against_the_paper(tmp_path: Path) -> None:
    check_paper_names(as_the_paper(tmp_path))
    models = {"tiny": {**content()["models"]["tiny"], "paper": "GPT-2"}}
    with pytest.raises(ConfigurationError, match="models.tiny.paper is 'GPT-2'; the paper has Llama3.1-405B, "):
        check_paper_names(as_the_paper(tmp_path, models=models))


def test_entries_of_the_paper_are_found_by_their_place() -> None:
    hybrid, drawn = entry("GLUE", "Hybrid", "Llama3.1-405B"), entry("HumanEval", "Hybrid", "Llama3.1-405B", "pass@10")
    assert hybrid is not None and (hybrid.runs, hybrid.average) == ((91.7, 93.1, 92.1), 92.3)
    assert drawn is not None and drawn.average == 77.8
    missing = ("HumanEval", "Hybrid", "Llama3.1-405B"), (None, "Hybrid", "Llama3.1-405B")
    assert {entry(*place) for place in (*missing, ("HumanEval", "Hybrid", "Llama3.3-70B", "pass@1"))} == {None}


def test_without_lora_there_is_no_table_of_speed(tmp_path: Path) -> None:
    methods = {name: METHODS[name] for name in ("lora-ga", "hybrid")}
    assert speed_table.table(results(tmp_path, methods=methods), "tiny", "talk") is None


def test_loss_that_is_never_reached_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = {"lora": METHODS["lora"], "slow": {"flags": {"peft-method": "boft"}, "grid": {"lr": [0.1, 0.4]}}}
    monkeypatch.setitem(small_results.LOSSES, "slow", 9.0)
    monkeypatch.setitem(small_results.BETTER, "slow", "0.4")
    speeds = speed_table.table(results(tmp_path, methods=methods), "tiny", "talk")
    assert speeds is not None and speeds.rows[0][1:] == ("not reached (0/3)",) * 3
