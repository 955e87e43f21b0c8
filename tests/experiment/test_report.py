"""A report's sentences and tables, and its page, read by a parser, and by a browser where Chromium is installed.

Its figures show what was measured: costs, curves, lambda by layer; the same numbers give the same file.
"""

import base64
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from megatron_peft.benchmarks import measure
from megatron_peft.commands.report import main as report_main
from megatron_peft.config import ConfigurationError
from megatron_peft.experiment import plots, report, tables
from megatron_peft.experiment.plots import color, new_figure, save, style, svg
from megatron_peft.experiment.records import ByLayer, cell_file, read_records, write_record
from megatron_peft.experiment.report import build_report, markdown, write
from megatron_peft.experiment.results import Results, read_results
from megatron_peft.experiment.tables import Scores, score_runs
from tests.experiment import small_results
from tests.experiment.small_experiment import content
from tests.experiment.small_results import LAYERS, LOSSES, as_the_paper, record_of, results
from tests.time_limits import seconds
from tools import documents
from tools.documents import filled

FLAGS = content()["tasks"]["talk"]["flags"]
VOID = {"meta", "img", "br", "link"}
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


class Reader(HTMLParser):
    """Notes whether tags nest, and what is fetched from where."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("report")
    write(build_report(results(place), "hybrid"), place)
    return place


def test_report_of_known_cells_reads_as_the_file_beside(tmp_path: Path) -> None:
    """Runs, means, tests, bests, the Hybrid's place, costs, speed, settings that were tried, the paper's tables."""
    expected = Path(__file__).with_name("small_report.md")
    assert markdown(build_report(as_the_paper(tmp_path), "hybrid")) == expected.read_text()


def test_all_files_are_there_and_the_page_needs_nothing_else(folder: Path) -> None:
    figures = {"result", "cost-talk", "curves-tiny-talk", "depth-tiny-talk", "lambda-tiny-talk-hybrid"}
    names = {path.name for path in folder.iterdir() if path.is_file()} - {"small.yaml", "experiment.yaml"}
    assert names == {
        *("report.md", "report.html", "table1.csv", "table1.tex", "table1-tested.tex"),
        *(f"{name}.{kind}" for name in figures for kind in ("png", "svg")),
    }
    links = re.findall(r"!\[.*?\]\((.*?)\)", (folder / "report.md").read_text())
    assert set(links) == {f"{name}.svg" for name in figures}
    reader = Reader()
    reader.feed((folder / "report.html").read_text())
    assert reader.open == [] and len(reader.sources) == 5
    for source in reader.sources:
        kind, _, data = source.partition("base64,")
        assert kind == "data:image/svg+xml;"
        ElementTree.fromstring(base64.b64decode(data, validate=True))


def test_command_prints_the_result_and_the_files(found: Results, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(report, "write", lambda report, folder: [folder / "report.html"])  # takes seconds
    assert report_main([str(tmp_path)]) == 0
    first, *others, page = capsys.readouterr().out.splitlines()
    assert first == report.state(found) and page == f"{tmp_path}/report.html"
    assert "| lora | 79.40 ± 0.53 |" in others


def test_a_click_sorts_a_table_in_a_browser(folder: Path, tmp_path: Path) -> None:
    """Two clicks on the mean of the long table: by value, from the greatest, missing ones last; images have loaded."""
    click = """<script>addEventListener("load", () => {
        const heads = [...document.querySelectorAll("table.sortable thead th")];
        const head = heads.find((one) => one.textContent === "mean"), table = head.closest("table");
        table.rows[4].cells[head.cellIndex].textContent = "1,792.0";  // as text it would stand after 84.70
        table.rows[1].cells[head.cellIndex].textContent = "–";
        head.click(); head.click();
        const means = [...table.tBodies[0].rows].map((row) => row.cells[head.cellIndex].textContent.trim());
        const sizes = [...document.images].map((image) => image.naturalWidth > 100);
        document.body.append(`means ${means.join(" ")}; sort ${head.ariaSort}; images ${sizes.join(" ")}.`);
    });</script>"""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    page = tmp_path / "clicked.html"
    page.write_text((folder / "report.html").read_text().replace("</body>", f"{click}</body>"))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds(120))
    assert done.returncode == 0, done.stderr
    told = re.search(r"means (.*?); sort (\w+); images (.*?)\.", done.stdout.rpartition("</script>")[2])
    assert told is not None
    assert told[1].split() == ["1,792.0", "84.70", "83.70", "1.630", "1.530", "–"]
    assert (told[2], told[3]) == ("descending", "true true true true")


def verdicts(results: Results, reference: str, scores: Scores | None = None) -> list[str]:
    return report.verdicts(results, scores or score_runs(results, reference), reference)


def test_unfinished_experiment_is_marked(found: Results, tmp_path: Path) -> None:
    assert report.state(found) == "9 of 9 final runs are in (seeds 1, 2, 3)."
    cell_file(tmp_path, found.all[0].group.finals[1][2]).unlink()
    found = read_results(tmp_path)
    assert report.state(found).startswith("**Not finished:** 8 of 9")
    first = verdicts(found, "hybrid")[0]
    assert first == "So far, on talk, validation loss against hybrid: **worse** lora; **undecided** lora-ga."


def test_a_report_before_the_first_final_run_and_of_runs_of_unlike_lengths(found: Results, tmp_path: Path) -> None:
    group = found.all[2].group
    (cell,) = (cells[1] for cells in group.finals if cells[1].key in found.records())
    record = found.records()[cell.key]
    longer = ByLayer([20, 40, 60], {"0": [1.0, 2.0, None], "1": [0.5, 0.5, 0.5]})
    write_record(tmp_path, replace(record, grad_norms=longer))
    assert "depth-" in markdown(build_report(read_results(tmp_path), "hybrid"))
    for path in (tmp_path / "cells").glob("*.json"):
        path.unlink()
    write_record(tmp_path, record_of(group.tuning[0]))
    assert "0 of 9 final runs" in markdown(build_report(read_results(tmp_path), "hybrid"))


def test_means_say_of_how_many_seeds_they_are(found: Results, tmp_path: Path) -> None:
    mean = "Mean ± standard deviation of"
    assert tables.by_score(found, score_runs(found, "hybrid")).title == f"{mean} 3 seeds"
    assert tables.by_score(found, {}).title == f"{mean} 0 seeds"
    data = {"test-data-path": "test.jsonl"}
    small_results.write_cells(tmp_path, tasks={"talk": {**content()["tasks"]["talk"], "flags": {**FLAGS, **data}}})
    for key, record in read_records(tmp_path).items():
        scores = {} if "seed=3" in key else record.scores
        write_record(tmp_path, replace(record, test_loss=1.0, scores=scores))
    few = read_results(tmp_path)
    table = tables.by_score(few, score_runs(few, "hybrid"))
    assert table.title == f"{mean} 2 seeds (talk, test loss: 3)" and [*table.frame] == [
        *("method", "talk, accuracy", "talk, test loss")
    ]


def test_a_commit_with_changes_is_told_of_a_tuning_cell_too(found: Results, tmp_path: Path) -> None:
    finals = [record.settings for record in found.all[0].finals.values()]
    cell = next(cell for cell in found.all[0].group.tuning if cell.settings not in finals)
    (record,) = (one for one in found.all[0].records.values() if one.settings == cell.settings)
    write_record(tmp_path, replace(record, versions={"commit": "abc with changes"}))
    text = markdown(build_report(read_results(tmp_path), "hybrid"))
    assert "and data. 1 ran from a commit with changes." in text
    assert re.search("Versions: .*commit abc with changes", text)


def test_scores_are_whole_where_every_seed_that_is_to_be_scored_has_one(found: Results, tmp_path: Path) -> None:
    for method in found.all:
        (last,) = (cells[2] for cells in method.group.finals if cells[2].key in found.records())
        write_record(tmp_path, replace(found.records()[last.key], scores={}, score={}))
    told = verdicts(read_results(tmp_path), "hybrid")
    assert [sentence[:9] for sentence in told[:2]] == ["On talk, ", "So far, o"]
    tasks = {"talk": {**content()["tasks"]["talk"], "scored_seeds": [1, 2]}}
    small_results.write_cells(tmp_path, tasks=tasks)
    for key, record in read_records(tmp_path).items():
        if "seed=3" in key:
            write_record(tmp_path, replace(record, scores={}))
    told = verdicts(read_results(tmp_path), "hybrid")
    assert [sentence[:9] for sentence in told[:2]] == ["On talk, ", "On talk, "]


def test_a_method_is_better_or_worse_where_a_test_over_the_seeds_of_both_says_so(found: Results) -> None:
    scores = score_runs(found, "lora")
    told = verdicts(found, "lora")
    assert told[:2] == [
        f"On talk, {name} against lora: **better** lora-ga, hybrid." for name in ("validation loss", "accuracy")
    ]
    assert told[2].startswith(
        "Better and worse: p of a paired t-test over the seeds that both methods have is below 0.05"
    )

    def near(difference: float, factor: float) -> str:
        changes = {"difference": difference, "p": [1.0, 0.03 * factor, 0.04 * factor]}
        return verdicts(found, "lora", {key: part.assign(**changes) for key, part in scores.items()})[0]

    for difference, word in ((-1, "better"), (1, "worse")):
        assert near(difference, 0.5) == f"On talk, validation loss against lora: **{word}** lora-ga, hybrid."
    assert near(-1, 1) == "On talk, validation loss against lora: **undecided** lora-ga, hybrid."


def test_the_best_is_so_over_the_seeds_that_both_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of fewer seeds is the lowest, but seed by seed the other method is better."""
    monkeypatch.setitem(LOSSES, "lora-ga", 1.605)
    methods = {**small_results.METHODS, "lora-ga": {**small_results.METHODS["lora-ga"], "seeds": [1, 2]}}
    scores = score_runs(results(tmp_path, methods=methods), "hybrid")["tiny", "talk", "validation loss"]
    assert scores["mean"]["lora-ga"] < scores["mean"]["hybrid"] < scores["mean"]["lora"]
    assert [*scores["is_best"]] == [False, False, True]


def test_methods_with_the_same_runs_count_once_and_are_one_curve(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(LOSSES, "lora-ga", 1.6)
    twins = results(tmp_path)
    told = verdicts(twins, "lora")
    assert told[0] == "On talk, validation loss against lora: **better** lora-ga."
    assert told[3:] == ["On talk, hybrid has the same runs as lora-ga: they count once."]
    assert verdicts(twins, "hybrid")[0] == "On talk, validation loss against hybrid: **worse** lora."
    depths = plots.draw_depths(twins, "tiny", "talk")
    assert depths is not None
    for axes in (*plots.draw_dynamics(twins, "tiny", "talk").axes, *depths.axes):
        assert [line.get_label() for line in axes.lines] == ["lora", "lora-ga, hybrid"]


def test_an_experiment_of_ones_own_shows_nothing_of_the_papers(found: Results) -> None:
    """The result comes first, as a chart; whatever is long is folded."""
    assert list(report.beside_ours(found, score_runs(found, "hybrid"))) == []
    built = build_report(found, "hybrid")
    assert "paper" not in markdown(built).lower() and not any(section.is_papers for section in built.sections)
    first = built.sections[0]
    assert [*first.figures] == ["result"] and [*first.tables[0].frame] == ["method", "talk, accuracy"]
    long = [section for section in built.sections if sum(len(table.frame) for table in section.tables) > 5]
    assert len(long) == 2 and all(section.is_folded for section in long)
    assert not any("--" in text for section in built.sections for text in section.texts), "flags in prose"


def test_a_method_alone_is_not_the_best(tmp_path: Path) -> None:
    alone = results(tmp_path, methods={"hybrid": small_results.METHODS["hybrid"]})
    assert verdicts(alone, "hybrid") == []
    assert [part["is_best"].tolist() for part in score_runs(alone, "hybrid").values()] == [[False], [False]]


def test_marked_places_of_a_document_are_filled_from_records(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    small_results.write_cells(tmp_path / "small")
    calls = measure.Figure("calls above the base's", 1, 2, "calls", "37 and 38")
    figures = [calls, measure.Figure("bytes", 1.00746)]
    measure.write_json(tmp_path / "bench" / "c.json", figures)
    head, end = "<!-- records: {} -->\n", "<!-- end of records -->\n"
    text = f"a\n{head.format('small')}old 12.3\n{end}b\n{head.format('bench/c.json')}{end}c 4.5\n"
    new = filled(text, tmp_path)
    lines = new.splitlines()
    assert lines[0] == "a" and lines[-1] == "c 4.5" and "old" not in new and filled(new, tmp_path) == new
    assert {
        "| method | talk, accuracy |",
        "| lora | 79.40 ± 0.53 |",
        "| lora-ga | **84.70 ± 0.26** |",
        "- 9 of 9 final runs are in (seeds 1, 2, 3).",
        "- All 12 cells record their commit and data.",
        "| calls above the base's (calls) | 37 and 38 | 1 | 2 |",
        "| bytes |  | 1.007 |  |",
    } <= set(lines)
    with pytest.raises(ConfigurationError, match="nowhere/experiment.yaml is not there"):
        filled(head.format("nowhere") + end, tmp_path)


def test_the_tool_of_documents_says_how_it_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="^0$"):
        documents.main(["--help"])
    assert capsys.readouterr().out.startswith("usage: documents [-h] files [files ...]\n\nWrites the results of comm")


# Figures.


def small() -> Figure:
    figure = new_figure(3, 2, "A title")
    axes = figure.subplots()
    axes.plot([1, 2], [3, 4], color=color(0))
    style(axes, "Loss")
    return figure


def test_the_same_figure_has_the_same_svg_and_both_files_replace_the_old_ones(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"old")
    save(small(), tmp_path, "a")
    assert (tmp_path / "a.svg").read_text() == svg(small())
    assert ElementTree.fromstring(svg(small())).tag.endswith("svg")
    strict = expat.ParserCreate()
    strict.StartDoctypeDeclHandler = lambda name, *ids: pytest.fail(f"an external DTD: {ids}")
    strict.Parse(svg(small()), True)
    assert re.findall(r' (?:width|height)="(.*?)"', svg(small()))[:2] == ["288", "192"], "pixels"
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "a.svg"}
    assert imread(tmp_path / "a.png").shape[:2] == (240, 360)


def test_bars_are_minutes_and_gigabytes_of_each_method(found: Results) -> None:
    left, right = plots.draw_cost(found, "talk").axes
    assert [bar.get_height() for bar in left.patches] == [1.0] * 3
    assert [bar.get_height() for bar in right.patches] == [2.0] * 3
    assert [label.get_text() for label in left.get_xticklabels()] == ["lora", "lora-ga", "hybrid"]


def test_wall_time_is_left_out_where_runs_of_a_method_contradict_one_another(found: Results, tmp_path: Path) -> None:
    table = tables.cost_table(found)
    assert [*table.frame][4:] == ["seconds a step", "minutes an epoch", "CPU minutes a run", "peak memory (GB)"]
    assert table.note.endswith("Seconds and minutes are wall-clock time.")
    cell = found.all[0].group.finals[1][1]
    write_record(tmp_path, record_of(cell, step_seconds=0.61))
    noisy = read_results(tmp_path)
    table = tables.cost_table(noisy)
    assert [*table.frame][4:] == [
        "CPU minutes a run",
        "peak memory (GB)",
    ] and "Wall-clock time is left out" in table.note
    left, _ = plots.draw_cost(noisy, "talk").axes
    assert "Peaks differ" not in table.note
    write_record(tmp_path, record_of(cell, step_seconds=0.61, peak_memory_bytes=int(2.9e9)))
    assert "Peaks differ by up to a factor of 1.45" in tables.cost_table(read_results(tmp_path)).note
    assert left.get_title("left") == "CPU minutes of a run" and [bar.get_height() for bar in left.patches] == [1.5] * 3


def test_costs_of_several_commits_say_of_which(found: Results, tmp_path: Path) -> None:
    for seed, changes in ((0, ""), (1, " with changes")):
        cell = found.all[0].group.finals[1][seed]
        write_record(tmp_path, replace(record_of(cell), versions={"commit": "0123456789" * 4 + changes}))
    table = tables.cost_table(read_results(tmp_path))
    assert [*table.frame][-1] == "commit" and "of several commits" in table.note
    assert [*table.frame["commit"]] == ["0123456, 0123456 with changes, ccccccc", "ccccccc", "ccccccc"]


def test_mean_is_over_the_runs_that_were_measured(found: Results, tmp_path: Path) -> None:
    cells = found.all[0].group.finals[1]
    write_record(tmp_path, record_of(cells[1], epoch_seconds=None))
    write_record(tmp_path, record_of(cells[2], epoch_seconds=180.0))
    again = read_results(tmp_path)
    assert tables.cost_table(again).frame["minutes an epoch"][0] == "2.000"


def test_lines_are_means_over_the_seeds(found: Results) -> None:
    left, right = plots.draw_dynamics(found, "tiny", "talk").axes
    assert [line.get_label() for line in left.lines] == ["lora", "lora-ga", "hybrid"]
    lora = left.lines[0].get_xydata()
    assert lora[-1].tolist() == pytest.approx([1.0, 2.06])
    assert len(right.lines[0].get_xydata()) == 20, "40 gradient norms, two to a point"


def test_gradient_norms_by_layer_are_means_over_runs_and_iterations(found: Results, tmp_path: Path) -> None:
    figure = plots.draw_depths(found, "tiny", "talk")
    assert figure is not None
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert axes.get_legend().get_window_extent().x0 >= axes.get_window_extent().x1, "it would cover the curves"
    lora, lora_ga, _ = (np.asarray(line.get_ydata()).tolist() for line in figure.axes[0].lines)
    assert lora == pytest.approx([2.06 + 1, 0.5]) and lora_ga == pytest.approx([1.53 + 1, 0.5])
    for cell in (cell for result in found.all for cell in result.chosen):
        write_record(tmp_path, record_of(cell, grad_norms=ByLayer()))
    assert plots.draw_depths(read_results(tmp_path), "tiny", "talk") is None


def test_lambdas_are_means_over_the_final_runs(found: Results, tmp_path: Path) -> None:
    cell = found.all[2].chosen[2]
    by_layer = {LAYERS[0]: [0.5, 0.6], LAYERS[1]: [0.5, 0.5]}
    write_record(tmp_path, record_of(cell, lambdas=ByLayer([20, 40], by_layer)))
    panel, _ = plots.draw_mean_lambdas(read_results(tmp_path).all[2]).axes
    assert panel.images[0].get_array().ravel().tolist() == pytest.approx([0.5, 0.4, 0.5, 0.7])


def test_the_headline_has_a_dot_for_each_run_and_colors_the_best(found: Results) -> None:
    (axes,) = plots.draw_results(found, score_runs(found, "hybrid")).axes
    assert axes.get_title("left") == "talk: accuracy (higher is better)"
    assert np.array(axes.lines[1].get_ydata()).tolist() == pytest.approx([84.9, 84.8, 84.4])
    assert [line.get_color() for line in axes.lines] == [plots.BEFORE, plots.AFTER, plots.BEFORE]
    assert [text.get_text() for text in axes.texts] == ["79.40", "84.70", "83.70"]


def test_averages_keep_the_mean_of_the_curve_and_short_curves_stay() -> None:
    epochs, values = plots.averages([[at, at / 10, float(at)] for at in range(1, 41)], 4).T
    assert values.tolist() == [5.5, 15.5, 25.5, 35.5] and epochs.tolist() == pytest.approx([0.55, 1.55, 2.55, 3.55])
    epochs, values = plots.averages([[1, 0.5, 3.0], [2, 1.0, 2.0]], 20).T
    assert (epochs.tolist(), values.tolist()) == ([0.5, 1.0], [3.0, 2.0])


QKV = "decoder.layers.{}.self_attention.linear_qkv"
FC1 = "decoder.layers.{}.mlp.linear_fc1"


def test_map_of_lambda_is_layer_by_step_for_each_kind_and_the_mean_is_over_runs() -> None:
    found = plots.maps({QKV.format(0): [0.1, 0.2], QKV.format(1): [0.3, 0.4], FC1.format(1): [0.5, None]})
    assert found["linear_qkv"].tolist() == [[0.1, 0.2], [0.3, 0.4]]
    assert np.isnan(found["linear_fc1"]).tolist() == [[True, True], [False, True]]
    assert plots.mean_by_layer([{"a": [0.2, 0.4, 0.9]}, {"a": [0.4, 0.8]}]) == {"a": pytest.approx([0.3, 0.6])}


def test_panels_share_one_scale_and_cover_the_run_be_it_a_step_or_nothing() -> None:
    figure = plots.draw_lambdas("Hybrid", [10, 20, 30], {QKV.format(3): [0.1, 0.2, 0.3], FC1.format(0): [0.5] * 3})
    *panels, _ = figure.axes
    assert [axes.get_title(loc="left") for axes in panels] == ["linear_qkv", "linear_fc1"]
    assert [axes.images[0].get_clim() for axes in panels] == [(0, 1), (0, 1)]
    assert panels[0].get_xlim() == (5, 35) and panels[0].images[0].get_extent()[2:] == [-0.5, 3.5]
    assert plots.draw_lambdas("Hybrid", [7], {QKV.format(0): [0.5]}).axes[0].get_xlim() == (6.5, 7.5)
    for by_layer in ({}, {"embedding": [0.5]}):
        assert plots.draw_lambdas("Hybrid", [1], by_layer).axes == []
