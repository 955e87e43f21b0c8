from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM

from megatron_peft.config import ConfigurationError
from megatron_peft.evaluation.generation import Greedy, generate
from tests.evaluation.generation_runs import Job
from tests.ranks import run_ranks
from tests.tiny_llama import VOCAB_SIZE, save_llama

TARGET = "tests.evaluation.generation_runs:run_jobs"
NUM_NEW = 12
TP2 = {"tensor_model_parallel_size": 2}
TP2_SP = {**TP2, "sequence_parallel": True}


def _greedy_by_transformers(base, prompts, eos_id=None):
    """Each prompt alone and whole at every token: no batch, no padding, no cache."""
    model = LlamaForCausalLM.from_pretrained(base)
    answers = []
    for prompt in prompts:
        answer: list[int] = []
        while len(answer) < NUM_NEW:
            with torch.no_grad():
                token = int(model(torch.tensor([prompt + answer])).logits[0, -1].argmax())
            if token == eos_id:
                break
            answer.append(token)
        answers.append(answer)
    return answers


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    """Seven prompts of one to nineteen tokens. The shortest, the first row of its batch, is the first to end there."""
    base = str(save_llama(tmp_path_factory.mktemp("base")))
    draw = random.Random(0)
    prompts = [[draw.randrange(VOCAB_SIZE) for _ in range(length)] for length in (5, 1, 19, 8, 2, 13, 8)]
    eos_id = _greedy_by_transformers(base, prompts)[1][4]
    return Job(base, prompts, Greedy(eos_id, NUM_NEW, batch_size=3))


@pytest.fixture(scope="module")
def alone(job):
    adapted = replace(job, with_adapters=True)
    return run_ranks(1, TARGET, [job, adapted, replace(adapted, settings=replace(job.settings, batch_size=1))])[0]


def test_answers_are_those_of_one_prompt_at_a_time_without_a_cache(job, alone):
    expected = _greedy_by_transformers(job.base, job.prompts, job.settings.eos_id)
    ends = {len(prompt): len(answer) for prompt, answer in zip(job.prompts, expected, strict=True)}
    assert ends[1] < min(ends[2], ends[5]), "the first row of a batch must end before the others"
    assert alone[0].answers == expected


def test_batches_report_how_many_prompts_they_finished(alone):
    assert alone[0].reported == [3, 3, 1]


def test_adapters_take_part_and_batches_change_nothing(alone):
    base, adapted, one_by_one = (outcome.answers for outcome in alone)
    assert adapted != base
    assert adapted == one_by_one


def test_tensor_and_sequence_parallel_ranks_answer_as_one_process_and_are_left_as_found(job, alone):
    adapted = replace(job, with_adapters=True)
    jobs = [replace(job, parallel=TP2), replace(adapted, parallel=TP2), replace(adapted, parallel=TP2_SP)]
    for outcomes in run_ranks(2, TARGET, jobs):
        base, split, sequence = outcomes
        assert base.answers == alone[0].answers
        assert split.answers == sequence.answers == alone[1].answers
        assert all(outcome.left_as_found for outcome in outcomes)


def test_an_answer_that_is_complete_ends_with_its_last_token(monkeypatch):
    settings = Greedy(eos_id=9, max_new_tokens=5, is_complete=lambda ids: ids[-1] == 3)
    assert _generate_by_script(monkeypatch, settings, {1: [4, 3, 7], 2: [5, 6, 9], 8: [4, 4, 4, 4, 4, 4]}) == [
        [4, 3],
        [5, 6],
        [4, 4, 4, 4, 4],
    ]


def _generate_by_script(monkeypatch, settings, script):
    """`generate` over a model that says what `script` holds for the first token of a prompt."""
    from megatron_peft.evaluation import generation

    class Batch:
        def __init__(self, model, prompts, max_new_tokens):
            self.lines = [iter(script[prompt[0]]) for prompt in prompts]
            self.prompt_tokens = torch.zeros(len(prompts), 1)

        def next_tokens(self, tokens):
            assert len(tokens) == len(self.lines)
            return torch.tensor([[next(line)] for line in self.lines])

        def keep(self, rows, tokens):
            self.lines = [self.lines[row] for row in rows]
            return tokens[rows]

    monkeypatch.setattr(generation, "_Batch", Batch)
    monkeypatch.setattr(generation.parallel_state, "get_pipeline_model_parallel_world_size", lambda: 1)
    return generate(torch.nn.Module(), [[first] for first in script], settings)


def test_pipeline_stages_and_empty_prompts_are_refused(monkeypatch):
    from megatron_peft.evaluation import generation

    stages = generation.parallel_state
    monkeypatch.setattr(stages, "get_pipeline_model_parallel_world_size", lambda: 2)
    with pytest.raises(ConfigurationError, match="--pipeline-model-parallel-size 1, not 2"):
        generate(torch.nn.Module(), [[1]], Greedy(0, 1))
    monkeypatch.setattr(stages, "get_pipeline_model_parallel_world_size", lambda: 1)
    with pytest.raises(ConfigurationError, match="a prompt is empty"):
        generate(torch.nn.Module(), [[1], []], Greedy(0, 1))
