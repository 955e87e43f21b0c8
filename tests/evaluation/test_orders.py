"""A plan meets a model; orders to several ranks are in test_harness.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from megatron_peft.evaluation.orders import AnswerPlan, generation_settings
from megatron_peft.evaluation.sampling import Sampling


class Letters:
    special_tokens = {"<end>": 7}

    def decode(self, ids):
        return "".join(chr(i) for i in ids if i > 20)


def test_an_answer_ends_at_the_models_ends_the_plans_and_the_longest_text():
    model: Any = SimpleNamespace(tokenizer=Letters(), end_ids=frozenset({3}), max_length=50)
    plan = AnswerPlan(("<end>", "ab"), 9, Sampling(0.5), seed=4)
    settings = generation_settings(model, plan, batch_size=2)
    assert settings.end_ids == {3, 7} and settings.is_complete([97, 98]) and not settings.is_complete([97])
    assert (settings.max_new_tokens, settings.max_length, settings.batch_size, settings.seed) == (9, 50, 2, 4)
    assert settings.sampling.temperature == 0.5
