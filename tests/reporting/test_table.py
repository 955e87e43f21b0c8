from __future__ import annotations

import csv
import io

import pytest

from megatron_peft.reporting.table import Table, latex_text, number

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
    text = Table("t", ("a", "b"), (("x", "1"), ("", "2"), ("y", "3"))).latex()
    assert text.splitlines()[4:-2] == [
        r"\hline",
        r"a & b \\",
        r"\hline",
        r"x & 1 \\",
        r" & 2 \\",
        r"\hline",
        r"y & 3 \\",
        r"\hline",
    ]


@pytest.mark.parametrize(
    ("value", "text"), [(1.70449, "1.704"), (20.13, "20.13"), (192.55, "192.6"), (None, "–"), (-0.5, "-0.500")]
)
def test_numbers_have_four_digits_or_so(value: float | None, text: str) -> None:
    assert number(value) == text


def test_signed_number() -> None:
    assert number(0.25, signed=True) == "+0.250"
