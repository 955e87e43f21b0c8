"""The demo's result at the terminal."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_peft.demo.run import Report

NUM_SHOWN = 4


def print_report(report: Report, folder: Path, console: Console | None = None) -> None:
    """Scores before and after, what was trained, a few translations, and where the rest lies."""
    console = console or Console()
    console.print(_scores(report), _translations(report), markup=False)
    console.print(
        f"{report.method}: {report.trainable_parameters:,} trainable parameters, {report.iterations} iterations in "
        f"{report.training_seconds:.0f} s on {report.tensor_parallel_size} tensor-parallel ranks; "
        f"{report.seconds:.0f} s in all.\n{folder / 'report.json'}, {folder / 'report.png'}",
        markup=False,
        highlight=False,
    )


def _scores(report: Report) -> Table:
    table = Table(title=f"{report.held_out_messages} held-out messages")
    for column in ("", "before", "after"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("BLEU", f"{report.bleu_before:.1f}", f"{report.bleu_after:.1f}")
    table.add_row("validation loss", f"{report.validation_loss_before:.3f}", f"{report.validation_loss_after:.3f}")
    return table


def _translations(report: Report) -> Table:
    table = Table("English", "Reference", "Before", "After", show_lines=True)
    for example in report.translations[:NUM_SHOWN]:
        table.add_row(example.source, example.reference, example.before, example.after)
    return table
