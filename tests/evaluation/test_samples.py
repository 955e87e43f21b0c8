"""Answers before and after training: the base's and the run's own, to prompts of the validation data."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_peft.cli.parser import read_config
from megatron_peft.config import ConfigurationError
from megatron_peft.evaluation import answers
from megatron_peft.evaluation.answers import question_of, questions_of, write_samples
from megatron_peft.evaluation.model import saved_values
from megatron_peft.runtime.launch import stop_model_parallel
from megatron_peft.training.run import finetune
from tests.evaluation.worded_llama import save_worded_llama, save_worded_pairs
from tests.one_rank import one_rank

TURNS = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "a ", "completion": "b"}, ("a ", "b", {"prompt": "a "})),
        ({"messages": TURNS}, ("a", "b", {"messages": TURNS[:1]})),
        (
            {"messages": [*TURNS, {"role": "assistant", "content": "d"}], "tools": [{}]},
            ("c", "d", {"messages": TURNS, "tools": [{}]}),
        ),
        ({"messages": TURNS[1:]}, None),
        ({"messages": TURNS[:1]}, None),
        ({"messages": "a"}, None),
        ({"text": "a"}, None),
    ],
)
def test_what_a_record_asks(record: dict[str, Any], expected: Any) -> None:
    assert question_of(record) == expected


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and training data."""
    place = tmp_path_factory.mktemp("samples")
    save_worded_llama(place / "base")
    save_worded_pairs(place / "pairs.jsonl")
    return place


def train(folder: Path, name: str, flags: str) -> Path:
    data = ["--train-data-path", str(folder / "pairs.jsonl"), "--valid-data-path", str(folder / "pairs.jsonl")]
    common = "--micro-batch-size 4 --seq-length 32 --num-workers 0 --log-interval 10 --train-iters 30"
    where = ["--pretrained-checkpoint", str(folder / "base"), "--save", str(folder / name)]
    finetune(read_config([*where, *data, *common.split(), *flags.split()]))
    stop_model_parallel()
    return folder / name


def samples(run: Path, number: int) -> list[dict[str, str]]:
    config = read_config(["--load", str(run)], saved=saved_values)
    write_samples(config, run / "samples.jsonl", str(run), number, max_new_tokens=6)
    stop_model_parallel()
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_before_is_the_base_and_after_the_run_for_every_kind_of_method(folder: Path) -> None:
    """Full fine-tuning changes the base's own weights, and merging the Hybrid does."""
    hybrid = "--peft-method hybrid --lora-rank 8 --lora-ga-batches 1 --boft-block-size 4 --boft-factors 1"
    with one_rank(with_groups=False):
        full = samples(train(folder, "full", "--peft-method full --lr 3e-3"), 4)
        mixed = samples(train(folder, "hybrid", f"{hybrid} --lr 8e-3 --hybrid-merge-interval 8 --train-iters 12"), 4)
    assert [one["prompt"] for one in full] == ["w0 ", "w2 ", "w4 ", "w6 "]
    assert full[1]["reference"] == full[1]["after"] == "w3 w4 w5"
    assert [one["before"] for one in full] == [one["before"] for one in mixed]
    assert all(one["before"] != one["after"] for one in (*full, *mixed))


def test_a_run_without_prompts_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with one_rank(with_groups=False):
        run = train(folder, "alone", "--peft-method lora --lora-rank 2 --exit-interval 1")
    record = answers.read_run_record(run)
    (folder / "texts.jsonl").write_text('{"text": "w1 w2"}\n')
    for paths, told in (((), "was trained without"), ((str(folder / "texts.jsonl"),), "are plain text")):
        data = replace(record.config.data, valid_data_path=paths)
        changed = replace(record, config=replace(record.config, data=data))
        monkeypatch.setattr(answers, "read_run_record", lambda _, changed=changed: changed)
        with pytest.raises(ConfigurationError, match=told):
            questions_of(str(run), 2)
    alpaca = {"instruction": "w1 w2", "input": "", "output": "w3"}
    (folder / "texts.jsonl").write_text(json.dumps(alpaca) + "\n")  # of the last `changed`
    (question,) = questions_of(str(run), 2)
    assert "w1 w2" in question[0] and question[1] == "w3"
