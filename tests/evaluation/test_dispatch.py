"""Work of one rank and of made-up replicas; real ones score and answer in test_harness.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_peft.evaluation import crew as module
from megatron_peft.evaluation.crew import Crew, over_replicas
from megatron_peft.evaluation.orders import AnswerPlan, generation_settings
from megatron_peft.evaluation.sampling import Sampling
from tests.one_rank import one_rank


def test_the_leader_does_its_part_of_an_order():
    with one_rank():
        crew = Crew({"double": lambda x: 2 * x})
        assert crew.is_led_here and crew.order("double", 4) == 8
        crew.dismiss()
        assert over_replicas([1, 2, 3], lambda own: [-x for x in own]) == [-1, -2, -3]


@pytest.mark.parametrize("parts", [[[0, 1], [2, 3], [4]], [["alone"], [], []]])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_each_replica_takes_a_part_and_all_get_everything(monkeypatch, rank, parts):
    """One item alone is the first replica's, which shows the answer as it grows."""
    everything = [item for part in parts for item in part]
    monkeypatch.setattr(
        module.parallel_state, "get_data_parallel_group", lambda: SimpleNamespace(size=lambda: 3, rank=lambda: rank)
    )
    seen: list[Any] = []

    def gather(found, own, group):
        found[:] = parts

    monkeypatch.setattr(module.dist, "all_gather_object", gather)
    assert over_replicas(everything, lambda own: seen.append(list(own)) or own) == everything
    assert seen == [parts[rank]]


def test_an_answer_ends_at_the_models_ends_the_plans_and_the_longest_text():
    tokenizer = SimpleNamespace(special_tokens={"<end>": 7}, decode=lambda ids: "".join(map(chr, ids)))
    model: Any = SimpleNamespace(tokenizer=tokenizer, end_ids=frozenset({3}), max_length=50)
    settings = generation_settings(model, AnswerPlan(("<end>", "ab"), 9, Sampling(0.5), seed=4), batch_size=2)
    assert settings.end_ids == {3, 7} and settings.is_complete([97, 98]) and not settings.is_complete([97])
    assert (settings.max_new_tokens, settings.max_length, settings.batch_size, settings.seed) == (9, 50, 2, 4)
    assert settings.sampling.temperature == 0.5
