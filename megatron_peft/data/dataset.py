"""Instruction data as a numbered source of samples, tokenized when they are asked for."""

import numpy as np

from megatron_peft.data.jsonl import JsonRecords
from megatron_peft.data.sample import Sample
from megatron_peft.data.survey import Fit, survey


class InstructionDataset:
    """The samples of JSON records that are left after `--overlong`.

    lengths: int32 [samples], input positions of each. `warnings` says, once, what was cut or skipped.
    Building it is a collective over all ranks (see `survey`).
    """

    def __init__(self, records: JsonRecords, fit: Fit) -> None:
        self._records = records
        self._fit = fit
        found = survey(records, fit)
        self._usable = found.usable
        self.lengths: np.ndarray = found.positions[self._usable]
        self.warnings = found.summary(records, fit)

    def __len__(self) -> int:
        return len(self._usable)

    def __getitem__(self, index: int) -> Sample:
        sample, _ = self._fit.sample(self._records, int(self._usable[index]))
        return sample

    def record(self, index: int) -> dict:
        """The JSON record of a sample."""
        return self._records[int(self._usable[index])]
