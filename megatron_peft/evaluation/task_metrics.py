"""Metrics of the benchmarks as lm-evaluation-harness calls them: with the references and predictions of one document.

Task files name them: `!function megatron_peft.evaluation.task_metrics.rouge_l`.
"""

from collections.abc import Sequence

from megatron_peft.evaluation import translation_scores
from megatron_peft.evaluation.pass_at_k import pass_at_k as estimate
from megatron_peft.evaluation.sandbox import PASSED


def rouge_l(references: Sequence[str], predictions: Sequence[str]) -> float:
    """ROUGE-L of one answer, 0 to 100."""
    return translation_scores.rouge_l(references[0], predictions[0])


def rouge_l_words(references: Sequence[str], predictions: Sequence[str]) -> float:
    """ROUGE-L of one answer over words of any alphabet, 0 to 100."""
    return translation_scores.rouge_l_words(references[0], predictions[0])


def pass_at_k(references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int]) -> dict[str, float]:
    """`{"pass@1": ...}` of one problem, from the verdicts that `humaneval.run_tests` put in place of its samples."""
    verdicts = predictions[0]
    return {f"pass@{each}": estimate(len(verdicts), verdicts.count(PASSED), each) for each in k}


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
    return translation_scores.corpus_bleu(references, translations, tokenize).score
