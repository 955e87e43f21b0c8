"""Adapters that no run has trained, as a --save folder that --load opens."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as torch_checkpoint
from torch import Tensor

from megatron_peft.checkpoint.folders import RECORD, publish, start_draft
from megatron_peft.checkpoint.record import ADAPTER_CONFIG, RunRecord
from megatron_peft.conversion.output_folder import new_folder
from megatron_peft.conversion.to_megatron import FORMAT

ITERATION = 0


def save_adapters(output: str | Path, record: RunRecord, tensors: Mapping[str, Tensor]) -> None:
    """Write iter_0000000, the tracker and adapter_config.json; all appear at once.

    Args:
        output: must not exist.
        record: of a run that has not begun.
        tensors: whole tensors by key, `decoder.layers.3.mlp.linear_fc1.adapter.A`.
    """
    with new_folder(output) as folder:
        draft = start_draft(folder, ITERATION)
        writer = torch_checkpoint.FileSystemWriter(draft, thread_count=1, sync_files=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is no process group: it is not needed
            torch_checkpoint.save(dict(tensors), storage_writer=writer, no_dist=True)
        (draft / "metadata.json").write_text(json.dumps(FORMAT))
        torch.save({}, draft / "common.pt")
        (draft / RECORD).write_text(record.to_json())
        for place in (draft, folder):
            (place / ADAPTER_CONFIG).write_text(record.adapter_config())
        publish(draft, folder, ITERATION)
