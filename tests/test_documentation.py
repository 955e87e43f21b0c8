"""What the documentation names exists, flags and files, and its results are those of the committed cells."""

import re
from functools import cache
from pathlib import Path

import pytest

from megatron_peft.cli.flags import served_flags
from megatron_peft.commands.completion import whole_parser, with_commands
from tools import reference
from tools.documents import PLACE, filled

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), ROOT / "examples" / "README.md"]
RECORDS = ROOT / "docs" / "results"
# Flags of other programs (torchrun, vllm, pip, docker, sbatch, hooks), of golden and mutations, and argparse's own.
FOREIGN = set(
    "--nproc-per-node --nodes --no-build-isolation --config-settings --build-option --build-arg --rm --gpus --ipc "
    "--signal --requeue --help --model --include_path --only --sample --gains-bound --gains-lr-ratio "
    "--max-lora-rank --enable-lora --max-loras --capture-range".split()
)


@cache
def known_flags() -> set[str]:
    refused = {flag.split()[0] for script in reference.scripts() for flag in script["refused"]}
    return {name for one in with_commands(whole_parser()) for name in one._option_string_actions} | FOREIGN | refused


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_flags_and_links_lead_somewhere_and_tables_are_those_of_the_declarations(page: Path) -> None:
    text = page.read_text()
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9](?![\w-])", text)) - known_flags() == set()
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert [target for target in targets if not (page.parent / target).exists()] == []
    assert reference.filled(text) == text


def test_every_flag_has_a_line_of_its_own_in_the_reference() -> None:
    lines = reference.flag_tables("all").splitlines()
    assert all(sum(line.startswith(f"| `{one.names[0]}") for line in lines) >= 1 for one in served_flags())


# Numbers in the text of a page that are no results: limits, defaults, versions, levels. What was measured stands in a
# place that records fill; a new number here says which of these it is.
NO_RESULTS = {
    "docs/arguments.md": "3.0 3.1 64 MiB 0.05",  # names of models, limits
    "docs/benchmark-tasks.md": "0.6 32 MiB 512 MiB 5 s 20 s 64 KiB",
    # Targets, which tests compare with the benchmarks' own; arithmetic.
    "docs/benchmarks.md": "1.25 1.0 3% 1.10 1.05 1.03 80 MB "
    "0.72 0.80 0.60 1.30 0.285 0.535 400 MB 2.3 100 MiB 1.05 300 MiB 1.43 70% 400 MiB 20 s 5.7% 64 KiB 2 s 20 ms",
    "docs/checkpoints.md": "256 KiB 64 KiB 4 KiB 200 times 30 seconds",
    "docs/data.md": "0.17 95% 32 MiB 64 MiB 256 MiB 1,000 times",
    "docs/evaluation.md": "512 MiB 10 seconds",
    "docs/experiments.md": "95% 0.1 90% 0.01 0.0310 0.05",  # of rules, and an example
    "docs/headlines.md": "55 minutes 2.1 times 2.1 80 GB",  # the paper's
    "docs/install.md": "3.11 2.13 5.24 3.12 3.13 2.15 0.19 0.17 2.4 2.8 2.10 2.18 2.19 9.6 2.36",
    "docs/method-internals.md": "0.5 2.1 GB 64 MiB 32 MiB",  # two of arithmetic
    "docs/methods.md": "0.5 0.02 0.98 0.78",  # of a rule, and of a law that others found
    "docs/moving-weights.md": "4 MiB 0.1",
    "docs/scale.md": "30 kB 16 s 2.4 GB",  # measured once, by a simulation that is gone
    "docs/untested-on-cuda.md": "0.19 2.4 2.8 3.9",
    "README.md": "3.11",
    "CONTRIBUTING.md": "3.11",
}
UNITS = "BLEU|ROUGE|%|percent|points|[GMK]i?B|TB|ms|s|min|h|seconds?|minutes?|hours?|days?|times|tokens?/s"
FIGURE = re.compile(rf"(?<![\w.-])\d[\d,]*(?:\.\d+)? ?(?:{UNITS})(?![\w-])|(?<![\w.-])\d+\.\d+(?![\w.])")


@pytest.mark.parametrize("page", [*PAGES, RECORDS / "README.md"], ids=page_id)
def test_page_says_what_the_records_say_and_no_other_results(page: Path) -> None:
    text, known = page.read_text(), FIGURE.findall(NO_RESULTS.get(page_id(page), ""))
    assert filled(text, RECORDS) == text, "python -m tools.documents docs/*.md ..."
    typed = PLACE.sub("", text)
    assert "±" not in typed, "a result that no record stands behind"
    figures = FIGURE.findall(re.sub(r"`[^`]*`|^    .*$", "", typed, flags=re.MULTILINE))
    assert set(figures) <= {*known}, "fill it from a record (docs/results), or say above what it is"


SOURCES = [*(ROOT / "megatron_peft").rglob("*.py"), *(ROOT / "tools").glob("*.py"), *(ROOT / "tests").glob("*.py")]
NAME_OF_A_FILE = re.compile(r"(?<![\w/.~<-])((?:[\w-]+/)*\w+\.(?:py|md|toml|sbatch))(?!\w)(?:::(\w+))?")
# An example's, other people's, a report's own, or what a rule is about.
NO_FILES = {"megatron_peft/adapters/gains.py", "megatron_peft/config/methods/gains.py", "utils.py", "train.py"}
NO_FILES |= {"megatron_peft/models/starcoder2.py", "tools/checkpoint/convert.py", "docs/llama_mistral.md", "report.md"}


@pytest.mark.parametrize("page", [*PAGES, *SOURCES], ids=page_id)
def test_files_and_tests_that_are_named_exist(page: Path) -> None:
    if page.match("cli/flags.py") or page == Path(__file__):
        return  # a table of megatron-core's files; this very list
    places = [page.parent, ROOT, ROOT / "megatron_peft", ROOT / "tests", *(p for p in ROOT.glob("*/*") if p.is_dir())]
    for name, test in set(NAME_OF_A_FILE.findall(page.read_text())) - {(name, "") for name in NO_FILES}:
        found = [place / name for place in places if (place / name).is_file()]
        assert found, f"{name} is gone"
        assert not test or f"def {test}(" in found[0].read_text(), f"{test} is gone from {name}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_examples_that_are_named_exist(page: Path) -> None:
    named = set(re.findall(r"(?<![\w./-])examples/(?:data|experiments|models|recipes)/[\w./-]*\w", page.read_text()))
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", ["docs/planning.md", "docs/fit.md"])
def test_model_of_a_planned_command_is_in_the_clone(page: str) -> None:
    models = re.findall(r"megatron-peft plan (?:.*\\\n)*.*--pretrained-checkpoint (\S+)", (ROOT / page).read_text())
    assert models and all((ROOT / model / "config.json").is_file() for model in models)


MODULES = {path.stem for path in (ROOT / "megatron_peft").rglob("*.py")}
ROOMS = {path.name for path in (ROOT / "megatron_peft").iterdir() if path.is_dir()}


@pytest.mark.parametrize("page", SOURCES, ids=page_id)
def test_modules_that_are_named_exist(page: Path) -> None:
    """`training.update.GradientShards` or `record.work`: a room's module, and a name that stands in it."""
    for room, module, name in re.findall(r"`(?:megatron_peft\.)?(\w+\.)?(\w+)\.(\w+)`", page.read_text()):
        if room.rstrip(".") in ROOMS:
            assert module in MODULES, f"{room}{module} is gone"
            assert re.search(rf"\b{name}\b", (ROOT / "megatron_peft" / room[:-1] / f"{module}.py").read_text()), name


def test_the_tool_for_tables_says_how_it_is_called(capsys) -> None:
    for words, code in ((["--help"], 0), ([], 2), (["no_such_page"], 2)):
        assert reference.main(words) == code
        assert "tools/reference.py README.md" in capsys.readouterr()[code and 1]


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert {page for page in pages if f"({page})" not in index} == set()
