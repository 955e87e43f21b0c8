"""Reports as sections of text, tables and figures, written as one self-contained HTML page or as Markdown."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure

from megatron_peft.checkpoint.folders import write_atomically
from megatron_peft.experiment.plots import save, svg
from megatron_peft.experiment.tables import BEST, Table

PAGE = "page.html.jinja"
MARKDOWN, HTML = "report.md", "report.html"


@dataclass(frozen=True)
class Section:
    """A heading and its content: figures by the names of their files, texts, then tables.

    Attributes:
        is_papers: whether it shows the paper's numbers, which were not measured here.
        is_folded: whether the page shows the heading only, until it is clicked.
    """

    title: str
    texts: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Mapping[str, Figure] = field(default_factory=dict)
    is_papers: bool = False
    is_folded: bool = False


@dataclass(frozen=True)
class Report:
    """The whole report. `files`: text files beside the pages, by name."""

    title: str
    sections: tuple[Section, ...]
    files: Mapping[str, str] = field(default_factory=dict)


def markdown(report: Report) -> str:
    """The report as Markdown; its figures are files beside it."""
    parts = [f"# {report.title}"]
    for section in report.sections:
        parts += [f"## {section.title}", *(f"![{name}]({name}.svg)" for name in section.figures), *section.texts]
        parts += [table.markdown().rstrip() for table in section.tables]
    return "\n\n".join(parts) + "\n"


def html(report: Report) -> str:
    """One page that contains its plots, style and script."""
    environment = Environment(loader=PackageLoader("megatron_peft.experiment", "."), autoescape=True, trim_blocks=True)
    environment.filters["svg_base64"] = lambda figure: base64.b64encode(svg(figure).encode()).decode()
    environment.filters["plain"] = lambda text: text.replace("**", "").replace("`", "")
    return environment.get_template(PAGE).render(report=report, best=BEST)


def write(report: Report, folder: Path) -> list[Path]:
    """Write the page, the Markdown, the report's own files, and the figures as PNG and SVG; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {MARKDOWN: markdown(report), HTML: html(report), **report.files}
    for name, text in texts.items():
        write_atomically(folder / name, text)
    figures = {name: figure for section in report.sections for name, figure in section.figures.items()}
    for name, figure in figures.items():
        save(figure, folder, name)
    return [folder / name for name in (*texts, *(f"{name}.svg" for name in figures))]


def write_page(report: Report, path: Path) -> Path:
    """Write the page alone, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, html(report))
    return path
