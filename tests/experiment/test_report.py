"""A report's sentences and tables, and its page, read by a parser, and by a browser where Chromium is installed."""

import base64
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megatron_peft.benchmarks.measure import Figure, write_json
from megatron_peft.config import ConfigurationError
from megatron_peft.experiment import report
from megatron_peft.experiment.cell_record import cell_file
from megatron_peft.experiment.report import build_report, markdown, write
from megatron_peft.experiment.results import Results, read_results
from megatron_peft.experiment.tables import rows
from tests.experiment import small_results
from tests.experiment.small_results import LOSSES, as_the_paper, results
from tests.time_limits import seconds
from tools.documents import filled

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
    figures = {"result", "cost-talk", "curves-tiny-talk", "lambda-tiny-talk-hybrid"}
    names = {path.name for path in folder.iterdir() if path.is_file()} - {"small.yaml", "experiment.yaml"}
    assert names == {
        *("report.md", "report.html", "table1.csv", "table1.tex", "table1-tested.tex"),
        *(f"{name}.{kind}" for name in figures for kind in ("png", "svg")),
    }
    links = re.findall(r"!\[.*?\]\((.*?)\)", (folder / "report.md").read_text())
    assert set(links) == {f"{name}.svg" for name in figures}
    reader = Reader()
    reader.feed((folder / "report.html").read_text())
    assert reader.open == [] and len(reader.sources) == 4
    for source in reader.sources:
        kind, _, data = source.partition("base64,")
        assert kind == "data:image/svg+xml;"
        ElementTree.fromstring(base64.b64decode(data, validate=True))


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


def test_unfinished_experiment_is_marked(found: Results, tmp_path: Path) -> None:
    assert report.state(found) == "9 of 9 final runs are in (seeds 1, 2, 3)."
    cell_file(tmp_path, found.all[0].group.finals[1][2]).unlink()
    found = read_results(tmp_path)
    assert report.state(found).startswith("**Not finished:** 8 of 9")
    first = report.verdicts(rows(found, "hybrid"), "hybrid")[0]
    assert first.startswith("So far, on talk, **lora-ga** has the best validation loss of 3 methods: 1.530")


def test_the_place_of_the_reference_method_is_told_unless_it_is_the_best(tmp_path: Path, monkeypatch) -> None:
    found = rows(results(tmp_path), "lora")
    told = "On talk, **lora-ga** has the best accuracy of 3 methods: 84.70 ± 0.26. "
    assert report.verdicts(found, "lora")[1] == f"{told}lora, with 79.40 ± 0.53, comes after lora-ga, hybrid."
    assert report.verdicts(found, "lora-ga")[1] == told.strip()
    monkeypatch.setitem(LOSSES, "hybrid", 1.0)
    assert report.verdicts(rows(results(tmp_path), "hybrid"), "hybrid")[0].endswith("3 methods: 1.030 ± 0.026.")


def test_an_experiment_of_ones_own_shows_nothing_of_the_papers(found: Results) -> None:
    """The result comes first, as a chart; whatever is long is folded."""
    assert list(report.beside_ours(rows(found, "hybrid"))) == []
    built = build_report(found, "hybrid")
    assert "paper" not in markdown(built).lower() and not any(section.is_papers for section in built.sections)
    first = built.sections[0]
    assert [*first.figures] == ["result"] and first.tables[0].columns == ("method", "talk, accuracy")
    long = [section for section in built.sections if sum(len(table.rows) for table in section.tables) > 5]
    assert len(long) == 2 and all(section.is_folded for section in long)
    assert not any("--" in text for section in built.sections for text in section.texts), "flags in prose"


def test_a_method_alone_is_not_the_best(tmp_path: Path) -> None:
    alone = rows(results(tmp_path, methods={"hybrid": small_results.METHODS["hybrid"]}), "hybrid")
    assert report.verdicts(alone, "hybrid") == [] and len(alone) == 2 and not any(row.is_best for row in alone)


def test_marked_places_of_a_document_are_filled_from_records(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    small_results.write_cells(tmp_path / "small")
    figures = [Figure("calls above the base's", 1, 2, "calls", "37 and 38"), Figure("bytes", 1.00746)]
    write_json(tmp_path / "bench" / "c.json", figures)
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
        "- All 12 cells record their experiment file, commit and data.",
        "| calls above the base's (calls) | 37 and 38 | 1 | 2 |",
        "| bytes |  | 1.007 |  |",
    } <= set(lines)
    with pytest.raises(ConfigurationError, match="nowhere/experiment.yaml is not there"):
        filled(head.format("nowhere") + end, tmp_path)
