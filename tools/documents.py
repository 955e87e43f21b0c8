"""Writes the results of committed records into documents, so that no figure in them is typed.

python -m tools.documents docs/*.md docs/results/README.md rewrites the text between

    <!-- records: claim -->
    <!-- end of records -->

from docs/results/claim: the folder of an experiment (scores, its state, answers to its questions), a JSON
file of megatron-peft bench (`bench/collectives.json`: its figures), or one that holds a table
(`planning/published.json`). A test compares the documents with them.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_peft.config import ConfigurationError
from megatron_peft.config.untrusted import read_json, read_text
from megatron_peft.experiment import contrasts, report, tables
from megatron_peft.experiment.results import read_results

RECORDS = Path("docs/results")  # from the root of a clone
PLACE = re.compile(r"(<!-- records: (\S+) -->\n).*?(<!-- end of records -->)", re.DOTALL)


def filled(text: str, records: Path) -> str:
    """The document with its marked places filled from the folder `records`."""
    return PLACE.sub(lambda place: f"{place[1]}{markdown_of(records / place[2])}{place[3]}", text)


def markdown_of(record: Path) -> str:
    """Raises ConfigurationError: there is no such record."""
    if record.suffix != ".json":
        return experiment(record)
    found = read_json(record)
    return table_of(found) if isinstance(found, dict) else benchmark(record)


def table_of(found: dict[str, Any]) -> str:
    """Markdown of a JSON file with `title`, `columns`, `rows` of text, and the number of `text_columns`."""
    return tables.make_table(**found).markdown()


def experiment(folder: Path) -> str:
    """Markdown of an experiment's folder: scores by method, its state and the answers to its questions."""
    results = read_results(folder)
    scores = tables.score_runs(results, tables.reference_method(results, None))
    answers = contrasts.sentences(results, contrasts.answers(results))
    sentences = (report.state(results), report.provenance(results), *report.not_tuned(results), *answers)
    return f"{tables.by_score(results, scores).markdown()}\n" + "".join(f"- {sentence}\n" for sentence in sentences)


def benchmark(path: Path) -> str:
    """Markdown of a JSON file that `megatron-peft bench` wrote."""
    figures: list[dict[str, Any]] = read_json(path)
    return tables.make_table(
        f"`megatron-peft bench {path.stem}`",
        ("figure", "behind it", "measured", "target"),
        [(_name(one), one["note"], _number(one["measured"]), _number(one["target"])) for one in figures],
        text_columns=2,
    ).markdown()


def _name(figure: dict[str, Any]) -> str:
    return f"{figure['name']} ({figure['unit']})" if figure["unit"] else figure["name"]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def main(words: Sequence[str]) -> int:
    """Fill the marked places of documents. Exit code 2 for records that cannot be read."""
    parser = argparse.ArgumentParser("documents", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="documents, which are rewritten")
    try:
        for path in parser.parse_args(words).files:
            path.write_text(filled(read_text(path), RECORDS), encoding="utf-8")
    except ConfigurationError as error:
        print("documents: error: " + "\n  - ".join(error.problems), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
