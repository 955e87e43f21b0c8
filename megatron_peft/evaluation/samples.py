"""Answers of a run before and after training: to prompts of its validation data, greedy, by its base and by itself."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

from megatron_peft.adapters.attach import linear_layers
from megatron_peft.checkpoint.folders import write_atomically
from megatron_peft.checkpoint.record import read_run_record
from megatron_peft.config import ConfigurationError, Requirements, RunConfig, is_indexed, parse_blend, require
from megatron_peft.conversion.pretrained import ReadingGroups, load_pretrained
from megatron_peft.data.files import RecordFiles
from megatron_peft.data.formats import ColumnNames
from megatron_peft.data.records import Fit
from megatron_peft.data.tokenizers import build_tokenizer
from megatron_peft.evaluation.answers import encode_prompts, request_bar
from megatron_peft.evaluation.dispatch import AnswerPlan, NamedPrompt, generate_answers
from megatron_peft.evaluation.generation import GREEDY
from megatron_peft.evaluation.model import InferenceModel, load_model
from megatron_peft.models.shape import ModelShape
from megatron_peft.runtime.launch import checked_together


@dataclass(frozen=True)
class AnswerPair:
    """A prompt, the answer in the data, and what the model answered before and after training. A line of the file."""

    prompt: str
    reference: str
    before: str
    after: str


@dataclass(frozen=True)
class SampleSettings:
    """Which prompts of a run are answered, and how long answers may be.

    Args:
        run: the --save folder of a run, or a checkpoint in it.
        num_samples: prompts, spread evenly over the validation data.
    """

    run: str
    num_samples: int
    max_new_tokens: int = 128
    batch_size: int = 16

    def __post_init__(self) -> None:
        with Requirements(self) as require:
            require(self.num_samples > 0, f"--samples is {self.num_samples}; it must be above 0.")

    def questions(self) -> list["Question"]:
        """Raises ConfigurationError: the run has no validation data with prompts."""
        config = read_run_record(self.run).config
        data = config.data
        paths = data.data_path or data.valid_data_path
        require(
            bool(paths) and not is_indexed(paths),
            f"--samples takes prompts from the run's --valid-data-path, but {self.run} "
            + (f"was validated on indexed data ({paths[0]})." if paths else "was trained without."),
        )
        records = RecordFiles(parse_blend(paths, "--valid-data-path").prefixes, "--valid-data-path")
        tokenizer = build_tokenizer(data, config.model.pretrained_checkpoint)
        fit = Fit(tokenizer, data.seq_length, columns=ColumnNames.of(data))
        step = max(len(records) // self.num_samples, 1)
        chosen = list(range(0, len(records), step))[: self.num_samples]
        native = [fit.format_of(records, index).native(records[index]) for index in chosen]
        found = [question for record in native if (question := question_of(record)) is not None]
        require(bool(found), f"--samples needs prompts, but the records of {' '.join(paths)} are plain text.")
        return found


@dataclass(frozen=True)
class Question:
    """The prompt of a record as a person reads it, its answer, and the record that `encode_prompts` takes."""

    prompt: str
    reference: str
    record: Mapping[str, Any]


def question_of(record: Mapping[str, Any]) -> Question | None:
    """What is asked in a record of training data: its prompt, or its messages up to the last of the assistant.

    None for a plain text, and for messages in which nothing is asked.
    """
    if isinstance(record.get("prompt"), str):
        return Question(record["prompt"], str(record.get("completion", "")), {"prompt": record["prompt"]})
    messages = record.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return None
    turns = [at for at, message in enumerate(messages) if message.get("role") == "assistant"]
    if not turns or turns[-1] == 0:
        return None
    asked, answer = messages[: turns[-1]], messages[turns[-1]]
    tools = {"tools": record["tools"]} if record.get("tools") else {}
    return Question(str(asked[-1].get("content")), str(answer.get("content")), {"messages": asked, **tools})


def write_samples(config: RunConfig, settings: SampleSettings, output: Path) -> None:
    """Answer the questions with the trained model and with its base, and write the file. In a started world.

    Args:
        config: of the model, with --load naming the run.

    Raises:
        ConfigurationError: on every rank: no validation data, a prompt that is too long, a folder that is read-only.
    """
    questions = checked_together(settings.questions)
    model = load_model(config)
    prompts = encode_prompts([one.record for one in questions], model.tokenizer, False, model.max_length)
    with request_bar("answering", 2 * len(questions)) as advance:
        after = _answers(model, prompts, settings, advance)
        restore_base(model.chunks, model.config, model.shape)
        before = _answers(model, prompts, settings, advance)
    samples = [
        AnswerPair(one.prompt, one.reference, *texts) for one, *texts in zip(questions, before, after, strict=True)
    ]
    checked_together(lambda: _write(samples, output) if dist.get_rank() == 0 else None)


def _answers(
    model: InferenceModel, prompts: Sequence[Sequence[int]], settings: SampleSettings, advance: Any
) -> list[str]:
    plan = AnswerPlan((), settings.max_new_tokens, GREEDY, seed=0)
    named = [NamedPrompt(tuple(ids), str(at)) for at, ids in enumerate(prompts)]
    found = generate_answers(model, named, plan, settings.batch_size)
    if dist.get_rank() == 0:
        advance(len(named))
    return [model.tokenizer.decode(ids) for ids in found]


def restore_base(chunks: Sequence[nn.Module], config: RunConfig, shape: ModelShape) -> None:
    """Take the adapters off, and read the base's weights again: some methods train or replace them. A collective.

    Args:
        chunks: of this rank, without a data-parallel wrapper.
    """
    for layer in (layer for chunk in chunks for layer in linear_layers(chunk)):
        layer.module.adapter = None
    load_pretrained(
        chunks,
        str(config.model.pretrained_checkpoint),
        shape,
        tensor_parallel_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_parallel_size=config.parallel.tensor_model_parallel_size,
        progress=False,
        groups=ReadingGroups.of_layout(),
    )


def _write(samples: Sequence[AnswerPair], output: Path) -> None:
    try:
        write_atomically(output, "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in samples))
    except OSError as error:
        raise ConfigurationError(f"--samples: {output} cannot be written ({error.strerror}).") from error
