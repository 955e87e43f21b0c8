from __future__ import annotations

import time

from megatron_peft.data.dataset import InstructionDataset
from megatron_peft.data.instruction import tokenize_record
from megatron_peft.data.jsonl import JsonRecords
from megatron_peft.data.sample import sample_from_ids
from megatron_peft.data.survey import Fit
from tests.time_limits import seconds


def test_samples_are_those_of_the_records_that_are_left(write_lines, hf):
    records = [{"text": "the cat"}, {"text": ""}, {"prompt": "the cat:", "completion": " le chat"}]
    dataset = InstructionDataset(JsonRecords([write_lines(records)], "--train-data-path"), Fit(hf, 64))
    assert len(dataset) == 2
    for index, record in enumerate([records[0], records[2]]):
        expected = sample_from_ids(*tokenize_record(record, hf), 64)
        assert dataset.record(index) == record
        assert dataset[index].tokens.tolist() == expected.tokens.tolist()
        assert dataset[index].loss_mask.tolist() == expected.loss_mask.tolist()
        assert dataset.lengths[index] == len(expected)


def test_a_few_thousand_short_records_take_a_moment(write_lines, hf):
    record = {"prompt": "English: the cat sat on the mat\nFrench:", "completion": " le chat dort"}
    records = JsonRecords([write_lines([record] * 3000)], "--train-data-path")
    begin = time.process_time()
    assert len(InstructionDataset(records, Fit(hf, 64))) == 3000
    assert time.process_time() - begin < seconds(5)  # CPU seconds; 0.5 measured
