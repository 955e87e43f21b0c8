"""The first rank leads, the others do what it says; and replicas share work.

The evaluation harness runs on the first rank alone, so tasks are read, answers judged and code executed once. The other
ranks wait for orders as long as that takes: over gloo, in a group whose patience has no end worth speaking of.
"""

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_peft.evaluation.generation import GenerationSettings, Sampling, StopTexts, generate
from megatron_peft.evaluation.model import AskedModel
from megatron_peft.evaluation.scoring import Continuation, Score, score

Item = TypeVar("Item")
Answer = TypeVar("Answer")

_PATIENCE = datetime.timedelta(days=30)
_DISMISSED = None


class Crew:
    """All ranks of a started world. Making it is a collective.

    Args:
        actions: what can be ordered, by name. Each is called alike on every rank.
    """

    def __init__(self, actions: Mapping[str, Callable[..., Any]]) -> None:
        self._actions = actions
        self._group: Any = dist.new_group(backend="gloo", timeout=_PATIENCE)

    @property
    def is_led_here(self) -> bool:
        return dist.get_rank() == 0

    def order(self, action: str, *arguments: Any) -> Any:
        """Have every rank call an action, this one (the first) too; returns what it gives here."""
        self._tell((action, arguments))
        return self._actions[action](*arguments)

    def serve(self) -> None:
        """Do as the first rank says until it dismisses."""
        while (told := self._tell(None)) is not _DISMISSED:
            action, arguments = told
            self._actions[action](*arguments)

    def dismiss(self) -> None:
        """Let the others go on."""
        self._tell(_DISMISSED)

    def _tell(self, what: Any) -> Any:
        box = [what]
        if dist.get_world_size() > 1:
            dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]


def over_replicas(items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Answer]]) -> list[Answer]:
    """`work(items)`, with each data-parallel replica working on a part of them. A collective of all ranks.

    Returns:
        An answer to each item, in their order, on every rank.
    """
    group: Any = parallel_state.get_data_parallel_group()
    size, rank = group.size(), group.rank()
    bounds = [-(-len(items) * part // size) for part in range(size + 1)]  # one item alone is the first replica's
    own = list(work(items[bounds[rank] : bounds[rank + 1]]))
    if size == 1:
        return own
    parts: list[Any] = [None] * size
    dist.all_gather_object(parts, own, group=group)
    return [answer for part in parts for answer in part]


@dataclass(frozen=True)
class AnswerPlan:
    """How a portion of prompts is answered.

    Args:
        until: texts that end an answer.
        max_new_tokens: the longest answer.
    """

    until: tuple[str, ...]
    max_new_tokens: int
    sampling: Sampling
    seed: int


@dataclass(frozen=True)
class NamedPrompt:
    """Token ids, and the name of the random stream that its answer is drawn from."""

    ids: tuple[int, ...]
    name: str


def make_crew(model: AskedModel, batch_size: int) -> Crew:
    """All ranks, able to `score` continuations and to `generate` answers. A collective."""

    def score_portion(continuations: Sequence[Continuation]) -> list[Score]:
        return over_replicas(continuations, lambda own: score(model.chunks, own, batch_size))

    def answer_portion(prompts: Sequence[NamedPrompt], plan: AnswerPlan) -> list[list[int]]:
        settings = generation_settings(model, plan, batch_size)
        return over_replicas(prompts, lambda own: _answers(model, own, settings))

    return Crew({"score": score_portion, "generate": answer_portion})


def generation_settings(model: AskedModel, plan: AnswerPlan, batch_size: int) -> GenerationSettings:
    """The plan, with the model's own ends and longest text."""
    stop = StopTexts(model.tokenizer, plan.until)
    return GenerationSettings(
        end_ids=model.end_ids | stop.end_ids,
        max_new_tokens=plan.max_new_tokens,
        is_complete=stop.is_complete,
        batch_size=batch_size,
        sampling=plan.sampling,
        seed=plan.seed,
        max_length=model.max_length,
    )


def _answers(model: AskedModel, prompts: Sequence[NamedPrompt], settings: GenerationSettings) -> list[list[int]]:
    names = [prompt.name for prompt in prompts]
    return generate(model.chunks, [prompt.ids for prompt in prompts], settings, names=names)
