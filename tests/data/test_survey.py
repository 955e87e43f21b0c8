from __future__ import annotations

import numpy as np
import pytest

from megatron_peft.config import ConfigurationError, ParallelConfig
from megatron_peft.data.dataset import InstructionDataset
from megatron_peft.data.jsonl import JsonRecords
from megatron_peft.data.survey import Fit, survey
from megatron_peft.data.tokenizers import NullTokenizer
from megatron_peft.runtime.launch import start_world
from tests.ranks import run_ranks

FLAG = "--train-data-path"
RECORDS = [
    {"prompt": "1 2", "completion": "3"},  # 3 positions with the end token
    {"prompt": "1 2", "completion": "3 4 5 6"},  # 6: longer than 4
    {"prompt": "1 2 3 4 5", "completion": "6"},  # 6, and 4 hold the prompt alone
    {"text": ""},  # the end token alone: nothing to predict
    {"text": "1 2 3 4"},  # 4
]


def surveyed(write_lines, overlong: str, records=RECORDS):
    lines = JsonRecords([write_lines(records)], FLAG)
    return InstructionDataset(lines, Fit(NullTokenizer(99), 4, overlong))


def test_truncation_cuts_the_end_and_skips_prompts_that_fill_the_sequence(write_lines):
    dataset = surveyed(write_lines, "truncate")
    assert dataset.lengths.tolist() == [3, 4, 4]
    assert [len(dataset[i]) for i in range(3)] == [3, 4, 4]
    assert dataset[1].labels.tolist() == [2, 3, 4, 5]
    assert dataset[1].loss_mask.tolist() == [0, 1, 1, 1]
    assert dataset.record(2) == {"text": "1 2 3 4"}
    cut, filled, empty = dataset.warnings
    assert cut.startswith("1 of 5 samples are longer than --seq-length 4 and were cut at their end (first:")
    assert cut.endswith("data.jsonl, line 2).")
    assert "1 of 5" in filled and "their prompt alone fills it" in filled and "line 3" in filled
    assert "1 of 5" in empty and "have no token to learn from" in empty and "line 4" in empty


def test_skip_leaves_all_overlong_samples_out(write_lines):
    dataset = surveyed(write_lines, "skip")
    assert dataset.lengths.tolist() == [3, 4]
    assert "2 of 5 samples are longer than --seq-length 4 and were skipped" in dataset.warnings[0]
    assert len(dataset.warnings) == 2


def test_error_names_the_first_overlong_sample_and_the_way_out(write_lines):
    with pytest.raises(ConfigurationError, match="line 2: the sample takes 6 tokens, above --seq-length 4: raise it"):
        surveyed(write_lines, "error")
    with pytest.raises(ConfigurationError, match="line 2: the sample has no token to learn from"):
        surveyed(write_lines, "error", [RECORDS[0], {"text": ""}])


def test_samples_that_fit_give_no_warning(write_lines):
    assert surveyed(write_lines, "error", [RECORDS[0], RECORDS[4]]).warnings == []


def test_a_dataset_of_which_nothing_is_left_is_an_error(write_lines):
    with pytest.raises(ConfigurationError, match="no sample is left of 1 .*line 1.*their prompt alone fills it"):
        surveyed(write_lines, "truncate", [RECORDS[2]])


@pytest.mark.parametrize(
    ("record", "message"),
    [("{", "data.jsonl, line 2: not JSON"), ({"prompt": "1"}, 'line 2: lacks the field "completion"')],
)
def test_a_bad_record_ends_the_run_before_it_begins(write_lines, record, message):
    with pytest.raises(ConfigurationError, match=message):
        surveyed(write_lines, "truncate", [RECORDS[0], record])


def survey_on_a_rank(files: tuple[str, str]) -> None:
    good, bad = files
    start_world(ParallelConfig())
    fit = Fit(NullTokenizer(99), 4)
    found = survey(JsonRecords([good], FLAG), fit)
    assert found.positions.tolist() == [3, 4, 0, 0, 4]
    assert found.overlong.tolist() == [False, True, True, False, False]
    assert found.usable.tolist() == np.flatnonzero(found.positions).tolist()
    with pytest.raises(ConfigurationError, match="bad.jsonl, line 3: not JSON"):  # of which rank 1 alone can know
        survey(JsonRecords([bad], FLAG), fit)


def test_ranks_share_the_work_and_know_the_same(write_lines):
    good, bad = write_lines(RECORDS), write_lines([*RECORDS[:2], "{"], "bad.jsonl")
    run_ranks(2, survey_on_a_rank, (good, bad))
