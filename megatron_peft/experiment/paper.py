"""The paper's own numbers as printed (paper.json has the source), and a check of its averages."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("paper.json")
METHODS = {"full": "Full FT", "lora": "LoRA", "boft": "BOFT", "lora-ga": "LoRA-GA", "urnn": "uRNN", "hybrid": "Hybrid"}
PRINTED = 0.1  # averages have one digit after the point


@dataclass(frozen=True)
class Entry:
    """One entry of the paper's Table I. `metric` is empty where the benchmark has one number only.

    Units are the paper's: percent for GLUE, GSM8K and HumanEval, BLEU for MT-Bench.
    """

    benchmark: str
    method: str
    model: str
    metric: str
    runs: tuple[float, ...]
    average: float

    @property
    def mean_of_runs(self) -> float:
        """In the benchmark's unit."""
        return sum(self.runs) / len(self.runs)

    @property
    def average_is_of_runs(self) -> bool:
        """Whether the printed average is the mean of the printed runs, rounded either way."""
        return abs(self.mean_of_runs - self.average) <= PRINTED / 2 + 1e-9


@cache
def facts() -> Mapping[str, Any]:
    """The file: source, units, table, resources, dynamics, settings."""
    return json.loads(FILE.read_text(encoding="utf-8"))


@cache
def entries() -> tuple[Entry, ...]:
    """All entries of Table I, in its order; the paper has no HumanEval with Llama3.3-70B."""
    return tuple(_entries())


def _entries() -> Iterator[Entry]:
    for benchmark, methods in facts()["table"].items():
        for method, models in methods.items():
            for model, found in models.items():
                yield from _numbers(benchmark, method, model, found) if found else ()


def _numbers(benchmark: str, method: str, model: str, found: Mapping[str, Any]) -> Iterator[Entry]:
    if not isinstance(found["runs"], Mapping):
        yield Entry(benchmark, method, model, "", tuple(found["runs"]), found["average"])
        return
    for metric, runs in found["runs"].items():
        yield Entry(benchmark, method, model, metric, tuple(runs), found["average"][metric])


def benchmarks() -> Sequence[str]:
    """The benchmarks of Table I."""
    return list(facts()["table"])


def models() -> Sequence[str]:
    """The models of Table I."""
    return list(dict.fromkeys(entry.model for entry in entries()))


def wrong_averages() -> list[Entry]:
    """Entries whose printed average is not the mean of their printed runs."""
    return [found for found in entries() if not found.average_is_of_runs]
