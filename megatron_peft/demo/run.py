"""The whole demo: download the model and messages, train, score with and without it, write a report and a picture.

Everything is kept in one folder, and a second call reuses it. If the flags of a run change, its folder is emptied.

python -m megatron_peft.demo.run FOLDER FLAGS is each of its ranks, which trains and writes FOLDER/after.json and
FOLDER/before.json; FLAGS are those of pretrain_peft.py.
"""

import json
import os
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.transforms import Bbox
from rich.console import Console
from rich.table import Table

from megatron_peft.checkpoint.folders import write_atomically
from megatron_peft.cli.launch import start_processes
from megatron_peft.cli.parser import RunFlags, read_config, tell_error
from megatron_peft.config import ConfigurationError, PeftConfig, require
from megatron_peft.config.untrusted import read_json
from megatron_peft.demo.data import (
    PROGRAM,
    DemoScore,
    Pair,
    PairFiles,
    prepare_model,
    prepare_pairs,
    read_pairs,
    waiting,
    write_lines,
)
from megatron_peft.experiment import plots
from megatron_peft.experiment.process import ENVIRONMENT, LAMBDA_FILE
from megatron_peft.experiment.run_report import SAMPLE_FIELDS, SAMPLES_FILE, training_seconds
from megatron_peft.training.metrics import METRICS_FILE, read_metrics

BEFORE, AFTER = "before.json", "after.json"  # scores that the ranks write


# Unless flags say otherwise. On two cores the three tensor-parallel ranks that its three key-value heads allow would
# cost twice as much.
PIPELINE_PARALLEL_SIZE = 2
MOST_WORDS = 8  # of a message: three quarters of all are as short, and a newcomer need not wait for the others
ITERATIONS = 44  # of two packs, about twelve messages: a fifth of an epoch
SCORED_OF = 2  # one held-out message in so many is scored
MOST_NEW_TOKENS = 32  # no held-out completion of a short message has more
NUM_EXAMPLES = 7
CHECKPOINTS = "checkpoints"  # --save, in the folder of a method
Report = Mapping[str, Any]  # what report.json holds


def run_demo(folder: Path, method: str = PeftConfig.method, extra_flags: Sequence[str] = ()) -> Report:
    """Run what is missing under `folder`; writes report.json and report.png. `extra_flags` override the demo's own.

    Raises ConfigurationError: a flag is wrong (before any download); a download, the training or a scoring failed.
    """
    started_at = time.monotonic()
    unread = training_flags(Path("model"), PairFiles(Path("train.jsonl"), Path("valid.jsonl")), method)
    run_flags = RunFlags([*unread, *extra_flags])
    parallel = run_flags.config({"WORLD_SIZE": str(run_flags.replica_size)}).parallel
    _print_progress(f"model and messages in {folder}")
    model = prepare_model(folder / "model", folder / "downloads")
    files = _short_files(prepare_pairs(folder / "data", folder / "downloads"))
    save = folder / method / CHECKPOINTS
    flags = [*training_flags(model, files, method), *extra_flags]
    before, after = _trained(folder / method, flags, parallel.world_size)
    records, lambdas = read_metrics(save / METRICS_FILE), read_metrics(save / LAMBDA_FILE)
    held_out = read_pairs(files.valid)
    # Examples spread evenly over the held-out messages, not the best ones.
    chosen = range(0, len(held_out), max(len(held_out) // NUM_EXAMPLES, 1))[:NUM_EXAMPLES]
    examples = [(held_out[at], before.translations[at], after.translations[at]) for at in chosen]
    report = {
        "bleu_before": before.bleu,  # sacreBLEU's, from 0 to 100
        "bleu_after": after.bleu,
        "validation_loss_before": before.validation_loss,  # means over the held-out completions' tokens
        "validation_loss_after": after.validation_loss,
        "tensor_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_parallel_size": parallel.pipeline_model_parallel_size,
        "trainable_parameters": after.trainable_parameters,
        "seconds": time.monotonic() - started_at,  # of this call; less in a second one
        "training_seconds": training_seconds(records),
        "method": method,
        "iterations": records[-1]["iteration"],
        "training_messages": len(read_pairs(files.train)),
        "held_out_messages": len(held_out),
        "bleu_signature": after.bleu_signature,
        "translations": [
            {"source": pair.english, "reference": pair.french, "before": untrained, "after": trained}
            for pair, untrained, trained in examples
        ],
    }
    _write_json(folder / "report.json", report)
    # For `megatron-peft report` of the run.
    samples = [dict(zip(SAMPLE_FIELDS, (pair.prompt, pair.french, *said), strict=True)) for pair, *said in examples]
    write_atomically(save / SAMPLES_FILE, "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples))
    with waiting("drawing the picture"):
        draw_picture(folder / "report.png", report, records, lambdas)
    return report


def _short_files(files: PairFiles) -> PairFiles:
    """The short messages: all of them to train on, and held-out ones that are spread evenly to score."""
    short = PairFiles(files.train.with_name("short.jsonl"), files.valid.with_name("scored.jsonl"))
    for path, source, step in ((short.train, files.train, 1), (short.valid, files.valid, SCORED_OF)):
        write_lines(path, [pair for pair in read_pairs(source) if len(pair.english.split()) <= MOST_WORDS][::step])
    return short


def training_flags(model: Path, files: PairFiles, method: str) -> list[str]:
    """pretrain_peft.py's flags for the demo's run, --save and --load aside."""
    flags = {
        "pretrained-checkpoint": model,
        "train-data-path": files.train,
        "valid-data-path": files.valid,
        "peft-method": method,
        "pipeline-model-parallel-size": PIPELINE_PARALLEL_SIZE,
        "seq-length": 128,
        "overlong": "skip",
        "micro-batch-size": 1,
        "global-batch-size": 2,
        "train-iters": ITERATIONS,
        "lr": PeftConfig(method).spec.demo_lr,
        "lr-decay-style": "linear",
        "clip-grad": 1.0,
        "log-interval": 1,
        "eval-interval": ITERATIONS,
        "num-workers": 0,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [*words, "--pack-sequences"]


def _trained(folder: Path, flags: list[str], num_ranks: int) -> tuple[DemoScore, DemoScore]:
    """Scores of the base and the trained model, of an earlier call with these flags; else trains and scores them."""
    record, scores = folder / "flags.json", (folder / BEFORE, folder / AFTER)
    if folder.exists() and not (record.exists() and read_json(record) == flags):
        made_here = record.exists() or not any(folder.iterdir())
        require(made_here, f"{folder} is there, and no demo made it: give another --output than {folder.parent}.")
        _print_progress(f"the flags have changed: {folder} is emptied")
        shutil.rmtree(folder)
    if not all(path.exists() for path in scores):
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(record, flags)
        _print_progress(f"megatron-peft train {' '.join(flags)}")
        # A run that was stopped goes on from its checkpoint. A rank that fails has said what is wrong.
        os.environ.update(ENVIRONMENT)
        words = [str(folder), *flags, "--save", str(folder / CHECKPOINTS), "--resume", "auto"]
        launch = {"nproc_per_node": str(num_ranks)}
        if ended := start_processes("megatron_peft.demo.run", words, launch, PROGRAM):
            raise SystemExit(ended)
    before, after = map(DemoScore.read, scores)
    return before, after


def main() -> None:
    """Train and score a run on its ranks: the folder of the scores, then flags of pretrain_peft.py.

    Training comes first, so that its first loss is soon there, and is continued if it was stopped.
    """
    tells = os.environ.get("RANK", "0") == "0"
    try:
        _train_and_score(*sys.argv[1:], tells=tells)
    except ConfigurationError as error:
        sys.exit(tell_error(error, program=PROGRAM))
    except KeyboardInterrupt:  # while nothing has begun
        if tells:
            print(f"{PROGRAM}: interrupted", file=sys.stderr, flush=True)
        os._exit(128 + signal.SIGINT)


def _train_and_score(folder: str, *flags: str, tells: bool) -> None:
    with waiting("loading torch and megatron-core", tells):
        from megatron.core.utils import unwrap_model

        from megatron_peft.demo.scoring import score_model
        from megatron_peft.evaluation.model import restore_base
        from megatron_peft.runtime.failure import run_together
        from megatron_peft.runtime.launch import world
        from megatron_peft.training.run import finetune

    config = read_config(flags)

    def train_and_score() -> None:
        trained = finetune(config)
        if trained.state.position.iteration < trained.data.train_iters:
            raise KeyboardInterrupt  # it was asked to stop, and has saved
        # Training ends with a validation: of all held-out messages, unless --eval-iters said otherwise.
        last = read_metrics(Path(str(config.checkpoint.save), METRICS_FILE))[-1]
        loss = last.get("validation_loss") if config.training.eval_iters is None else None
        limit = MOST_NEW_TOKENS
        score_model(trained, "scoring the trained model", Path(folder, AFTER), loss=loss, max_new_tokens=limit)
        restore_base(unwrap_model(trained.state.model_chunks), config, trained.state.shape)
        score_model(trained, "scoring the base model", Path(folder, BEFORE), max_new_tokens=limit)

    with world(config.parallel.distributed_backend, config.parallel.distributed_timeout_minutes):
        run_together(train_and_score, program=PROGRAM)


def _write_json(path: Path, content: Any) -> None:
    write_atomically(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")


def _print_progress(text: str) -> None:
    print(f"demo: {text}", flush=True)


def _ranks(report: Report) -> str:
    """What the run was split over."""
    tp, pp = report["tensor_parallel_size"], report["pipeline_parallel_size"]
    parts = [f"{tp} tensor-parallel ranks"] * (tp > 1) + [f"{pp} pipeline stages"] * (pp > 1)
    return " x ".join(parts) or "one rank"


LAMBDA_INCHES = 3.4
LOSS_CAPTION = (
    "Each batch has messages of its own, measured before its update. The base model is worst at the token that ends a "
    "message, so short messages have higher losses at first."
)
COLUMNS = ("English", "Reference", "Before", "After")
COLUMN_CHARACTERS = 42
MOST_LINES = 3  # of a cell


def draw_picture(
    path: Path, report: Report, records: Sequence[Mapping[str, Any]], lambdas: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Draw the run into a PNG: loss, gradient norm, BLEU before and after, translations beside the reference.

    Args: records: lines of metrics.jsonl; lambdas: of lambda.jsonl, drawn above the translations (a Hybrid's).
    """
    heights = [4.2, *([LAMBDA_INCHES] if lambdas else []), 0.6 + 0.62 * len(report["translations"])]
    figure = plots.new_figure(13, sum(heights) + 0.5)
    title = f"SmolLM2-135M, English to French: {report['method']} over {_ranks(report)}"
    figure.suptitle(title, fontsize=14, fontweight="bold")
    rows = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    curves, *middle, texts = [figure.add_subfigure(rows[at]) for at in range(len(heights))]
    left, center, right = curves.subplots(1, 3, width_ratios=[5, 5, 3])

    iterations, losses = plots.series(records, "loss")
    left.plot(iterations, losses, color=plots.AFTER, linewidth=1.8, label="training: each batch")
    measured = dict(zip(*plots.series(records, "validation_loss"), strict=True))
    ends = report["validation_loss_before"], report["validation_loss_after"]
    measured |= dict(zip((0, max(iterations, default=1)), ends, strict=True))
    curve, form = zip(*sorted(measured.items()), strict=True), plots.measurement_format([*measured.values()])
    number = report["held_out_messages"]
    left.plot(*curve, form, color="#d1242f", markersize=5, label=f"held out: all {number} messages")
    left.legend(frameon=False)
    curves.supxlabel(LOSS_CAPTION, x=0.01, ha="left", fontsize=9)
    center.plot(*plots.series(records, "grad_norm"), color=plots.AFTER, linewidth=1.8)
    for axes, name in ((left, "Loss"), (center, "Gradient norm")):
        plots.style(axes, name, "iteration")
    scores, colors = [report["bleu_before"], report["bleu_after"]], [plots.BEFORE, plots.AFTER]
    bars = right.bar(["before", "after"], scores, color=colors, width=0.6)
    right.bar_label(bars, fmt="%.1f", padding=3, weight="bold")
    right.margins(y=0.15)
    plots.style(right, f"BLEU, {number} held-out messages")

    for part in middle:
        plots.draw_lambdas_into(part, *plots.read_lines(lambdas))
    axes = texts.subplots()
    axes.axis("off")
    if report["translations"]:
        _draw_translations(axes, report["translations"])
    plots.save_png(figure, path)


def _draw_translations(axes: Axes, translations: Sequence[Mapping[str, str]]) -> None:
    def wrapped(text: str) -> str:
        lines = textwrap.wrap(text, COLUMN_CHARACTERS, max_lines=MOST_LINES, placeholder=" …")
        return "\n".join(lines) or "(nothing)"

    cells = [list(map(wrapped, translation.values())) for translation in translations]
    table = axes.table(cells, colLabels=COLUMNS, cellLoc="left", colLoc="left", bbox=Bbox.unit())
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    for (row, column), cell in table.get_celld().items():
        cell.set_edgecolor(plots.GUIDE)
        cell.visible_edges = "B"
        cell.PAD = 0.02
        text = cell.get_text()
        text.set_parse_math(False)  # a message may hold dollar signs
        if row == 0:
            text.set_fontweight("bold")
        elif COLUMNS[column] in ("Before", "After"):
            text.set_color(plots.AFTER if COLUMNS[column] == "After" else "#57606a")


NUM_SHOWN = 4  # translations on the terminal


def print_report(report: Report, folder: Path, console: Console | None = None) -> None:
    """Scores before and after, what was trained, a few translations, and where to find the rest."""
    console = Console() if console is None else console
    scores = Table("", title=f"{report['held_out_messages']} held-out messages")
    for when in ("before", "after"):
        scores.add_column(when, justify="right")
    for title, name, digits in (("BLEU", "bleu", 1), ("validation loss", "validation_loss", 3)):
        scores.add_row(title, *(f"{report[f'{name}_{when}']:.{digits}f}" for when in ("before", "after")))
    translations = Table(*COLUMNS, show_lines=True)
    for example in report["translations"][:NUM_SHOWN]:
        translations.add_row(*example.values())
    console.print(scores, translations, markup=False)

    # To ask the trained model something of one's own, and to look at its run.
    program, run = Path(sys.executable).with_name("megatron-peft"), folder / report["method"] / CHECKPOINTS
    if program.is_relative_to(Path.cwd()):
        program = program.relative_to(Path.cwd())
    prompt = Pair("Open the file", "").prompt.replace("\n", "\\n")
    spent = f"{report['training_seconds']:.0f} s"
    console.print(
        f"{report['method']}: {report['trainable_parameters']:,} trainable parameters, {report['iterations']} "
        f"iterations in {spent} on {_ranks(report)}; {report['seconds']:.0f} s in all.\n"
        f"{folder / 'report.json'}, {folder / 'report.png'}\n\nTry next:\n"
        f"  {program} generate --load {run} --prompt $'{prompt}'\n  {program} report {run}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
