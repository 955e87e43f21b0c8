from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from megatron_peft.demo.run import Report
from megatron_peft.demo.table import NUM_SHOWN, print_report
from megatron_peft.reporting.run_plot import Translation

REPORT = Report(
    bleu_before=2.84,
    bleu_after=20.46,
    validation_loss_before=3.8807,
    validation_loss_after=1.7345,
    tensor_parallel_size=3,
    trainable_parameters=4055040,
    seconds=412.0,
    training_seconds=151.0,
    method="lora",
    iterations=60,
    training_messages=3073,
    held_out_messages=159,
    bleu_signature="nrefs:1",
    translations=tuple(Translation(f"source{i} [bold]", f"ref{i}", f"before{i}", f"after{i}") for i in range(9)),
)


def test_the_tables_show_scores_translations_and_where_the_rest_lies():
    console = Console(file=io.StringIO(), width=160)
    print_report(REPORT, Path("runs/demo"), console)
    text = console.file.getvalue()
    rows = [" ".join(line.replace("│", " ").split()) for line in text.splitlines()]
    assert "BLEU 2.8 20.5" in rows
    assert "validation loss 3.881 1.734" in rows or "validation loss 3.881 1.735" in rows
    assert "source1 [bold] ref1 before1 after1" in rows
    assert f"after{NUM_SHOWN}" not in text
    assert "4,055,040 trainable parameters, 60 iterations in 151 s on 3 tensor-parallel ranks; 412 s in all." in text
    assert "runs/demo/report.json" in text
