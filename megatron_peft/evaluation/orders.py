"""What the first rank orders while it runs the harness: scores and answers of a portion of requests, by all ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_peft.evaluation.dispatch import Crew, over_replicas
from megatron_peft.evaluation.generation import GenerationSettings, generate
from megatron_peft.evaluation.model import AskedModel
from megatron_peft.evaluation.sampling import Sampling
from megatron_peft.evaluation.scoring import Continuation, Score, score
from megatron_peft.evaluation.stop import StopTexts


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
