"""The run that `kill_runs.py` kills: small, with dropout, on two ranks."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, load

from megatron_peft.config import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerSettings,
    ParallelConfig,
    PeftConfig,
    RunConfig,
    TrainingConfig,
)
from tests.tiny_llama import VOCAB_SIZE, save_llama, save_pairs

PARALLEL: dict[str, dict[str, Any]] = {"tp2": {"tensor_model_parallel_size": 2}, "dp2": {}}


def make_files(work: Path) -> None:
    """Base model and data."""
    save_llama(work / "base", num_hidden_layers=2)
    save_pairs(work / "pairs.jsonl")


def run_config(work: Path, name: str, options: argparse.Namespace, saves_each_step: bool) -> RunConfig:
    """Of a run in `work/name`, which goes on from whatever is there."""
    folder = str(work / name)
    saving = {"save_interval": 1, "keep_last_checkpoints": 3, "async_save": options.async_save}
    return RunConfig(
        parallel=ParallelConfig(world_size=2, distributed_timeout_minutes=2, **PARALLEL[options.layout]),
        model=ModelConfig(
            pretrained_checkpoint=str(work / "base"),
            transformer={"hidden_dropout": 0.1, "attention_dropout": 0.1},
            bf16=True,
        ),
        peft=PeftConfig(lora_rank=4, lora_dropout=0.1),
        data=DataConfig(
            train_data_path=(str(work / "pairs.jsonl"),),
            seq_length=32,
            tokenizer_type="NullTokenizer",
            vocab_size=VOCAB_SIZE - 1,
            num_workers=0,
        ),
        training=TrainingConfig(
            micro_batch_size=2, global_batch_size=4, train_iters=options.iterations, eval_interval=None
        ),
        optimizer=OptimizerSettings(
            lr=5e-3, lr_decay_style="cosine", use_distributed_optimizer=options.layout == "dp2"
        ),
        checkpoint=CheckpointConfig(save=folder, load=folder, **(saving if saves_each_step else {})),
        logging=LoggingConfig(log_interval=10),
    )


def compared_tensors(left: Path, right: Path) -> tuple[list[str], list[str]]:
    """(keys of the tensors that are the same in two checkpoints, bit for bit; all other keys)"""
    tensors, others = _tensors(left), _tensors(right)
    both = tensors.keys() & others.keys()
    equal = [key for key in sorted(both) if torch.equal(tensors[key], others[key])]
    return equal, sorted((tensors.keys() | others.keys()) - set(equal))


def _tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    reader = FileSystemReader(checkpoint)
    stored = reader.read_metadata().state_dict_metadata.items()
    room = {key: torch.empty(tensor.size, dtype=tensor.properties.dtype) for key, tensor in stored}
    load(room, storage_reader=reader, no_dist=True)
    return room
