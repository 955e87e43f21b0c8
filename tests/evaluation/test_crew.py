"""A crew of one; crews of two score and answer in test_harness.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_peft.evaluation import crew as module
from megatron_peft.evaluation.crew import Crew, over_replicas
from tests.one_rank import one_rank


def test_the_leader_does_its_part_of_an_order():
    with one_rank():
        crew = Crew({"double": lambda x: 2 * x})
        assert crew.is_led_here and crew.order("double", 4) == 8
        crew.dismiss()
        assert over_replicas([1, 2, 3], lambda own: [-x for x in own]) == [-1, -2, -3]


def test_the_others_serve_until_they_are_dismissed(monkeypatch):
    told = iter([("note", (1,)), ("note", (2,)), None])
    done: list[int] = []
    with one_rank():
        crew = Crew({"note": done.append})
        monkeypatch.setattr(crew, "_tell", lambda what: next(told))
        crew.serve()
    assert done == [1, 2]


def test_each_replica_takes_a_part_and_all_get_everything(monkeypatch):
    class Group:
        def size(self):
            return 3

        def rank(self):
            return 1

    seen: list[list[int]] = []

    def gather(parts, own, group):
        parts[:] = [[0, 1], own, [4]]

    monkeypatch.setattr(module.parallel_state, "get_data_parallel_group", Group)
    monkeypatch.setattr(module.dist, "all_gather_object", gather)
    found = over_replicas([0, 1, 2, 3, 4], lambda own: seen.append(list(own)) or own)
    assert seen == [[2, 3]] and found == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("rank", "own"), [(0, ["alone"]), (1, []), (2, [])])
def test_one_item_is_the_first_replicas_which_shows_it(monkeypatch, rank, own):
    group = SimpleNamespace(size=lambda: 3, rank=lambda: rank)
    seen: list[str] = []

    def gather(parts, own, group):
        parts[:] = [["alone"], [], []]

    monkeypatch.setattr(module.parallel_state, "get_data_parallel_group", lambda: group)
    monkeypatch.setattr(module.dist, "all_gather_object", gather)
    assert over_replicas(["alone"], lambda items: seen.extend(items) or items) == ["alone"]
    assert seen == own
